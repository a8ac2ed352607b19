"""A method that learns decoder layers, in a run: its prior masks, its metrics, its snapshots, its last state."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

from nmprune.checkpoint.durable import writing
from nmprune.distributed import ALONE, Processes
from nmprune.methods.base import LearnStep, State
from nmprune.refine import LayerChain
from nmprune.run.folder import RunFolder, open_tensors, write_tensors, write_text
from nmprune.run.interrupts import interrupts
from nmprune.run.prior_masks import PriorMasks
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, LayerDone, LayerSelection, LayerStep
from nmprune.stream.per_layer import Learning

Sign = LayerStep | LayerDone
_PAST_ALL = 1 << 30  # a decoder layer after the last
SNAPSHOT_SECONDS = 60.0  # a kill inside a layer loses at most about this much learning


def learning_of(recipe: Recipe, model: DecoderModel, selections: Sequence[LayerSelection]) -> Learning | None:
    """What the walk needs for a run's learner, from a fresh start; None for other methods.

    Args:
        recipe: what is done.
        model: the dense model.
        selections: what is pruned, with the patterns that were chosen.

    Raises:
        InputError: the prior's mask file does not fit.
    """
    pruner = recipe.pruner
    if not isinstance(pruner, LayerChain):
        return None
    if pruner.prior_file is None:
        return Learning(recipe.seed)
    prior = PriorMasks(str(pruner.prior_file), model, selections, recipe.pattern)
    return Learning(recipe.seed, prior.of_layer)


class LayerLearningFiles:
    """Metrics, snapshots and states of one run; a run of another kind of method leaves none.

    Args:
        folder: the run.
        processes: that share it; process 0 writes.
        every: seconds between two snapshots.
    """

    def __init__(self, folder: RunFolder, processes: Processes = ALONE, every: float | None = None) -> None:
        self._folder, self._processes = folder, processes
        self._metrics = folder.metrics_file
        self._snapshot_file = folder.progress / "learning.safetensors"
        self._every = SNAPSHOT_SECONDS if every is None else every
        self._kept = time.monotonic()

    def resumed(self, fresh: Learning | None, n_layers: int) -> Learning | None:
        """`fresh` with what an interrupted run left; metrics of steps that will be done again are dropped.

        Args:
            fresh: from `learning_of`.
            n_layers: of the model.
        """
        if fresh is None:
            return None
        first = next((i for i in range(n_layers) if self._folder.layer(i) is None), n_layers)
        if self._processes.is_main:
            self._drop_metrics_after(first, self._snapshot_step(first))
        self._processes.barrier()
        return Learning(fresh.seed, fresh.prior_masks, self._folder.state_before, self._snapshot)

    def watched(self, steps: Iterable[Sign]) -> Generator[Sign, None, None]:
        """The walk's signs, with what the learner says kept on the way; Ctrl-C in a step waits until that is kept.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        with interrupts() as interrupted:
            for sign in steps:
                if isinstance(sign, LayerStep):
                    self.note(sign)
                yield sign
                if isinstance(sign, LayerDone) and not sign.reused:
                    self.drop_snapshot()
                # other signs come as often as a process has batches: they are no moment for all to talk
                if isinstance(sign, LayerDone) or sign.learned is not None:
                    stop = self._processes.tell(interrupted.is_set())
                else:
                    stop = self._processes.alone and interrupted.is_set()
                if stop:
                    if isinstance(sign, LayerStep) and sign.learned is not None:
                        self.keep(sign.index, sign.learned)
                    raise KeyboardInterrupt
                del sign

    def note(self, sign: LayerStep) -> None:
        """Keep what the learner said: a line of metrics, and now and then a snapshot."""
        step = sign.learned
        if step is None:
            return
        if self._processes.is_main:
            # no clock in it, so that a run that went on leaves the same file
            line = json.dumps({"layer": sign.index, "step": step.step, "total": step.total, **step.values}) + "\n"
            with writing(self._metrics, len(line)), self._metrics.open("a") as file:
                file.write(line)
        if self._processes.tell(time.monotonic() - self._kept >= self._every):
            self.keep(sign.index, step)

    def keep(self, index: int, step: LearnStep) -> None:
        """A snapshot in place of the one before; the metrics up to it are on the disk before it is."""
        if self._processes.is_main:
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())
            metadata = {"layer": str(index), "step": str(step.step)}
            write_tensors(self._snapshot_file, _plain(step.snapshot()), metadata)
        self._kept = time.monotonic()

    def drop_snapshot(self) -> None:
        """The layer is finished: its snapshot is of no use."""
        if self._processes.is_main:
            self._snapshot_file.unlink(missing_ok=True)

    def keep_last_state(self, recipe: Recipe) -> None:
        """What the last layer left: the network that masks can be made from again, where the method has one."""
        state = self._folder.state_before(_PAST_ALL)
        if state:
            metadata = {"format": "nmprune-learned", "method": recipe.method.name, "pattern": str(recipe.pattern)}
            write_tensors(self._folder.learned_file, state, metadata)

    def _snapshot_step(self, index: int) -> int:
        if not self._snapshot_file.is_file():
            return 0
        with open_tensors(self._snapshot_file) as file:
            metadata: dict[str, Any] = file.metadata()
        return int(metadata["step"]) if int(metadata["layer"]) == index else 0

    def _snapshot(self, index: int) -> State | None:
        return _tensors(self._snapshot_file) if self._snapshot_step(index) else None

    def _drop_metrics_after(self, index: int, step: int) -> None:
        lines = self._metrics.read_text().splitlines() if self._metrics.is_file() else []
        kept = [line for line in lines if (place := _place_of(line)) is not None and place <= (index, step)]
        if len(kept) < len(lines):
            write_text(self._metrics, "".join(f"{line}\n" for line in kept))


def live_words(sign: LayerStep) -> str:
    """What the learner said last, in a few words; empty for other signs."""
    step = sign.learned
    if step is None:
        return ""
    numbers = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in step.values.items())
    return f"decoder layer {sign.index + 1}, step {step.step}/{step.total}: {numbers}"


def learned_words(done: LayerDone) -> list[str]:
    """What learning came to, for the line of a finished layer."""
    learned = done.learned
    if learned is None:
        return []
    parts = []
    if learned.loss is not None:
        before = "" if learned.prior_loss is None else f"{learned.prior_loss:.4g} -> "
        parts.append(f"held-out loss {before}{learned.loss:.4g}")
    if learned.accepted is False:
        parts.append("not accepted: the prior's masks stay")
    elif learned.flips is not None:
        parts.append(f"{learned.flips:.1%} of groups flipped")
    return parts


def _plain(state: State) -> State:
    """As a file holds it: on the CPU, none sharing another's memory."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _tensors(path: Path) -> State:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  no mapping


def _place_of(line: str) -> tuple[int, int] | None:
    """(layer, step) of a line of metrics; None of one that a kill cut off."""
    try:
        found = json.loads(line)
        return int(found["layer"]), int(found["step"])
    except (ValueError, KeyError, TypeError):
        return None
