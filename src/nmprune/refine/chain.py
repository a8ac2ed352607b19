"""A method and what follows it, as one method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from nmprune.errors import InputError
from nmprune.methods.base import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.refine.polish import Polish
from nmprune.refine.reconstruct import Reconstruct
from nmprune.stats import InputStats


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
        if self.polish is not None and self.reconstruct is None and self.method.updates_weights:
            raise InputError(
                f"polish chooses another mask, and the weights that {self.method.name} moved belong to its own. Add "
                "reconstruct (--reconstruct), which finds weights for the new one, or leave polish out."
            )
        moves = self.reconstruct is not None or (self.method.updates_weights and self.polish is None)
        declared = {
            "name": "+".join([self.method.name, *(step.name for step in self._steps)]),
            "needs": self.method.needs.union(*(step.needs for step in self._steps)),
            "updates_weights": moves,
        }
        for attribute, value in declared.items():  # what is the class's in a method depends on the parts here
            object.__setattr__(self, attribute, value)

    @property
    def _steps(self) -> list[Polish | Reconstruct]:
        return [step for step in (self.polish, self.reconstruct) if step is not None]

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
