"""GBLM-Pruner: weights scaled by the norm of their input plus the norm of their gradient. No weight moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nmprune import masks
from nmprune.errors import InputError, near_matches
from nmprune.methods.base import PerLinear, Pruned, option
from nmprune.methods.gradients import checked_gradient
from nmprune.methods.norms import checked_squared_norms
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic

NORMS: dict[str, Statistic] = {"l1": "weight_grad_abs", "l2": "weight_grad_sq"}
_AUTHORS_SEQUENCES = 128


@dataclass(frozen=True)
class Gblm(PerLinear):
    """Scores |w_ij| * (alpha * ||g_ij||_p + ||x_j||_2) (the paper's pruning metric); equal scores keep the lower index.

    The two norms have different units, so what alpha means depends on how each is taken. As in the authors' code ||x_j||_2
    is the root of the mean over sequences of a sequence's sum of squares, and ||g_ij||_p runs over sequences. A norm over
    sequences grows with their number; it is therefore scaled to the authors' 128: alpha means the same for any number.
    """

    name: ClassVar[str] = "gblm"
    summary: ClassVar[str] = "Keep the largest |weight| x (input norm + alpha x gradient norm); no weight moves."
    paper: ClassVar[str] = (
        "Das et al. 2023, Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, arXiv 2311.04902"
    )
    # What it may read; an object reads the gradients of its own norm only.
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_sq_norm", "weight_grad_abs", "weight_grad_sq"})

    norm: str = option("l1", "norm of the gradients over calibration sequences: l1 or l2")
    alpha: float = option(100.0, "weight of the gradient norm; 0 leaves Wanda's score")

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError(f"gblm.norm is {self.norm!r}. {near_matches(self.norm, NORMS)}")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"gblm.alpha is {self.alpha!r}; expected a number >= 0, such as 100.")
        object.__setattr__(self, "needs", frozenset({"input_sq_norm", NORMS[self.norm]}))

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask of the highest scores of each group.

        Raises:
            InputError: the width is not a whole number of groups, the statistics are of another shape or saw no token, or
                a weight, a norm or a gradient is not finite.
        """
        pattern.check_divides(weight.shape[-1])
        sq_norm_I = checked_squared_norms(stats, weight)
        norm_I = (sq_norm_I / max(stats.n_grad_sequences, 1)).sqrt().to(weight)
        score_OI = self._gradient_norm(stats, weight).mul_(self.alpha).add_(norm_I).mul_(weight.detach().abs())
        return Pruned(masks.from_scores(score_OI, pattern))

    def _gradient_norm(self, stats: InputStats, weight: Tensor) -> Tensor:
        """The norm over sequences, (out, in), as 128 sequences of the same mean would have it; a tensor of its own."""
        share = _AUTHORS_SEQUENCES / max(stats.n_grad_sequences, 1)
        if self.norm == "l1":
            return checked_gradient(stats, "weight_grad_abs", weight.shape) * share
        return (checked_gradient(stats, "weight_grad_sq", weight.shape) * share).sqrt_()

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """fp32 gradient norms beside the scores and the comparisons on the way to a mask."""
        return 4 * out_features * in_features + super().solver_bytes(out_features, in_features)
