"""--loss-aware, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nmprune.cli import app
from nmprune.run import Recipe, RunFolder
from nmprune.run.loss_aware import LossAware

SMALL = ("--n-sequences", 4, "--seq-len", 16)
WORDS = (*SMALL, "--method", "sparsegpt", "--loss-aware")


def flat(text: str) -> str:
    """Words on one line, however they were wrapped."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def weighted(made, tmp_path_factory) -> Path:
    """A run of SparseGPT with loss-aware tokens in two blocks of rows."""
    out = tmp_path_factory.mktemp("weighted") / "run"
    words = ("prune", made[0], *WORDS, "--set", "loss_aware.blocks=2", "--out", out)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    (out.parent / "stderr").write_text(result.stderr)
    return out


def test_the_recipe_says_what_was_done(weighted):
    written = yaml.safe_load((weighted / "recipe.yaml").read_text())
    assert written["loss_aware"] == {"power": 0.5, "blocks": 2}
    recipe = RunFolder(weighted).read_recipe()
    assert recipe.to_yaml() == (weighted / "recipe.yaml").read_text()
    assert recipe == Recipe.from_dict(written) and recipe.loss_aware == LossAware(blocks=2)


def test_the_results_hold_the_settings_and_the_pass(weighted, call):
    results = json.loads((weighted / "results.json").read_text())
    assert results["method"]["name"] == "sparsegpt"
    assert results["method"]["loss_aware"] == {"power": 0.5, "blocks": 2}
    assert results["seconds"]["gradients"] > 0
    assert all(one["notes"]["row_blocks"] == 2 and 0 < one["output_error"] < 1 for one in results["linears"])
    assert json.loads((weighted / "model/config.json").read_text())["nmprune"]["method"] == results["method"]
    assert "gradients of 4 sequences through 2 decoder layers" in flat((weighted.parent / "stderr").read_text())
    assert "loss_aware.power 0.5, loss_aware.blocks 2" in (weighted / "README.md").read_text()
    assert call("inspect", weighted).exit_code == 0
    assert not (weighted / "progress").exists()


def test_it_verifies(weighted, call):
    result = call("verify", weighted)
    assert result.exit_code == 0, result.output


def test_the_same_command_again_changes_nothing_and_other_settings_are_another_run(weighted, call, made):
    before = {file: file.stat().st_mtime_ns for file in weighted.rglob("*")}
    words = ("prune", made[0], *WORDS, "--out", weighted)
    again = call(*words, "--set", "loss_aware.blocks=2")
    assert again.exit_code == 0 and "finished already; nothing to do" in again.stderr
    other = call(*words)
    assert other.exit_code == 2 and "blocks: 2" in flat(other.stderr)
    assert {file: file.stat().st_mtime_ns for file in weighted.rglob("*")} == before


def test_a_recipes_weights_are_kept_or_taken_off(weighted, call, made, tmp_path):
    for name, flag, expected in (("kept", "--loss-aware", LossAware(blocks=2)), ("off", "--no-loss-aware", None)):
        done = call("prune", weighted / "recipe.yaml", flag, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        assert RunFolder(tmp_path / name).read_recipe().loss_aware == expected
    plain = call("prune", made[0], *SMALL, "--method", "sparsegpt", "--out", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    weights = {place: (place / "model/model.safetensors").read_bytes() for place in (weighted, *tmp_path.iterdir())}
    assert weights[tmp_path / "kept"] == weights[weighted] != weights[tmp_path / "off"] == weights[tmp_path / "plain"]


def test_interrupted_and_run_again(weighted, call, made, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = ("prune", made[0], *WORDS, "--set", "loss_aware.blocks=2", "--out", out)
    for stage, left in (("gradients", "gradients/layer_00001.safetensors"), ("layers", "layer_00000.safetensors")):

        def interrupt(view: object, sign: object, stage: str = stage, left: str = left) -> None:
            if sign.stage == stage and (out / "progress" / left).is_file():
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("nmprune.cli.progress.ProgressView.show", interrupt)
            patch.setattr("sys.argv", ["nmprune", *map(str, words)])
            assert call(*words).exit_code == 130
        assert (out / "progress" / left).is_file()
    again = call(*words)
    assert again.exit_code == 0 and "resuming" in again.stderr
    for file in ("masks.safetensors", "model/model.safetensors"):
        assert (out / file).read_bytes() == (weighted / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--set", "loss_aware.power=0"), "loss_aware.power is 0.0; expected a number above 0, such as 0.5."),
        (("--set", "loss_aware.blocks=0"), "loss_aware.blocks is 0; expected a whole number >= 1, such as 1."),
        (("--set", "loss_aware.powr=1"), "unknown key loss_aware.powr. Did you mean 'power'?"),
        (("--method", "magnitude"), "loss_aware weights tokens in the statistics of inputs, and magnitude reads none."),
        (("--method", "pruner_zero"), "and pruner_zero reads none. Leave it out."),
    ],
)
def test_faults(words, expected, call, base):
    result = call("prune", base, "--method", "wanda", *SMALL, "--loss-aware", *words)
    assert result.exit_code == 2 and expected in flat(result.stderr)


def test_a_plan_counts_the_gradients_and_a_gram_matrix_per_linear(document, base):
    words = ("plan", base, *SMALL, "--method", "sparsegpt", "--no-time")
    plain, one, two = (
        document(*words, *more) for more in ((), ("--loss-aware",), ("--loss-aware", "--set", "loss_aware.blocks=2"))
    )
    assert one["layer_passes"] == two["layer_passes"] == plain["layer_passes"] + 2 + 3 * 2
    assert not any("gradients" in stage for stage in plain["memory"])
    assert "gradients, layers" in one["memory"] and "gradients (given back)" in one["disk"]
    grams = [found["memory"]["layers"]["statistics"] for found in (plain, one, two)]
    assert grams[0] == 2 * 4 * (3 * 32**2 + 64**2), "qkv, o, gate and up; down: of all tokens so far and of a segment"
    assert grams[1] == 2 * 4 * (6 * 32**2 + 64**2) and grams[2] == 2 * grams[1]
