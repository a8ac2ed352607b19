"""The shape that a method has. A method is a frozen dataclass; its fields are its hyper-parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic


def option(default: Any, help: str) -> Any:
    """A hyper-parameter: its default and its one description, which the CLI help, the docs and the reports show."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Pruned:
    """What a method made of one linear.

    Attributes:
        mask: bool (out, in), True = kept, exactly N of every M along `in`.
        weight: fp32 (out, in), the moved weights with zeros where the mask is False; None for frozen weights (then the
            pruned weight is the dense one where the mask is True and +0.0 elsewhere).
        notes: small facts worth recording with the linear, e.g. {"damping_steps": 1}.
    """

    mask: Tensor
    weight: Tensor | None = None
    notes: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class PerLinear(ABC):
    """A method that sees one linear and its input statistics.

    Class attributes:
        name: the paper's short name, as the CLI spells it.
        summary: one sentence for `nmprune list`.
        paper: where the formula comes from.
        needs: the statistics it reads; empty = needs no calibration.
        updates_weights: whether kept weights may move.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    updates_weights: ClassVar[bool] = False

    def why_not(self, pattern: Pattern) -> str | None:
        """None where the method can do `pattern`, else the reason in words. Every pattern, unless overridden."""
        return None

    @abstractmethod
    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """Prune one linear.

        Args:
            weight: fp32 (out, in), dense; not modified.
            stats: what the method declared in `needs`.
            pattern: N kept of M.

        Raises:
            InputError: the statistics or the weight cannot be used (wrong width, not finite, singular).
        """

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """Peak bytes of temporaries inside `prune`, for plans: fp32 scores and the comparisons on the way to a mask."""
        return 12 * out_features * in_features

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """Floating-point operations of `prune`, for plans: only the ratio between two shapes is used."""
        return 10.0 * out_features * in_features

    def hyper_parameters(self) -> dict[str, Any]:
        """Field name -> value, in order."""
        return dataclasses.asdict(self)
