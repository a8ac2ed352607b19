"""Masks learned through the whole model, as a user types it."""

from __future__ import annotations

import json

import yaml

from nmprune.methods.maskllm import MaskLLM

SMALL = ("--n-sequences", 5, "--seq-len", 16, "--set", "train.steps=2", "--set", "train.eval_every=1")


def flat(text: str) -> str:
    """Words on one line, however they were wrapped."""
    return " ".join(text.split())


def test_a_preset_is_written_out_and_its_settings_can_be_changed(call, made, tmp_path):
    out = tmp_path / "run"
    words = ("--method", "maskllm", "--preset", "best", "--set", "method.lr=0.5", "--checkpoint-minutes", 0)
    result = call("prune", made[0], *words, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["method"] == {
        "name": "maskllm",
        **MaskLLM(**{**MaskLLM.presets["best"], "lr": 0.5}).hyper_parameters(),
    }
    assert written["train"]["loss"] == "kl" and written["train"]["steps"] == 2
    assert "prior masks by descent" in result.stderr
    assert "step 2/2: held-out loss" in flat(result.stderr) and "of groups flipped" in flat(result.stderr)
    assert json.loads((out / "results.json").read_text())["learning"]["loss"] == "kl"
    assert call("verify", out).exit_code == 0
    over = tmp_path / "over"
    result = call("prune", out / "recipe.yaml", "--preset", "best", *SMALL, "--out", over)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((over / "recipe.yaml").read_text())["method"]["lr"] == MaskLLM.presets["best"]["lr"]


def test_an_unknown_preset_names_the_known_ones(call, made, tmp_path):
    result = call("prune", made[0], "--method", "maskllm", "--preset", "bset", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "method maskllm has no preset 'bset'. Did you mean 'best'? Known: best." in flat(result.stderr)
    assert not (tmp_path / "run").exists()


def test_list_shows_presets(call, document):
    assert "--preset best" in call("list", "methods").stdout
    methods = {one["name"]: one for one in document("list", "methods")["methods"]}
    assert methods["maskllm"]["presets"]["best"] == MaskLLM.presets["best"]
    assert methods["wanda"]["presets"] == {}


def test_a_plan_says_what_learning_takes(call, made, monkeypatch):
    monkeypatch.setattr("nmprune.run.rehearsal.layer_peak", lambda *args: None)  # a process of its own: slow
    result = call("plan", made[0], "--method", "maskllm", *SMALL)
    assert result.exit_code == 0, result.output
    assert "learned state, gradients, moments" in result.stdout
    assert "2 steps, 32 tokens, loss lm; the whole model is in memory while it learns." in flat(result.stdout)
