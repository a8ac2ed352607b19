"""A whole-model method in a run: prior masks, the model in memory, learning with checkpoints, one progress file per layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from torch import Tensor

from nmprune import masks
from nmprune.distributed import ALONE, Processes
from nmprune.errors import InputError
from nmprune.methods import Pruned
from nmprune.methods.base import LearnStep, WholeModel
from nmprune.refine.layer_chain import one_shot_prior
from nmprune.report.quantities import duration
from nmprune.results import LearningResult
from nmprune.run.folder import RunFolder
from nmprune.run.interrupts import interrupts
from nmprune.run.learning_files import LearningFiles
from nmprune.run.machine import Machine
from nmprune.run.prior_masks import PriorMasks
from nmprune.run.progress import Progress, Report
from nmprune.run.recipe import Recipe
from nmprune.run.shared_run import wait_for
from nmprune.stream import DecoderModel, LayerDone, LayerSelection, LinearDone
from nmprune.stream.experts import observable_experts
from nmprune.stream.input_sums import InputSums
from nmprune.train.judge import Learned
from nmprune.train.loop import Text, learn
from nmprune.train.masked_linear import targets_of
from nmprune.train.settings import TrainRecipe
from nmprune.train.sharding import Sharding

Bits = dict[str, Tensor]  # linear name -> packed mask
PruneLayers = Callable[[RunFolder, Recipe, Tensor], None]


def learn_whole(
    folder: RunFolder,
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor,
    report: Report,
    prune_layers: PruneLayers,
    processes: Processes = ALONE,
) -> None:
    """Learn the masks of all linears and keep each decoder layer as a finished one, or do what is left of that.

    Args:
        folder: the run.
        recipe: its method is a `WholeModel`.
        machine: how often a checkpoint is kept.
        model: opened from its folder, or in memory.
        selections: one per layer.
        windows: int64 (n_sequences, seq_len); the last `recipe.n_held_out` judge, and nothing is learned from them.
        report: called at every sign of life.
        prune_layers: streams a one-shot method through the model into the progress files of a folder.
        processes: that share the run.

    Raises:
        InputError: the prior masks do not fit; the loss is not finite; as `check_shard`.
        KeyboardInterrupt: Ctrl-C, after the step in work was finished and kept.
    """
    check_shard(recipe, processes)
    there = processes.tell(all(folder.layer_file(index).is_file() for index in range(model.n_layers)))
    if there:
        return
    text = Text(windows[: -recipe.n_held_out], windows[-recipe.n_held_out :])
    prior, seconds = _prior(folder, recipe, model, selections, text.train, report, prune_layers, processes)
    files = LearningFiles(folder)
    learned = _learn(recipe, machine, model, selections, text, prior, files, report, processes)
    if processes.is_main:
        files.finish(_result(recipe, learned, text))
        for done in _layers(recipe, selections, learned, prior, text, seconds, files.seconds / model.n_layers):
            folder.save_layer(done)
        files.drop_checkpoint()
    processes.barrier()


def check_shard(recipe: Recipe, processes: Processes = ALONE) -> None:
    """Raise InputError where the model is to be spread over processes and there is only one."""
    method = recipe.method
    if recipe.train.shard and isinstance(method, WholeModel) and method.learns_by == "descent":
        raise InputError(
            f"train.shard spreads the model over several processes, and {method.name} needs whole linears. Leave it out: the "
            "processes then share the text, and each holds the model."
        )
    if recipe.train.shard and processes.alone:
        raise InputError(
            "train.shard spreads the model over several processes, and there is one. Start them with torchrun, such as: torchrun "
            "--nproc-per-node 8 -m nmprune prune MODEL ... --set train.shard=true; or leave train.shard out."
        )


@contextmanager
def whole(model: DecoderModel) -> Iterator[None]:
    """All of a model in memory inside the body, in its compute dtype."""
    with ExitStack() as stack:
        stack.enter_context(model.head())
        for index in range(model.n_layers):
            stack.enter_context(model.layer(index))
        stack.enter_context(observable_experts(model.config))
        yield


def _prior(
    folder: RunFolder,
    recipe: Recipe,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    train: Tensor,
    report: Report,
    prune_layers: PruneLayers,
    processes: Processes,
) -> tuple[Bits, list[dict[str, float]]]:
    """The prior masks, and per layer what they took in seconds by phase."""
    method = recipe.method
    assert isinstance(method, WholeModel)
    one_shot = one_shot_prior(method)
    if one_shot is None:
        file = PriorMasks(method.prior, model, selections, recipe.pattern)
        found = {name: mask for index in range(model.n_layers) for name, mask in file.of_layer(index).items()}
        return {name: masks.pack(mask) for name, mask in found.items()}, [{} for _ in selections]
    prior = RunFolder(folder.progress / "prior")
    prior.progress.mkdir(parents=True, exist_ok=True)
    report(Progress("layers", text=f"prior masks by {method.prior}"))
    prune_layers(prior, replace(recipe, method=one_shot, train=TrainRecipe()), train)
    bits: Bits = {}
    seconds = []
    for index in range(model.n_layers):
        wait_for(prior.layer_file(index), processes)
        saved = prior.layer(index)
        assert saved is not None
        bits |= {name: masks.pack(one.mask) for name, one in saved.pruned().items()}
        seconds.append(saved.seconds)
    return bits, seconds


def _learn(
    recipe: Recipe,
    machine: Machine,
    model: DecoderModel,
    selections: Sequence[LayerSelection],
    text: Text,
    prior: Bits,
    files: LearningFiles,
    report: Report,
    processes: Processes,
) -> Learned:
    method, n_steps = recipe.method, recipe.train.steps
    assert isinstance(method, WholeModel)
    snapshot = files.resume(processes.is_main)
    n_tokens = n_steps * recipe.train.batch_size * recipe.train.accumulation * text.train.shape[1]
    report(Progress("learn", 0, n_steps, _opening(n_tokens, text, snapshot)))
    sharding = None
    if recipe.train.shard:
        model = model.twin(recipe.trust_remote_code)  # it is taken apart
        sharding = Sharding(model.bring_in, processes)
    loaded = whole(model) if sharding is None else observable_experts(model.config)
    with loaded, interrupts() as interrupted, ExitStack() as stack:
        linears = [
            [(one, selection.patterns.get(one.name, recipe.pattern)) for one in selection.prune]
            for selection in selections
        ]
        layers = list(model.layers)
        steps = learn(
            model.model,
            layers,
            targets_of(layers, linears),
            method,
            prior,
            text,
            recipe.train,
            recipe.seed,
            snapshot,
            processes,
            sharding,
            InputSums(model, selections),
        )
        del snapshot
        stack.enter_context(closing(steps))
        kept = time.monotonic()
        while True:
            try:
                sign = next(steps)
            except StopIteration as end:
                result: Learned = end.value
                return result
            stop = processes.tell(interrupted.is_set())
            due = processes.tell(stop or time.monotonic() - kept >= 60 * machine.checkpoint_minutes)
            if processes.is_main:
                files.note(sign)
            if due and sharding is not None and not processes.is_main:
                sign.snapshot()  # process 0 gathers it from all of them
            if due and processes.is_main:
                files.save(sign)
                kept = time.monotonic()
                processes.resume_hint = f"it goes on after step {sign.step} of {sign.total}"
            report(_sign(sign, files.seconds))
            if stop:
                report(
                    Progress("learn", sign.step, sign.total, f"interrupted: a checkpoint of step {sign.step} is kept")
                )
                raise KeyboardInterrupt


def _opening(n_tokens: int, text: Text, snapshot: Mapping[str, Tensor] | None) -> str:
    if snapshot is not None:
        return f"resuming: learning goes on after step {int(snapshot['step'])}"
    repeats = n_tokens / text.train.numel()
    words = f"learning from {n_tokens:,} tokens, judged by {text.held_out.numel():,} held-out ones"
    return words + (f"; each is seen {repeats:.1f} times, and fresh ones teach more" if repeats > 1.05 else "")


def _sign(sign: LearnStep, seconds: float) -> Progress:
    words = ""
    if "held_out_loss" in sign.values:
        left = seconds * (sign.total / sign.step - 1)
        words = (
            f"step {sign.step}/{sign.total}: held-out loss {sign.values['held_out_loss']:.4f} (prior "
            f"{sign.values['held_out_prior_loss']:.4f}, best {sign.values['best_held_out_loss']:.4f}), "
            f"{sign.values['flips']:.2%} of groups flipped, {duration(seconds)}, about {duration(left)} left"
        )
    return Progress("learn", sign.step, sign.total, words)


def _result(recipe: Recipe, learned: Learned, text: Text) -> LearningResult:
    settings = recipe.train
    return LearningResult(
        loss=settings.loss,
        steps=learned.steps,
        n_tokens=learned.steps * settings.batch_size * settings.accumulation * text.train.shape[1],
        epochs=learned.epochs,
        held_out_tokens=text.held_out.numel(),
        prior_loss=learned.prior_loss,
        held_out_loss=learned.loss,
        best_step=learned.best.step,
        best_loss=learned.best.loss,
        best_flips=learned.best.flips,
        last_loss=learned.last.loss,
        last_flips=learned.last.flips,
        guarded=learned.guarded,
    )


def _layers(
    recipe: Recipe,
    selections: Sequence[LayerSelection],
    learned: Learned,
    prior: Bits,
    text: Text,
    prior_seconds: Sequence[Mapping[str, float]],
    seconds: float,
) -> Iterator[LayerDone]:
    """What was learned as finished decoder layers."""
    method = recipe.method
    assert isinstance(method, WholeModel)
    n_tokens = learned.steps * recipe.train.batch_size * recipe.train.accumulation * text.train.shape[1]
    for index, selection in enumerate(selections):
        done = []
        for one in selection.prune:
            pattern = selection.patterns.get(one.name, recipe.pattern)
            mask, before = (masks.unpack(bits[one.name], one.shape) for bits in (learned.bits, prior))
            flips = (mask != before).unflatten(-1, (-1, pattern.group)).any(-1).float().mean().item()
            pruned = Pruned(mask, None, {"prior": method.prior, "flips": flips})
            done.append(LinearDone(one.name, one.role, one.tensor, pruned, n_tokens, 0.0, pattern=pattern))
        yield LayerDone(index, tuple(done), selection.dense, {**prior_seconds[index], "learn": seconds})
