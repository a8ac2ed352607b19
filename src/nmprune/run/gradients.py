"""The gradients of a run: computed before the stream, kept on disk layer by layer, read back linear by linear."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nmprune.checkpoint.durable import writing
from nmprune.distributed import ALONE, Processes
from nmprune.errors import InputError
from nmprune.prepare.gradients import GradientStep, LayerGradients, layer_gradients
from nmprune.run import folder
from nmprune.run.loss_aware import LossAware
from nmprune.run.machine import Machine
from nmprune.run.progress import Progress, Report
from nmprune.run.shared_run import wait_for
from nmprune.stats import GRADIENTS, InputStats, Statistic
from nmprune.stream import DecoderModel, LayerSelection

_TOKENS = "token_weights"
_SUMS: tuple[Statistic, ...] = ("weight_grad_abs", "weight_grad_sq")


class GradientFiles:
    """One file per decoder layer, and once in a while the gradient from which an interrupted pass goes on.

    Args:
        path: the folder; made when something is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hidden_file = path / "hidden.safetensors"
        self._hidden_saved = time.monotonic()

    def file(self, index: int) -> Path:
        """Where a layer's gradients are kept."""
        return self.path / f"layer_{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether a layer's gradients are there."""
        return self.file(index).is_file()

    def save(self, done: LayerGradients) -> None:
        """Keep a layer's gradients.

        Raises:
            InputError: the disk is full or not writable.
        """
        tensors = {}
        for name, stats in done.stats.items():
            for key in _SUMS:
                value: Tensor | None = getattr(stats, key)
                if value is not None:
                    tensors[f"{name}:{key}"] = value.cpu()
        tensors |= {f"{name}:{_TOKENS}": weights.cpu() for name, weights in done.token_weights.items()}
        linears = {name: (stats.n_tokens, stats.n_grad_sequences) for name, stats in done.stats.items()}
        record = {"linears": linears, "seconds": done.seconds}
        with writing(self.path, 0):
            self.path.mkdir(parents=True, exist_ok=True)
        folder.write_tensors(self.file(done.index), tensors, {"record": json.dumps(record)})
        if done.input_gradient is not None and time.monotonic() - self._hidden_saved >= folder.HIDDEN_INTERVAL_SECONDS:
            tensors = {"input_gradient": done.input_gradient}
            folder.write_tensors(self._hidden_file, tensors, {"layer": str(done.index)})
            self._hidden_saved = time.monotonic()

    def of_linear(self, index: int, name: str) -> InputStats:
        """One linear's gradients, read from disk.

        Raises:
            InputError: the file cannot be read.
        """
        with folder.open_tensors(self.file(index)) as file:
            n_tokens, n_sequences = json.loads(file.metadata()["record"])["linears"][name]
            stored = set(file.keys())
            sums: dict[str, Any] = {key: file.get_tensor(f"{name}:{key}") for key in _SUMS if f"{name}:{key}" in stored}
        return InputStats(n_tokens, **sums, n_grad_sequences=n_sequences)

    def token_weights(self, index: int, loss_aware: LossAware) -> dict[str, Tensor]:
        """Linear name -> what each token counts, fp32 (n_sequences, seq_len, n_blocks), read from disk.

        Raises:
            InputError: the file cannot be read, or a gradient in it is not finite.
        """
        with folder.open_tensors(self.file(index)) as file:
            stored = set(file.keys())
            squares = {name: file.get_tensor(name) for name in stored if name.endswith(f":{_TOKENS}")}
        found = {}
        for key, value in squares.items():
            name = key.removesuffix(f":{_TOKENS}")
            try:
                found[name] = loss_aware.weights(value)
            except InputError as error:
                raise error.located(name) from error
        return found

    def restart(self, left: Sequence[int]) -> tuple[int, Tensor] | None:
        """(layer, the loss's gradient with respect to its input) where an interrupted pass kept them.

        Args:
            left: layers that are still to do; None comes back where one of them lies past the kept gradient.
        """
        if not self._hidden_file.is_file():
            return None
        with folder.open_tensors(self._hidden_file) as file:
            index = int(file.metadata()["layer"])
            return (index, file.get_tensor("input_gradient")) if max(left) < index else None

    def seconds(self) -> float:
        """Seconds that all kept layers took."""
        total = 0.0
        for path in self.path.glob("layer_*.safetensors"):
            with folder.open_tensors(path) as file:
                total += json.loads(file.metadata()["record"])["seconds"]
        return total


def collect_gradients(
    files: GradientFiles,
    model: DecoderModel,
    windows: Tensor,
    selections: Sequence[LayerSelection],
    needs: frozenset[Statistic],
    machine: Machine,
    report: Report,
    token_blocks: int = 0,
    n_segments: int = 8,
    processes: Processes = ALONE,
) -> None:
    """Put the gradients that a method needs into `files`, or what an interrupted pass left to do; nothing where it needs none.

    Args:
        files: where to.
        model: the dense model.
        windows: int64 (n_sequences, seq_len) calibration token ids.
        selections: from `select`, one per layer.
        needs: what the method reads.
        machine: memory budget and scratch folder.
        report: called at every sign of life.
        token_blocks: blocks of output rows of loss-aware token weights; 0 = no such weights.
        n_segments: see `layer_gradients`.
        processes: those that share the run; process 0 writes. With several, an interrupted pass has its finished layers, and
            runs through all of them once more.

    Raises:
        InputError: the loss is not finite, or the disk is full.
    """
    wanted = [index for index, one in enumerate(selections) if one.prune]
    left = processes.tell([index for index in wanted if not files.has(index)])
    if not (needs & GRADIENTS or token_blocks) or not left:
        return
    text = f"gradients of {windows.shape[0]} sequences through {model.n_layers} decoder layers, last to first"
    if len(left) < len(wanted):
        text = f"resuming: gradients of {len(wanted) - len(left)} of {len(wanted)} decoder layers are there"
    report(Progress("gradients", text=text))
    steps = layer_gradients(
        model,
        windows,
        selections,
        needs,
        token_blocks=token_blocks,
        hidden_budget=machine.hidden_budget,
        finished=lambda index: index not in left,
        restart=files.restart(left) if processes.alone else None,
        scratch=machine.scratch,
        n_segments=n_segments,
        processes=processes,
    )
    for step in steps:
        if isinstance(step, GradientStep):
            report(Progress("gradients", step.done, step.total))
        else:
            if processes.is_main:
                files.save(step)
            report(Progress("gradients", text=f"gradients of decoder layer {step.index + 1}: {step.seconds:.1f} s"))
        del step  # a layer's gradients must not stay while the next layer runs
    processes.barrier()
    for index in left:
        wait_for(files.file(index), processes)


def token_weights(files: GradientFiles, loss_aware: LossAware | None) -> Callable[[int], dict[str, Tensor]] | None:
    """Layer -> linear name -> what each token counts, as the walker asks for it; None where all count the same."""
    return None if loss_aware is None else partial(files.token_weights, loss_aware=loss_aware)
