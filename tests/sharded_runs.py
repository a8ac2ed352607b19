"""Whole-model learners on models that are spread over processes, and what each process held."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import learners
import tiny_models
from nmprune import InputError, masks
from nmprune.distributed import ALONE, Processes, started
from nmprune.methods.base import LearnStep, WholeModel
from nmprune.methods.maskpro import MaskPro
from nmprune.methods.proxsparse import ProxSparse
from nmprune.run import api
from nmprune.run.learn_whole import whole
from nmprune.stream import DecoderModel, select
from nmprune.stream.config import DTypeName
from nmprune.stream.experts import observable_experts
from nmprune.train import loop
from nmprune.train.judge import Learned
from nmprune.train.loop import Text, learn
from nmprune.train.masked_linear import targets_of
from nmprune.train.settings import TrainRecipe
from nmprune.train.sharding import Sharding, local

STEPS, STOP = 3, 1
GENTLE = dataclasses.replace(learners.QUICK, lr=0.05, lr_last=0.02, gate_std=0.5)


@dataclass(frozen=True)
class Case:
    """A family of `tiny_models`, what learns it, and how."""

    family: str
    method: WholeModel
    settings: Mapping[str, Any]
    dtype: DTypeName = "float32"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, place: Path) -> None:
        """The model's folder, where `model` looks for it."""
        tiny_models.save(self.family, place / self.family, **self.changes)


# Three micro-batches for two processes: one of them runs another one that does not count.
CASES = {
    "maskllm": Case("llama_tied", GENTLE, {"accumulation": 3, "loss": "kl", "activation_checkpointing": True}),
    "proxsparse": Case("qwen2", ProxSparse(lr=2e-3, anchor=0.25), {"accumulation": 3, "loss": "kl"}),
    "proxsparse in bfloat16": Case("llama", ProxSparse(lr=2e-3), {"accumulation": 2, "autocast": True}, "bfloat16"),
    "maskpro": Case("llama", MaskPro(flip_share=0.2, lr=20.0), {"accumulation": 3, "batch_size": 1}),
    "transposed": Case("gpt2", GENTLE, {"accumulation": 2, "autocast": True, "activation_checkpointing": True}),
    "experts": Case("mixtral", GENTLE, {"accumulation": 2, "activation_checkpointing": True}),
}


KEPT = ("maskllm", "proxsparse", "maskpro", "experts")
RESUMED = ("proxsparse", "maskpro")


@dataclass
class Found:
    """What a run came to."""

    values: list[dict[str, float]]
    bits: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    held: dict[str, float]


def run(case: Case, place: Path, processes: Processes = ALONE, snapshot: Mapping[str, Tensor] | None = None) -> Found:
    """Learn; spread over the processes where there are several. Keeps the snapshot after step `STOP`."""
    model = DecoderModel.open(place / case.family, dtype=case.dtype)
    selections = select(model, learners.PATTERN)
    priors = {}
    for index, selection in enumerate(selections):
        with model.layer(index) as layer:
            for one in selection.prune:
                priors[one.name] = masks.pack(masks.from_scores(model.weight(layer, one).abs(), learners.PATTERN))
    targets = targets_of(list(model.layers), [[(one, learners.PATTERN) for one in each.prune] for each in selections])
    windows = tiny_models.windows(9)
    settings = TrainRecipe(**{"steps": STEPS, "batch_size": 2, "eval_every": STEPS, "guard": False, **case.settings})
    sharding = None if processes.alone else Sharding(model.bring_in, processes)
    found = Found([], {}, {}, {})
    with ExitStack() as stack:
        stack.enter_context(whole(model) if sharding is None else observable_experts(model.config))
        steps = learn(
            model.model,
            list(model.layers),
            targets,
            case.method,
            priors,
            Text(windows[:6], windows[6:]),
            settings,
            0,
            snapshot,
            processes,
            sharding,
        )
        while True:
            try:
                step: LearnStep = next(steps)
            except StopIteration as end:
                learned: Learned = end.value
                found.bits = learned.bits
                return found
            found.values.append({"step": step.step, **step.values})
            if step.step == STOP:
                found.kept = step.snapshot()
                found.held = _held(steps.gi_frame.f_locals["loop"])


def _held(at_work: Any) -> dict[str, float]:
    """Bytes of parameters with learned state, and of moments: here, and of all processes together."""
    held = dict.fromkeys(("parameters", "all parameters", "moments", "all moments"), 0.0)
    for one in at_work.model.parameters():
        held["parameters"] += local(one).untyped_storage().nbytes()
        held["all parameters"] += one.numel() * one.element_size()
    states = at_work.optimiser.state.values() if at_work.optimiser is not None else ()
    for moment in (value for state in states for value in state.values() if value.dim()):
        held["moments"] += local(moment).untyped_storage().nbytes()
        held["all moments"] += moment.numel() * moment.element_size()
    return held


def learn_in_each(place: str, names: list[str], snapshots: str | None) -> None:
    """`run` for each of the cases, to `<name>_<rank>.json` and `.bits` and, from process 0, `<name>.kept`.

    Args:
        place: where the models are.
        names: of `CASES`; of those in `KEPT` the snapshot is kept, and those in `RESUMED` are run again from it.
        snapshots: a folder with `<name>.kept` to go on from; None: from the start.
    """
    here = Path(place)
    with started(torch.device("cpu")) as processes:
        for name in names:
            kept = None if snapshots is None else load_file(Path(snapshots) / f"{name}.kept")
            found = run(CASES[name], here, processes, kept)
            _write(found, here, name, processes)
            assert bool(found.kept) == (processes.is_main and snapshots is None)
            if found.kept and name in KEPT:
                save_file(dict(found.kept), here / f"{name}.kept")
            processes.barrier()
            if snapshots is None and name in RESUMED:
                again = run(CASES[name], here, processes, load_file(here / f"{name}.kept"))
                _write(again, here, f"{name} resumed", processes)


def _write(found: Found, here: Path, name: str, processes: Processes) -> None:
    (here / f"{name}_{processes.rank}.json").write_text(json.dumps({"values": found.values, "held": found.held}))
    save_file({key: value.clone() for key, value in found.bits.items()}, here / f"{name}_{processes.rank}.bits")


def prune(model: str, out: str, settings: dict[str, Any], dies: tuple[int, int] | None) -> None:
    """`nmprune.prune`, exiting 2 with the text in `<out>.error_RANK` on an InputError.

    Args:
        model: the folder.
        out: the run folder.
        settings: other arguments.
        dies: (rank, step): that process kills itself before that step; None = nobody does.
    """
    rank, real = os.environ["RANK"], loop._Loop._step

    def step(self: loop._Loop, number: int) -> dict[str, float]:
        assert self.sharding is not None
        if dies == (int(rank), number):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number)

    loop._Loop._step = step  # type: ignore[method-assign]
    try:
        api.prune(model, pattern="2:4", out=out, **settings)
    except InputError as error:
        Path(f"{out}.error_{rank}").write_text(str(error))
        sys.exit(2)
