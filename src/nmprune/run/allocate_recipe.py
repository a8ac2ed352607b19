"""The recipe's section on mixed patterns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nmprune.errors import InputError, near_matches
from nmprune.pattern import Pattern
from nmprune.prepare.allocation import RULES
from nmprune.prepare.choices import Choice, check_density, parse_choices


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class AllocateRecipe:
    """Mixed patterns under one budget: which linear gets which."""

    patterns: tuple[str, ...] = _option(
        (), "patterns to choose from, such as 1:4, 2:4, 3:4 and dense; empty = every linear gets the run's pattern"
    )
    density: float = _option(0.0, "share of the prunable linears' weights that is kept; 0 = the run's pattern's")
    rule: str = _option("error", "error (least output error) or owl (layers with more outliers keep more)")
    owl_m: float = _option(5.0, "owl: an outlier is a score of more than this many times its layer's mean")
    owl_lambda: float = _option(0.08, "owl: half the range of the layers' keep ratios")

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The set, sparsest first; empty where every linear gets the run's pattern.

        Raises:
            InputError: the names make no set (see `parse_choices`).
        """
        return parse_choices(self.patterns) if self.patterns else ()

    def faults(self, pattern: Pattern | None) -> list[str]:
        """What is wrong, as sentences.

        Args:
            pattern: the run's; None where it could not be read.
        """
        found = []
        if self.rule not in RULES:
            found.append(f"allocate.rule is {self.rule!r}. {near_matches(self.rule, RULES)}")
        found += [
            f"{name} is {value:g}; expected more than 0."
            for name, value in (("allocate.owl_m", self.owl_m), ("allocate.owl_lambda", self.owl_lambda))
            if value <= 0
        ]
        if not self.patterns:
            idle = {"allocate.density": self.density, "allocate.rule": self.rule if self.rule != "error" else ""}
            return found + [
                f"{name} is {value}, which is not applicable: with one pattern{f', {pattern},' if pattern else ''} there is "
                "nothing to allocate. Name the patterns to choose from, such as --allocate 1:4,2:4,3:4,dense."
                for name, value in idle.items()
                if value
            ]
        try:
            choices = self.choices
        except InputError as error:
            return [*found, f"allocate.patterns: {error}"]
        if self.density or pattern:
            try:
                check_density(choices, self.density or pattern.density)  # type: ignore[union-attr]
            except InputError as error:
                found.append(f"allocate.{error}")
        return found


NOT_MIXED = AllocateRecipe()
"""Every linear gets the run's pattern."""
