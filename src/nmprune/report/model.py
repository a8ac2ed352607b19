"""What there is to know of a model before it is pruned, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nmprune.report.layout import Table, facts
from nmprune.report.quantities import shape


@dataclass(frozen=True)
class RoleFacts:
    """The linears of one role and shape.

    Attributes:
        role: place in the decoder layer.
        count: how many the model has.
        shape: (out, in) of each.
        shared_input: role of the first linear that is fed by the same tensor.
        tensor: such a linear's checkpoint tensor.
    """

    role: str
    count: int
    shape: tuple[int, int]
    shared_input: str
    tensor: str


@dataclass(frozen=True)
class ModelFacts:
    """A model as its config (and, where there are any, its shard headers) describe it.

    Attributes:
        model: as the user named it.
        folder: where its weights lie; empty where only the config was read.
        model_type: config.json's.
        n_layers: decoder layers.
        dtype: of the weights on disk, or what config.json says of them.
        parameters: tied ones once.
        linears: prunable, by role and shape.
        dense: what stays dense -> (how many, why).
        patterns: usual pattern -> None where every linear takes it, else the roles that do not.
        pruned: config.json's `nmprune` key, where the model was pruned by us.
    """

    model: str
    folder: str
    model_type: str
    n_layers: int
    dtype: str
    parameters: int
    linears: tuple[RoleFacts, ...]
    dense: Mapping[str, tuple[int, str]]
    patterns: Mapping[str, str | None]
    pruned: Mapping[str, Any] = field(default_factory=dict)


def model_tables(model: ModelFacts) -> list[Table]:
    """The model in a few facts, its linears by role, and what stays dense."""
    weights = sum(one.count * one.shape[0] * one.shape[1] for one in model.linears)
    overview = facts(
        "",
        {
            "model": model.model,
            "weights in": model.folder or "not here: read from the config alone",
            "model_type": f"{model.model_type}, {model.n_layers} decoder layers",
            "dtype": model.dtype,
            "parameters": f"{model.parameters:,}, {weights / model.parameters:.1%} of them in prunable linears",
            "patterns that fit": ", ".join(name for name, roles in model.patterns.items() if roles is None) or "none",
            "that do not": "; ".join(f"{name}: {roles}" for name, roles in model.patterns.items() if roles),
            "pruned already": _pruned(model.pruned),
        },
    )
    rows = tuple((one.role, f"{one.count:,}", shape(one.shape), one.shared_input) for one in model.linears)
    linears = Table("linears", ("role", "count>", "out x in", "same input as"), rows)
    dense = tuple((name, f"{count:,}", reason) for name, (count, reason) in model.dense.items())
    return [overview, linears, Table("dense", ("name", "count>", "why"), dense)]


def _pruned(key: Mapping[str, Any]) -> str:
    return f"{key.get('pattern')} by {key.get('method', {}).get('name')} (nmprune {key.get('version')})" if key else ""
