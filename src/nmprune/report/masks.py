"""Mask files and their differences, as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from nmprune.architectures import starred
from nmprune.checkpoint import MaskDiff, MaskFile, TensorDiff, TensorMask
from nmprune.report.layout import Table, facts


def role_of(tensor: str) -> str:
    """A tensor's place in its decoder layer: "model.layers.3.mlp.up_proj.weight" -> "mlp.up_proj"."""
    parts = tensor.removesuffix(".weight").split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return starred(".".join(parts[first + 1 :]))


def diff_tables(a: str, b: str, diff: MaskDiff) -> list[Table]:
    """One row per role and the totals; then what only one of the two has.

    Args:
        a: what to call the first file.
        b: what to call the second file.
        diff: their comparison.
    """
    by_role: dict[str, list[TensorDiff]] = {}
    for one in diff.tensors:
        by_role.setdefault(role_of(one.name), []).append(one)
    columns = ("role", "tensors>", "groups>", "groups that differ>", "share>", "kept by both>", "of other patterns>")
    rows = tuple(_diff_row(role, tensors) for role, tensors in by_role.items())
    total = _diff_row("all", diff.tensors) if diff.tensors else ()
    tables = [Table(f"masks: {a} against {b}", columns, rows, total)] if diff.tensors else []
    if diff.only_in_a or diff.only_in_b:
        rows = tuple((a, *row) for row in _named(diff.only_in_a)) + tuple((b, *row) for row in _named(diff.only_in_b))
        tables.append(Table("masks that only one of them has", ("only in", "tensor", "count>"), rows))
    return tables


def mask_tables(name: str, masks: MaskFile) -> list[Table]:
    """A mask file's origin, and one row per role."""
    by_role: dict[str, list[TensorMask]] = {}
    for tensor, entry in masks.masks.items():
        by_role.setdefault(role_of(tensor), []).append(entry)
    origin = {
        "mask file": name,
        "model": masks.model,
        "fingerprint": masks.fingerprint,
        "method": masks.method,
        "written by": f"nmprune {masks.nmprune_version}" if masks.nmprune_version else "",
        "pattern": ", ".join(pattern.words for pattern in masks.patterns()),
        "legal": "yes: every group keeps exactly what its pattern says",
    }
    mixed = len(masks.patterns()) > 1
    rows = tuple(_mask_row(role, entries, mixed) for role, entries in by_role.items())
    total = _mask_row("all", masks.masks.values(), mixed)
    return [facts("", origin), Table("", ("role", "tensors>", "weights>", "kept>", "tensors by pattern"), rows, total)]


def _diff_row(role: str, tensors: Iterable[TensorDiff]) -> tuple[str, ...]:
    each = tuple(tensors)
    total = MaskDiff(each, (), ()).total
    n_other = sum(not one.same_pattern for one in each)
    return (
        role,
        f"{len(each):,}",
        f"{total.n_groups:,}",
        f"{total.n_groups_differ:,}",
        f"{total.n_groups_differ / total.n_groups:.2%}",
        f"{total.share_in_common:.2%}",
        f"{n_other:,}" if n_other else "",
    )


def _mask_row(role: str, entries: Iterable[TensorMask], mixed: bool) -> tuple[str, ...]:
    each = tuple(entries)
    weights = sum(math.prod(entry.shape) for entry in each)
    kept = f"{sum(entry.n_kept for entry in each) / weights:.1%}"
    counts = Counter(entry.pattern for entry in each)
    patterns = ", ".join(f"{pattern}: {count:,}" for pattern, count in sorted(counts.items())) if mixed else ""
    return role, f"{len(each):,}", f"{weights:,}", kept, patterns


def _named(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names with layer and expert numbers as "*", and how many of each."""
    counts: dict[str, int] = {}
    for name in names:
        counts[starred(name)] = counts.get(starred(name), 0) + 1
    return [(name, f"{count:,}") for name, count in counts.items()]
