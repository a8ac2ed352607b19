"""What analyzing a run found, as tables: by role, the worst linears, and how error and information go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmprune.report.layout import Table
from nmprune.report.quantities import error, mean

_WORST = 8


@dataclass(frozen=True)
class AnalysedRow:
    """One linear on a text.

    Attributes:
        name: unique in the model.
        role: its place in the decoder layer.
        n_outputs: out_features.
        calibration_error: relative output error on the calibration tokens; None where it was not measured.
        error: the same on the text.
        nats: information for each share of noise.
        determines_input: whether the dense output tells all of the input.
        mean_share: the first term of eq. 11 as a share of both.
        kept: both terms as a share of the dense weights'.
    """

    name: str
    role: str
    n_outputs: int
    calibration_error: float | None
    error: float
    nats: tuple[float, ...]
    determines_input: bool
    mean_share: float
    kept: float


@dataclass(frozen=True)
class CorrelationRow:
    """One rank correlation in words and numbers: over what, of how many, against nats and against nats per output."""

    over: str
    noise_share: float
    n: int
    nats: float | None
    nats_per_output: float | None
    least: float | None
    most: float | None


def analysis_tables(
    title: str,
    where: str,
    noise_shares: Sequence[float],
    linears: Sequence[AnalysedRow],
    correlations: Sequence[CorrelationRow],
) -> list[Table]:
    """By role with a last row for all, then the linears of the largest errors, then the rank correlations.

    Args:
        title: of the run.
        where: the text, as a phrase.
        noise_shares: c of each of `nats`.
        linears: in order.
        correlations: in order.
    """
    by_role: dict[str, list[AnalysedRow]] = {}
    for one in linears:
        by_role.setdefault(one.role, []).append(one)
    nats = (f"nats per output, c {c:g}>" for c in noise_shares)
    heads = ("linears>", "error, calibration>", "error, this text>", *nats)
    heads += ("Z tells x>", "eq. 11: mean>", "kept>")
    roles = tuple(_row(role, f"{len(rows)}", rows) for role, rows in by_role.items())
    tables = [Table(f"{title}; {where}", ("role", *heads), roles, _row("all", f"{len(linears)}", linears))]
    if len(linears) > _WORST:
        worst = sorted(linears, key=lambda one: -one.error)[:_WORST]
        columns = ("linear", *heads[1:])
        rows = tuple((name, *rest) for name, _, *rest in (_row(one.name, "", [one]) for one in worst))
        tables.append(Table("largest errors on this text", columns, rows))
    columns = ("", "noise c>", "linears>", "with nats>", "with nats per output>")
    rows = tuple(
        (one.over, f"{one.noise_share:g}", f"{one.n}", _signed(one.nats), _signed(one.nats_per_output), _range(one))
        for one in correlations
    )
    return [*tables, Table("rank correlation of error and information, over", (*columns, "least to most>"), rows)]


def _row(first: str, count: str, rows: Sequence[AnalysedRow]) -> tuple[str, ...]:
    n_shares = len(rows[0].nats) if rows else 0
    nats = (mean(one.nats[place] / one.n_outputs for one in rows) for place in range(n_shares))
    return (
        first,
        count,
        error(mean(one.calibration_error for one in rows)),
        error(mean(one.error for one in rows)),
        *(f"{value:.3f}" for value in nats if value is not None),
        f"{sum(one.determines_input for one in rows)}",
        _share(mean(one.mean_share for one in rows)),
        _share(mean(one.kept for one in rows)),
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _range(one: CorrelationRow) -> str:
    return "" if one.least is None else f"{_signed(one.least)} to {_signed(one.most)}"
