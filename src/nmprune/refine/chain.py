"""A method and what follows it, as one method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from nmprune.errors import InputError
from nmprune.methods.base import Method, PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.refine.polish import Polish
from nmprune.refine.reconstruct import Reconstruct
from nmprune.stats import InputStats


def steps_of(polish: Polish | None, reconstruct: Reconstruct | None) -> list[Polish | Reconstruct]:
    """The steps that are given, in order."""
    return [step for step in (polish, reconstruct) if step is not None]


def declared(
    method: Method, polish: Polish | None, reconstruct: Reconstruct | None, prior: PerLinear | None = None
) -> dict[str, Any]:
    """`name`, `needs` and `updates_weights` of a chain: what is the class's in a method depends on the parts there.

    Raises:
        InputError: polish after a method that moves weights, without reconstruct.
    """
    if polish is not None and reconstruct is None and method.updates_weights:
        raise InputError(
            f"polish chooses another mask, and the weights that {method.name} moved belong to its own. Add "
            "reconstruct (--reconstruct), which finds weights for the new one, or leave polish out."
        )
    steps = steps_of(polish, reconstruct)
    return {
        "name": "+".join([method.name, *(step.name for step in steps)]),
        "needs": method.needs.union(*(part.needs for part in (*steps, *([prior] if prior else [])))),
        "updates_weights": reconstruct is not None or (method.updates_weights and polish is None),
    }


@dataclass(frozen=True)
class Chain(PerLinear):
    """A method, then polish, then reconstruct, as far as they are given; what the parts declare, it declares together.

    Raises:
        InputError: polish after a method that moves weights, without reconstruct.
    """

    name: ClassVar[str] = "chain"
    summary: ClassVar[str] = "a method and what follows it"
    paper: ClassVar[str] = "see its parts"

    method: PerLinear
    polish: Polish | None = None
    reconstruct: Reconstruct | None = None

    def __post_init__(self) -> None:
        for attribute, value in declared(self.method, self.polish, self.reconstruct).items():
            object.__setattr__(self, attribute, value)

    @property
    def _steps(self) -> list[Polish | Reconstruct]:
        return steps_of(self.polish, self.reconstruct)

    def why_not(self, pattern: Pattern) -> str | None:
        """What the method says."""
        return self.method.why_not(pattern)

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """See `PerLinear.prune`; one part after the other."""
        pruned = self.method.prune(weight, stats, pattern)
        for step in self._steps:
            pruned = step.refine(weight, pruned, stats, pattern)
        return pruned

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """The largest of the parts; each gives its temporaries back."""
        return max(part.solver_bytes(out_features, in_features) for part in (self.method, *self._steps))

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """All parts together."""
        return sum(part.solver_flops(out_features, in_features) for part in (self.method, *self._steps))

    def hyper_parameters(self) -> dict[str, Any]:
        """The method's, and those of each step under the step's name."""
        return {**self.method.hyper_parameters(), **{step.name: asdict(step) for step in self._steps}}
