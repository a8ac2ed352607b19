"""One finetuning at work: student and dense model in memory, the loop, its metrics and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nmprune.checkpoint import MaskFile
from nmprune.errors import InputError
from nmprune.methods.base import LearnStep
from nmprune.report.quantities import duration
from nmprune.run.finetune_text import FinetuneText
from nmprune.run.folder import RunFolder
from nmprune.run.interrupts import interrupts
from nmprune.run.learning_files import LearningFiles
from nmprune.run.progress import Progress, Report
from nmprune.stream import DecoderModel
from nmprune.train.finetune import Finetuning, Standing
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.held_masks import HeldMasks, held_parameters
from nmprune.train.masked_low_rank import add_low_rank, merge_low_rank
from nmprune.train.parts import masked_parameters, trained_parameters


def load_whole(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    """A model with all its weights, frozen, in evaluation mode.

    Raises:
        InputError: transformers cannot load it.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded by transformers: {' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Trainable:
    """What of a student is trained.

    Attributes:
        trained: name -> parameter whose values will be written.
        moved: name -> what the optimiser moves: the same, or low-rank factors in place of the masked ones.
        holding: what holds the masks while they move.
    """

    trained: dict[str, nn.Parameter]
    moved: dict[str, nn.Parameter]
    holding: HeldMasks


def trainable(
    student: PreTrainedModel, described: DecoderModel, masks: MaskFile, settings: FinetuneRecipe
) -> Trainable:
    """Let gradients flow to what is trained, and give it low-rank deltas where they are asked for.

    Args:
        student: with its weights, all frozen.
        described: its folder.
        masks: its masks.
        settings: how.
    """
    shapes = {name: one.shape for name, one in student.named_parameters()}
    held = held_parameters(shapes, described.pieces, masks)
    masked = masked_parameters(described.pieces, masks)
    trained = trained_parameters(student, described.family.layers, masked, settings.also)
    moved, holding = dict(trained), HeldMasks(student, held)
    if settings.lora:
        moved = {name: one for name, one in moved.items() if name not in masked}
        moved |= add_low_rank(student, held, settings.lora, settings.seed)
    for one in moved.values():
        one.requires_grad_(True)
    return Trainable(trained, moved, holding)


def stored_dtype(described: DecoderModel, name: str) -> torch.dtype:
    """What a parameter's values will be written as; what is in no file (low-rank factors) stays fp32."""
    pieces = described.pieces.get(name, ())
    assert described.checkpoint is not None
    return described.checkpoint.info(pieces[0].tensor).dtype if pieces else torch.float32


def dense_dtype(autocast: bool) -> torch.dtype:
    """Of the dense model: forwards in bfloat16 would round its weights in every one of them."""
    return torch.bfloat16 if autocast else torch.float32


class FinetuneJob:
    """Training in memory.

    Args:
        described: the pruned model's folder, opened without weights.
        masks: its masks.
        dense: folder of the dense model.
        settings: how.
        text: on what.
        device: where.
        autocast: forwards in bfloat16.
        trust_remote_code: as the parent's recipe says.
    """

    def __init__(
        self,
        described: DecoderModel,
        masks: MaskFile,
        dense: Path,
        settings: FinetuneRecipe,
        text: FinetuneText,
        device: torch.device,
        autocast: bool,
        trust_remote_code: bool,
    ) -> None:
        assert described.checkpoint is not None
        self._described, self._settings, self._text = described, settings, text
        self.student = load_whole(described.checkpoint.folder, torch.float32, device, trust_remote_code)
        what = trainable(self.student, described, masks, settings)
        self.trained = what.trained
        teacher = None
        if settings.loss == "kl":
            teacher = load_whole(dense, dense_dtype(autocast), device, trust_remote_code)
        self._loop = Finetuning(
            self.student,
            teacher,
            what.moved,
            None if settings.lora else what.holding,
            self._layers(),
            partial(stored_dtype, described),
            text.windows,
            text.held_out,
            settings,
            autocast,
        )

    def _layers(self) -> list[torch.nn.Module]:
        return list(self.student.get_submodule(self._described.family.layers).children())

    def train(self, folder: RunFolder, checkpoint_minutes: float, report: Report) -> Standing:
        """Do what is left of the training; metrics and checkpoints go to the run folder.

        Raises:
            InputError: the loss is no number, the disk is full, or a checkpoint is of other text.
            KeyboardInterrupt: Ctrl-C, after the step in work was finished and kept.
        """
        files = LearningFiles(folder)
        saved = files.resume()
        if saved is not None:
            report(Progress("finetune", text=f"resuming after step {int(saved['step'])}"))
        kept = time.monotonic()
        with interrupts() as interrupted, closing(self._loop.run(saved)) as steps:
            del saved
            while True:
                try:
                    sign = next(steps)
                except StopIteration as end:
                    return end.value
                files.note(sign)
                report(self._progress(sign))
                if interrupted.is_set() or time.monotonic() - kept >= 60 * checkpoint_minutes:
                    files.save(sign)
                    kept = time.monotonic()
                if interrupted.is_set():
                    raise KeyboardInterrupt

    def _progress(self, sign: LearnStep) -> Progress:
        standing = self._loop.standing
        words = ""
        if "held_out_loss" in sign.values:
            n_tokens = sign.step * self._settings.batch_size * self._settings.accumulation * self._text.windows.shape[1]
            left = standing.seconds * (sign.total / sign.step - 1) if sign.step else 0.0
            words = (
                f"step {sign.step}: held-out loss {sign.values['held_out_loss']:.4f} (start {standing.start_loss:.4f}, best "
                f"{standing.best_loss:.4f}), {n_tokens:,} tokens, {duration(standing.seconds)}, about {duration(left)} left"
            )
        return Progress("finetune", sign.step, sign.total, words)

    def finish(self) -> dict[str, float]:
        """Merge low-rank deltas, round to what will be stored, and measure that on the held-out windows."""
        merge_low_rank(self.student)
        with torch.no_grad():
            for name in self.trained:
                current = self.student.get_parameter(name)
                stored = stored_dtype(self._described, name)
                current.copy_(current.to(stored).to(current.dtype))
                if not current.isfinite().all():
                    raise InputError(f"{name} has values that {stored} cannot hold. Lower the rate (--set lr=...).")
        return self._loop.held_out()

    def values(self) -> Mapping[str, Tensor]:
        """Name -> value of every parameter of the student, tied ones under each name."""
        return self.student.state_dict()
