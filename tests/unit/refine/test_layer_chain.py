"""A learner with its prior and its steps, as one method."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest

from layer_methods import Toy
from nmprune.errors import InputError
from nmprune.methods import METHODS
from nmprune.pattern import Pattern
from nmprune.refine import LayerChain, Polish, Reconstruct


@dataclass(frozen=True)
class Moving(Toy):
    name: ClassVar[str] = "moving"
    updates_weights: ClassVar[bool] = True


def test_what_the_parts_declare_is_declared_together():
    alone = LayerChain(Toy(prior="sparsegpt"))
    assert (alone.name, alone.updates_weights, alone.follows_dense) == ("toy", False, False)
    assert alone.needs == {"input_sq_norm", "input_gram"} and alone.runs_layers
    steps = LayerChain(Toy(), Polish(), Reconstruct())
    assert steps.name == "toy+polish+reconstruct" and steps.updates_weights and steps.follows_dense
    assert LayerChain(Toy(target=0.1)).follows_dense and not LayerChain(Toy(), Polish(target=0.0)).follows_dense


def test_priors():
    assert LayerChain(Toy()).prior is None and LayerChain(Toy()).prior_file is None
    assert LayerChain(Toy(prior="wanda")).prior.name == "wanda"
    for place in ("runs/first", "masks.safetensors", "masks.npz"):
        chain = LayerChain(Toy(prior=place))
        assert chain.prior is None and str(chain.prior_file) == place
    with pytest.raises(InputError, match="neither a one-shot method nor a mask file"):
        LayerChain(Toy(prior="wnada"))


def test_hyper_parameters_of_steps_stand_under_their_names():
    found = LayerChain(Toy(), Polish(), Reconstruct()).hyper_parameters()
    assert found["polish"]["sweeps"] == 6 and found["reconstruct"]["target"] == 0.5 and found["steps"] == 4


def test_no_method_has_a_setting_named_as_a_step():
    for method in METHODS.values():
        assert not {"polish", "reconstruct"} & {field.name for field in dataclasses.fields(method)}


def test_polish_alone_cannot_follow_moved_weights():
    with pytest.raises(InputError, match="polish chooses another mask"):
        LayerChain(Moving(), Polish())
    assert LayerChain(Moving(), Polish(), Reconstruct()).updates_weights
    assert LayerChain(Toy()).why_not(Pattern(2, 4)) is None
