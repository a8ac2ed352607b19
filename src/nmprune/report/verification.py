"""The verdict on a run, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nmprune.report.layout import Table, facts

_SHOWN = 20


@dataclass(frozen=True)
class FindingRow:
    """One thing that is wrong: with which tensor, what, how often, and the facts in words."""

    tensor: str
    what: str
    count: int
    detail: str = ""


def verdict_tables(
    ok: bool, checked: Mapping[str, str], faults: Sequence[str], findings: Sequence[FindingRow]
) -> list[Table]:
    """What was checked and the verdict; then every fault of the run as a whole and the first findings by tensor.

    Args:
        ok: the verdict.
        checked: what was compared -> how much of it.
        faults: sentences about the run as a whole.
        findings: what is wrong with single tensors.
    """
    n_wrong = len(faults) + len(findings)
    verdict = "OK" if ok else f"FAILED: {n_wrong} finding{'s' if n_wrong != 1 else ''}"
    tables = [facts("", {**checked, "verdict": verdict})]
    if faults:
        tables.append(Table("wrong with the run", ("",), tuple((fault,) for fault in faults)))
    if findings:
        rows = tuple((one.tensor, one.what, f"{one.count:,}", one.detail) for one in findings[:_SHOWN])
        rest = len(findings) - _SHOWN
        more = (f"and {rest:,} more (--json lists all)", "", "", "") if rest > 0 else ()
        tables.append(Table("wrong with tensors", ("tensor", "what", "count>", "detail"), rows, more))
    return tables
