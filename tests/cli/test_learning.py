"""Learners from the command line: what they say, what is drawn, what `plan` tells."""

from __future__ import annotations

import json

import pytest

SMALL = ["--n-sequences", "4", "--seq-len", "16", "--set", "method.steps=4"]


@pytest.fixture(scope="module")
def learned(made, tmp_path_factory):
    from nmprune.methods import create
    from nmprune.pattern import Pattern
    from nmprune.run import CalibrationRecipe, Recipe, prune_run

    out = tmp_path_factory.mktemp("learned") / "run"
    method = create("hyperprune", {"steps": 4, "prior": "wanda"})
    prune_run(Recipe(str(made[0]), method, Pattern(2, 4), calibration=CalibrationRecipe("builtin", 4, 16)), out)
    return out


def test_a_learner_prunes_and_says_what_came_of_it(call, base, tmp_path):
    result = call("prune", base, "--method", "hyperprune", *SMALL, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.stderr and f"nmprune curves {tmp_path / 'run'}" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(one["layer"], one["step"]) for one in lines] == [(layer, s) for layer in range(2) for s in range(1, 5)]
    learned = json.loads((tmp_path / "run" / "results.json").read_text())["learned_layers"]
    assert [one["layer"] for one in learned] == [0, 1] and all(one["steps"] == 4 for one in learned)
    assert call("verify", tmp_path / "run").exit_code == 0


def test_curves(call, document, learned):
    result = call("curves", learned)
    assert result.exit_code == 0, result.output
    assert "loss" in result.stdout and f"drawn: {learned / 'curves.html'}" in result.stderr
    assert "<svg" in (learned / "curves.html").read_text()
    found = document("curves", learned)
    assert found["file"] == str(learned / "curves.html") and len(found["metrics"]) == 8
    assert call("curves", learned, "--quiet").stderr == ""
    assert call("verify", learned).exit_code == 0, "a drawing more in the folder changes nothing"


def test_curves_of_a_run_at_work_leave_out_the_line_being_written(document, learned, tmp_path):
    place = tmp_path / "at_work"
    place.mkdir()
    (place / "recipe.yaml").write_text((learned / "recipe.yaml").read_text())
    lines = (learned / "metrics.jsonl").read_text().splitlines()
    (place / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"layer": 0, "st')
    assert len(document("curves", place)["metrics"]) == 3


def test_curves_of_a_run_that_learns_nothing(call, run, tmp_path):
    result = call("curves", run)
    assert result.exit_code == 2 and "has no metrics.jsonl: wanda does not learn step by step" in result.stderr
    assert "is not a run folder" in call("curves", tmp_path, "--debug").stderr


def test_plan_of_a_learner(document, base):
    found = document("plan", base, "--method", "hyperprune", *SMALL, "--no-time")
    assert found["seconds"] is None and found["fits"]
    assert any("carries" in note for note in found["notes"])
    assert any("learner" in part for part in found["disk"])


def test_plan_of_a_learner_for_a_device_that_is_not_here(document, base):
    found = document("plan", base, "--method", "hyperprune", *SMALL, "--device-memory", "24GB")
    parts = found["memory"]["layers"]
    assert {"carried state", "learner, masked weights, gradients"} <= parts.keys() and found["seconds"] is None


def test_a_prior_that_is_nothing(call, base):
    result = call("prune", base, "--method", "hyperprune", "--set", "method.prior=wnada")
    assert result.exit_code == 2 and "Did you mean 'wanda'" in result.stderr
