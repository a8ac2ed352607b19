"""Which linears will be pruned, which stay dense and why: settled for the whole model before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from nmprune.architectures import DenseLinear, Linear
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.stream.model import DecoderModel


@dataclass(frozen=True)
class LayerSelection:
    """One decoder layer's linears.

    Attributes:
        prune: to be pruned, in order of execution.
        dense: to stay dense, with reasons.
        patterns: linear name -> its pattern, where it is not the run's.
    """

    prune: tuple[Linear, ...]
    dense: tuple[DenseLinear, ...]
    patterns: Mapping[str, Pattern] = field(default_factory=dict)


def select(model: DecoderModel, pattern: Pattern, exclude: Sequence[str] = ()) -> list[LayerSelection]:
    """Every decoder layer's selection.

    Args:
        model: the model; no weights are read.
        pattern: N kept of M.
        exclude: shell patterns matched against a linear's full name and its role ("*.down_proj", "model.layers.0.*").

    Raises:
        InputError: a linear cannot take the pattern and is not excluded, a pattern of `exclude` matches nothing, or nothing
            is left to prune.
    """
    unused = set(exclude)
    selections = []
    for index in range(model.n_layers):
        linears, dense = model.linears(index)
        prune = []
        for linear in linears:
            hits = [glob for glob in exclude if fnmatchcase(linear.name, glob) or fnmatchcase(linear.role, glob)]
            unused.difference_update(hits)
            if hits:
                dense.append(DenseLinear(linear.name, linear.shape, f"excluded by {hits[0]!r}"))
                continue
            _check_fits(index, linear, pattern)
            prune.append(linear)
        selections.append(LayerSelection(tuple(prune), tuple(dense)))
    if unused:
        roles = sorted({linear.role for index in range(model.n_layers) for linear in model.linears(index)[0]})
        raise InputError(
            f"exclude {', '.join(map(repr, sorted(unused)))} matches no linear. Roles here: {', '.join(roles)}; full names look "
            f"like {model.linears(0)[0][0].name}."
        )
    if not any(selection.prune for selection in selections):
        raise InputError("nothing is left to prune: every linear is excluded.")
    return selections


def with_patterns(
    selections: Sequence[LayerSelection], chosen: Mapping[str, Pattern | None], reason: str
) -> list[LayerSelection]:
    """The selections with a pattern of its own for every linear.

    Args:
        selections: of every decoder layer.
        chosen: linear name -> its pattern, None = stays dense; all linears that are to be pruned are in it.
        reason: why a linear stays dense, for reports.
    """
    with_own = []
    for selection in selections:
        dense = [DenseLinear(one.name, one.shape, reason) for one in selection.prune if chosen[one.name] is None]
        patterns = {one.name: pattern for one in selection.prune if (pattern := chosen[one.name]) is not None}
        prune = tuple(one for one in selection.prune if one.name in patterns)
        with_own.append(LayerSelection(prune, (*selection.dense, *dense), patterns))
    return with_own


def _check_fits(index: int, linear: Linear, pattern: Pattern) -> None:
    try:
        pattern.check_divides(linear.shape[1])
    except InputError as error:
        text = str(error).replace("--exclude", f"--exclude '*.{linear.role.rpartition('.')[2]}'")
        raise InputError(
            f"decoder layer {index}, {linear.role}: {text} (weight shape {linear.shape}, {linear.name})"
        ) from None


def stage_of(linear: Linear) -> str:
    """What execution reaches together: one shared input, or all experts of a kind (all gate_up, all down)."""
    return linear.shared_input if linear.in_module.expert is None else linear.parameter
