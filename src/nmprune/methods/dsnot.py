"""DSnoT: swaps inside groups that take back the expected error of each row. No weight moves.

Dropping weights changes a row's output by e = sum over dropped of w_j x_j. Its mean over tokens, the expected error, is
sum over dropped of w_j mean(x_j). A swap regrows a weight whose part of that sum has the sum's sign, and drops another of
the same group: the smallest Wanda score among those whose part has the other sign.

While the sign of a row's error does not change, which weights it regrows next does not either: they are ranked once. A
weight moves at most once. Legend: O out_features, I in_features, R rows at work, C cycles, M group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nmprune.errors import InputError, near_matches
from nmprune.methods.base import PerLinear, Pruned, option
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.norms import checked_squared_norms, checked_sums
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic

PRIORS = ("wanda", "magnitude")
UNITS = ("sequence", "token", "row")
_SEQUENCE = 2048  # tokens of a calibration sequence of the authors, over which their error is summed
# Least variance of an input, as a share of its mean square: what rounding leaves of a constant one is noise.
_LEAST_VARIANCE = 2.0**-20
_CHUNK = 1 << 20  # weights whose rows go side by side


@dataclass(frozen=True)
class Dsnot(PerLinear):
    """Equations 3 and 4 of the paper inside N:M groups, from another method's mask.

    A row keeps the mask of smallest |expected error| that it met, the first of equals: never a worse one than the prior's.
    """

    name: ClassVar[str] = "dsnot"
    summary: ClassVar[str] = (
        "From Wanda's mask, swap inside groups until each row's mean error is gone; no weight moves."
    )
    paper: ClassVar[str] = (
        "Zhang et al. 2024, Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, arXiv 2310.08915"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_sq_norm", "input_sum"})

    prior: str = option("wanda", "whose mask to start from: wanda or magnitude")
    cycles: int = option(50, "most swaps of a row")
    threshold: float = option(0.1, "a row whose expected error is not above this makes no further swap")
    threshold_unit: str = option(
        "sequence", "sequence: error summed over 2048 tokens; token: per token; row: share of the output's RMS"
    )
    variance_power: float = option(1.0, "what a weight brings is divided by its input's variance to this power")

    def __post_init__(self) -> None:
        for key, known in (("prior", PRIORS), ("threshold_unit", UNITS)):
            if getattr(self, key) not in known:
                raise InputError(f"dsnot.{key} is {getattr(self, key)!r}. {near_matches(getattr(self, key), known)}")
        if self.cycles < 1:
            raise InputError(f"dsnot.cycles is {self.cycles!r}; expected a whole number >= 1, such as 50.")
        for key, usual in (("threshold", 0.1), ("variance_power", 1.0)):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"dsnot.{key} is {value!r}; expected a number >= 0, such as {usual}.")

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """The prior's mask after the swaps.

        Raises:
            InputError: the width is not a whole number of groups, the statistics are of another width or saw no token,
                or a weight or a statistic is not finite.
        """
        weight = weight.detach()
        pattern.check_divides(weight.shape[-1])
        sq_norm_I, sum_I = checked_squared_norms(stats, weight), checked_sums(stats, weight)
        prior_OI = Wanda().prune(weight, stats, pattern).mask  # checks that no score overflows, whatever the prior
        if self.prior == "magnitude":
            prior_OI = Magnitude().prune(weight, stats, pattern).mask
        mean_I, mean_sq_I = sum_I / stats.n_tokens, sq_norm_I / stats.n_tokens
        gain_I = self._per_variance(mean_I, mean_sq_I).to(weight)
        rows = max(1, _CHUNK // weight.shape[1])
        done = [
            _swap(
                weight_RI * mean_I.to(weight),
                weight_RI.abs() * sq_norm_I.sqrt().to(weight),
                gain_I,
                prior_RI,
                self._limit(weight_RI, mean_sq_I),
                pattern,
                self.cycles,
            )
            for weight_RI, prior_RI in zip(weight.split(rows), prior_OI.split(rows), strict=True)
        ]
        start, end = (sum(getattr(one, key) for one in done) for key in ("start", "end"))
        notes: dict[str, float | int | str] = {
            "swaps_per_row": sum(one.swaps for one in done) / weight.shape[0],
            "relative_expected_error": end / start if start else 1.0,
        }
        return Pruned(torch.cat([one.mask for one in done]), None, notes)

    def _per_variance(self, mean_I: Tensor, mean_sq_I: Tensor) -> Tensor:
        """1 / variance^power of each input, up to a common factor; 1 for an input that was zero on every token."""
        variance_I = torch.maximum(mean_sq_I - mean_I.square(), mean_sq_I * _LEAST_VARIANCE)
        largest = variance_I.max()
        return torch.where(variance_I > 0, variance_I / largest, 1.0).pow(-self.variance_power)

    def _limit(self, weight_RI: Tensor, mean_sq_I: Tensor) -> Tensor:
        """The expected error per token, (rows,), up to which a row is left alone."""
        if self.threshold_unit == "row":
            return (weight_RI.to(mean_sq_I).square() @ mean_sq_I).sqrt() * self.threshold
        tokens = _SEQUENCE if self.threshold_unit == "sequence" else 1
        return mean_sq_I.new_full(weight_RI.shape[:1], self.threshold / tokens)

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """The prior's, the masks, and what the rows at work take: scores, parts, their ranking."""
        weights = out_features * in_features
        return (
            super().solver_bytes(out_features, in_features) + 2 * weights + 40 * min(weights, max(_CHUNK, in_features))
        )

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """Some passes over the weights and a ranking; the swaps take the time of some 800 operations each and row."""
        return 60.0 * out_features * in_features + 800.0 * self.cycles * out_features


