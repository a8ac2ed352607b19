"""Finetune a finished run, masks held: a new run folder with the parent's masks and better weights. Resumable."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmprune.checkpoint import as_integers, write_checkpoint
from nmprune.checkpoint.durable import atomic_file, writing
from nmprune.errors import InputError
from nmprune.results import FinetuneResult, Results
from nmprune.run.finetune_card import finetune_card
from nmprune.run.finetune_job import FinetuneJob
from nmprune.run.finetune_parent import Parent, check_low_rank, finetune_recipe, open_parent, uses_autocast
from nmprune.run.finetune_text import FinetuneText, finetune_text
from nmprune.run.folder import RunFolder, write_text
from nmprune.run.machine import Machine, PeakMemory, compute_words, describe
from nmprune.run.progress import Progress, Report, report_untied, silent
from nmprune.run.recipe import Recipe
from nmprune.train.finetune import Standing
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.held_masks import MaskBroken
from nmprune.train.parts import unmasked_tensors


def finetune_run(
    parent: Path,
    settings: FinetuneRecipe,
    out: Path,
    machine: Machine | None = None,
    base: str | None = None,
    report: Report = silent,
) -> Results:
    """Train the kept weights of the finished run `parent` and write the run `out`, or do what is left of it.

    A finished run of the same settings changes nothing. Nothing is written before model, settings and text were found to fit.

    Args:
        parent: a finished run folder; finetuned ones may be finetuned again.
        settings: how; `parent` and `parent_masks` are filled in here.
        out: the new run's folder.
        machine: where.
        base: where the dense model is now; None = where the parent's recipe says.
        report: called at every sign of life.

    Returns:
        What results.json holds.

    Raises:
        InputError: anything the user can put right.
    """
    machine = machine or Machine()
    device = machine.resolve()
    machine.set_threads()
    report(Progress("open", text=f"opening {parent}"))
    origin = open_parent(parent, base)
    peak = PeakMemory(device)
    recipe = finetune_recipe(origin, settings)
    folder = RunFolder(out)
    if folder.path.resolve() == origin.folder.path.resolve():
        raise InputError(f"--out {out} is the run that is to be finetuned. It stays as it is: choose another folder.")
    folder.check(recipe)
    if folder.finished:
        report(Progress("done", 1, 1, f"{out} is finished already; nothing to do."))
        return folder.read_results()
    check_low_rank(origin, settings)
    report_untied(origin.model.untied, report)
    text = finetune_text(recipe, origin.folder, origin.model.config, report)
    settings = recipe.finetune or settings
    with folder.working(recipe):
        autocast = uses_autocast(settings.autocast, device)
        words = compute_words(torch.bfloat16 if autocast else torch.float32, device)
        sessions = folder.count_session(origin.results.model_fingerprint, words)
        trust = recipe.trust_remote_code
        job = FinetuneJob(origin.model, origin.masks, origin.dense, settings, text, device, autocast, trust)
        standing = job.train(folder, machine.checkpoint_minutes, report)
        after = job.finish()
        tensors = _write(folder, origin, recipe, job, report)
        found = _found(recipe, text, standing, after, words, tensors)
        results = _results(origin.results, found, sessions, peak, describe(device, torch.float32))
        write_text(folder.card, finetune_card(recipe, results))
        folder.finish(results)
    report(Progress("done", 1, 1, f"finished: {folder.model}"))
    return results


def _write(folder: RunFolder, origin: Parent, recipe: Recipe, job: FinetuneJob, report: Report) -> tuple[str, ...]:
    """Everything but results.json and the card; returns the tensors without a mask that may have moved."""
    theirs = origin.folder
    for source, place in (
        (theirs.masks_file, folder.masks_file),
        (theirs.permutation_file, folder.permutation_file),
        (theirs.allocation_file, folder.allocation_file),
        (theirs.tokens_file, folder.tokens_file),
    ):
        if source.is_file():
            _copy(source, place)
    described = origin.model
    moved = unmasked_tensors(job.student, described.pieces, job.trained, origin.masks)
    with writing(folder.model, 0):
        if folder.model.exists():  # of a session that was killed before results.json: it may hold other weights
            shutil.rmtree(folder.model)
    _write_model(folder, origin, recipe, job.values(), moved, report)
    return tuple(sorted(moved))


def _write_model(
    folder: RunFolder,
    origin: Parent,
    recipe: Recipe,
    values: Mapping[str, Tensor],
    moved: set[str],
    report: Report,
) -> None:
    """The parent's checkpoint with the trained tensors in it, each in the dtype it had."""
    base, masks = origin.checkpoint, origin.masks
    place = {piece.tensor: (name, piece) for name, parts in origin.model.pieces.items() for piece in parts}

    def trained(tensor: str, before: Tensor) -> Tensor:
        name, piece = place[tensor]
        value = values[name].detach() if piece.region is None else piece.region.of(values[name].detach())
        value = value.cpu().to(before.dtype).contiguous()
        # checked and not masked once more: that would hide a merge that lost the masks, and the losses would be another model's
        if tensor in masks.masks and as_integers(value)[~masks.mask(tensor)].any():
            raise MaskBroken(
                f"{tensor} has masked weights that are not +0.0 after training. This is a fault of nmprune."
            )
        return value

    done = 0

    def wrote(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report(Progress("model", done, base.nbytes))

    assert recipe.finetune is not None
    told = {**base.config["nmprune"], "finetuned": {**recipe.finetune.to_dict(), "beside_masked": sorted(moved)}}
    report(Progress("model", 0, base.nbytes, f"writing {folder.model} ({base.nbytes / 2**20:,.0f} MiB)"))
    write_checkpoint(base, folder.model, trained, {*masks.masks, *moved}, {"nmprune": told}, wrote)


def _copy(source: Path, place: Path) -> None:
    with writing(place, source.stat().st_size), source.open("rb") as content, atomic_file(place) as file:
        shutil.copyfileobj(content, file)


def _found(
    recipe: Recipe,
    text: FinetuneText,
    standing: Standing,
    after: dict[str, float],
    compute: str,
    tensors: tuple[str, ...],
) -> FinetuneResult:
    settings = recipe.finetune
    assert settings is not None
    n_windows = standing.step * settings.batch_size * settings.accumulation
    return FinetuneResult(
        parent=settings.parent,
        loss=settings.loss,
        text=text.name,
        split=text.split,
        n_tokens=n_windows * text.windows.shape[1],
        epochs=n_windows / len(text.windows),
        steps=standing.step,
        best_step=standing.best_step,
        seconds=standing.seconds,
        compute=compute,
        tensors=tensors,
        held_out_before={"loss": standing.start_loss, "nll": standing.start_nll},
        held_out_after={"loss": after["held_out_loss"], "nll": after["held_out_nll"]},
    )


def _results(
    parent: Results, found: FinetuneResult, sessions: int, peak: PeakMemory, machine: dict[str, Any]
) -> Results:
    """The parent's results without what no longer holds: output errors were those of other weights."""
    linears = tuple(dataclasses.replace(one, output_error=None, held_out_error=None) for one in parent.linears)
    return dataclasses.replace(
        parent,
        updates_weights=True,
        seconds={"finetune": found.seconds},
        sessions=sessions,
        peak_memory=peak.host(),
        device_peak_memory=peak.device(),
        machine=machine,
        linears=linears,
        finetune=found,
    )
