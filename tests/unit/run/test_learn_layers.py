"""A learner in a run: metrics, snapshots, resume to the same bits, prior masks from files, what results.json says."""

import json
import os
import signal
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from layer_methods import Toy
from nmprune import methods
from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.refine import Polish, Reconstruct
from nmprune.results import Results
from nmprune.run import CalibrationRecipe, Recipe, learn_layers, prune_run
from runs import output, prune

TOY = Toy(prior="wanda", guard=True, steps=5)


class Killed(Exception):
    """The end of a process, as far as a test can play it."""


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", Toy)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("model") / "base", num_hidden_layers=3)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def killed_at(moment):
    """A report that ends the run at the sign of number `moment` that a learner gives."""
    seen = []

    def report(sign):
        seen.extend([sign] if sign.live else [])
        if len(seen) > moment:
            raise Killed

    return report


def left(out):
    """What must be the same, interrupted or not."""
    state = {name: value.tolist() for name, value in load_file(out / "learned.safetensors").items()}
    return {**output(out), "metrics": (out / "metrics.jsonl").read_bytes(), "state": state}


def test_what_a_run_leaves(model, tmp_path):
    results = prune(model, tmp_path / "run", TOY).results
    lines = metrics(tmp_path / "run")
    assert [(one["layer"], one["step"]) for one in lines] == [(i, s) for i in range(3) for s in range(1, 6)]
    assert all(one["total"] == 5 and one["loss"] > 0 and one["temperature"] == 1 / one["step"] for one in lines)
    state = load_file(tmp_path / "run" / "learned.safetensors")
    assert state["layers"] == 3 and state["bias"].shape == (7,)
    assert results.method == {"name": "toy", **TOY.hyper_parameters()} and not results.updates_weights
    assert results.seconds["learn"] > 0
    read = Results.read(tmp_path / "run" / "results.json").learned_layers
    assert read == results.learned_layers and [one.layer for one in read] == [0, 1, 2]
    for one in read:
        assert one.steps == 5 and one.accepted == (one.flips > 0)
        assert one.loss <= one.prior_loss and one.final_loss is None
    linear = results.linears[0]
    assert linear.notes["prior"] == "wanda" and linear.n_tokens == 6 * 16 and linear.seconds > 0
    assert not (tmp_path / "run" / "progress").exists()


def test_a_seed_decides_and_another_seed_differs(model, tmp_path):
    free = Toy(steps=3)
    for place, seed in (("one", 0), ("same", 0), ("other", 1)):
        prune(model, tmp_path / place, free, seed=seed)
    assert left(tmp_path / "one") == left(tmp_path / "same")
    assert left(tmp_path / "one") != left(tmp_path / "other")


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["every step kept", "nothing kept inside a layer"])
@pytest.mark.parametrize("moment", [0, 2, 4, 7, 14])
def test_killed_inside_a_layer_and_run_again(model, tmp_path, monkeypatch, every, moment):
    prune(model, tmp_path / "undisturbed", TOY)
    monkeypatch.setattr(learn_layers, "SNAPSHOT_SECONDS", every)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        prune(model, out, TOY, report=killed_at(moment))
    assert (out / "progress" / "learning.safetensors").exists() == (not every)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"layer": 0, "st')  # cut off by the kill
    done = []
    monkeypatch.setattr(learn_layers, "SNAPSHOT_SECONDS", 1e9)
    prune(model, out, TOY, report=lambda sign: done.extend([sign] if sign.live else []))
    assert left(out) == left(tmp_path / "undisturbed")
    again = 15 - moment - 1 if not every else 15 - 5 * (moment // 5)
    assert len(done) == again


def test_killed_twice_in_one_layer(model, tmp_path, monkeypatch):
    prune(model, tmp_path / "undisturbed", TOY)
    monkeypatch.setattr(learn_layers, "SNAPSHOT_SECONDS", 0.0)
    for moment in (6, 0):  # layer 1, step 2; then one step on
        with pytest.raises(Killed):
            prune(model, tmp_path / "run", TOY, report=killed_at(moment))
    prune(model, tmp_path / "run", TOY)
    assert left(tmp_path / "run") == left(tmp_path / "undisturbed")


def test_ctrl_c_keeps_the_step_in_work(model, tmp_path):
    prune(model, tmp_path / "undisturbed", TOY)
    signs = []

    def interrupt(sign):
        signs.extend([sign] if sign.live else [])
        if len(signs) == 8 and sign.live:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "run", TOY, report=interrupt)
    assert len(signs) == 8 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signs.clear()
    prune(model, tmp_path / "run", TOY, report=lambda sign: signs.extend([sign] if sign.live else []))
    assert len(signs) == 7
    assert left(tmp_path / "run") == left(tmp_path / "undisturbed")


