from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

QUICK = (
    "--minutes",
    0,
    "--steps",
    2,
    "--device",
    "cpu",
    "--threads",
    1,
    "--set",
    "seq_len=16",
    "--set",
    "n_held_out=2",
)
SHORT = (*QUICK, "--set", "max_tokens=800", "--set", "autocast=no")


def flat(text: str) -> str:
    """Words on one line, however they were wrapped."""
    return re.sub(r"\s+", " ", text)


def test_from_a_run_to_a_verified_run(call, document, run, tmp_path):
    out = tmp_path / "tuned"
    result = call("finetune", run, "--out", out, *SHORT, "--text", "builtin", "--loss", "lm", "--seed", 1)
    assert result.exit_code == 0, result.output
    assert "language-model loss" in result.stdout and "held-out token perplexity" in result.stdout
    assert "step 0: held-out loss" in result.stderr and f"nmprune verify {out}" in flat(result.stderr)
    verified = call("verify", out)
    assert verified.exit_code == 0, verified.output
    assert (
        f"the masks of {run}, byte for byte" in flat(verified.stdout) and "2 linears and embeddings" in verified.stdout
    )
    found = document("verify", out)
    assert found["ok"] and found["dense"] == ["model.embed_tokens", "lm_head"] and found["beside"] == []
    assert call("evaluate", out, "--text", "builtin", "--seq-len", 16, "--max-windows", 2).exit_code == 0


def test_json_a_finished_run_and_the_recipe_again(call, document, run, tmp_path):
    out = tmp_path / "tuned"
    found = document(
        "finetune", run, "--out", out, *SHORT, "--lora", 2, "--set", "also=norms", "--checkpoint-minutes", 0
    )
    tuned = found["results"]["finetune"]
    assert not found["already_finished"] and tuned["steps"] == 2 and len(tuned["tensors"]) == 5
    assert document("finetune", run, "--out", out, *SHORT, "--lora", 2, "--set", "also=norms")["already_finished"]

    again = document("finetune", out / "recipe.yaml", "--out", tmp_path / "again", "--quiet")
    assert again["results"]["finetune"]["held_out_after"] == tuned["held_out_after"]
    assert (tmp_path / "again" / "recipe.yaml").read_text() == (out / "recipe.yaml").read_text()


def test_without_out_and_with_a_base_that_moved(call, run, base, monkeypatch):
    result = call("finetune", run, *SHORT, "--base", base)
    assert result.exit_code == 0, result.output
    assert f"the run folder is {run}_finetuned" in flat(result.stderr)
    assert Path(f"{run}_finetuned", "results.json").is_file()
    result = call("finetune", run, *SHORT, "--base", run, "--debug")
    assert result.exit_code == 2


def test_a_plan_rehearses_and_writes_nothing(call, document, run, tmp_path):
    out = tmp_path / "tuned"
    result = call("finetune", run, "--out", out, *SHORT, "--text", "builtin", "--plan")
    assert result.exit_code == 0, result.output
    shown = flat(result.stdout)
    assert "fits this machine" in shown and "(rehearsed)" in shown and "2 steps, 64 tokens" in shown
    assert "timing some steps" in result.stderr and not out.exists()
    found = document("finetune", run, *SHORT, "--text", "builtin", "--plan", "--quiet", "--loss", "lm")
    assert found["fits"] and found["steps"] == 2 and 0 < found["seconds"]["training"] <= found["total_seconds"]
    rehearsed = "activations, logits, workspace, libraries (rehearsed)"
    assert 1 << 20 < found["memory"]["training"][rehearsed] < 1 << 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "mse"), "loss is 'mse'"),
        (("--set", "lrr=1"), "unknown key finetune.lrr. Did you mean 'lr'"),
        (("--set", "lr"), "expected KEY=VALUE, such as lr=0.001"),
        (("--set", "parent=runs/x"), "the run that is given is the parent"),
        (("--set", "lr=fast"), "finetune.lr is 'fast'; expected float"),
        (("--minutes", 0), "minutes and steps are both 0"),
        (
            ("--lora", 99, "--steps", 1, "--set", "seq_len=16"),
            "lora is 99; expected 1 to 16, the smaller side of model.layers.0.",
        ),
    ],
)
def test_what_can_be_put_right(call, run, tmp_path, words, message):
    result = call("finetune", run, "--out", tmp_path / "tuned", *words)
    assert result.exit_code == 2, result.output
    assert message in flat(result.stderr)


def test_recipes_of_pruning_and_of_finetuning_are_told_apart(call, run, tmp_path):
    result = call("finetune", run / "recipe.yaml", "--out", tmp_path / "x")
    assert result.exit_code == 2 and "is the recipe of a pruning run" in flat(result.stderr)
    assert call("finetune", run, "--out", tmp_path / "tuned", *SHORT, "--quiet").stderr == ""
    result = call("prune", tmp_path / "tuned" / "recipe.yaml", "--out", tmp_path / "y")
    assert result.exit_code == 2 and "Give it to `nmprune finetune`" in flat(result.stderr)
    shown = json.loads(call("inspect", tmp_path / "tuned", "--json").stdout)
    assert shown["recipe"]["finetune"]["steps"] == 2
