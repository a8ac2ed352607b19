"""The recipe's `train` section beside its method: what a preset or a method starts it from, and what the two rule out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nmprune.errors import InputError
from nmprune.methods import Method
from nmprune.methods.base import WholeModel
from nmprune.refine.layer_chain import NO_PRIOR, one_shot_prior
from nmprune.train.settings import TrainRecipe

Section = Callable[[dict[str, Any]], TrainRecipe]


def train_of(method: Method | None, raw_method: Any, raw: Any, read: Section) -> Any:
    """The `train` section: what is given, on top of what the preset says, on top of what the method starts from.

    Args:
        method: as it was read; None where it could not be.
        raw_method: what the recipe says of the method, where a preset may be named.
        raw: what the recipe says under `train`.
        read: makes the section of plain data and collects faults.
    """
    if not isinstance(method, WholeModel) or not isinstance(raw or {}, Mapping):
        return read(raw or {})
    preset = raw_method.get("preset", "") if isinstance(raw_method, Mapping) else ""
    return read({**method.train_defaults, **method.preset_train.get(str(preset), {}), **(raw or {})})


def train_faults(values: Mapping[str, Any], n_held_out: int) -> list[str]:
    """What is wrong with a whole-model method, its section and its neighbours; values that could not be read are None.

    Args:
        values: the recipe's.
        n_held_out: sequences that judge.
    """
    method, train, calibration = values["method"], values["train"], values["calibration"]
    if not isinstance(method, WholeModel):
        if method is not None and train != TrainRecipe():
            return [f"train is read by methods that learn the whole model, and {method.name} does not. Leave it out."]
        return []
    faults = train.faults()
    for step in ("polish", "reconstruct"):
        if values[step] is not None:
            faults.append(
                f"{step} works on one linear at a time and cannot follow {method.name}, which learns the whole model. Leave it "
                f"out, or take a one-shot method with {step}; `nmprune finetune` trains the kept weights of a finished run."
            )
    try:
        prior = one_shot_prior(method)
        if method.prior == NO_PRIOR:
            faults.append(
                f"method {method.name} starts from prior masks, and method.prior is none. Name a one-shot method: magnitude "
                "needs no text."
            )
        elif prior is not None and values["pattern"] and (reason := prior.why_not(values["pattern"])) is not None:
            faults.append(f"prior {prior.name} cannot do {values['pattern']}: {reason}")
        elif prior is None and values["permute"]:
            faults.append(
                f"{method.name}.prior {method.prior} is a mask file, and permute gives the channels another order. Name a "
                "one-shot method, or leave permute out."
            )
    except InputError as error:
        faults.append(str(error))
    if n_held_out >= calibration.n_sequences >= 1:
        faults.append(
            f"{method.name} judges masks on {n_held_out} of calibration.n_sequences {calibration.n_sequences}: nothing is left "
            "to learn from. Give more sequences."
        )
    return faults


def train_words(method: Method, train: TrainRecipe) -> dict[str, Any]:
    """The section as recipe.yaml and results.json hold it; nothing for a method that does not read it.

    `shard` is left out: it says where things lie, and a run may go on with it or without it.
    """
    if not isinstance(method, WholeModel):
        return {}
    return {"train": {key: value for key, value in dataclasses.asdict(train).items() if key != "shard"}}
