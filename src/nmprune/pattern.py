"""What N:M means, said once: keep N of every M consecutive weights along the input features."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nmprune.errors import InputError

MAX_GROUP = 32


@dataclass(frozen=True, order=True)
class Pattern:
    """Keep `kept` of every `group` consecutive weights along the input features; 1:4 is 75 % sparse.

    Half of the field's code reads N as the number *removed*. Here it is always the number kept.

    Raises:
        InputError: unless 1 <= kept < group <= 32.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group <= MAX_GROUP:
            raise InputError(
                f"pattern {self.kept}:{self.group} is not possible: N:M keeps N of every M weights, "
                f"with 1 <= N < M <= {MAX_GROUP}. For example 2:4, 4:8 or 1:4 (which is 75 % sparse)."
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4" (keep 2 of 4).

        Raises:
            InputError: the text is not two whole numbers with a colon, or not a possible pattern.
        """
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
        if match is None:
            raise InputError(f"pattern {text!r} is not of the form N:M, such as 2:4 (keep 2 of every 4 weights).")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def words(self) -> str:
        """The unambiguous spelling, "2 kept of 4"."""
        return f"{self.kept} kept of {self.group}"

    @property
    def density(self) -> float:
        """Share of weights kept, 0..1."""
        return self.kept / self.group

    @property
    def sparsity(self) -> float:
        """Share of weights removed, 0..1."""
        return 1 - self.density

    @property
    def n_candidates(self) -> int:
        """C(M, N): how many legal masks one group has."""
        return math.comb(self.group, self.kept)

    def check_divides(self, in_features: int) -> None:
        """Raise InputError where `in_features` is not a whole number of groups."""
        if in_features % self.group:
            smaller = [m for m in (16, 8, 4, 2) if m < self.group and in_features % m == 0]
            other = (
                f", or choose a group that divides {in_features}, such as {smaller[0] // 2}:{smaller[0]}"
                if smaller
                else ""
            )
            raise InputError(
                f"in_features {in_features} is not a multiple of {self.group}, the group of pattern {self}. "
                f"Leave it dense with --exclude{other}."
            )
