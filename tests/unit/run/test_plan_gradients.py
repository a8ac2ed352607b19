from __future__ import annotations

import importlib
from collections import defaultdict

import pytest

import tiny_models
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.run import probe, rehearsal
from nmprune.run.loss_aware import LossAware
from nmprune.run.machine import Machine
from nmprune.run.plan import plan
from nmprune.run.recipe import CalibrationRecipe, Recipe, StreamRecipe
from nmprune.stream import DecoderModel

run_plan = importlib.import_module("nmprune.run.plan")
N_SEQUENCES, SEQ_LEN, HIDDEN, N_LAYERS, VOCABULARY = 6, 16, 32, 3, tiny_models.VOCABULARY
STORE = N_SEQUENCES * SEQ_LEN * HIDDEN * 4
LAYER_WEIGHTS = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
PAST = "hidden states of the gradients past the budget (given back)"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("model") / "base", num_hidden_layers=N_LAYERS)


def planned(base, method, exclude=(), machine=None, timed=False, settings=None, loss_aware=None, **kwargs):
    calibration = CalibrationRecipe("tokens.safetensors", N_SEQUENCES, SEQ_LEN)
    recipe = Recipe(str(base), create(method, settings), Pattern(2, 4), exclude, calibration, loss_aware=loss_aware)
    return plan(recipe, machine or Machine(), timed=timed, **kwargs)


def test_gradients_alone_cost_no_pass_of_the_stream(base):
    found = planned(base, "pruner_zero")
    assert found.layer_passes == N_LAYERS + 3 * N_LAYERS
    assert found.calibration == (N_SEQUENCES, SEQ_LEN, N_SEQUENCES)
    assert "hidden states" not in found.memory["layers"] and "embedding" not in found.memory
    assert found.disk["gradients (given back)"] == N_LAYERS * LAYER_WEIGHTS * 4 + STORE
    assert PAST not in found.disk
    assert planned(base, "wanda").layer_passes == 2 * N_LAYERS - 1
    assert not any("gradient" in key for key in (*planned(base, "wanda").memory, *planned(base, "wanda").disk))


def test_gradients_and_the_stream_add_up(base):
    found = planned(base, "gblm")
    assert found.layer_passes == N_LAYERS + 3 * N_LAYERS + 2 * N_LAYERS - 1
    assert found.disk["gradients (given back)"] == N_LAYERS * LAYER_WEIGHTS * 4 + STORE, "of its own norm only"


def test_memory_of_the_two_stages(base):
    memory = planned(base, "pruner_zero").memory
    layers, head = memory["gradients, layers"], memory["gradients, head"]
    assert layers["gradient sums, and those of a segment"] == 2 * LAYER_WEIGHTS * 4
    assert layers["hidden states of all layers"] == head["hidden states of all layers"] == (N_LAYERS + 1) * STORE
    assert head["logits of one sequence and their gradient"] == 4 * SEQ_LEN * VOCABULARY * 4
    on_device = planned(base, "pruner_zero", device_memory=10**9).memory["gradients, layers"]
    assert "hidden states of all layers" not in on_device


def test_hidden_states_past_the_budget_go_to_disk_layer_by_layer(base):
    found = planned(base, "pruner_zero", machine=Machine(hidden_budget=2 * STORE + 1))
    assert found.memory["gradients, layers"]["hidden states of all layers"] == 2 * STORE
    assert found.disk[PAST] == (N_LAYERS + 1 - 2) * STORE


def test_layers_before_the_first_pruned_one_are_not_run_back(base):
    found = planned(base, "pruner_zero", exclude=("model.layers.0.*", "model.layers.1.*"))
    assert found.layer_passes == N_LAYERS + 3
    assert found.memory["gradients, layers"]["hidden states of all layers"] == 2 * STORE


