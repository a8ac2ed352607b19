"""`nmprune.prune`: the Python door to a run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nmprune.calibration import from_token_ids
from nmprune.checkpoint import Checkpoint, as_integers
from nmprune.checkpoint.durable import finish_folder, flush_folder
from nmprune.checkpoint.names import NameMap
from nmprune.errors import InputError
from nmprune.methods import Method, create
from nmprune.methods.base import WholeModel
from nmprune.pattern import Pattern
from nmprune.refine import Polish, Reconstruct
from nmprune.results import AllocationResult, LearnedLayerResult, LinearResult, Results
from nmprune.run.allocate import allocated, select_fitting
from nmprune.run.allocate_recipe import AllocateRecipe
from nmprune.run.folder import RunFolder
from nmprune.run.gradients import GradientFiles, collect_gradients, token_weights
from nmprune.run.learn_in_memory import learn_in_memory
from nmprune.run.learn_layers import learning_of
from nmprune.run.loss_aware import LossAware
from nmprune.run.machine import Machine
from nmprune.run.permute import check_permute, permute_model
from nmprune.run.permute_recipe import kinds_of
from nmprune.run.progress import Progress, Report, silent
from nmprune.run.prune import layer_progress, prune_run
from nmprune.run.recipe import CalibrationRecipe, Recipe, StreamRecipe, section
from nmprune.run.stream_options import stream_options
from nmprune.run.tokens import calibration_windows, token_source
from nmprune.run.train_recipe import train_of
from nmprune.stream import DecoderModel, LayerDone, LayerSelection, prune_layers, refuse_sparse
from nmprune.train.settings import TrainRecipe


@dataclass(frozen=True)
class PruneResult:
    """What `prune` gives back.

    Attributes:
        masks: linear name -> bool (out, in), True = kept. In memory only where no `out` was given.
        linears: one record per pruned linear.
        results: everything results.json holds; None without `out`.
        out: the run folder; None without `out`.
        allocation: how mixed patterns were chosen; None where every linear has the same.
        permutations: channel space -> int64 (blocks, channels), old channel by new, of those that were reordered in memory;
            the masks belong to the new order. With `out` they are in its permutation.safetensors.
        learned_layers: how masks were learned decoder layer by decoder layer; empty for other methods.
    """

    masks: dict[str, Tensor]
    linears: tuple[LinearResult, ...]
    results: Results | None = None
    out: Path | None = None
    allocation: AllocationResult | None = None
    permutations: dict[str, Tensor] = field(default_factory=dict)
    learned_layers: tuple[LearnedLayerResult, ...] = ()


def prune(
    model: str | Path | PreTrainedModel,
    method: str | Mapping[str, Any] | Method = "wanda",
    pattern: str | Pattern = "2:4",
    calibration: str | Path | Tensor = "builtin",
    out: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_sequences: int = 32,
    seq_len: int = 512,
    n_held_out: int = 0,
    seed: int = 0,
    exclude: str | Sequence[str] = (),
    stream: Mapping[str, Any] | None = None,
    allocate: Mapping[str, Any] | None = None,
    permute: str | Sequence[str] = (),
    polish: bool | Polish = False,
    reconstruct: bool | Reconstruct = False,
    loss_aware: bool | LossAware = False,
    train: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    allow_sparse: bool = False,
    machine: Machine | None = None,
    report: Report = silent,
) -> PruneResult:
    """Prune a model to N:M.

    A path, hub id, .gguf file or `smollm2-135m` is streamed one decoder layer at a time into the run folder `out`, resumable.
    A model in memory is pruned in place; with `out` its dense weights are saved to `out/base` first, the run works from
    there (as from any folder, in fp32 on a CPU), and the result is loaded back into the model.

    Args:
        model: what to prune.
        method: a name of `nmprune list`, a method object with its hyper-parameters set, or both as a recipe has them, such as
            {"name": "maskllm", "preset": "best"}.
        pattern: "2:4" keeps 2 of every 4 weights.
        calibration: a text source (builtin, wikitext2, c4, hf:DATASET, a file), or token ids int64 (n_sequences, seq_len).
        out: the run folder; needed unless the model is in memory.
        tokenizer: for a model in memory with a text source; else the model folder's own.
        n_sequences: token windows, where `calibration` is text.
        seq_len: tokens per window, where `calibration` is text.
        n_held_out: of these, windows that reconstruct judges by and does not solve on; 0 = one in 16, at least 1.
        seed: chooses the windows.
        exclude: shell patterns of linears that stay dense, e.g. "*.down_proj".
        stream: propagate, true_sequential, batch_size, min_expert_tokens (see `StreamRecipe`).
        allocate: mixed patterns under one budget: patterns, density, rule, owl_m, owl_lambda (see `AllocateRecipe`), such as
            {"patterns": ["1:4", "2:4", "3:4", "dense"]}; the density is `pattern`'s unless said.
        permute: channels that are reordered first, so that N:M costs less while the model computes the same: "ffn", "heads",
            "residual", or "all" (docs/permutation.md).
        polish: lower the output error of the method's mask by descent; True, or a `Polish` with its settings.
        reconstruct: find better weights on the mask; True, or a `Reconstruct` with its settings.
        loss_aware: tokens count by what the loss feels of a linear's outputs; True, or a `LossAware` with its settings.
        train: how a method that learns the whole model is to do it: steps, batch_size, loss and so on (see `TrainRecipe`).
        dtype: compute dtype; "auto" is fp32 on a CPU and the checkpoint's elsewhere. Without `out`, a model in memory keeps
            its own.
        allow_sparse: take a model that is sparse already.
        machine: device, memory budget, threads. Without `out`, a model in memory stays on its device.
        report: called with a `Progress` at every sign of life.

    Raises:
        InputError: anything the caller can put right.
    """
    machine = machine or Machine()
    ids = from_token_ids(calibration) if isinstance(calibration, Tensor) else None
    in_memory = model if isinstance(model, PreTrainedModel) else None
    recipe = _recipe(
        "a model in memory" if in_memory is not None else str(model),
        method,
        Pattern.parse(pattern) if isinstance(pattern, str) else pattern,
        (exclude,) if isinstance(exclude, str) else tuple(exclude),
        {
            **(
                {"source": str(calibration), "n_sequences": n_sequences, "seq_len": seq_len}
                if ids is None
                else {"source": token_source(ids), "n_sequences": ids.shape[0], "seq_len": ids.shape[1]}
            ),
            "n_held_out": n_held_out,
        },
        stream or {},
        allocate or {},
        train or {},
        {
            "seed": seed,
            "dtype": dtype,
            "allow_sparse": allow_sparse,
            "permute": kinds_of(permute),
            "polish": Polish() if polish is True else polish or None,
            "reconstruct": Reconstruct() if reconstruct is True else reconstruct or None,
            "loss_aware": LossAware() if loss_aware is True else loss_aware or None,
        },
    )
    if in_memory is None:
        if out is None:
            raise InputError(
                "out is missing: a model that is not in memory is pruned into a run folder, such as out='runs/x'."
            )
        results = prune_run(recipe, Path(out), machine, ids, report)
        return PruneResult(
            {}, results.linears, results, Path(out), results.allocation, learned_layers=results.learned_layers
        )
    needs_text = recipe.calibrated and ids is None
    if needs_text and tokenizer is None and not recipe.calibration.source.endswith(".safetensors"):
        raise InputError(
            "tokenizer is missing: a model in memory has none. Pass tokenizer=, or token ids as calibration."
        )
    if out is None:
        return _prune_in_memory(in_memory, recipe, machine, ids, tokenizer, report)
    place = Path(out)
    recipe = replace(recipe, model=str(RunFolder(place).base.resolve()))
    RunFolder(place).check(recipe)
    _save_base(in_memory, tokenizer, RunFolder(place).base)
    results = prune_run(recipe, place, machine, ids, report)
    finished = type(in_memory).from_pretrained(RunFolder(place).model, dtype=in_memory.dtype)
    in_memory.load_state_dict(finished.state_dict())
    return PruneResult({}, results.linears, results, place, results.allocation, learned_layers=results.learned_layers)


def _recipe(
    model: str,
    method: str | Mapping[str, Any] | Method,
    pattern: Pattern,
    exclude: tuple[str, ...],
    calibration: Mapping[str, Any],
    stream: Mapping[str, Any],
    allocate: Mapping[str, Any],
    train: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> Recipe:
    """A recipe from the caller's arguments, checked as one from a file is."""
    faults: list[str] = []
    chosen, named = _chosen(method)
    sections: dict[str, Any] = {
        "train": train_of(chosen, named, train, partial(section, faults, "train", TrainRecipe)),
        "calibration": section(faults, "calibration", CalibrationRecipe, calibration),
        "stream": section(faults, "stream", StreamRecipe, stream),
        "allocate": section(faults, "allocate", AllocateRecipe, allocate),
    }
    if faults:
        raise InputError(" ".join(faults))
    return Recipe(model=model, method=chosen, pattern=pattern, exclude=exclude, **sections, **rest)


