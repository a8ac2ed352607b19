"""Rehearse a finetuning: some real steps on the model's first decoder layers, in a process of its own, timed and weighed.

Two depths give what one more decoder layer takes; everything else (embedding, head, loss, optimiser) is in both.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nmprune.run.finetune_job import dense_dtype, stored_dtype, trainable
from nmprune.run.finetune_parent import open_parent
from nmprune.run.machine import Machine, PeakMemory
from nmprune.stream import DecoderModel
from nmprune.train.finetune import Finetuning
from nmprune.train.finetune_settings import FinetuneRecipe

N_HELD_OUT = 2  # windows that judge in a rehearsal
N_STEPS = 6
_TIMED_STEPS = slice(2, N_STEPS)  # the first pay for what is made once
_LOOKS = 3


@dataclass(frozen=True)
class Rehearsed:
    """What the first decoder layers took.

    Attributes:
        n_layers: how many.
        peak: bytes, on the accelerator where there is one; None where it could not be measured.
        step: seconds of an optimiser step.
        judged: seconds of a held-out window.
    """

    n_layers: int
    peak: int | None
    step: float
    judged: float


def rehearse(
    parent: Path,
    base: str | None,
    settings: FinetuneRecipe,
    machine: Machine,
    n_layers: int,
    seq_len: int,
    autocast: bool,
) -> Rehearsed | None:
    """Some steps with a few layers; None where they fail, as for too little memory.

    Args:
        parent: the run that would be finetuned.
        base: where the dense model is now.
        settings: as they would be.
        machine: how.
        n_layers: decoder layers to keep.
        seq_len: tokens per window.
        autocast: forwards in bfloat16.
    """
    work = {
        "parent": str(parent),
        "base": base,
        "settings": settings.to_dict(),
        "device": machine.device,
        "threads": torch.get_num_threads(),
        "n_layers": n_layers,
        "seq_len": seq_len,
        "autocast": autocast,
    }
    # a process of its own: only there is the highest mark this work's alone
    command = [sys.executable, "-c", "from nmprune.run.finetune_rehearsal import child; child()"]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    return Rehearsed(**json.loads(last[0])) if last else None


def child() -> None:
    """The other process: read the work from stdin, train for a moment, print what it took."""
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    print(json.dumps(dataclasses.asdict(_train(work))))


def _train(work: dict[str, Any]) -> Rehearsed:
    device = Machine(work["device"]).resolve()
    raw = {**work["settings"], "also": tuple(work["settings"]["also"])}
    wanted = FinetuneRecipe(**raw)
    settings = dataclasses.replace(wanted, minutes=0.0, steps=N_STEPS, evaluations=1, patience=0)
    n_layers, autocast = work["n_layers"], work["autocast"]
    origin = open_parent(Path(work["parent"]), work["base"])
    trust = origin.recipe.trust_remote_code
    peak = PeakMemory(device)
    student = _first_layers(origin.checkpoint.folder, torch.float32, device, n_layers, trust)
    what = trainable(student, origin.model, origin.masks, settings)
    dense = None
    if settings.loss == "kl":
        dense = _first_layers(origin.dense, dense_dtype(autocast), device, n_layers, trust)
    loop = Finetuning(
        student,
        dense,
        what.moved,
        None if settings.lora else what.holding,
        list(student.get_submodule(origin.model.family.layers).children()),
        partial(stored_dtype, origin.model),
        *_windows(student, settings, work["seq_len"]),
        settings,
        autocast,
    )
    del what
    lap = _Lap(device)
    steps = [lap.seconds() for _ in loop.run()]
    looks = []
    for _ in range(_LOOKS):
        loop.held_out()
        looks.append(lap.seconds())
    # the least: other work on this machine only adds, and the difference of two depths would multiply it
    step, judged = min(steps[_TIMED_STEPS]), min(looks) / N_HELD_OUT
    return Rehearsed(n_layers, peak.device() if device.type == "cuda" else peak.host(), step, judged)


class _Lap:
    """Seconds since it was last asked."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, time.perf_counter()

    def seconds(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def _first_layers(
    folder: Path, dtype: torch.dtype, device: torch.device, n_layers: int, trust_remote_code: bool
) -> PreTrainedModel:
    """A model with the real weights of its first decoder layers and of all that lies outside them, frozen."""
    name = str(dtype).removeprefix("torch.")
    described = DecoderModel.open(
        folder,
        device=device,
        dtype=name,  # type: ignore[arg-type]
        trust_remote_code=trust_remote_code,
        allow_sparse=True,
    )
    described.bring_in(None)
    for index in range(n_layers):
        described.bring_in(index)
    del described.model.get_submodule(described.family.layers)[n_layers:]
    return described.model.requires_grad_(False)


def _windows(student: PreTrainedModel, settings: FinetuneRecipe, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens to train on and to judge by."""
    vocabulary: int = student.config.get_text_config().vocab_size
    n_windows = settings.batch_size * settings.accumulation * settings.steps
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(vocabulary, (n_windows + N_HELD_OUT, seq_len), generator=generator)
    return windows[N_HELD_OUT:], windows[:N_HELD_OUT]
