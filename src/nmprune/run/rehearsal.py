"""Rehearse a run for its peak memory: some decoder layers with random weights, some batches, in a process of its own.

Sizes can be added up, but what a process really takes is more: the allocator keeps and splits what was freed, libraries
hold buffers. So a plan does the first steps of the run itself, with the walker that the run will use, and looks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from nmprune.errors import InputError
from nmprune.run.folder import RunFolder
from nmprune.run.machine import Machine, PeakMemory
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, LayerDone, StreamOptions, prune_layers, select
from nmprune.stream.calls import LayerCalls
from nmprune.stream.hidden_states import HiddenStates

N_LAYERS = 3
N_BATCHES = 4
_MOST_WEIGHTS = 300_000_000  # of a decoder layer
_MOST_FLOPS = 5e11  # of a decoder layer's solvers: about half a minute on two cores


class _Rehearsed(DecoderModel):
    """The first layers of a model of which only the config is there; weights are random."""

    @classmethod
    def shortened(cls, folder: Path, recipe: Recipe, device: torch.device) -> Self:
        model = cls.from_config(
            folder,
            device=device,
            dtype=recipe.dtype,  # type: ignore[arg-type]
            trust_remote_code=recipe.trust_remote_code,
            allow_sparse=recipe.allow_sparse,
        )
        model.n_layers = min(N_LAYERS, model.n_layers)
        return model

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        with self.random_layer(index) as layer:
            yield layer

    def embed(
        self, windows: Tensor, batch_size: int, hidden_budget: int, scratch: Path | None = None
    ) -> tuple[HiddenStates, dict[int, LayerCalls]]:
        with self.stand_in():
            hidden, calls = super().embed(windows, batch_size, hidden_budget, scratch)
        hidden.all.normal_(generator=torch.Generator().manual_seed(0))
        return hidden, calls


def affordable(weights: int, solver_flops: float) -> bool:
    """Whether three such decoder layers can be rehearsed in about a minute.

    Args:
        weights: of the largest decoder layer.
        solver_flops: of its linears together.
    """
    return weights <= _MOST_WEIGHTS and solver_flops <= _MOST_FLOPS


def layer_peak(folder: Path, recipe: Recipe, machine: Machine, batch: tuple[int, int]) -> int | None:
    """Peak bytes of the layers of a run, hidden states of the batches included; None where it could not be measured.

    Args:
        folder: holds config.json.
        recipe: what would be done.
        machine: how.
        batch: (sequences, seq_len) of one forward.
    """
    work = {
        "folder": str(folder),
        "recipe": recipe.to_dict(),
        "machine": {"device": machine.device, "hidden_budget": machine.hidden_budget},
        "batch": batch,
        "threads": torch.get_num_threads(),
    }
    # a process of its own: only there is the highest mark this work's alone
    command = [sys.executable, "-c", "from nmprune.run.rehearsal import child; child()"]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    return json.loads(last[0]) if last else None


def child() -> None:
    """The other process: read the work from stdin, walk, print the peak."""
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    print(
        json.dumps(
            _walk(Path(work["folder"]), Recipe.from_dict(work["recipe"]), Machine(**work["machine"]), work["batch"])
        )
    )


def _walk(folder: Path, recipe: Recipe, machine: Machine, batch: tuple[int, int]) -> int | None:
    """Peak bytes of walking the shortened model and keeping each layer as a run does."""
    device = machine.resolve()
    peak = PeakMemory(device)
    model = _Rehearsed.shortened(folder, recipe, device)
    selections = select(model, recipe.pattern, recipe.exclude)
    windows = torch.zeros(N_BATCHES * batch[0], batch[1], dtype=torch.long) if recipe.method.needs else None
    options = StreamOptions(**{**asdict(recipe.stream), "batch_size": batch[0]}, hidden_budget=machine.hidden_budget)
    with tempfile.TemporaryDirectory() as place:
        run = RunFolder(Path(place))
        run.progress.mkdir()
        try:
            for step in prune_layers(model, windows, recipe.method, recipe.pattern, selections, options):
                if isinstance(step, LayerDone):
                    run.save_layer(step)
                del step
        except InputError:
            return None  # random weights can be singular where real ones are not
    return peak.host()
