from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import tiny_models
import tiny_runs
from nmprune.calibration import builtin
from nmprune.run import Recipe, RunFolder
from nmprune.run.progress import Progress

SMALL = ("--n-sequences", 2, "--seq-len", 16)


def recipe_of(out: Path) -> Recipe:
    return RunFolder(out).read_recipe()


def test_a_run_its_summary_and_what_next(call, base, tmp_path):
    out = tmp_path / "my run"
    result = call("prune", base, "--method", "sparsegpt", "--pattern", "1:4", "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "1:4 (1 kept of 4) by sparsegpt" in result.stdout
    assert "self_attn.q_proj" in result.stdout
    assert "global sparsity" in result.stdout
    assert "decoder layer 2/2: 7 linears" in result.stderr
    assert f"nmprune verify '{out}'" in result.stderr
    assert f"nmprune evaluate '{out}'" in result.stderr
    assert (out / "model" / "model.safetensors").is_file()


def test_the_same_command_again_changes_nothing_and_says_so(call, document, base, tmp_path):
    words = ("prune", base, "--method", "wanda", "--out", tmp_path / "run", *SMALL)
    first = document(*words)
    assert not first["already_finished"]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    result = call(*words)
    assert result.exit_code == 0
    assert "finished already; nothing to do" in result.stderr
    again = document(*words)
    assert again["already_finished"]
    assert again["results"] == first["results"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_a_finished_run_needs_its_model_no_more(call, base, tmp_path):
    moved = Path(shutil.copytree(base, tmp_path / "model"))
    words = ("prune", moved, "--method", "wanda", "--out", tmp_path / "run", *SMALL)
    assert call(*words).exit_code == 0
    shutil.rmtree(moved)
    assert call(*words).exit_code == 0


def test_every_flag_reaches_the_recipe(call, base, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(builtin.load("", "calibration").joined[:20_000])
    result = call(
        *("prune", base, "--method", "sparsegpt", "--pattern", "2:4", "--out", tmp_path / "run"),
        *("--calibration", text, "--n-sequences", 3, "--seq-len", 8, "--seed", 7),
        *("--exclude", "*.o_proj", "--exclude", "*.down_proj"),
        *("--set", "method.damping=0.05", "--set", "stream.batch_size=2", "--propagate", "pruned", "--true-sequential"),
        *("--dtype", "bfloat16", "--trust-remote-code", "--allow-sparse", "--quiet"),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    recipe = recipe_of(tmp_path / "run").to_dict()
    assert recipe["method"] == {"name": "sparsegpt", "damping": 0.05, "block_size": 128}
    assert recipe["exclude"] == ["*.o_proj", "*.down_proj"]
    assert recipe["calibration"] == {"source": str(text), "n_sequences": 3, "seq_len": 8, "n_held_out": 0}
    assert recipe["stream"] == {
        "propagate": "pruned",
        "true_sequential": True,
        "batch_size": 2,
        "min_expert_tokens": 32,
        "sum_segments": 8,
    }
    assert (recipe["seed"], recipe["dtype"]) == (7, "bfloat16")
    assert (recipe["trust_remote_code"], recipe["allow_sparse"]) == (True, True)


def test_machine_flags(call, base, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    words = ("prune", base, "--method", "wanda", *SMALL, "--scratch", scratch)
    words += ("--device", "cpu", "--hidden-budget", "1KB", "--threads", 1)
    result = call(*words, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "--scratch" in result.stderr
    assert "no such folder" in result.stderr
    scratch.mkdir()
    made = []
    original = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, *a, **k: (made.append(name), original(name, *a, **k))[1])
    assert call(*words, "--out", tmp_path / "run").exit_code == 0
    assert made
    assert all(Path(name).parent == scratch for name in made)
    assert call("prune", base, "--device", "tpu").exit_code == 2
    assert "expected a size such as 8GB" in call("prune", base, "--hidden-budget", "lots").stderr


def test_without_out_the_folder_is_named_after_model_method_and_pattern(call, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("prune", base, "--method", "magnitude", "--pattern", "4:8")
    assert "no --out given: the run folder is runs/llama_magnitude_4x8" in result.stderr
    assert (tmp_path / "runs" / "llama_magnitude_4x8" / "results.json").is_file()


@pytest.fixture
def recipe(base, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    raw = {
        "model": str(base),
        "method": {"name": "sparsegpt", "damping": 0.2},
        "pattern": "4:8",
        "exclude": ["*.o_proj"],
        "calibration": {"n_sequences": 2, "seq_len": 16},
        "seed": 3,
        "stream": {"true_sequential": True},
    }
    file.write_text(yaml.safe_dump(raw))
    return file


def test_a_recipe_alone(call, recipe, tmp_path):
    assert call("prune", recipe, "--out", tmp_path / "run").exit_code == 0
    found = recipe_of(tmp_path / "run")
    assert found == Recipe.from_yaml(recipe)
    assert found.method.hyper_parameters()["damping"] == 0.2


def test_only_given_flags_override_a_recipe(call, recipe, tmp_path):
    words = ("--seed", 5, "--exclude", "*.down_proj", "--no-true-sequential", "--set", "method.damping=0.3")
    assert call("prune", recipe, "--out", tmp_path / "run", *words).exit_code == 0
    was, found = Recipe.from_yaml(recipe).to_dict(), recipe_of(tmp_path / "run").to_dict()
    changed = {"seed": 5, "exclude": ["*.down_proj"]}
    assert {key for key in was if was[key] != found[key]} == {"seed", "exclude", "stream", "method"}
    assert found["stream"] == {**was["stream"], "true_sequential": False}
    assert found["method"] == {**was["method"], "damping": 0.3}
    assert {key: found[key] for key in changed} == changed


def test_another_method_over_a_recipe_drops_its_hyper_parameters(call, recipe, tmp_path):
    assert call("prune", recipe, "--out", tmp_path / "run", "--method", "wanda").exit_code == 0
    assert recipe_of(tmp_path / "run").to_dict()["method"] == {"name": "wanda"}


def test_all_faults_of_a_command_line_at_once_with_near_matches(call, base):
    result = call("prune", base, "--method", "wnda", "--propagate", "prunde", "--set", "stream.batchsize=4")
    assert result.exit_code == 2
    assert "3 faults" in result.stderr
    for words in ("Did you mean 'wanda'", "Did you mean 'pruned'", "Did you mean 'batch_size'"):
        assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_misspelt_model_or_recipe(call, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    result = call("prune", "smolm2-135m")
    assert result.exit_code == 2
    assert "Did you mean 'smollm2-135m'?" in result.stderr
    assert not (tmp_path / "runs").exists()
    (tmp_path / "llama.yaml").write_text("model: x")
    assert "Did you mean 'llama.yaml'?" in call("prune", "lama.yaml").stderr


def test_propagate_dense(call, base, tmp_path):
    assert (
        call("prune", base, "--method", "wanda", *SMALL, "--propagate", "dense", "--out", tmp_path / "run").exit_code
        == 0
    )
    assert recipe_of(tmp_path / "run").stream.propagate == "dense"


def test_an_interrupted_run_says_how_to_go_on_and_does(call, base, tmp_path, monkeypatch):
    words = ["prune", str(base), "--method", "wanda", "--out", str(tmp_path / "run"), *map(str, SMALL)]
    reference = tiny_runs.finished(base, tmp_path / "reference")

    def interrupt(view: object, sign: Progress) -> None:
        if sign.stage == "layers" and sign.text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nmprune.cli.progress.ProgressView.show", interrupt)
        patch.setattr("sys.argv", ["nmprune", *words])
        result = call(*words)
    assert result.exit_code == 130
    assert f"nmprune {' '.join(words)}" in result.stderr
    assert (tmp_path / "run" / "progress" / "layer_00000.safetensors").is_file()
    again = call(*words, "--n-sequences", 4)
    assert again.exit_code == 2, "another recipe in the same folder is refused"
    again = call(*words)
    assert again.exit_code == 0
    assert "resuming" in again.stderr
    assert not RunFolder(reference).progress.exists()


def test_experts(call, tmp_path):
    moe = tiny_runs.model(tmp_path / "moe", "qwen2_moe")
    result = call("prune", moe, "--method", "wanda", "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0
    assert "by magnitude: too few tokens" in result.stdout


def test_a_linear_that_does_not_take_the_pattern(call, tmp_path):
    model = tiny_models.save("llama", tmp_path / "odd", intermediate_size=62)
    result = call("prune", model, "--method", "magnitude", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "--exclude '*.down_proj'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_mixed_patterns_are_shown_wherever_a_run_is_looked_at(call, document, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = ("--allocate", "1:4, 2:4,3:4,dense", "--density", 0.55, "--allocate-rule", "owl")
    done = call("prune", base, "--method", "wanda", *mixed, *SMALL)
    assert done.exit_code == 0, done.output
    out = tmp_path / "runs" / f"{base.name}_wanda_mixed55"
    assert recipe_of(out).to_dict()["allocate"] == {
        "patterns": ["1:4", "2:4", "3:4", "dense"],
        "density": 0.55,
        "rule": "owl",
        "owl_m": 5.0,
        "owl_lambda": 0.08,
    }
    assert "patterns by owl: density 0.5486 of 0.55 asked, 25 weights below the budget (the sizes" in done.stdout
    assert "measuring every linear under 1:4, 2:4, 3:4, dense" in done.stderr
    assert "allocated: " in done.stderr
    looked = call("inspect", out)
    assert "mixed: 1 kept of 4, 2 kept of 4, 3 kept of 4, or dense, 55.00% kept in all" in looked.stdout
    assert "patterns by owl" in looked.stdout
    assert call("verify", out).exit_code == 0
    patterns = document("inspect", out / "masks.safetensors")["patterns"]
    assert len(patterns) > 1
    assert "tensors by pattern" in call("inspect", out / "masks.safetensors").stdout
    assert document("inspect", out / "model")["pruned"]["pattern"].startswith("mixed: ")
    plain = tmp_path / "plain"
    assert call("prune", base, "--method", "wanda", "--out", plain, *SMALL).exit_code == 0
    assert "of other patterns" in call("diff", out, plain).stdout
    off = ("--allocate", "", "--density", 0, "--allocate-rule", "error")
    uniform = call("prune", out / "recipe.yaml", *off, "--out", tmp_path / "x")
    assert uniform.exit_code == 0, uniform.output
    assert document("inspect", tmp_path / "x" / "masks.safetensors")["patterns"] == ["2:4"]
