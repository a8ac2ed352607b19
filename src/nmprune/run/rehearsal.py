"""Rehearse a run for its peak memory: some decoder layers with random weights, some batches, in a process of its own.

Sizes can be added up, but what a process really takes is more: the allocator keeps and splits what was freed, libraries
hold buffers. So a plan does the first steps of the run itself, with the walker that the run will use, and looks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from nmprune import masks
from nmprune.errors import InputError
from nmprune.heap import give_back
from nmprune.prepare.layer_sums import n_token_blocks
from nmprune.prepare.unit_errors import measure_layers
from nmprune.run.allocate import select_fitting
from nmprune.run.folder import RunFolder
from nmprune.run.machine import Machine, PeakMemory
from nmprune.run.recipe import Recipe
from nmprune.run.stream_options import stream_options
from nmprune.stats import InputStats
from nmprune.stream import DecoderModel, LayerDone, LayerSelection, prune_layers
from nmprune.stream.calls import LayerCalls
from nmprune.stream.hidden_states import HiddenStates
from nmprune.stream.per_layer import Learning

N_LAYERS = 3
N_BATCHES = 4
_MOST_WEIGHTS = 300_000_000  # of a decoder layer
_MOST_LEARNED = 20_000_000  # likewise, where it is learned
_LEARNED_STEPS = 2  # after that a learner needs no more than before
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
        try:
            with self.random_layer(index) as layer:
                yield layer
        finally:
            give_back()  # as after a layer that was read from disk

    def embed(
        self,
        windows: Tensor,
        batch_size: int,
        hidden_budget: int,
        scratch: Path | None = None,
        n_apart: int = 0,
    ) -> tuple[HiddenStates, dict[int, LayerCalls]]:
        with self.stand_in():
            hidden, calls = super().embed(windows, batch_size, hidden_budget, scratch, n_apart)
        hidden.all.normal_(generator=torch.Generator().manual_seed(0))
        return hidden, calls


def affordable(weights: int, solver_flops: float, learns: bool = False) -> bool:
    """Whether three such decoder layers, or two steps of a learner in the first, can be rehearsed in about a minute.

    Args:
        weights: of the largest decoder layer.
        solver_flops: of its linears together.
        learns: whether a learner works on the layer as a whole.
    """
    return weights <= (_MOST_LEARNED if learns else _MOST_WEIGHTS) and solver_flops <= _MOST_FLOPS


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
    selections = select_fitting(model, recipe)
    windows = torch.zeros(N_BATCHES * batch[0], batch[1], dtype=torch.long) if recipe.calibrated else None
    options = replace(stream_options(recipe, machine), batch_size=batch[0], n_held_out=min(recipe.n_held_out, batch[0]))
    with tempfile.TemporaryDirectory() as place:
        run = RunFolder(Path(place))
        run.progress.mkdir()
        try:
            if recipe.choices and windows is not None:
                for measured in measure_layers(model, windows, selections, recipe.choices, options):
                    del measured
            for step in prune_layers(
                model,
                windows,
                recipe.pruner,
                recipe.pattern,
                selections,
                options,
                gradients=_gradients_of(selections),
                token_weights=_token_weights_of(selections, recipe.token_blocks, windows),
                learning=_learning_of(recipe, selections),
            ):
                if isinstance(step, LayerDone):
                    run.save_layer(step)
                elif step.learned is not None and step.learned.step >= _LEARNED_STEPS:
                    step.learned.snapshot()
                    break
                del step
        except InputError:
            return None  # random weights can be singular where real ones are not
    return peak.host()


def _gradients_of(selections: Sequence[LayerSelection]) -> Callable[[int, str], InputStats]:
    """Random gradient sums, made when asked for, as a run reads them from disk."""
    generator = torch.Generator().manual_seed(0)
    shapes = {linear.name: linear.shape for selection in selections for linear in selection.prune}

    def of_linear(index: int, name: str) -> InputStats:
        absolute, square = (torch.rand(shapes[name], generator=generator) for _ in range(2))
        return InputStats(1, weight_grad_abs=absolute, weight_grad_sq=square, n_grad_sequences=1)

    return of_linear


def _learning_of(recipe: Recipe, selections: Sequence[LayerSelection]) -> Learning:
    """Any masks in place of those of a prior's file."""

    def masks_of(index: int) -> dict[str, Tensor]:
        ones = {linear.name: torch.ones(linear.shape) for linear in selections[index].prune}
        return {name: masks.from_scores(one, recipe.pattern) for name, one in ones.items()}

    return Learning(recipe.seed, masks_of)


def _token_weights_of(
    selections: Sequence[LayerSelection], n_blocks: int, windows: Tensor | None
) -> Callable[[int], dict[str, Tensor]] | None:
    """Equal token weights, made when asked for, as a run reads them from disk; None where there are none."""
    if not n_blocks or windows is None:
        return None

    def of_layer(index: int) -> dict[str, Tensor]:
        blocks = {linear.name: n_token_blocks(linear, n_blocks) for linear in selections[index].prune}
        return {name: torch.ones(*windows.shape, own) for name, own in blocks.items() if own}

    return of_layer
