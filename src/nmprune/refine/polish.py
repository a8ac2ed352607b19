"""Polish: coordinate descent over groups from the mask that a method found. See methods/descent.py for the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nmprune.methods import hessian
from nmprune.methods.base import Pruned, option
from nmprune.methods.descent import check_settings, descend_bytes, descend_flops, descend_to, needed
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic


@dataclass(frozen=True)
class Polish:
    """Lower the output error of a mask, group by group. Weights that the method moved go back to the dense ones."""

    name: ClassVar[str] = "polish"
    shrinkage: float = option(0.5, "share of the Gram matrix's diagonal that is added to it; large: Wanda's mask")
    target: float = option(0.4, "0: the output on the linear's own inputs; 1: the dense model's output")
    sweeps: int = option(6, "most passes over all groups; it stops earlier when a pass changes nothing")

    def __post_init__(self) -> None:
        check_settings(self.name, self.shrinkage, self.target, self.sweeps)

    @property
    def needs(self) -> frozenset[Statistic]:
        """The dense model's inputs only where its output is the target."""
        return needed(self.target)

    def refine(self, weight: Tensor, pruned: Pruned, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask that descent from `pruned.mask` ends in, with the dense weights.

        Args:
            weight: fp32 (out, in), dense; not modified.
            pruned: what came before.
            stats: with what `needs` says; without `cross_gram` (experts) the target is the output on the linear's own inputs.
            pattern: N kept of M.

        Raises:
            InputError: the statistics cannot be used.
        """
        hessian.checked_gram(stats, weight.shape[1])
        found, notes = descend_to(weight, stats, pruned.mask, pattern, self.shrinkage, self.target, self.sweeps)
        return Pruned(found.mask, None, {**pruned.notes, **{f"polish_{key}": value for key, value in notes.items()}})

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """See `descend_bytes`."""
        return descend_bytes(out_features, in_features, self.target)

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """See `descend_flops`."""
        return descend_flops(out_features, in_features, self.sweeps)
