"""What the last network of a run makes of every layer, as tables: agreement by role and layer, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmprune.report.layout import Table

_HEADS = ("network = run>", "prior = run>", "network = prior>")


@dataclass(frozen=True)
class AgreementRow:
    """One linear: shares of its groups with the same mask, 0..1; None where there is no prior."""

    layer: int
    role: str
    groups: int
    agreement: float
    prior_run: float | None
    prior_network: float | None


@dataclass(frozen=True)
class LossRow:
    """One decoder layer's held-out losses, None where unknown, and whether the run took the learned masks."""

    layer: int
    accepted: bool | None
    run: float | None
    network: float | None
    prior: float | None


def regeneration_tables(title: str, linears: Sequence[AgreementRow], layers: Sequence[LossRow]) -> list[Table]:
    """By role with a last row for all, then by decoder layer with the losses.

    Args:
        title: of the run.
        linears: in order; at least one.
        layers: in order.
    """
    roles = list(dict.fromkeys(one.role for one in linears))
    by_role = tuple((role, *_shares([one for one in linears if one.role == role])) for role in roles)
    tables = [Table(title, ("role", "groups>", *_HEADS), by_role, ("all", *_shares(linears)))]
    columns = ("layer", *_HEADS, "taken", "loss, run>", "loss, network>", "loss, prior>")
    by_layer = tuple(
        (
            str(layer.layer),
            *_shares([one for one in linears if one.layer == layer.layer])[1:],
            {True: "learned", False: "prior's", None: ""}[layer.accepted],
            *("" if loss is None else f"{loss:.4g}" for loss in (layer.run, layer.network, layer.prior)),
        )
        for layer in layers
    )
    return [*tables, Table("by decoder layer; losses on held-out sequences", columns, by_layer)]


def _shares(linears: Sequence[AgreementRow]) -> tuple[str, ...]:
    """Groups, and the three agreements over them."""
    groups = sum(one.groups for one in linears)
    cells = [f"{groups:,}"]
    for key in ("agreement", "prior_run", "prior_network"):
        values = [(getattr(one, key), one.groups) for one in linears]
        known = bool(groups) and all(value is not None for value, _ in values)
        cells.append(f"{sum(value * n for value, n in values) / groups:.1%}" if known else "")
    return tuple(cells)
