"""Wanda: weights scaled by the norm of their input. No weight moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nmprune import masks
from nmprune.methods.base import PerLinear, Pruned
from nmprune.methods.norms import checked_squared_norms
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic


@dataclass(frozen=True)
class Wanda(PerLinear):
    """Scores |w_ij| * ||x_j||_2 (equation 1 of the paper); equal scores keep the lower index.

    An input that was zero on every calibration token scores zero for all rows.
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "Keep the largest |weight| x input norm of each group; no weight moves."
    paper: ClassVar[str] = "Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs, arXiv 2306.11695"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_sq_norm"})

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask of the highest scores of each group.

        Raises:
            InputError: the width is not a whole number of groups, the statistics are of another width or saw no token,
                or a weight or a norm is not finite.
        """
        pattern.check_divides(weight.shape[-1])
        sq_norm_I = checked_squared_norms(stats, weight)
        return Pruned(masks.from_scores(weight.abs() * sq_norm_I.sqrt().to(weight), pattern))
