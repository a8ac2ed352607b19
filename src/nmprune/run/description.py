"""The `nmprune` key of a model's config.json: what was done to it, said in the model itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from nmprune.architectures import DenseLinear, starred
from nmprune.version import VERSION


def self_description(
    pattern_words: str,
    method: Mapping[str, Any],
    mask_checksum: str,
    pruned: Iterable[str],
    dense: Iterable[DenseLinear],
) -> dict[str, Any]:
    """The key's value; layer and expert numbers are collapsed to "*" with a count.

    Args:
        pattern_words: "N kept of M".
        method: name, and hyper-parameters where they are known.
        mask_checksum: sha256 (hex) of the mask file.
        pruned: names of the pruned linears.
        dense: linears that stayed dense.
    """
    n_pruned: defaultdict[str, int] = defaultdict(int)
    for name in pruned:
        n_pruned[starred(name)] += 1
    n_dense: defaultdict[tuple[str, str], int] = defaultdict(int)
    for one in dense:
        n_dense[starred(one.name), one.reason] += 1
    return {
        "version": VERSION,
        "pattern": pattern_words,
        "group_axis": "input features",
        "method": dict(method),
        "mask_checksum": f"sha256:{mask_checksum}",
        "pruned": dict(n_pruned),
        "dense": [{"linears": name, "count": n, "reason": reason} for (name, reason), n in n_dense.items()],
    }
