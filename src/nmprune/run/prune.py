"""One pruning run, put together: locate, calibrate, prune layer by layer, write masks, model and results. Resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmprune.distributed import Processes, started
from nmprune.errors import InputError
from nmprune.methods import Pruned
from nmprune.methods.base import WholeModel
from nmprune.report.quantities import mean
from nmprune.results import Results
from nmprune.run.allocate import allocated, select_fitting
from nmprune.run.card import model_card
from nmprune.run.folder import RunFolder, write_text
from nmprune.run.gradients import GradientFiles, collect_gradients, token_weights
from nmprune.run.learn_layers import (
    LayerLearningFiles,
    learned_words,
    learning_of,
    live_words,
)
from nmprune.run.learn_whole import check_shard, learn_whole
from nmprune.run.machine import Machine, PeakMemory, compute_words, describe
from nmprune.run.outputs import Outputs
from nmprune.run.permute import check_permute, permute_model
from nmprune.run.prior_masks import check_prior
from nmprune.run.progress import Progress, Report, report_untied, silent
from nmprune.run.recipe import Recipe
from nmprune.run.shared_run import find_model_once, own_machine, tell_tokens, wait_for, working
from nmprune.run.stream_options import stream_options
from nmprune.run.tokens import calibration_windows
from nmprune.stream import (
    DecoderModel,
    DTypeName,
    LayerDone,
    LayerSelection,
    LayerStep,
    prune_layers,
    refuse_sparse,
)


def prune_run(
    recipe: Recipe,
    out: Path,
    machine: Machine | None = None,
    token_ids: Tensor | None = None,
    report: Report = silent,
) -> Results:
    """Do a run, or what is left of it, in the folder `out`.

    A finished run of the same recipe changes nothing. Nothing is written before the model, the recipe and the calibration
    text were found to fit each other. The processes that torchrun started share the run: all call this, and process 0
    writes and reports.

    Args:
        recipe: what to do.
        out: the run's folder; absent, empty, or holding the same recipe.
        machine: how to do it.
        token_ids: int64 (n_sequences, seq_len) in place of the recipe's calibration text.
        report: called at every sign of life.

    Returns:
        What results.json holds.

    Raises:
        InputError: anything the user can put right.
    """
    if recipe.finetune is not None:
        raise InputError(
            f"this recipe is of a finetuning of {recipe.finetune.parent}, not of a pruning run. Give it to `nmprune finetune`."
        )
    machine = machine or Machine()
    with started(machine.resolve()) as processes:
        machine = own_machine(machine, processes)
        return _run(recipe, RunFolder(out), machine, token_ids, report if processes.is_main else silent, processes)


def _run(
    recipe: Recipe,
    folder: RunFolder,
    machine: Machine,
    token_ids: Tensor | None,
    report: Report,
    processes: Processes,
) -> Results:
    device = machine.resolve()
    check_shard(recipe, processes)
    if processes.is_main:
        folder.check(recipe)
    if processes.tell(folder.finished):
        return _nothing_to_do(folder, report, processes)
    report(Progress("open", text=f"opening {recipe.model}"))
    machine.set_threads()
    source = find_model_once(recipe.model, processes)
    peak = PeakMemory(device)  # after a GGUF file was dequantised, where it had to be
    model = _open(recipe, source, device, report)
    selections = select_fitting(model, recipe)
    check_permute(recipe, model, selections)
    check_prior(recipe, model, selections)
    windows, origin = None, None
    if processes.is_main:
        windows, origin = _tokens(folder, recipe, source, model, token_ids, report)
    windows, origin = tell_tokens(windows, origin, processes)
    with working(folder, recipe, processes):
        if processes.tell(folder.finished):
            return _nothing_to_do(folder, report, processes)
        assert model.checkpoint is not None
        sessions = 0
        if processes.is_main:
            sessions = folder.count_session(model.checkpoint.fingerprint(), compute_words(model.dtype, device))
            if windows is not None and origin is not None:
                folder.save_tokens(windows, origin)
        with _one_after_the_other(recipe, folder, processes):
            permute_model(recipe, machine, model, selections, windows, report, folder)
            selections, allocation, allocate_seconds = allocated(
                recipe, machine, model, selections, windows, report, folder
            )
        _layers(folder, recipe, machine, model, selections, windows, report, processes)
        results = None
        if processes.is_main:
            outputs = Outputs(folder, recipe, model, selections, allocation, allocate_seconds)
            outputs.write_masks(report)
            outputs.write_model(report)
            results = outputs.results(origin, sessions, peak, describe(device, model.dtype))
            write_text(folder.card, model_card(recipe, results))
            LayerLearningFiles(folder).keep_last_state(recipe)
            folder.finish(results)
        processes.barrier()
        wait_for(folder.results_file, processes)
    report(Progress("done", 1, 1, f"finished: {folder.model}"))
    return results or folder.read_results()


@contextmanager
def _one_after_the_other(recipe: Recipe, folder: RunFolder, processes: Processes) -> Iterator[None]:
    """Process 0 looks at the dense model and writes what it found; then the others read that."""
    if not processes.is_main:
        processes.barrier()
        files = {folder.permutation_file: recipe.permute, folder.allocation_file: recipe.choices}
        for file in (file for file, asked in files.items() if asked):
            wait_for(file, processes)
    yield
    if processes.is_main:
        processes.barrier()


def _nothing_to_do(folder: RunFolder, report: Report, processes: Processes) -> Results:
    results = folder.read_results()
    if processes.is_main:
        folder.clean()
    report(Progress("done", 1, 1, f"{folder.path} is finished already; nothing to do."))
    return results


def _open(recipe: Recipe, source: Path, device: torch.device, report: Report) -> DecoderModel:
    dtype: DTypeName = recipe.dtype  # type: ignore[assignment]
    model = DecoderModel.open(
        source,
        device=device,
        dtype=dtype,
        trust_remote_code=recipe.trust_remote_code,
        allow_sparse=recipe.allow_sparse,
    )
    if model.unused_tensors:
        report(
            Progress(
                "open",
                text=f"{len(model.unused_tensors)} checkpoint tensors belong to no part of the model and are copied as they "
                f"are, such as {model.unused_tensors[0]}",
            )
        )
    report_untied(model.untied, report)
    if not recipe.allow_sparse:
        refuse_sparse(model, recipe.model)
    return model


def _tokens(
    folder: RunFolder, recipe: Recipe, source: Path, model: DecoderModel, token_ids: Tensor | None, report: Report
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """The run's calibration windows: those that it saved before, else made now; None for methods that need none."""
    if not recipe.calibrated:
        return None, None
    saved = folder.saved_tokens()
    if saved is not None:
        return saved
    report(Progress("calibrate", text=f"calibrating on {recipe.calibration.source}"))
    return calibration_windows(recipe, source, model.config, token_ids)


