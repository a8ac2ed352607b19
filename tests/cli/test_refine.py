"""--polish and --reconstruct, as a user types them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from nmprune.checkpoint import read_masks
from nmprune.refine import Polish, Reconstruct
from nmprune.run import Recipe, RunFolder

SMALL = ("--n-sequences", 4, "--seq-len", 16)


def flat(text: str) -> str:
    """Words on one line, however they were wrapped."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def refined(made, tmp_path_factory) -> Path:
    """A run of Wanda, polished and reconstructed."""
    from typer.testing import CliRunner

    from nmprune.cli import app

    out = tmp_path_factory.mktemp("refined") / "run"
    words = ("prune", made[0], "--method", "wanda", *SMALL, "--polish", "--reconstruct")
    words += ("--set", "reconstruct.ridge=0.1", "--out", out)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    (out.parent / "stdout").write_text(result.stdout)
    (out.parent / "stderr").write_text(result.stderr)
    return out


def test_the_recipe_says_what_was_done(refined):
    written = yaml.safe_load((refined / "recipe.yaml").read_text())
    assert written["polish"] == asdict(Polish())
    assert written["reconstruct"] == asdict(Reconstruct(ridge=0.1))
    assert written["calibration"]["n_held_out"] == 0
    recipe = RunFolder(refined).read_recipe()
    assert recipe.to_yaml() == (refined / "recipe.yaml").read_text()
    assert recipe == Recipe.from_dict(written)


def test_the_results_name_the_steps_with_their_settings_and_every_linears_errors(refined):
    results = json.loads((refined / "results.json").read_text())
    assert results["method"] == {
        "name": "wanda+polish+reconstruct",
        "polish": asdict(Polish()),
        "reconstruct": asdict(Reconstruct(ridge=0.1)),
    }
    assert results["updates_weights"] is True
    assert len(results["linears"]) == 14
    for one in results["linears"]:
        assert 0 < one["output_error"] < 1 and 0 < one["held_out_error"] < 1
        assert one["notes"]["ridge"] == 0.1 and one["notes"]["reconstruct_taken"] in (0, 1)
        assert one["notes"]["polish_sweeps"] >= 1
    assert any(one["notes"]["reconstruct_taken"] for one in results["linears"])
    assert json.loads((refined / "model" / "config.json").read_text())["nmprune"]["method"] == results["method"]
    assert read_masks(refined / "masks.safetensors").method == "wanda+polish+reconstruct"


def test_held_out_errors_are_shown(refined, call):
    shown, signs = (flat((refined.parent / name).read_text()) for name in ("stdout", "stderr"))
    assert "by wanda+polish+reconstruct" in shown and "held-out error" in shown
    assert "(held-out 0." in signs and "mean output error 0." in signs
    assert "(held-out tokens) | 0." in (refined / "README.md").read_text()
    looked = flat(call("inspect", refined).stdout)
    steps = {"polish": asdict(Polish()), "reconstruct": asdict(Reconstruct(ridge=0.1))}
    words = ", ".join(f"{step}.{key} {value}" for step, given in steps.items() for key, value in given.items())
    assert f"wanda+polish+reconstruct, {words}" in looked and "held-out error" in looked
    assert f"wanda+polish+reconstruct (hyper-parameters: {words}" in (refined / "README.md").read_text()
    assert "and moved by the method" in looked


def test_it_verifies(refined, call):
    result = call("verify", refined)
    assert result.exit_code == 0, result.output


def test_the_same_command_again_changes_nothing_and_other_settings_are_another_run(refined, call, made):
    before = {file: file.stat().st_mtime_ns for file in refined.rglob("*")}
    words = ("prune", made[0], "--method", "wanda", *SMALL, "--polish", "--reconstruct", "--out", refined)
    again = call(*words, "--set", "reconstruct.ridge=0.1")
    assert again.exit_code == 0 and "finished already; nothing to do" in again.stderr
    other = call(*words)
    assert other.exit_code == 2 and "there: ridge: 0.1" in flat(other.stderr)
    assert {file: file.stat().st_mtime_ns for file in refined.rglob("*")} == before


