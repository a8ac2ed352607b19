"""Descent: the mask whose dropped weights change the output least, found group by group. No weight moves.

For one row, dropping the weights e = w * (1 - mask) costs e H e^T. As a function of the set S dropped from one group,
with everything else as it is, that is a constant plus

    sum_{i,j in S} w_i w_j H_ij  +  2 sum_{i in S} w_i r_i,    r = H e^T without the group's own part,

so every group can be set to its best set exactly. With D the input that the linear meets in the dense model and a target
T = t D + (1 - t) X between it and its own input X, ||X (w - e) - T w||^2 = e H e^T + 2 e p + a constant, p = X^T (T - X) w:
the same steps with p added to r, and the mask makes up for what the layers before it lost.

How the groups are gone through: methods/descent_sweep.py.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nmprune.errors import InputError
from nmprune.methods import hessian
from nmprune.methods.base import PerLinear, Pruned, option
from nmprune.methods.descent_shrinkage import SAMPLED_ROWS, SAMPLED_SWEEPS, SHRINKAGES, held_out_shrinkage
from nmprune.methods.descent_sweep import Descended, descend, load_diagonal
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic


@dataclass(frozen=True)
class Descent(PerLinear):
    """Coordinate descent over groups on ||X (W * M)^T - T W^T||^2 from Wanda's mask; see the top of the file."""

    name: ClassVar[str] = "descent"
    summary: ClassVar[str] = "From Wanda's mask, set group after group to its best mask; no weight moves."
    paper: ClassVar[str] = "ours: exact coordinate descent on the linear's squared output error"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_gram", "cross_gram"})

    shrinkage: float = option(0.5, "share of the Gram matrix's diagonal that is added to it; large: Wanda's mask")
    target: float = option(0.4, "0: the output on the linear's own inputs; 1: the dense model's output")
    sweeps: int = option(6, "most passes over all groups; it stops earlier when a pass changes nothing")
    choose_shrinkage: bool = option(False, "for each linear the best of 0.1, 0.3, 0.5 and 1 on held-out sequences")

    def __post_init__(self) -> None:
        check_settings("descent", self.shrinkage, self.target, self.sweeps)
        held_out: frozenset[Statistic] = frozenset({"held_out_gram"} if self.choose_shrinkage else ())
        # what a method declares depends on its settings here
        object.__setattr__(self, "needs", needed(self.target) | held_out)

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask that descent from Wanda's ends in.

        Without `cross_gram` (experts: the dense model sends them other tokens) the target is the output on the linear's own
        inputs, and the notes say so. Where `choose_shrinkage` finds no held-out token (experts), `shrinkage` holds.

        Raises:
            InputError: the width is not a whole number of groups, or weight or statistics are not finite or do not fit.
        """
        pattern.check_divides(weight.shape[-1])
        hessian.checked_gram(stats, weight.shape[-1])
        prior_OI = Wanda().prune(weight, stats, pattern).mask
        shrinkage = self.shrinkage
        if self.choose_shrinkage:
            chosen = held_out_shrinkage(weight, stats, prior_OI, pattern, self.target, self.sweeps)
            shrinkage = self.shrinkage if chosen is None else chosen
        found, notes = descend_to(weight, stats, prior_OI, pattern, shrinkage, self.target, self.sweeps)
        if self.choose_shrinkage:
            notes["shrinkage"] = shrinkage
        return Pruned(found.mask, None, notes)

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """See `descend_bytes`; the Gram matrix without the held-out tokens while a shrinkage is chosen."""
        chosen = 8 * in_features**2 + descend_bytes(min(out_features, 2 * SAMPLED_ROWS), in_features, self.target)
        whole = descend_bytes(out_features, in_features, self.target)
        return max(whole, chosen) if self.choose_shrinkage else whole

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """See `descend_flops`; once for each shrinkage on the sampled rows."""
        whole = descend_flops(out_features, in_features, self.sweeps)
        if not self.choose_shrinkage:
            return whole
        sweeps = len(SHRINKAGES) * min(self.sweeps, SAMPLED_SWEEPS)
        return whole + descend_flops(min(out_features, SAMPLED_ROWS), in_features, sweeps)


def check_settings(who: str, shrinkage: float, target: float, sweeps: int) -> None:
    """Raise InputError where a setting of `who` is out of range."""
    if not (math.isfinite(shrinkage) and shrinkage >= 0):
        raise InputError(f"{who}.shrinkage is {shrinkage!r}; expected a number >= 0, such as 0.5.")
    if not 0 <= target <= 1:
        raise InputError(f"{who}.target is {target!r}; expected a number from 0 to 1, such as 0.5.")
    if sweeps < 1:
        raise InputError(f"{who}.sweeps is {sweeps!r}; expected a whole number >= 1, such as 6.")


def needed(target: float) -> frozenset[Statistic]:
    """The statistics that descent reads: the dense model's inputs only where they have a say."""
    return frozenset({"input_gram", "cross_gram"} if target else {"input_gram"})


@torch.no_grad()
def descend_to(
    weight_OI: Tensor,
    stats: InputStats,
    mask_OI: Tensor,
    pattern: Pattern,
    shrinkage: float,
    target: float,
    sweeps: int,
) -> tuple[Descended, dict[str, float | int | str]]:
    """`descend` with H and the pull from a linear's statistics, and what is worth recording of it.

    Args:
        weight_OI: fp32 (out, in), dense; not modified.
        stats: with `input_gram`, checked; with `cross_gram` for a target above 0.
        mask_OI: bool (out, in), where to start.
        pattern: N kept of M.
        shrinkage: see `load_diagonal`.
        target: t of T = t D + (1 - t) X.
        sweeps: most passes over all groups.
    """
    gram_II = stats.gram()
    loaded_II, factor = stats.derived(("loaded gram", shrinkage), lambda: load_diagonal(gram_II, shrinkage))
    pull_OI = None
    if target and stats.cross_gram is not None:
        pull_OI = (weight_OI @ stats.cross_gram.T).sub_(weight_OI @ gram_II).mul_(target * factor)
    found = descend(weight_OI, loaded_II, mask_OI, pattern, sweeps, pull_OI=pull_OI)
    output = (weight_OI @ gram_II).mul_(weight_OI).sum().item() * factor
    notes: dict[str, float | int | str] = {
        "sweeps": found.sweeps,
        "changed_groups": found.changed_groups,
        "objective_fall": (found.start - found.end) / output if output > 0 else 0.0,
    }
    if target and pull_OI is None:
        notes["target"] = "own inputs"
    return found, notes


def descend_bytes(out_features: int, in_features: int, target: float) -> int:
    """Peak bytes: H; weight, what is dropped and E in fp32, two masks; the terms of a block or group; the pull twice."""
    pulls = 8 * out_features * in_features if target else 0
    return 4 * in_features**2 + 14 * out_features * in_features + 4096 * out_features + pulls


def descend_flops(out_features: int, in_features: int, sweeps: int) -> float:
    """A product H E for each sweep; a group's small steps take the time of some 3500 operations per weight."""
    return sweeps * out_features * in_features * (2.0 * in_features + 3500.0)