def _layers(
    folder: RunFolder,
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor | None,
    report: Report,
    processes: Processes,
) -> None:
    """Prune what is not pruned yet and keep each layer as it is finished."""
    if isinstance(recipe.method, WholeModel):
        assert windows is not None

        def prior(into: RunFolder, one_shot: Recipe, train: Tensor) -> None:
            _layers(into, one_shot, machine, model, selections, train, report, processes)

        learn_whole(folder, recipe, machine, model, selections, windows, report, prior, processes)
        return
    n_layers = model.n_layers
    there = processes.tell([index for index in range(n_layers) if folder.layer(index) is not None])
    n_finished = len(there)
    if n_finished == n_layers:
        return
    if n_finished:
        processes.resume_hint = _resume_hint(n_finished, n_layers)
        report(Progress("layers", 0, n_layers, f"resuming: {n_finished} of {n_layers} decoder layers are finished"))
    gradients = GradientFiles(folder.gradients)
    if windows is not None:
        blocks = recipe.token_blocks
        collect_gradients(
            gradients,
            model,
            windows,
            selections,
            recipe.pruner.needs,
            machine,
            report,
            blocks,
            recipe.stream.sum_segments,
            processes,
        )
    options = stream_options(recipe, machine)
    files = LayerLearningFiles(folder, processes)
    learning = files.resumed(learning_of(recipe, model, selections), n_layers)

    def finished(index: int) -> dict[str, Pruned] | None:
        if index not in there:
            return None
        wait_for(folder.layer_file(index), processes)
        saved = folder.layer(index)
        return None if saved is None else saved.pruned()

    steps = prune_layers(
        model,
        windows,
        recipe.pruner,
        recipe.pattern,
        selections,
        options,
        finished=finished,
        restart=folder.saved_hidden(processes) if windows is not None else None,
        scratch=machine.scratch,
        gradients=gradients.of_linear,
        token_weights=token_weights(gradients, recipe.loss_aware),
        learning=learning,
        processes=processes,
    )
    with closing(steps if learning is None else files.watched(steps)) as signs:
        for step in signs:
            if isinstance(step, LayerDone) and not step.reused:
                folder.save_layer(step, processes)
                processes.resume_hint = _resume_hint(step.index + 1, n_layers)
            report(layer_progress(step, n_layers))
            del step  # a finished layer's masks and weights must not stay while the next layer runs


def _resume_hint(n_finished: int, n_layers: int) -> str:
    return f"it goes on after decoder layer {n_finished} of {n_layers}"


def layer_progress(step: LayerStep | LayerDone, n_layers: int) -> Progress:
    """What the walker yields, as a report."""
    if isinstance(step, LayerStep):
        done = step.index + step.done / max(step.total, 1) * 0.999
        return Progress("layers", done, n_layers, live=live_words(step))
    return Progress("layers", step.index + 1, n_layers, _layer_line(step, n_layers))


def _layer_line(done: LayerDone, n_layers: int) -> str:
    if done.reused:
        return f"decoder layer {done.index + 1}/{n_layers}: taken over"
    parts = [f"{len(done.linears)} linears"]
    error, held_out = (mean(getattr(one, key) for one in done.linears) for key in ("output_error", "held_out_error"))
    if error is not None:
        parts.append(f"mean output error {error:.4f}" + ("" if held_out is None else f" (held-out {held_out:.4f})"))
    parts += learned_words(done)
    fallbacks = sum("fallback" in one.pruned.notes for one in done.linears)
    if fallbacks:
        parts.append(f"{fallbacks} experts by magnitude: too few tokens")
    parts.append(f"{sum(done.seconds.values()):.1f} s")
    return f"decoder layer {done.index + 1}/{n_layers}: {', '.join(parts)}"
