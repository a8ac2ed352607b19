"""Which channels were reordered before pruning, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from nmprune.report.layout import Table
from nmprune.results import PermutationResult


def permutation_table(results: Sequence[PermutationResult]) -> Table:
    """One row per kind: how many channel spaces were reordered, and the share of the scores that is lost before and after."""
    columns = ("kind", "spaces>", "reordered>", "score lost, given order>", "score lost, new order>")
    return Table("channels reordered before pruning", columns, tuple(_row(*one) for one in _by_kind(results).items()))


def permutation_words(results: Sequence[PermutationResult]) -> str:
    """The same in a line."""
    rows = [_row(*one) for one in _by_kind(results).items()]
    return "; ".join(f"{kind} {taken} of {n} reordered, score lost {was} -> {now}" for kind, n, taken, was, now in rows)


def _by_kind(results: Sequence[PermutationResult]) -> dict[str, list[PermutationResult]]:
    kinds: dict[str, list[PermutationResult]] = {}
    for one in results:
        kinds.setdefault(one.kind, []).append(one)
    return kinds


def _row(kind: str, found: Sequence[PermutationResult]) -> tuple[str, ...]:
    before, after = (sum(shares) / len(found) for shares in ([o.before for o in found], [o.after for o in found]))
    taken = sum(one.taken > 0 for one in found)
    return kind, f"{len(found):,}", f"{taken:,}", f"{1 - before:.2%}", f"{1 - after:.2%}"
