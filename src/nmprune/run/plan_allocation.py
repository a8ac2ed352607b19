"""What allocating patterns adds to a plan: one pass over the dense model, and every linear measured under every choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from nmprune import masks
from nmprune.methods.base import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.prepare.choices import Choice
from nmprune.prepare.unit_errors import NEEDS, linear_errors
from nmprune.run.plan_dense_pass import DensePassSizes
from nmprune.run.probe import measure
from nmprune.stats import InputStats, Statistic


@dataclass(frozen=True)
class _MeasuringErrors(PerLinear):
    """The phase's work on one linear in the shape of a method, so that it is timed as methods are."""

    name: ClassVar[str] = "allocate"
    summary: ClassVar[str] = "Measure one linear under every choice."
    paper: ClassVar[str] = "ours: docs/allocation.md"
    needs: ClassVar[frozenset[Statistic]] = NEEDS
    choices: tuple[Choice, ...] = ()

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        # the probe may cut a wide linear to a width that only `pattern` divides
        group = math.lcm(*(choice.group for choice in self.choices if choice))
        width = weight.shape[1] // group * group
        fitting = replace(stats, input_gram=stats.gram()[:width, :width].contiguous())
        linear_errors(weight[:, :width].contiguous(), fitting, self.choices)
        return Pruned(masks.from_scores(weight.abs(), pattern))

    def solver_flops(self, out_features: int, in_features: int) -> float:
        return 2.0 * (len(self.choices) + 1) * out_features * in_features**2


class AllocationSizes(DensePassSizes):
    """Bytes and seconds of the phase; the recipe mixes patterns."""

    @property
    def passes(self) -> int:
        """Forwards of a decoder layer over all calibration tokens."""
        return self._model.n_layers

    def memory(self) -> dict[str, int]:
        """Part -> bytes at the worst moment, besides the hidden states."""
        numels = [sum(p.numel() for p in layer.parameters()) for layer in self._model.layers]
        worst = max(range(len(numels)), key=lambda index: numels[index])
        linears = self._selections[worst].prune
        widths = {one.shared_input: one.shape[1] for one in linears}
        # fp32: a linear's weights, what a mask takes of them, their product with the Gram matrix, Wanda's scores
        measured = 4 * 4 * max((math.prod(one.shape) for one in linears), default=0)
        size = self._model.dtype.itemsize
        return {
            "decoder layer": numels[worst] * size,
            "statistics": sum(4 * width * width for width in widths.values()),
            "batch in the forward, or a linear measured": max(
                math.prod(self._batch) * self._forward_width * size, measured
            ),
        }

    def seconds(self, observed: Sequence[Sequence[tuple[int, float]]], n_bytes: int, disk: Path) -> float:
        """Seconds of the phase on this machine; times its parts.

        Args:
            observed: by decoder layer, (in_features, share of the tokens that it sees) of every shared input.
            n_bytes: of the checkpoint.
            disk: a folder on the disk that it would be read from.
        """
        recipe = self._recipe
        rates = measure(self._model, _MeasuringErrors(recipe.choices), recipe.pattern, self._batch, disk)
        measuring = sum(rates.solver_seconds[one.shape][0] for selection in self._selections for one in selection.prune)
        return n_bytes * rates.read_seconds + self._pass_seconds(rates, observed) + measuring


NOTE = (
    "which linear gets which pattern is known once the dense model is measured: but for the share of zeros, all are counted as "
    "pruned to the recipe's pattern."
)
