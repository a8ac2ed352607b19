"""The recipe's `permute` key: which channels are reordered before pruning."""

from __future__ import annotations

from collections.abc import Sequence

from nmprune.architectures.channels import KINDS
from nmprune.errors import near_matches

ALL = "all"


def kinds_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds in their fixed order, each once; "all" is all of them, and unknown words stay, for `permute_faults`."""
    words = [word.strip() for word in (given.split(",") if isinstance(given, str) else given)]
    wanted: set[str] = set(KINDS) if ALL in words else set()
    wanted |= {word for word in words if word and word != ALL}
    return tuple(kind for kind in KINDS if kind in wanted) + tuple(sorted(wanted - set(KINDS)))


def permute_faults(kinds: Sequence[str], trust_remote_code: bool | None) -> list[str]:
    """What is wrong with a recipe's kinds; code from a model's folder may tell channels apart that ours does not."""
    if kinds and trust_remote_code:
        return ["permute is exact for transformers' own model code only; leave it or trust_remote_code out."]
    unknown = [kind for kind in kinds if kind not in KINDS]
    return [f"permute {kind!r} is no kind of channels. {near_matches(kind, [*KINDS, ALL])}" for kind in unknown]
