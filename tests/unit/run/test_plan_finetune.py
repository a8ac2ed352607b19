from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import tiny_runs
from nmprune.errors import InputError
from nmprune.report import finetune_plan_tables
from nmprune.run import Machine
from nmprune.run import plan_finetune as plan_module
from nmprune.run.finetune_rehearsal import Rehearsed
from nmprune.run.plan_finetune import plan_finetune as plan
from nmprune.train.finetune_settings import FinetuneRecipe

N_LAYERS = 6
CPU = Machine("cpu", threads=1)
SETTINGS = FinetuneRecipe(text="builtin", seq_len=16, max_tokens=800, n_held_out=2, minutes=0, steps=10, autocast="no")


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("plan_finetune")
    return tiny_runs.finished(tiny_runs.model(place / "base", num_hidden_layers=N_LAYERS), place / "run")


@pytest.fixture
def rehearsals(monkeypatch) -> list[int]:
    """Depths that were rehearsed; every decoder layer takes 1 MB, 0.5 s a step and 0.1 s a window, all else 2 MB, 3 s, 1 s."""
    depths: list[int] = []

    def rehearse(parent, base, settings, machine, n_layers, seq_len, autocast) -> Rehearsed:
        depths.append(n_layers)
        held = (2 + n_layers) * 10**6
        return Rehearsed(n_layers, held, 3 + 0.5 * n_layers, 1 + 0.1 * n_layers)

    monkeypatch.setattr(plan_module, "rehearse", rehearse)
    return depths


def test_two_depths_tell_the_whole(parent, rehearsals):
    found = plan(parent, SETTINGS, CPU)
    assert rehearsals == [2, 4]
    training = found.memory["training"]
    told = sum(training.values()) - training["tokenizer, token windows"]
    # what judges in the run is as much as in a rehearsal: two windows of 16 tokens
    assert told == pytest.approx(8 * 10**6, abs=2)
    assert found.seconds is not None and found.seconds["training"] == pytest.approx(10 * 6.0)
    looks = SETTINGS.evaluations + 2  # at the start, over the budget, and of what is written
    assert found.seconds["held-out windows"] == pytest.approx(2 * looks * 1.6)
    assert found.seconds.keys() == {"training", "held-out windows", "read", "write"}
    assert found.steps == 10 and found.fits and found.windows == (48, 16, 2, 1)


def test_sizes_are_those_of_the_shapes(parent, rehearsals):
    found = plan(parent, SETTINGS, CPU)
    linears = N_LAYERS * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    outside = 2 * 96 * 32 + 32 + N_LAYERS * 2 * 32
    assert found.trained == linears and found.parameters == linears + outside
    training = found.memory["training"]
    assert training["model, fp32"] == training["dense model"] == 4 * found.parameters
    assert training["gradients"] == training["best values so far"] == 4 * linears
    assert training["moments of Adam"] == 8 * linears and training["masks"] == 2 * linears
    assert found.disk["checkpoint (given back)"] == 16 * linears

    half = plan(parent, dataclasses.replace(SETTINGS, autocast="yes"), CPU).memory["training"]
    assert half["dense model"] == 2 * found.parameters
    alone = plan(parent, dataclasses.replace(SETTINGS, loss="lm"), CPU).memory["training"]
    assert not any("dense" in part or "distributions" in part for part in alone)
    low = plan(parent, dataclasses.replace(SETTINGS, lora=2), CPU)
    assert low.trained == N_LAYERS * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)) and "rank 2" in low.what
    more = plan(parent, dataclasses.replace(SETTINGS, also=("norms", "embeddings")), CPU)
    assert more.trained == more.parameters and more.what.endswith("linears, norms, embeddings")


def test_a_budget_of_time_becomes_steps(parent, rehearsals):
    timed = plan(parent, dataclasses.replace(SETTINGS, minutes=10.0, steps=0), CPU)
    looks = 2 * (SETTINGS.evaluations + 1) * 1.6
    assert timed.steps == round((600 - looks) / 6.0)
    assert plan(parent, dataclasses.replace(SETTINGS, minutes=10.0, steps=5), CPU).steps == 5
    assert plan(parent, dataclasses.replace(SETTINGS, minutes=0.01, steps=0), CPU).steps == 1


def test_where_nothing_can_be_rehearsed_sizes_are_added_up(parent, monkeypatch):
    monkeypatch.setattr(plan_module, "rehearse", lambda *args: None)
    found = plan(parent, dataclasses.replace(SETTINGS, minutes=1.0, steps=0), CPU)
    assert found.seconds is None and found.steps is None
    assert {"activations", "logits", "libraries"} <= found.memory["training"].keys()
    assert "was not rehearsed" in found.notes[0] and "no time" in found.notes[1] and "patience" in found.notes[2]
    checkpointed = plan(parent, dataclasses.replace(SETTINGS, activation_checkpointing=True), CPU)
    assert checkpointed.memory["training"]["activations"] < found.memory["training"]["activations"]
    shown = dict(finetune_plan_tables(found)[0].rows)
    assert shown["budget"] == "until the time is up" and shown["time"] == "not estimated"


def test_too_little_memory_is_said_with_the_ways_to_less(parent, rehearsals, monkeypatch):
    monkeypatch.setattr(plan_module, "memory_limit", lambda device, asked: 10**6)
    found = plan(parent, SETTINGS, CPU)
    assert rehearsals == [], "no rehearsal that would not fit either"
    assert not found.fits and "DOES NOT FIT" in dict(finetune_plan_tables(found)[0].rows)["peak memory"]
    assert "--lora 16, --set activation_checkpointing=true, --set batch_size=1" in found.notes[0]


def test_what_the_run_would_refuse_the_plan_refuses(parent, rehearsals):
    with pytest.raises(InputError, match="lora is 99"):
        plan(parent, dataclasses.replace(SETTINGS, lora=99), CPU)
    with pytest.raises(InputError, match="nothing is left to train on"):
        plan(parent, dataclasses.replace(SETTINGS, n_held_out=10_000), CPU)
    assert rehearsals == []
