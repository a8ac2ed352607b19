"""What learning decoder layers takes: bytes from sizes, seconds from a few real steps on a part of a layer."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.methods.base import PerLayer
from nmprune.pattern import Pattern
from nmprune.refine import LayerChain
from nmprune.report.quantities import size
from nmprune.run.probe import signature
from nmprune.run.recipe import Recipe
from nmprune.stats import InputStats, StatsAccumulator
from nmprune.stream import DecoderModel, LayerSelection

_BACKWARD = 2.0  # forwards that a backward costs
_PROBED_WEIGHTS = 1_000_000
_PROBED_INPUT = 2048
_PROBED_SECONDS = 8.0
_MOST_PROBED_STEPS = 12


@dataclass(frozen=True)
class _Probed:
    """Measured on a part of a layer.

    Attributes:
        seconds: of the learner alone, per weight and step.
        n_steps: that a layer gets.
        forwards: sequences that went through the layer without gradients, per step.
        gradients: sequences that went there and back, per step.
    """

    seconds: float
    n_steps: int
    forwards: float
    gradients: float


class LayerLearningSizes:
    """Bytes and seconds of learning.

    Args:
        recipe: its pruner is a `LayerChain`.
        model: made from a config.
        selections: what is pruned.
    """

    def __init__(self, recipe: Recipe, model: DecoderModel, selections: Sequence[LayerSelection]) -> None:
        pruner = recipe.pruner
        assert isinstance(pruner, LayerChain)
        self._recipe, self._chain, self._model, self._selections = recipe, pruner, model, selections
        self.n_held_out = min(recipe.n_held_out, recipe.calibration.n_sequences - 1)

    @property
    def state_bytes(self) -> int:
        """Of what is carried from layer to layer."""
        roles = list(dict.fromkeys(linear.role for one in self._selections for linear in one.prune))
        return self._chain.method.state_bytes(roles, self._model.n_layers, self._recipe.pattern)

    def memory(self, linears: Sequence[Linear], n_tokens: int) -> dict[str, int]:
        """Part -> bytes, while a layer with these linears is learned.

        Args:
            linears: of the layer.
            n_tokens: of the sequences that go through together.
        """
        n_weights = sum(math.prod(one.shape) for one in linears)
        item = self._model.dtype.itemsize
        copies = 0 if item == 4 else 2 * item * n_weights  # masked weights and their gradients in the compute dtype
        widths = sum(sum(one.shape) for one in {one.role: one for one in linears}.values())
        return {
            "dense weights in fp32, prior masks": 5 * n_weights,
            "learner, masked weights, gradients": self._chain.method.learner_bytes(n_weights, self._recipe.pattern)
            + copies,
            "carried state": self.state_bytes,
            "layer's forward and backward": n_tokens * (widths + 8 * self._hidden_size) * item,
        }

    def disk(self) -> dict[str, int]:
        """Part -> bytes: each layer's state, the last one for good, and a snapshot about as large as the learner."""
        largest = max(sum(math.prod(one.shape) for one in selection.prune) for selection in self._selections)
        return {
            "learner's states and snapshot (given back)": self._model.n_layers * self.state_bytes
            + self._chain.method.learner_bytes(largest, self._recipe.pattern),
            "learner's last state": self.state_bytes,
        }

    def seconds(self, layer_seconds: Mapping[tuple[tuple[int, ...], ...], float], per_forward: int) -> float:
        """Seconds of learning all layers.

        Args:
            layer_seconds: decoder layer signature -> one forward.
            per_forward: sequences in it.
        """
        linears = max((one.prune for one in self._selections), key=len)
        probed = _probe(self._chain, linears, self._recipe, self._model, self.n_held_out)
        judged = self.n_held_out * (2 + bool(self._chain.steps))
        total = 0.0
        for index, selection in enumerate(self._selections):
            if not selection.prune:
                continue
            forward = layer_seconds[signature(self._model.layers[index])] / per_forward
            n_weights = sum(math.prod(one.shape) for one in selection.prune)
            sequences = probed.forwards + (1 + _BACKWARD) * probed.gradients
            total += probed.n_steps * (probed.seconds * n_weights + sequences * forward) + judged * forward
        return total

    def notes(self) -> list[str]:
        """What a user should know of learning before starting."""
        method = self._chain.method
        notes = [
            f"the learner carries {size(self.state_bytes)} from layer to layer; {self.n_held_out} sequences judge its masks."
        ]
        if self._chain.prior is not None and self._chain.prior.updates_weights:
            notes.append(f"the prior {method.prior} moves weights: its mask is taken, its weights are not.")
        said = method.published.get((self._hidden_size, self._model.n_layers))
        return [*notes, f"{method.name}'s paper, for a model of this size: {said}."] if said else notes

    @property
    def _hidden_size(self) -> int:
        hidden_size: int = self._model.config.get_text_config().hidden_size
        return hidden_size


