"""`InputError`: everything that a user can put right. Any other exception is a bug of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave cannot be used.

    The message says where, what was given, what was expected and a way out. Inner code states the fact; an outer layer
    that knows more (which decoder layer, which linear) adds it once with `located`.
    """

    def located(self, place: str) -> InputError:
        """The same fact with `place` in front, e.g. "decoder layer 3, self_attn.k_proj"."""
        return InputError(f"{place}: {self}")


def near_matches(given: str, known: Iterable[str]) -> str:
    """A half sentence for an unknown name: near matches where there are any, then everything that is known."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(name) for name in close)}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."
