"""The phase that reorders channels before pruning: find permutations, keep them, read the model through them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from nmprune.architectures.channels import Channels, Kind
from nmprune.checkpoint.permutation_file import PermutationFile, read_permutation, write_permutation
from nmprune.errors import InputError
from nmprune.prepare.permutation import SpaceFound, check_kinds, find_permutations
from nmprune.report.permutation import permutation_words
from nmprune.results import PermutationResult
from nmprune.run.folder import RunFolder, write_text
from nmprune.run.machine import Machine
from nmprune.run.progress import Progress, Report
from nmprune.run.recipe import Recipe
from nmprune.run.stream_options import stream_options
from nmprune.stream import DecoderModel, LayerSelection, LayerStep
from nmprune.stream.permuted import channels_of, permute
from nmprune.version import VERSION


def check_permute(recipe: Recipe, model: DecoderModel, selections: Sequence[LayerSelection]) -> None:
    """Raise InputError where the recipe asks for permutations that this model cannot have; nothing is read or written."""
    if recipe.permute:
        check_kinds(channels_of(model), kinds_asked(recipe), recipe.pattern, selections)


def permute_model(
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor | None,
    report: Report,
    folder: RunFolder | None = None,
) -> PermutationFile | None:
    """Reorder the model's channels as the recipe asks; what an earlier session found is taken over.

    Args:
        recipe: what is done.
        machine: how.
        model: the dense model; from here on it is the permuted one.
        selections: what will be pruned.
        windows: int64 (n_sequences, seq_len) calibration token ids; None = judged by weights alone.
        report: called at every sign of life.
        folder: where the permutations are kept; None for a model in memory, which is changed in place.

    Returns:
        What was found; None where the recipe asks for nothing.

    Raises:
        InputError: the permutations in the folder belong to another model, or the disk is full.
    """
    if not recipe.permute:
        return None
    channels = channels_of(model)
    if folder is not None and folder.permutation_file.is_file():
        found = read_permutation(folder.permutation_file)
        report(
            Progress(
                "permute", text=f"resuming: {folder.permutation_file.name} is there: {permutation_words(found.results)}"
            )
        )
    else:
        start = time.perf_counter()
        found = _find(recipe, machine, model, channels, selections, windows, report)
        if folder is not None:
            write_permutation(folder.permutation_file, found)
            write_text(folder.permute_seconds, f"{time.perf_counter() - start:.3f}")
        report(Progress("permute", text=permutation_words(found.results)))
    permute_as(model, found, channels)
    return found


def permute_as(model: DecoderModel, found: PermutationFile, channels: Channels | None = None) -> None:
    """Read (in memory: make) a model as it is after a run's permutations.

    Args:
        model: not permuted yet.
        found: a run's permutations.
        channels: the model's spaces, where they are at hand.

    Raises:
        InputError: the model has no such channels.
    """
    channels = channels or channels_of(model)
    for name, permutation in found.permutations.items():
        shape = channels.spaces[name].shape if name in channels.spaces else "no such channels"
        if shape != tuple(permutation.shape):
            raise InputError(
                f"the permutation of {name} is for (blocks, channels) {tuple(permutation.shape)}; this model has {shape}. It "
                "belongs to another model."
            )
    permute(model, channels, found.permutations)


def _find(
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    channels: Channels,
    selections: Sequence[LayerSelection],
    windows: Tensor | None,
    report: Report,
) -> PermutationFile:
    judged_by = "weights and their inputs" if windows is not None else "weights alone: the method needs no calibration"
    n_layers = model.n_layers
    passes = 2 if "residual" in recipe.permute else 1
    report(Progress("permute", 0, passes * n_layers, f"reordering {', '.join(recipe.permute)} channels by {judged_by}"))
    options = stream_options(recipe, machine)
    results: list[PermutationResult] = []
    permutations: dict[str, Tensor] = {}
    steps = find_permutations(
        model, channels, windows, selections, recipe.pattern, kinds_asked(recipe), options, scratch=machine.scratch
    )
    for step in steps:
        if isinstance(step, SpaceFound):
            results.append(step.result)
            if step.permutation is not None:
                permutations[step.result.name] = step.permutation
        elif isinstance(step, LayerStep):
            done = step.index + step.done / step.total + (n_layers if step.phase == "judge" else 0)
            report(Progress("permute", done, passes * n_layers))
    fingerprint = model.checkpoint.fingerprint() if model.checkpoint is not None else ""
    return PermutationFile(
        permutations, tuple(results), recipe.permute, str(recipe.pattern), recipe.model, fingerprint, VERSION
    )


def kinds_asked(recipe: Recipe) -> tuple[Kind, ...]:
    """What a recipe asks for; it was checked when the recipe was made."""
    return cast(tuple[Kind, ...], recipe.permute)
