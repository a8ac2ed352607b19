"""One network for all masks: what the last network of a hyperprune run makes of every layer, beside what was taken on the way.

The run is walked again: each layer meets the inputs that it met then, in a model whose earlier layers are the run's own.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from nmprune.checkpoint import write_masks
from nmprune.errors import InputError
from nmprune.methods.base import State
from nmprune.methods.hyperprune import HyperPrune
from nmprune.refine import LayerChain
from nmprune.results import Results
from nmprune.run.allocate import allocated, select_fitting
from nmprune.run.base import find_base, wrong_base
from nmprune.run.folder import RunFolder, open_tensors, write_text
from nmprune.run.learn_layers import learning_of
from nmprune.run.machine import Machine
from nmprune.run.permute import permute_model
from nmprune.run.progress import Progress, Report, silent
from nmprune.run.recipe import Recipe
from nmprune.run.replay_layers import RegeneratedLayer, RegeneratedLinear, Replay, RunMasks, mean_over_groups
from nmprune.run.stream_options import stream_options
from nmprune.stream import DecoderModel, DTypeName, LayerDone, LayerSelection, prune_layers

MASKS_FILE = "regenerated.safetensors"


@dataclass(frozen=True)
class Regeneration:
    """What evaluations/regenerated.json holds.

    Attributes:
        method: of the run.
        prior: what its prior was.
        lambda2: weight of the continual term, which is there against forgetting.
        agreement: share of all groups that have the same mask in the run and from its last network, 0..1.
        prior_run: the same of the prior's masks and the run's; null without a prior.
        linears: in the order of the model.
        layers: in order; those with nothing to prune are left out.
        left_out: experts that saw too few tokens to be learned: pruned by magnitude, then and now.
        seconds: wall clock.
    """

    method: str
    prior: str
    lambda2: float
    agreement: float
    prior_run: float | None
    linears: tuple[RegeneratedLinear, ...]
    layers: tuple[RegeneratedLayer, ...]
    left_out: tuple[str, ...]
    seconds: float


def regenerate(
    path: Path, machine: Machine | None = None, base: str | None = None, report: Report = silent
) -> tuple[Regeneration, Path]:
    """Make every mask of a finished hyperprune run again from its last network, and compare.

    Args:
        path: the run folder.
        machine: how.
        base: where the dense model is now; None = where the recipe says.
        report: called at every sign of life.

    Returns:
        What was found, and the JSON file that holds it. The masks lie in the run folder, as `MASKS_FILE`: beside the order of
        the channels, where the run changed it.

    Raises:
        InputError: no finished run, no network in it, or its dense model is not there or another one.
    """
    machine = machine or Machine()
    start = time.perf_counter()
    folder = RunFolder(path)
    results, recipe = folder.read_results(), folder.read_recipe()
    method = _network(folder, recipe)
    machine.set_threads()
    model = _open(folder, recipe, results, machine, base)
    saved = folder.saved_tokens()
    if saved is None:
        raise InputError(f"{folder.path} has no {folder.tokens_file.name}: the run's text is gone.")
    windows = saved[0]
    selections = select_fitting(model, recipe)
    permute_model(recipe, machine, model, selections, windows, report, folder)
    selections, _, _ = allocated(recipe, machine, model, selections, windows, report, folder)
    of_run = RunMasks(folder, recipe.pruner.updates_weights, selections)
    replay = Replay(method.prior, method.target, method, _last_state(folder), of_run)
    n_layers = model.n_layers
    steps = prune_layers(
        model,
        windows,
        LayerChain(replay),
        recipe.pattern,
        selections,
        stream_options(recipe, machine),
        scratch=machine.scratch,
        learning=learning_of(recipe, model, selections),
    )
    for step in steps:
        if isinstance(step, LayerDone):
            report(Progress("regenerate", step.index + 1, n_layers, replay.words(step.index, n_layers)))
        else:
            report(Progress("regenerate", step.index + step.done / max(step.total, 1) * 0.999, n_layers))
        del step
    found = _summary(recipe, method, results, replay, selections, time.perf_counter() - start)
    file = folder.path / "evaluations" / "regenerated.json"
    write_text(file, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    write_masks(folder.path / MASKS_FILE, of_run.with_masks(replay.packed))
    return found, file


def _network(folder: RunFolder, recipe: Recipe) -> HyperPrune:
    if recipe.finetune is not None:
        raise InputError(
            f"{folder.path} is a finetuning, which changes no mask. Give the run that made them: {recipe.finetune.parent}."
        )
    if not isinstance(recipe.method, HyperPrune):
        raise InputError(
            f"{folder.path} is a run of {recipe.method.name}: only hyperprune has one network for all masks. Give a run of it."
        )
    if not recipe.method.network:
        raise InputError(f"{folder.path} ran with method.network=false: there is no network to make masks from.")
    if not folder.learned_file.is_file():
        raise InputError(f"{folder.path} has no {folder.learned_file.name}: its last network is gone. Run it again.")
    return recipe.method


def _open(folder: RunFolder, recipe: Recipe, results: Results, machine: Machine, base: str | None) -> DecoderModel:
    dtype: DTypeName = recipe.dtype  # type: ignore[assignment]
    model = DecoderModel.open(
        find_base(folder, recipe.model, base),
        device=machine.resolve(),
        dtype=dtype,
        trust_remote_code=recipe.trust_remote_code,
        allow_sparse=recipe.allow_sparse,
    )
    assert model.checkpoint is not None
    if (fingerprint := model.checkpoint.fingerprint()) != results.model_fingerprint:
        raise wrong_base(model.checkpoint.folder, fingerprint, results.model_fingerprint)
    return model


def _last_state(folder: RunFolder) -> State:
    with open_tensors(folder.learned_file) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  no mapping


def _summary(
    recipe: Recipe,
    method: HyperPrune,
    results: Results,
    replay: Replay,
    selections: list[LayerSelection],
    seconds: float,
) -> Regeneration:
    accepted = {one.layer: one.accepted for one in results.learned_layers}
    everything = [linear.name for selection in selections for linear in selection.prune]
    agreement = mean_over_groups(replay.linears, "agreement")
    if agreement is None:
        raise InputError("no linear of this run was learned: all are experts that saw too few tokens.")
    return Regeneration(
        method=recipe.pruner.name,
        prior=method.prior,
        lambda2=method.lambda2,
        agreement=agreement,
        prior_run=mean_over_groups(replay.linears, "prior_run"),
        linears=tuple(replay.linears),
        layers=tuple(dataclasses.replace(one, accepted=accepted.get(one.layer)) for one in replay.layers),
        left_out=tuple(name for name in everything if name not in replay.packed),
        seconds=seconds,
    )