def test_in_memory_gives_the_same_masks(model, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = prune(loaded, None, TOY)
    results = prune(model, tmp_path / "run", TOY).results
    assert found.learned_layers == results.learned_layers
    assert [one.notes for one in found.linears] == [one.notes for one in results.linears]
    assert all(not parameter.grad_fn and parameter.grad is None for parameter in loaded.parameters())


def test_a_finished_run_is_a_prior(model, tmp_path):
    prune(model, tmp_path / "first", "wanda")
    by_name = prune(model, tmp_path / "by_name", TOY).results
    by_file = prune(model, tmp_path / "by_file", Toy(prior=str(tmp_path / "first"), guard=True, steps=5)).results
    assert output(tmp_path / "by_name").keys() == output(tmp_path / "by_file").keys()
    # wanda in a run propagates its own masks, so later layers' priors differ; the first layer's are the same
    assert by_name.learned_layers[0] == by_file.learned_layers[0]
    assert by_file.linears[0].notes["prior"] == str(tmp_path / "first")


def test_polish_and_reconstruct_follow(model, tmp_path):
    results = prune(model, tmp_path / "run", TOY, polish=True, reconstruct=True).results
    assert results.method["name"] == "toy+polish+reconstruct" and results.updates_weights
    assert results.method["polish"] == {"shrinkage": 0.5, "target": 0.4, "sweeps": 6}
    assert all(one.final_loss is not None for one in results.learned_layers)
    assert {"polish_sweeps", "reconstruct_taken", "prior"} <= results.linears[0].notes.keys()


def test_a_prior_that_moves_weights_gives_its_mask_only(model, tmp_path):
    results = prune(model, tmp_path / "run", Toy(prior="sparsegpt", guard=True)).results
    assert not results.updates_weights
    assert results.linears[0].notes["prior"] == "sparsegpt's mask without its weights"


def test_experts_without_enough_tokens_are_pruned_by_magnitude(tmp_path):
    model = tiny_models.save("qwen3_moe", tmp_path / "base")
    results = prune(model, tmp_path / "run", TOY, stream={"min_expert_tokens": 60}).results
    starved = [one for one in results.linears if "fallback" in one.notes]
    assert 0 < len(starved) < len(results.linears)
    assert all(one.n_tokens < 60 and "prior" not in one.notes for one in starved)


def test_one_sequence_is_enough_and_nothing_is_held_out(model, tmp_path):
    results = prune(model, tmp_path / "run", Toy(prior="wanda"), calibration=tiny_models.windows(1)).results
    assert all(one.loss is None and one.prior_loss is None and one.flips >= 0 for one in results.learned_layers)


FAULTS = MappingProxyType(
    {
        "an unknown prior": ({"prior": "wnada"}, {}, "neither a one-shot method nor a mask file. Did you mean 'wanda'"),
        "a prior that is no one-shot method": ({"prior": "toy"}, {}, "which is no one-shot method"),
        "true sequential": ({}, {"stream": {"true_sequential": True}}, "learns all linears of a layer together"),
        "a target with dense propagation": ({"target": 0.5}, {"stream": {"propagate": "dense"}}, "stream.propagate"),
        "all held out": ({}, {"n_held_out": 6}, "nothing is left to learn from"),
        "a mask file and permute": ({"prior": "runs/first"}, {"permute": "all"}, "gives the channels another order"),
    }
)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_recipe(fault, model, tmp_path):
    settings, others, words = FAULTS[fault]
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        prune(model, tmp_path / "run", create("toy", settings), **others)
    assert not (tmp_path / "run").exists()


def test_a_mask_file_that_does_not_fit_is_found_before_anything_is_written(model, tmp_path):
    prune(model, tmp_path / "first", "wanda", pattern="1:4")
    with pytest.raises(InputError, match="is 1:4, and 2:4 is wanted here"):
        prune(model, tmp_path / "run", Toy(prior=str(tmp_path / "first")))
    other = tiny_models.save("llama", tmp_path / "other", num_hidden_layers=3, seed=5)
    prune(other, tmp_path / "second", "wanda")
    with pytest.raises(InputError, match="belongs to other weights"):
        prune(model, tmp_path / "run", Toy(prior=str(tmp_path / "second")))
    with pytest.raises(InputError, match="no such"):
        prune(model, tmp_path / "run", Toy(prior=str(tmp_path / "nowhere" / "masks.safetensors")))
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_a_learner_survives_the_file(model, tmp_path):
    recipe = Recipe(str(model), TOY, Pattern(2, 4), calibration=CalibrationRecipe("builtin", 4, 16))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert recipe.calibrated and Recipe(str(model), Toy(), Pattern(2, 4)).calibrated
    assert Recipe(str(model), TOY, Pattern(2, 4), polish=Polish(), reconstruct=Reconstruct()).pruner.follows_dense


def test_a_method_that_learns_nothing_leaves_no_such_files(model, tmp_path):
    results = prune(model, tmp_path / "run", "wanda").results
    assert results.learned_layers == ()
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "learned.safetensors").exists()


def test_a_foreign_folder_of_tokens_is_not_needed(model, tmp_path):
    recipe = Recipe(str(model), TOY, Pattern(2, 4))
    results = prune_run(recipe, tmp_path / "run", token_ids=tiny_models.windows())
    assert len(results.learned_layers) == 3
