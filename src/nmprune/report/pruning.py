"""What a finished pruning run found, as tables: one row per role, then the totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from nmprune.report.allocation import allocation_table
from nmprune.report.layout import Table, facts
from nmprune.report.learning import learning_table
from nmprune.report.permutation import permutation_table
from nmprune.report.quantities import duration, error, mean, shape, size
from nmprune.results import LinearResult, Results

_COLUMNS = ("role", "linears>", "shape", "kept>", "output error>", "held-out error>", "solver time>", "notes")
_HELD_OUT = _COLUMNS.index("held-out error>")


def role_table(results: Results) -> Table:
    """One row per role, in the order of the layer: linears, density, mean output error, seconds in the method, notes."""
    by_role: dict[str, list[LinearResult]] = {}
    for one in results.linears:
        by_role.setdefault(one.role, []).append(one)
    title = f"{results.model}: {results.pattern} ({results.pattern_words}) by {results.method['name']}"
    lines = [_COLUMNS, *(_row(role, linears) for role, linears in by_role.items()), _row("all", results.linears)]
    if all(one.held_out_error is None for one in results.linears):
        lines = [line[:_HELD_OUT] + line[_HELD_OUT + 1 :] for line in lines]
    columns, *rows, total = lines
    return Table(title, columns, tuple(rows), total)


def pruning_tables(results: Results) -> list[Table]:
    """All tables of a finished run: roles; mixed patterns, reordered channels and learning where there are some; totals."""
    mixed = [allocation_table(results.allocation)] if results.allocation else []
    permuted = [permutation_table(results.permutation)] if results.permutation else []
    learned = [found] if (found := learning_table(results)) else []
    return [role_table(results), *mixed, *permuted, *learned, totals(results)]


def totals(results: Results) -> Table:
    """Global sparsity, seconds by phase, peak memory, calibration, what stayed dense."""
    phases = ", ".join(f"{phase} {duration(value)}" for phase, value in results.seconds.items())
    calibration = "none needed"
    if results.calibration:
        c = results.calibration
        calibration = f"{c['source']} ({c['split']}), {c['n_sequences']} x {c['seq_len']} tokens, seed {c['seed']}"
    return facts(
        "",
        {
            "global sparsity": f"{results.global_sparsity:.2%} of {results.parameters:,} parameters",
            "weights": f"{results.weights_kept:,} of {results.weights_in_linears:,} kept"
            + (", and moved by the method" if results.updates_weights else ", each as it was"),
            "dense": _dense(results),
            "calibration": calibration,
            "time": f"{duration(sum(results.seconds.values()))} ({phases})" if results.seconds else "",
            "peak memory": "" if results.peak_memory is None else f"{size(results.peak_memory)} above the start",
            "peak on the device": "" if results.device_peak_memory is None else size(results.device_peak_memory),
            "sessions": f"{results.sessions}: the run was resumed" if results.sessions > 1 else "",
        },
    )


def _row(role: str, linears: Sequence[LinearResult]) -> tuple[str, ...]:
    weights = sum(math.prod(one.shape) for one in linears)
    kept = sum(one.density * math.prod(one.shape) for one in linears)
    shapes = list(dict.fromkeys(shape(one.shape) for one in linears))
    return (
        role,
        f"{len(linears):,}",
        shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
        f"{kept / weights:.1%}",
        error(mean(one.output_error for one in linears)),
        error(mean(one.held_out_error for one in linears)),
        duration(sum(one.seconds for one in linears)),
        _notes(linears),
    )


def _notes(linears: Iterable[LinearResult]) -> str:
    """What the method recorded and a reader should know: fallbacks, more damping, inputs that were always zero."""
    notes = [one.notes for one in linears]
    found = {
        "by magnitude: too few tokens": sum("fallback" in note for note in notes),
        "needed more damping": sum(bool(note.get("damping_steps")) for note in notes),
        "with dead inputs": sum(bool(note.get("dead_inputs")) for note in notes),
    }
    return ", ".join(f"{count} {what}" for what, count in found.items() if count)


def _dense(results: Results) -> str:
    reasons: dict[str, int] = {}
    for one in results.dense:
        reasons[one.reason] = reasons.get(one.reason, 0) + 1
    return "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
