"""The `nmprune` key of a model's config.json: what was done to it, said in the model itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nmprune.architectures import DenseLinear, starred
from nmprune.pattern import Pattern
from nmprune.version import VERSION


def words_of(patterns: Iterable[Pattern]) -> str:
    """ "2 kept of 4"; of several patterns "mixed: 1 kept of 4, 2 kept of 4"."""
    different = sorted(set(patterns))
    return ("mixed: " if len(different) > 1 else "") + ", ".join(pattern.words for pattern in different)


def self_description(
    patterns: Mapping[str, Pattern],
    method: Mapping[str, Any],
    mask_checksum: str,
    dense: Iterable[DenseLinear],
    permuted: Sequence[str] = (),
    permutation_checksum: str = "",
) -> dict[str, Any]:
    """The key's value; layer and expert numbers are collapsed to "*" with a count.

    Args:
        patterns: name of each pruned linear -> its pattern.
        method: name, and hyper-parameters where they are known.
        mask_checksum: sha256 (hex) of the mask file.
        dense: linears that stayed dense.
        permuted: kinds of channels that were reordered before pruning.
        permutation_checksum: sha256 (hex) of the permutation file.
    """
    n_pruned: defaultdict[str, int] = defaultdict(int)
    for name in patterns:
        n_pruned[starred(name)] += 1
    n_dense: defaultdict[tuple[str, str], int] = defaultdict(int)
    for one in dense:
        n_dense[starred(one.name), one.reason] += 1
    return {
        "version": VERSION,
        "pattern": words_of(patterns.values()),
        **({"patterns": _by_name(patterns)} if len(set(patterns.values())) > 1 else {}),
        "group_axis": "input features",
        "method": dict(method),
        "mask_checksum": f"sha256:{mask_checksum}",
        **({"permutation": _permutation(permuted, permutation_checksum)} if permuted else {}),
        "pruned": dict(n_pruned),
        "dense": [{"linears": name, "count": n, "reason": reason} for (name, reason), n in n_dense.items()],
    }


def _permutation(kinds: Sequence[str], checksum: str) -> dict[str, Any]:
    return {"kinds": list(kinds), "checksum": f"sha256:{checksum}"}


def _by_name(patterns: Mapping[str, Pattern]) -> dict[str, str]:
    """Linear -> "N:M"; experts of a kind that have one pattern together, under a name with "*" for their numbers."""
    alike: defaultdict[str, set[Pattern]] = defaultdict(set)
    for name, pattern in patterns.items():
        alike[_experts_starred(name)].add(pattern)
    return {
        together if len(alike[together := _experts_starred(name)]) == 1 else name: str(pattern)
        for name, pattern in patterns.items()
    }


def _experts_starred(name: str) -> str:
    """A name whose numbers after the first, the layer's, are "*"."""
    parts = name.split(".")
    layer = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join([*parts[: layer + 1], *starred(".".join(parts[layer + 1 :])).split(".")])
