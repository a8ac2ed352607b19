"""Magnitude pruning: keep the largest |w| of each group. Needs no calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nmprune import masks
from nmprune.methods.base import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.stats import InputStats


@dataclass(frozen=True)
class Magnitude(PerLinear):
    """Scores |w|; equal scores keep the lower index."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "Keep the largest absolute weights of each group; needs no calibration."
    paper: ClassVar[str] = "Han et al. 2015, Learning both Weights and Connections, arXiv 1506.02626"

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask of the largest |w| of each group; `stats` is not read.

        Raises:
            InputError: the width is not a whole number of groups, or a weight is not finite.
        """
        return Pruned(masks.from_scores(weight.abs(), pattern))