def _chosen(method: str | Mapping[str, Any] | Method) -> tuple[Method, Mapping[str, Any]]:
    """The method, and what was said of it: a preset may be named there."""
    if isinstance(method, Method):
        return method, {}
    named: Mapping[str, Any] = {"name": method} if isinstance(method, str) else method
    return create(str(named.get("name", "")), {key: one for key, one in named.items() if key != "name"}), named


def _save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, base: Path) -> None:
    """The dense model as a folder inside the run, so that the run can be resumed and verified later.

    It is saved once, through a temporary name: a resumed run finds it whole or not at all.

    Raises:
        InputError: it cannot be written, or another model was saved there before.
    """
    if base.is_dir():
        _check_same(model, base)
        return
    partial = base.with_name(base.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        finish_folder(partial)
        partial.rename(base)
        flush_folder(base.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"the dense model cannot be saved to {base}: {error}. Make room, or choose another out folder."
        ) from error


def _check_same(model: PreTrainedModel, base: Path) -> None:
    """Raise InputError unless the folder holds exactly this model's weights."""
    checkpoint = Checkpoint.open(base)
    state = model.state_dict()
    for key, pieces in NameMap(model, checkpoint.shapes()).pieces.items():
        for piece in pieces:
            mine = (state[key] if piece.region is None else piece.region.of(state[key])).cpu()
            stored = checkpoint.read(piece.tensor)
            if mine.dtype != stored.dtype or not torch.equal(as_integers(mine), as_integers(stored)):
                raise InputError(
                    f"{base} holds other weights than this model ({piece.tensor} differs): the run in {base.parent} was begun "
                    "with another model, or this one is pruned already. Choose another out folder."
                )


def _prune_in_memory(
    model: PreTrainedModel,
    recipe: Recipe,
    machine: Machine,
    token_ids: Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    report: Report,
) -> PruneResult:
    if recipe.dtype != "auto":
        raise InputError(f"dtype is {recipe.dtype!r}; a model in memory keeps its own, so say model.to(dtype) instead.")
    was_training = model.training
    try:
        result = _prune_in_place(model, recipe, machine, token_ids, tokenizer, report)
    finally:
        model.train(was_training)
    report(Progress("done", 1, 1, "finished: the model is pruned in place"))
    return result


def _prune_in_place(
    model: PreTrainedModel,
    recipe: Recipe,
    machine: Machine,
    token_ids: Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    report: Report,
) -> PruneResult:
    """The walk itself; it leaves the model in evaluation mode."""
    machine.set_threads()
    decoder = DecoderModel.from_model(model, allow_sparse=recipe.allow_sparse)
    if machine.device != "auto" and machine.resolve().type != decoder.device.type:
        raise InputError(f"device is {machine.device!r}; a model in memory stays on its own, {decoder.device}.")
    if not recipe.allow_sparse:
        refuse_sparse(decoder, "the model")
    selections = select_fitting(decoder, recipe)
    windows = None
    if recipe.calibrated:
        windows, _ = calibration_windows(recipe, tokenizer, decoder.config, token_ids)
    check_permute(recipe, decoder, selections)
    permutation = permute_model(recipe, machine, decoder, selections, windows, report)
    selections, allocation, _ = allocated(recipe, machine, decoder, selections, windows, report)
    walk = partial(_walk, decoder, machine, selections, report)
    if isinstance(recipe.method, WholeModel):
        assert windows is not None
        layers = learn_in_memory(recipe, machine, decoder, selections, windows, report, walk)
    else:
        layers = walk(recipe, windows)
    masks: dict[str, Tensor] = {}
    linears: list[LinearResult] = []
    learned: list[LearnedLayerResult] = []
    for done in layers:
        masks |= {one.name: one.pruned.mask for one in done.linears}
        linears += done.records()
        learned += [done.learned] if done.learned is not None else []
    moved = permutation.permutations if permutation is not None else {}
    return PruneResult(masks, tuple(linears), allocation=allocation, permutations=moved, learned_layers=tuple(learned))


def _walk(
    decoder: DecoderModel,
    machine: Machine,
    selections: Sequence[LayerSelection],
    report: Report,
    recipe: Recipe,
    windows: Tensor | None,
) -> Iterator[LayerDone]:
    """Prune a model in place, layer by layer."""
    with ExitStack() as stack:
        place = tempfile.TemporaryDirectory(prefix="nmprune-gradients-", dir=machine.scratch)
        gradients = GradientFiles(Path(stack.enter_context(place)))
        if windows is not None:
            blocks = recipe.token_blocks
            n_segments = recipe.stream.sum_segments
            needs = recipe.pruner.needs
            collect_gradients(gradients, decoder, windows, selections, needs, machine, report, blocks, n_segments)
        walk = prune_layers(
            decoder,
            windows,
            recipe.pruner,
            recipe.pattern,
            selections,
            stream_options(recipe, machine),
            scratch=machine.scratch,
            gradients=gradients.of_linear,
            token_weights=token_weights(gradients, recipe.loss_aware),
            learning=learning_of(recipe, decoder, selections),
        )
        for step in stack.enter_context(closing(walk)):
            report(layer_progress(step, decoder.n_layers))
            if isinstance(step, LayerDone):
                yield step
