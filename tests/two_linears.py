"""A layer of two linears, y = x + B relu(A x), as a `PerLayer` method sees it: no model around it."""

from __future__ import annotations

import torch

from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.stats import StatsAccumulator


class TwoLinears:
    """See the top of the file.

    Args:
        method: whose `distance` judges.
        pattern: N kept of M.
        prior: name of a one-shot method, or "none".
        index: the layer's number; each has its own weights.
        scale: on both weights.
        n_held_out: of 12 sequences.
        width: of the input; A has twice as many rows.
        linear: without the relu and without B: y = A x.
    """

    n_layers = 3

    def __init__(
        self, method, pattern="2:4", prior="wanda", index=0, scale=1.0, n_held_out=4, width=32, linear=False, seed=0
    ):
        draw = torch.Generator().manual_seed(seed + 7 * index)
        n_sequences, n_tokens = 12, 24
        mix = torch.eye(width) + torch.randn(width, width, generator=draw) / width**0.5
        self.inputs = torch.randn(n_sequences, n_tokens, width, generator=draw) @ mix
        self.inputs *= (3 * torch.rand(width, generator=draw)).exp() / 5
        up = torch.randn(width if linear else 2 * width, width, generator=draw) / width**0.5
        down = torch.randn(width, 2 * width, generator=draw) / width**0.5
        self.method, self.index, self.linear = method, index, linear
        self.weights = {"up": scale * up} if linear else {"up": scale * up, "down": scale * down}
        self.roles = {name: f"mlp.{name}" for name in self.weights}
        self.patterns = dict.fromkeys(self.weights, Pattern.parse(pattern))
        self.train = torch.arange(n_sequences - n_held_out)
        self.held_out = torch.arange(n_sequences - n_held_out, n_sequences)
        self.targets = self.run(self.weights, self.inputs)
        seen = {"up": self.inputs, "down": torch.relu(self.inputs @ self.weights["up"].T)}
        self.stats = {name: statistics(seen[name]) for name in self.weights}
        self.priors = {}
        if prior != "none":
            chooser = create(prior)
            for name, weight in self.weights.items():
                self.priors[name] = chooser.prune(weight, self.stats[name], self.patterns[name]).mask

    def run(self, weights, inputs):
        if self.linear:
            return inputs @ weights["up"].T
        return inputs + torch.relu(inputs @ weights["up"].T) @ weights["down"].T

    def distance(self, sequences, weights):
        outputs = self.run(weights, self.inputs[sequences])
        return self.method.distance(outputs, self.targets[sequences], self.inputs[sequences]).mean()

    def loss(self, sequences, weights):
        with torch.no_grad():
            return self.distance(sequences, weights).item()

    def gradients(self, sequences, weights):
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        loss = self.distance(sequences, leaves)
        found = torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), dict(zip(leaves, found, strict=True))


def statistics(inputs):
    accumulator = StatsAccumulator(inputs.shape[-1], frozenset({"input_gram", "input_sq_norm"}))
    accumulator.add(inputs)
    return accumulator.result()


ROLES = ["mlp.up", "mlp.down"]


def start(method, pattern="2:4", seed=0):
    """The state before the first layer."""
    generator = torch.Generator().manual_seed(seed)
    return method.start(ROLES, TwoLinears.n_layers, Pattern.parse(pattern), generator)


def learn(method, work, state=None, seed=0, snapshot=None):
    """(steps, masks and notes by linear, state): a layer learned to its end."""
    state = start(method, str(work.patterns["up"])) if state is None else state
    running, steps = method.learn(work, state, seed, snapshot), []
    while True:
        try:
            steps.append(next(running))
        except StopIteration as end:
            return steps, *end.value
