"""Pruner-Zero: squared weights scaled by their gradient's share of the matrix's range. No weight moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nmprune import masks
from nmprune.methods.base import PerLinear, Pruned
from nmprune.methods.gradients import checked_gradient
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic


@dataclass(frozen=True)
class PrunerZero(PerLinear):
    """Scores w_ij^2 * (g_ij - min g) / (max g - min g), g = sqrt(sum over sequences of (dL/dw_ij)^2).

    This is the symbolic metric that the paper's search found. Minimum and maximum are taken over the whole matrix: the
    score of a weight depends on all rows. Where all gradients of a matrix are equal they tell nothing, and the score is
    w_ij^2. Equal scores keep the lower index.
    """

    name: ClassVar[str] = "pruner_zero"
    summary: ClassVar[str] = "Keep the largest weight^2 x gradient, scaled to 0..1 over the matrix; no weight moves."
    paper: ClassVar[str] = (
        "Dong et al. 2024, Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for LLMs, arXiv 2406.02924"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"weight_grad_sq"})

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask of the highest scores of each group.

        Raises:
            InputError: the width is not a whole number of groups, the gradients are of another shape or of no sequence, or
                a weight or a gradient is not finite.
        """
        pattern.check_divides(weight.shape[-1])
        gradient_OI = checked_gradient(stats, "weight_grad_sq", weight.shape).sqrt()
        low, high = torch.aminmax(gradient_OI)
        share_OI = gradient_OI.sub_(low).div_(high - low) if high > low else torch.ones_like(gradient_OI)
        return Pruned(masks.from_scores(weight.detach().square().mul_(share_OI), pattern))

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """fp32 gradients beside the scores and the comparisons on the way to a mask."""
        return 4 * out_features * in_features + super().solver_bytes(out_features, in_features)
