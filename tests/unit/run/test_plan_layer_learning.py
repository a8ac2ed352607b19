"""What learning takes: bytes that add up, seconds that count every pass through the layer."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

import tiny_models
from layer_methods import Toy
from nmprune import methods
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.refine import Polish
from nmprune.run import CalibrationRecipe, Machine, Recipe
from nmprune.run.plan import plan
from nmprune.run.plan_layer_learning import LayerLearningSizes
from nmprune.run.probe import signature
from nmprune.stream import DecoderModel, select

LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}


@dataclass(frozen=True)
class Published(Toy):
    published: ClassVar[dict] = {(32, 2): "a minute and a half"}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", Toy)


@pytest.fixture
def folder(tmp_path):
    return tiny_models.save("llama", tmp_path / "base")


def sizes(folder, method, n_sequences=8, **kwargs):
    calibration = CalibrationRecipe("builtin", n_sequences, 16)
    recipe = Recipe(str(folder), method, Pattern(2, 4), calibration=calibration, **kwargs)
    model = DecoderModel.from_config(folder)
    return LayerLearningSizes(recipe, model, select(model, recipe.pattern)), model


def test_seconds_count_every_sequence_there_and_back(folder):
    found, model = sizes(folder, Toy(steps=6, prior="wanda"))
    layer_seconds = {signature(layer): 8000.0 for layer in model.layers}  # a forward of 8 sequences
    seconds = found.seconds(layer_seconds, 8)
    # 6 steps of 3 sequences there and back (3 forwards each); 1 held-out sequence judged with two masks
    assert seconds == pytest.approx(2 * 1000 * (6 * 3 * 3 + 2), rel=0.01)
    more, _ = sizes(folder, Toy(steps=60, prior="wanda"))
    assert more.seconds(layer_seconds, 8) == pytest.approx(2 * 1000 * (60 * 9 + 2), rel=0.01)
    polished, _ = sizes(folder, Toy(steps=6, prior="wanda"), polish=Polish())
    assert polished.seconds(layer_seconds, 8) == pytest.approx(2 * 1000 * (6 * 9 + 3), rel=0.01)


def test_bytes(folder):
    found, model = sizes(folder, Toy(prior="wanda"))
    linears = model.linears(0)[0]
    n_weights = sum(one.shape[0] * one.shape[1] for one in linears)
    parts = found.memory(linears, 2048)
    assert parts["dense weights in fp32, prior masks"] == 5 * n_weights
    assert parts["learner, masked weights, gradients"] == 12 * n_weights
    assert parts["carried state"] == 4 * 7 + 8
    assert found.disk()["learner's last state"] == 36


def test_notes(folder):
    assert sizes(folder, Toy(prior="sparsegpt"))[0].notes()[1:] == [
        "the prior sparsegpt moves weights: its mask is taken, its weights are not."
    ]
    assert sizes(folder, Published())[0].notes()[-1].endswith("for a model of this size: a minute and a half.")


def test_a_plan_holds_targets_and_the_dense_models_hidden_states(folder):
    def hidden(**settings):
        recipe = Recipe(str(folder), Toy(**settings), Pattern(2, 4), calibration=CalibrationRecipe("builtin", 8, 16))
        found = plan(recipe, timed=False)
        return found.memory["layers"]["hidden states"], found.layer_passes

    one, passes = hidden()
    assert hidden(target=0.5) == (one * 3 // 2, passes + 2)
    assert one == 2 * 8 * 16 * 32 * 4 and passes == 3


def test_a_seven_billion_model_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    calibration = CalibrationRecipe("builtin", 128, 2048)
    method = create("hyperprune", {"hidden": 256, "layer_width": 64, "component_width": 64})
    found = plan(
        Recipe(str(tmp_path), method, Pattern(2, 4), calibration=calibration), Machine(), device_memory=80 << 30
    )
    parts = found.memory["layers"]
    layer = parts["decoder layer"]
    assert layer == pytest.approx(202e6 * 2, rel=0.01)
    assert parts["carried state"] < layer, "the network must fit beside one decoder layer"
    assert found.fits and found.seconds is None
