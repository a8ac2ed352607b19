"""A small learner of decoder layers: slot logits pushed down the gradient of the layer's loss, the best step kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nmprune import masks
from nmprune.methods.base import LearnStep, PerLayer, Pruned, option


@dataclass(frozen=True)
class Toy(PerLayer):
    """Scores start at the prior (or at |w|) and follow the gradient at the hard mask, with noise from the state's generator."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "A small learner for tests."
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset] = frozenset({"input_sq_norm"})

    steps: int = option(4, "steps a layer")
    rate: float = option(0.5, "length of a step")
    guard: bool = option(False, "the prior's masks where the held-out loss is no lower")

    def start(self, roles, n_layers, pattern, generator):
        return {"bias": torch.randn(len(roles), generator=generator), "layers": torch.zeros((), dtype=torch.int64)}

    def distance(self, output_BTD, target_BTD, input_BTD):
        return (output_BTD - target_BTD).square().mean((1, 2))

    def learn(self, work, state, seed, snapshot=None):
        generator = torch.Generator().manual_seed(seed)
        scores = {name: work.priors.get(name, weight.abs()).float() for name, weight in work.weights.items()}
        first = 1
        if snapshot is not None:
            scores = {name: snapshot[name].clone() for name in scores}
            generator.set_state(snapshot["generator"])
            first = int(snapshot["step"]) + 1
        for step in range(first, self.steps + 1):
            sequences = work.train[torch.randperm(len(work.train), generator=generator)[:3]]
            hard = self.hard(work, scores)
            loss, gradients = work.gradients(sequences, {n: w * hard[n] for n, w in work.weights.items()})
            for name, gradient in gradients.items():
                slope = gradient * work.weights[name]
                noise = torch.randn(slope.shape, generator=generator) * 0.01 + state["bias"].mean()
                scores[name] = scores[name] - self.rate * slope / slope.abs().mean().clamp_min(1e-12) + noise

            def keep(step=step):
                return {**scores, "generator": generator.get_state(), "step": torch.tensor(step)}

            yield LearnStep(step, self.steps, {"loss": loss, "temperature": 1 / step}, keep)
        found = self.hard(work, scores)
        notes = {}
        if self.guard and work.priors:
            before, after = (
                work.loss(work.held_out, {n: w * m[n] for n, w in work.weights.items()}) for m in (work.priors, found)
            )
            notes = {"accepted": int(after < before)}
            found = found if after < before else work.priors
        state = {"bias": state["bias"] + 1, "layers": state["layers"] + 1}
        return {name: Pruned(mask, None, notes) for name, mask in found.items()}, state

    @staticmethod
    def hard(work, scores):
        return {name: masks.from_scores(score, work.patterns[name]) for name, score in scores.items()}

    def state_bytes(self, roles, n_layers, pattern):
        return 4 * len(roles) + 8

    def learner_bytes(self, n_weights, pattern):
        return 12 * n_weights
