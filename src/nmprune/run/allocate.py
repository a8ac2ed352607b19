"""The phase that mixes patterns: measure the dense model, choose a pattern per linear, keep the choice in the run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from nmprune.errors import InputError
from nmprune.prepare.allocation import Allocation, Measured, allocate
from nmprune.prepare.choices import Choice, name_of
from nmprune.prepare.unit_errors import measure_layers
from nmprune.results import AllocationResult
from nmprune.run import allocation_file
from nmprune.run.folder import RunFolder, write_text
from nmprune.run.machine import Machine
from nmprune.run.progress import Progress, Report
from nmprune.run.recipe import Recipe
from nmprune.run.stream_options import stream_options
from nmprune.stream import DecoderModel, LayerSelection, LayerStep, select
from nmprune.stream.selection import with_patterns

DENSE_REASON = "allocated: dense"


def select_fitting(model: DecoderModel, recipe: Recipe) -> list[LayerSelection]:
    """Every decoder layer's selection, where every linear takes every pattern that it may get.

    Raises:
        InputError: as `select`.
    """
    return [select(model, pattern, recipe.exclude) for pattern in recipe.patterns][-1]


def allocated(
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor | None,
    report: Report,
    folder: RunFolder | None = None,
) -> tuple[list[LayerSelection], AllocationResult | None, float]:
    """The selections with a pattern per linear, where the recipe mixes them; what an earlier session found is taken over.

    Args:
        recipe: what is done.
        machine: how.
        model: the dense model.
        selections: from `select_fitting`.
        windows: int64 (n_sequences, seq_len) calibration token ids.
        report: called at every sign of life.
        folder: the run, where there is one; its allocation.json is read or written.

    Returns:
        Selections, the facts for results.json (None where every linear gets one pattern), and the seconds it took.

    Raises:
        InputError: the density is not possible, the model's numbers cannot be used, or allocation.json is damaged.
    """
    if not recipe.choices:
        return list(selections), None, 0.0
    assert windows is not None
    if folder is not None and folder.allocation_file.is_file():
        found, seconds = allocation_file.read(folder.allocation_file)
        _check_belongs(found, folder, selections)
        report(Progress("allocate", 1, 1, f"allocation taken over: {summary(found)}"))
    else:
        start = time.perf_counter()
        found = _measure(recipe, machine, model, selections, windows, report)
        seconds = time.perf_counter() - start
        if folder is not None:
            write_text(folder.allocation_file, allocation_file.to_json(found, seconds))
        report(Progress("allocate", model.n_layers, model.n_layers, f"allocated: {summary(found)}"))
    if not any(found.chosen):
        raise InputError("nothing is left to prune: the allocation keeps every linear dense. Choose a smaller density.")
    return with_patterns(selections, found.by_linear, DENSE_REASON), facts_of(found), seconds


def _measure(
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor,
    report: Report,
) -> Allocation:
    settings = recipe.allocate
    words = ", ".join(map(name_of, recipe.choices))
    report(Progress("allocate", 0, model.n_layers, f"measuring every linear under {words}"))
    options = stream_options(recipe, machine)
    layers: list[Measured] = []
    steps = measure_layers(
        model,
        windows,
        selections,
        recipe.choices,
        options,
        owl_m=settings.owl_m if settings.rule == "owl" else None,
        scratch=machine.scratch,
    )
    for step in steps:
        if isinstance(step, LayerStep):
            report(Progress("allocate", step.index + step.done / max(step.total, 1) * 0.999, model.n_layers))
        else:
            layers.append(step)
            text = f"decoder layer {step.layer + 1}/{model.n_layers}: measured for the allocation"
            report(Progress("allocate", step.layer + 1, model.n_layers, text))
    return allocate(layers, recipe.choices, recipe.density, settings.rule, owl_lambda=settings.owl_lambda)


def _check_belongs(found: Allocation, folder: RunFolder, selections: Sequence[LayerSelection]) -> None:
    """Raise InputError unless the allocation is of exactly these linears."""
    mine = {linear.name for selection in selections for linear in selection.prune}
    strange = sorted(mine ^ found.by_linear.keys())
    if strange:
        raise InputError(
            f"{folder.allocation_file} is of other linears than this model's ({len(strange)} differ, such as {strange[0]}). "
            "Delete it and run the command again: it is measured anew."
        )


def summary(found: Allocation) -> str:
    """What was chosen, in a line."""
    counts: dict[Choice, int] = dict.fromkeys(found.choices, 0)
    for unit, choice in zip(found.units, found.chosen, strict=True):
        counts[choice] += len(unit.linears)
    linears = ", ".join(f"{name_of(choice)} for {count}" for choice, count in counts.items() if count)
    return f"{linears} linears; density {found.kept / found.n_weights:.4f} of {found.density:g} asked"


def facts_of(found: Allocation) -> AllocationResult:
    """What results.json says of it."""
    return AllocationResult(
        rule=found.rule,
        choices=tuple(map(name_of, found.choices)),
        density_asked=found.density,
        density=found.kept / found.n_weights,
        weights=found.n_weights,
        budget=found.budget,
        kept=found.kept,
        error=found.error,
        least_error=found.least_error,
        exact=found.exact,
        roles={role: {name_of(choice): n for choice, n in row.items()} for role, row in found.counts().items()},
    )