class _Part:
    """A part of a decoder layer, random, as a learner sees it; its layer costs nothing and counts how often it is run."""

    def __init__(
        self,
        chain: LayerChain,
        linears: Sequence[Linear],
        n_layers: int,
        pattern: Pattern,
        n_train: int,
        n_held_out: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.index, self.n_layers = 0, n_layers
        share = min(1.0, _PROBED_WEIGHTS / sum(math.prod(one.shape) for one in linears))
        shapes = {one.name: _part_of(one.shape, share, pattern) for one in linears}
        self.weights: Mapping[str, Tensor] = {
            name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()
        }
        self.roles: Mapping[str, str] = {one.name: one.role for one in linears}
        self.patterns: Mapping[str, Pattern] = dict.fromkeys(shapes, pattern)
        has_prior = chain.prior is not None or chain.prior_file is not None
        self.priors: Mapping[str, Tensor] = (
            {name: masks.from_scores(weight.abs(), pattern) for name, weight in self.weights.items()}
            if has_prior
            else {}
        )
        of_width: dict[int, InputStats] = {}
        for _, width in shapes.values():
            if width not in of_width:
                sums = StatsAccumulator(width, chain.needs, device)
                for held_out in (False, True):
                    inputs = torch.randn(64, width, generator=generator).to(device)
                    sums.add(inputs, inputs, held_out)
                of_width[width] = sums.result()
        self.stats: Mapping[str, InputStats] = {name: of_width[shape[1]] for name, shape in shapes.items()}
        self.train, self.held_out = torch.arange(n_train), torch.arange(n_train, n_train + n_held_out)
        self._gradients = {name: torch.randn_like(weight) for name, weight in self.weights.items()}
        self.n_forwards = self.n_gradients = 0

    def loss(self, sequences: Tensor, weights: Mapping[str, Tensor]) -> float:
        self.n_forwards += len(sequences)
        return 1.0

    def gradients(self, sequences: Tensor, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        self.n_gradients += len(sequences)
        return 1.0, {name: gradient.clone() for name, gradient in self._gradients.items()}


def _part_of(shape: tuple[int, int], share: float, pattern: Pattern) -> tuple[int, int]:
    width = min(shape[1], max(pattern.group, _PROBED_INPUT // pattern.group * pattern.group))
    return max(1, min(shape[0], round(share * math.prod(shape) / width))), width


def _probe(
    chain: LayerChain, linears: Sequence[Linear], recipe: Recipe, model: DecoderModel, n_held_out: int
) -> _Probed:
    """Some real steps on a part of a layer."""
    method: PerLayer = chain.method
    n_train = recipe.calibration.n_sequences - n_held_out
    part = _Part(chain, linears, model.n_layers, recipe.pattern, n_train, n_held_out, model.device)
    roles = list(dict.fromkeys(linear.role for linear in linears))
    state = method.start(roles, model.n_layers, recipe.pattern, torch.Generator().manual_seed(recipe.seed))
    learning = method.learn(part, state, recipe.seed)
    step = next(learning)  # what is made ready once is not counted
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    part.n_forwards = part.n_gradients = 0
    n_done, n_steps, start = 0, step.total, time.perf_counter()
    for step in itertools.islice(learning, _MOST_PROBED_STEPS):
        n_done, n_steps = n_done + 1, step.total
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        if time.perf_counter() - start > _PROBED_SECONDS:
            break
    spent = time.perf_counter() - start
    learning.close()
    n_weights = sum(weight.numel() for weight in part.weights.values())
    n_done = max(n_done, 1)
    return _Probed(spent / n_done / n_weights, n_steps, part.n_forwards / n_done, part.n_gradients / n_done)