@pytest.mark.parametrize("method", ["pruner_zero", "gblm"])
def test_a_plan_with_a_time(method, base, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_DISK_BYTES", 1 << 10)
    rehearsed = []
    # in this process: another one takes seconds to import everything
    monkeypatch.setattr(rehearsal, "layer_peak", lambda *args: rehearsed.append(rehearsal._walk(*args)) or 1 << 30)
    found = planned(base, method, timed=True, out=tmp_path)
    assert found.seconds["gradients"] > 0 and ("forward" in found.seconds) == (method == "gblm")
    assert len(rehearsed) == 1 and any("(rehearsed)" in part for part in found.memory["layers"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_every_kind_of_linear_can_be_timed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_DISK_BYTES", 1 << 10)
    model = DecoderModel.from_config(tiny_models.save(name, tmp_path / name))
    rates = probe.measure(model, create("pruner_zero"), Pattern(2, 4), (2, SEQ_LEN), tmp_path)
    assert rates.layer_seconds == {} and rates.statistics_seconds == {}, "the stream makes no forward"
    there, back = rates.gradient_seconds[probe.signature(model.layers[0])]
    assert there > 0 and back > 0 and rates.head_seconds > 0
    assert {one.shape for index in range(2) for one in model.linears(index)[0]} == rates.solver_seconds.keys()
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert probe.measure(model, create("wanda"), Pattern(2, 4), (2, SEQ_LEN), tmp_path).gradient_seconds == {}


TOKEN_WEIGHTS = 7 * N_SEQUENCES * SEQ_LEN * 4  # of a layer, in one block of rows


def test_loss_aware_adds_the_pass_without_gradient_sums(base):
    found, plain = planned(base, "wanda", loss_aware=LossAware()), planned(base, "wanda")
    assert found.layer_passes == plain.layer_passes + N_LAYERS + 3 * N_LAYERS
    layers = found.memory["gradients, layers"]
    assert layers["token weights"] == found.memory["layers"]["token weights"] == TOKEN_WEIGHTS
    assert not any("gradient sums" in part for part in layers) and "one gradient" not in layers
    assert found.disk["gradients (given back)"] == N_LAYERS * TOKEN_WEIGHTS + STORE
    assert "token weights" not in plain.memory["layers"]
    both = planned(base, "gblm", loss_aware=LossAware(blocks=2))
    assert both.disk["gradients (given back)"] == N_LAYERS * (LAYER_WEIGHTS * 4 + 2 * TOKEN_WEIGHTS) + STORE


def statistics(base, loss_aware, **settings):
    found = planned(base, "descent", loss_aware=loss_aware, **settings)
    return found.memory["layers"]["statistics"] / (4 * 4)  # fp32: two matrices, of all tokens so far and of a segment


def test_statistics_are_counted_by_linear_and_block(base):
    assert statistics(base, None) == 3 * 32**2 + 64**2
    assert statistics(base, LossAware()) == 6 * 32**2 + 64**2
    assert statistics(base, LossAware(blocks=3)) == 3 * (6 * 32**2 + 64**2)
    few_rows = statistics(base, LossAware(blocks=20))  # k and v have 16 rows
    assert few_rows == 20 * (4 * 32**2 + 64**2) + 2 * 16 * 32**2


def test_one_input_at_a_time_needs_the_statistics_of_the_largest_stage(base):
    def of_stage(loss_aware):
        calibration = CalibrationRecipe("tokens.safetensors", N_SEQUENCES, SEQ_LEN)
        stream = StreamRecipe(true_sequential=True)
        recipe = Recipe(
            *(str(base), create("sparsegpt"), Pattern(2, 4)),
            calibration=calibration,
            stream=stream,
            loss_aware=loss_aware,
        )
        return plan(recipe, timed=False).memory["layers"]["statistics"] // (2 * 4)  # fp32: the sum and a segment

    assert of_stage(None) == 64**2
    assert of_stage(LossAware(blocks=2)) == 2 * 64**2, "q, k and v: 2 * 3 * 32 ** 2 is less"


def test_experts_share_their_statistics_as_before(tmp_path):
    base = tiny_models.save("mixtral", tmp_path / "mixtral")
    assert statistics(base, LossAware()) - statistics(base, None) == 2 * 32**2, (
        "q, k and v instead of one for all three"
    )


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_loss_aware_plan_with_a_time(blocks, base, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_DISK_BYTES", 1 << 10)
    given: list[int] = []
    walk = rehearsal.prune_layers

    def watching(*args, **kwargs):
        given.extend(value.shape[-1] for value in kwargs["token_weights"](0).values())
        return walk(*args, **kwargs)

    monkeypatch.setattr(rehearsal, "prune_layers", watching)
    monkeypatch.setattr(rehearsal, "layer_peak", lambda *args: rehearsal._walk(*args) or 1 << 30)
    found = planned(base, "sparsegpt", timed=True, out=tmp_path, loss_aware=LossAware(blocks=blocks))
    assert found.seconds["gradients"] > 0 and found.seconds["forward"] > 0
    assert given == [blocks] * 7, "the rehearsal makes as many Gram matrices as the run"
    assert any("(rehearsed)" in part for part in found.memory["layers"])


@pytest.mark.parametrize(("blocks", "expected"), [(0, 12 + 7), (1, 21 + 7), (2, 42 + 7)])
def test_solvers_find_less_at_hand_where_inputs_are_weighted_apart(blocks, expected, base, tmp_path, monkeypatch):
    """With 4 seconds for a first solve and 1 for a later one, 3 are paid for each Gram matrix."""
    ones = defaultdict(lambda: 1.0)
    both = defaultdict(lambda: (4.0, 1.0))
    monkeypatch.setattr(run_plan, "measure", lambda *args: probe.Rates(ones, ones, both, ones, 0, 0, both))
    monkeypatch.setattr(rehearsal, "layer_peak", lambda *args: 1 << 30)
    found = planned(
        base, "sparsegpt", timed=True, out=tmp_path, loss_aware=LossAware(blocks=blocks) if blocks else None
    )
    assert found.seconds["solve"] == N_LAYERS * expected
    assert found.seconds["statistics"] == N_LAYERS * (expected - 7) / 3
