"""A whole-model method on a model in memory, without a run folder: its prior, learning, and the masks put into the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nmprune.run.folder import RunFolder
from nmprune.run.learn_whole import learn_whole
from nmprune.run.machine import Machine
from nmprune.run.progress import Report
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, LayerDone, LayerSelection, LinearDone
from nmprune.stream.per_linear import apply

Walk = Callable[[Recipe, Tensor], Iterator[LayerDone]]


def learn_in_memory(
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor,
    report: Report,
    walk: Walk,
) -> Iterator[LayerDone]:
    """Learn, then change the model's weights in place; yields its decoder layers as finished ones.

    What a run folder would hold lies in a temporary one. A copy of the linears' weights is held while the prior is made.

    Args:
        recipe: its method is a `WholeModel`.
        machine: where scratch files lie.
        model: in memory.
        selections: one per layer.
        windows: int64 (n_sequences, seq_len).
        report: called at every sign of life.
        walk: prunes the model in place by the one-shot method of another recipe, and yields its decoder layers.
    """
    with tempfile.TemporaryDirectory(prefix="nmprune-learning-", dir=machine.scratch) as place:
        folder = RunFolder(Path(place))
        folder.progress.mkdir(parents=True)

        def prior(into: RunFolder, one_shot: Recipe, train: Tensor) -> None:
            dense = _copies(model, selections)
            for done in walk(one_shot, train):
                into.save_layer(done)
            with torch.no_grad():
                for parameter, weight in dense:
                    parameter.copy_(weight)

        learn_whole(folder, recipe, machine, model, selections, windows, report, prior)
        for index, selection in enumerate(selections):
            saved = folder.layer(index)
            assert saved is not None
            pruned = saved.pruned()
            apply(model.layers[index], selection.prune, pruned)
            linears = (
                LinearDone(
                    one.name,
                    one.role,
                    one.tensor,
                    pruned[one.name],
                    record.n_tokens,
                    record.seconds,
                    pattern=selection.patterns.get(one.name, recipe.pattern),
                )
                for one, record in zip(selection.prune, saved.linears, strict=True)
            )
            yield LayerDone(index, tuple(linears), selection.dense, saved.seconds)


def _copies(model: DecoderModel, selections: Sequence[LayerSelection]) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter that holds a linear to be pruned, and a copy of it."""
    found = {
        id(parameter): parameter
        for layer, selection in zip(model.layers, selections, strict=True)
        for one in selection.prune
        for parameter in [layer.get_parameter(one.parameter)]
    }
    return [(parameter, parameter.detach().clone()) for parameter in found.values()]
