"""Finetune a finished run, masks held: a new run folder with the parent's masks and better weights. Resumable."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmprune.checkpoint import Checkpoint, MaskFile, as_integers, checksum, read_masks, write_checkpoint
from nmprune.checkpoint.durable import atomic_file, writing
from nmprune.errors import InputError
from nmprune.results import FinetuneResult, Results
from nmprune.run.base import find_base, wrong_base
from nmprune.run.finetune_card import finetune_card
from nmprune.run.finetune_job import FinetuneJob
from nmprune.run.finetune_text import FinetuneText, finetune_text
from nmprune.run.folder import RunFolder, write_text
from nmprune.run.machine import Machine, PeakMemory, compute_words, describe
from nmprune.run.progress import Progress, Report, report_untied, silent
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel
from nmprune.train.finetune import Standing
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.held_masks import MaskBroken
from nmprune.train.masked_low_rank import check_rank
from nmprune.train.parts import masked_parameters, unmasked_tensors


@dataclass
class _Parent:
    """What is finetuned, and its description without weights."""

    folder: RunFolder
    recipe: Recipe
    results: Results
    masks: MaskFile
    model: DecoderModel
    dense: Path

    @property
    def checkpoint(self) -> Checkpoint:
        assert self.model.checkpoint is not None
        return self.model.checkpoint


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
    origin = _open(parent, base)
    recipe = _recipe(origin, settings)
    folder = RunFolder(out)
    if folder.path.resolve() == origin.folder.path.resolve():
        raise InputError(f"--out {out} is the run that is to be finetuned. It stays as it is: choose another folder.")
    folder.check(recipe)
    if folder.finished:
        report(Progress("done", 1, 1, f"{out} is finished already; nothing to do."))
        return folder.read_results()
    if settings.lora:
        parameters = origin.model.model.state_dict()
        masked = masked_parameters(origin.model.pieces, origin.masks)
        check_rank({name: tuple(parameters[name].shape) for name in parameters if name in masked}, settings.lora)
    report_untied(origin.model.untied, report)
    text = finetune_text(recipe, origin.folder, origin.model.config, report)
    peak = PeakMemory(device)
    settings = recipe.finetune or settings
    with folder.working(recipe):
        autocast = _autocast(settings.autocast, device)
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


def _open(parent: Path, base: str | None) -> _Parent:
    folder = RunFolder(parent)
    results, recipe = folder.read_results(), folder.read_recipe()
    masks = read_masks(folder.masks_file)
    if checksum(folder.masks_file) != results.mask_checksum:
        raise InputError(
            f"{folder.masks_file} is not the file that the run's results.json names. `nmprune verify {parent}` says more."
        )
    dense = find_base(folder, recipe.model, base)
    fingerprint = Checkpoint.open(dense).fingerprint()
    if fingerprint != results.model_fingerprint:
        raise wrong_base(dense, fingerprint, results.model_fingerprint)
    trust = recipe.trust_remote_code
    model = DecoderModel.open(folder.model, dtype="float32", trust_remote_code=trust, allow_sparse=True)
    return _Parent(folder, recipe, results, masks, model, dense)


def _recipe(origin: _Parent, settings: FinetuneRecipe) -> Recipe:
    """The parent's recipe with the finetuning in it: the new run says all that led to it."""
    parent = str(origin.folder.path.resolve())
    filled = dataclasses.replace(settings, parent=parent, parent_masks=origin.results.mask_checksum)
    return dataclasses.replace(origin.recipe, finetune=filled)


def _autocast(wanted: str, device: torch.device) -> bool:
    """Whether forwards are in bfloat16; "auto": where the processor has units for it (AMX, AVX-512 BF16, a GPU)."""
    if wanted != "auto":
        return wanted == "yes"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _write(folder: RunFolder, origin: _Parent, recipe: Recipe, job: FinetuneJob, report: Report) -> tuple[str, ...]:
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
    origin: _Parent,
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