def test_a_recipes_steps_are_kept_or_taken_off(refined, call, tmp_path):
    plain = call("prune", refined / "recipe.yaml", "--no-polish", "--no-reconstruct", "--out", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    recipe = RunFolder(tmp_path / "plain").read_recipe()
    assert recipe.polish is None and recipe.reconstruct is None
    kept = call("prune", refined / "recipe.yaml", "--reconstruct", "--no-polish", "--out", tmp_path / "kept")
    assert kept.exit_code == 0, kept.output
    assert RunFolder(tmp_path / "kept").read_recipe().reconstruct.ridge == 0.1
    masks = [(tmp_path / name / "masks.safetensors").read_bytes()[-64:] for name in ("plain", "kept")]
    assert (refined / "masks.safetensors").read_bytes()[-64:] not in masks


def test_a_copy_of_the_masks_says_that_weights_moved(refined, call, made, tmp_path):
    result = call("apply", refined, made[0], "--out", tmp_path / "applied")
    assert result.exit_code == 0, result.output
    assert "chosen by wanda+polish+reconstruct, which also moves kept weights" in flat(result.stdout + result.stderr)


def test_the_folder_is_named_after_the_steps(call, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("prune", base, "--method", "wanda", *SMALL, "--polish", "--set", "polish.target=0").exit_code == 0
    run = tmp_path / "runs" / f"{base.name}_wanda+polish_2x4"
    results = json.loads((run / "results.json").read_text())
    assert results["updates_weights"] is False, "polish moves no weight"
    assert call("verify", run).exit_code == 0
    applied = call("apply", run, base, "--out", tmp_path / "applied")
    assert applied.exit_code == 0 and "also moves" not in applied.stdout + applied.stderr
    assert (tmp_path / "applied/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_faults_are_listed_together(call, base):
    result = call(
        *("prune", base, "--method", "wanda", "--n-sequences", 4, "--reconstruct", "--set", "reconstruct.ridge=-1"),
        *("--set", "reconstruct.foo=1", "--set", "calibration.n_held_out=4", "--propagate", "dense"),
    )
    assert result.exit_code == 2
    told = flat(result.stderr)
    for words in (
        "4 faults",
        "unknown key reconstruct.foo. Known: ",
        "reconstruct.ridge is -1.0; expected a number >= 0.",
        "wanda+reconstruct holds 4 of calibration.n_sequences 4 out: nothing is left to solve on. Give more sequences.",
        "which needs stream.propagate pruned and no stream.true_sequential. Set its target to 0 to do without.",
    ):
        assert words in told
    polished = call("prune", base, "--method", "sparsegpt", "--polish")
    assert polished.exit_code == 2 and "Add reconstruct (--reconstruct)" in flat(polished.stderr)


def test_a_plan_names_the_steps_and_counts_the_dense_model(document, base, tmp_path):
    words = ("plan", base, "--method", "wanda", *SMALL, "--device-memory", "1GB")
    plain, both, own = (
        document(*words, *more) for more in ((), ("--reconstruct",), ("--reconstruct", "--set", "reconstruct.target=0"))
    )
    assert (plain["method"], both["method"]) == ("wanda", "wanda+reconstruct")
    assert (plain["layer_passes"], own["layer_passes"], both["layer_passes"]) == (3, 3, 5)
    hidden = [one["disk"]["progress (given back)"] for one in (own, both)]
    assert hidden[1] - hidden[0] == 4 * 16 * 32 * 2, "the dense model's hidden states, bf16"


def test_interrupted_and_run_again(call, base, refined, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = ("prune", base, "--method", "wanda", *SMALL, "--polish", "--reconstruct")
    words += ("--set", "reconstruct.ridge=0.1", "--out", out)

    def interrupt(view: object, sign: object) -> None:
        if sign.stage == "layers" and sign.text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nmprune.cli.progress.ProgressView.show", interrupt)
        patch.setattr("sys.argv", ["nmprune", *map(str, words)])
        assert call(*words).exit_code == 130
    assert (out / "progress" / "layer_00000.safetensors").is_file()
    again = call(*words)
    assert again.exit_code == 0 and "resuming" in again.stderr
    for file in ("masks.safetensors", "model/model.safetensors"):
        assert (out / file).read_bytes() == (refined / file).read_bytes()
