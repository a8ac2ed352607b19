"""RIA: weights relative to their row and their column, scaled by a power of their input's norm. No weight moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods.base import PerLinear, Pruned, option
from nmprune.methods.norms import checked_squared_norms
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic


@dataclass(frozen=True)
class Ria(PerLinear):
    """Scores (|w_ij| / sum over rows i + |w_ij| / sum over columns j) * ||x_j||_2^a; equal scores keep the lower index.

    The score of a weight depends on all rows. A zero weight scores zero, also where its whole row or column is zero; so
    does every weight of an input that was zero on every token (a > 0). The paper's channel permutation is not part.
    """

    name: ClassVar[str] = "ria"
    summary: ClassVar[str] = "Keep the weights that are large relative to their row and column; no weight moves."
    paper: ClassVar[str] = (
        "Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models, "
        "doi 10.20944/preprints202310.1487.v1"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_sq_norm"})

    activation_power: float = option(0.5, "exponent a of the input norm; 0 leaves the activations out")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.activation_power) and self.activation_power >= 0):
            raise InputError(f"ria.activation_power is {self.activation_power!r}; expected a number >= 0, such as 0.5.")

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask of the highest scores of each group.

        Raises:
            InputError: the width is not a whole number of groups, the statistics are of another width or saw no token,
                or a weight or a norm is not finite.
        """
        pattern.check_divides(weight.shape[-1])
        sq_norm_I = checked_squared_norms(stats, weight)
        # Only ratios of norms matter; relative to the largest, no power of them can overflow.
        relative_I = _nonzero(sq_norm_I.max()).reciprocal() * sq_norm_I
        factor_I = relative_I.pow(self.activation_power / 2).to(weight)
        return Pruned(masks.from_scores(_relative_importance(weight.detach(), sq_norm_I.dtype) * factor_I, pattern))


def _relative_importance(weight_OI: Tensor, wide: torch.dtype) -> Tensor:
    """|w| over its column's sum plus |w| over its row's sum, 0..2, sums in the `wide` dtype; 0 where a sum is zero."""
    size_OI = weight_OI.abs()
    column_I = _nonzero(size_OI.sum(0, dtype=wide)).to(weight_OI)
    row_O1 = _nonzero(size_OI.sum(1, keepdim=True, dtype=wide)).to(weight_OI)
    return (size_OI / column_I).add_(size_OI / row_O1)


def _nonzero(sums: Tensor) -> Tensor:
    """The sums, 1 in place of 0: what they divide is then 0 as well."""
    return sums.masked_fill(sums == 0, 1.0)