@dataclass(frozen=True)
class _Swapped:
    """Some rows after their swaps: the mask (rows, in), how many swaps it holds, and the sums over rows of |expected
    error| per token before and after."""

    mask: Tensor
    swaps: int
    start: float
    end: float


def _swap(
    part_RI: Tensor, score_RI: Tensor, gain_I: Tensor, prior_RI: Tensor, limit_R: Tensor, pattern: Pattern, cycles: int
) -> _Swapped:
    """Swap in all rows, each until its error is within its limit or changes sign, or for so many cycles.

    Args:
        part_RI: w_j mean(x_j), what each weight brings to the expected error when it is dropped.
        score_RI: Wanda's.
        gain_I: (in,), what multiplies a weight's part when the next to regrow is chosen.
        prior_RI: the mask to start from; not modified.
        limit_R: >= 0.
        pattern: N kept of M.
        cycles: most swaps.
    """
    error_R = (part_RI * ~prior_RI).sum(1, dtype=limit_R.dtype)
    sign_R = error_R.sign()
    part_RI = part_RI * sign_R.unsqueeze(1).to(part_RI)  # from here on every error starts >= 0
    start_R = error_R.abs()
    error_R, least_R = start_R.clone(), start_R.clone()
    regrown_RC, n_regrown_R = _ranked(part_RI, gain_I, prior_RI, cycles)
    dropped_RC = torch.full_like(regrown_RC, -1)
    best_R = torch.zeros_like(n_regrown_R)  # cycles after which the error was least
    droppable_RI = prior_RI.clone()  # kept from the start: what was regrown stays
    working_R = error_R > limit_R
    for cycle in range(regrown_RC.shape[1]):
        at_W = (working_R & (cycle < n_regrown_R)).nonzero().squeeze(1)
        if not len(at_W):
            break
        regrow_W = regrown_RC[at_W, cycle]
        drop_W, can_W = _smallest(part_RI, score_RI, droppable_RI, at_W, regrow_W, pattern.group)
        at_W, regrow_W, drop_W = at_W[can_W], regrow_W[can_W], drop_W[can_W]
        droppable_RI[at_W, drop_W] = False
        dropped_RC[at_W, cycle] = drop_W
        after_W = error_R[at_W] + (part_RI[at_W, drop_W].to(error_R) - part_RI[at_W, regrow_W].to(error_R))
        error_R[at_W] = after_W
        better_W = after_W.abs() < least_R[at_W]
        least_R[at_W[better_W]] = after_W[better_W].abs()
        best_R[at_W[better_W]] = cycle + 1
        working_R[at_W] = after_W > limit_R[at_W]  # where the sign has changed it is below any limit
    made_RC = dropped_RC >= 0
    made_RC &= torch.arange(dropped_RC.shape[1], device=best_R.device) < best_R.unsqueeze(1)
    row_S, cycle_S = made_RC.nonzero(as_tuple=True)
    mask_RI = prior_RI.clone()
    mask_RI[row_S, regrown_RC[row_S, cycle_S]] = True
    mask_RI[row_S, dropped_RC[row_S, cycle_S]] = False
    return _Swapped(mask_RI, len(row_S), start_R.sum().item(), least_R.sum().item())


def _smallest(
    part_RI: Tensor, score_RI: Tensor, droppable_RI: Tensor, row_W: Tensor, regrow_W: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """What to drop in the group of each weight that is regrown, and whether there is anything.

    The smallest score among the weights that take error back when they are dropped; where the group has none, the
    smallest of all that may be dropped.
    """
    member_M = torch.arange(group, device=regrow_W.device)
    group_WM = (regrow_W - regrow_W % group).unsqueeze(1) + member_M
    row_W1 = row_W.unsqueeze(1)
    can_WM = droppable_RI[row_W1, group_WM]
    helps_WM = can_WM & (part_RI[row_W1, group_WM] < 0)
    chosen_WM = torch.where(helps_WM.any(1, keepdim=True), helps_WM, can_WM)
    # the first of equals
    drop_W1 = score_RI[row_W1, group_WM].masked_fill(~chosen_WM, math.inf).min(1, keepdim=True).indices
    return group_WM.gather(1, drop_W1).squeeze(1), can_WM.any(1)


def _ranked(part_RI: Tensor, gain_I: Tensor, kept_RI: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The dropped weights that take error back, best first, equal ones by index: columns (rows, C) and how many count."""
    gain_RI = (part_RI * gain_I).masked_fill_(kept_RI | (part_RI <= 0), -math.inf)
    count = min(count, gain_RI.shape[1])
    highest_RC, column_RC = gain_RI.topk(count, dim=1)
    number_R = (highest_RC > -math.inf).sum(1)
    last_R1 = highest_RC[:, -1:]
    if ((gain_RI >= last_R1) & (last_R1 > -math.inf)).sum(1).gt(count).any():
        return gain_RI.sort(dim=1, descending=True, stable=True).indices[:, :count], number_R
    column_RC = column_RC.sort(dim=1).values
    order_RC = gain_RI.gather(1, column_RC).sort(dim=1, descending=True, stable=True).indices
    return column_RC.gather(1, order_RC), number_R
