"""The commands that only look: list, inspect, validate, and the root's own options."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nmprune.checkpoint import read_masks, write_npz
from nmprune.methods import METHODS
from nmprune.version import VERSION


def test_version_and_help(call):
    assert call("--version").stdout == f"nmprune {VERSION}\n"
    assert call().exit_code in (0, 2)
    for command in ("prune", "verify", "apply", "diff", "evaluate", "list", "inspect", "validate"):
        assert command in call("--help").stdout
        assert call(command, "--help").exit_code == 0


def test_help_teaches(call):
    text = call("prune", "--help").stdout
    for words in ("nmprune prune smollm2-135m", "--set method.damping=0.05", "--exclude '*.down_proj'", "Exit codes"):
        assert words in text
    assert "3 something is wrong with it" in call("verify", "--help").stdout


def test_list(call, document):
    result = call("list")
    assert result.exit_code == 0
    for name in (*METHODS, "gpt_neox", "wikitext2[:SPLIT]", "--set method.damping=0.01"):
        assert name in result.stdout
    assert document("list").keys() == {"methods", "architectures", "texts"}
    assert document("list", "methods", "--quiet").keys() == {"methods"}
    assert "wanda" not in call("list", "texts").stdout
    result = call("list", "metods")
    assert result.exit_code == 2
    assert "Did you mean 'methods'" in result.stderr


def test_inspect_a_model(call, document, base):
    result = call("inspect", base)
    assert result.exit_code == 0, result.output
    assert "self_attn.k_proj" in result.stdout
    found = document("inspect", base, "--trust-remote-code", "--quiet")
    assert (found["kind"], found["parameters"]) == ("model", 24736)


def test_inspect_a_run(call, document, run):
    result = call("inspect", run)
    assert "finished" in result.stdout
    assert "global sparsity" in result.stdout
    found = document("inspect", run)
    assert (found["kind"], found["recipe"]["method"]) == ("run", {"name": "wanda"})
    (run / "results.json").unlink()
    assert "not finished: 0 decoder layers so far" in call("inspect", run).stdout
    assert document("inspect", run)["results"] is None


def test_inspect_mask_files(call, document, run, tmp_path):
    file = run / "masks.safetensors"
    assert "every group keeps exactly what its pattern says" in call("inspect", file).stdout
    found = document("inspect", file)
    assert (found["kind"], found["patterns"], found["density"], len(found["tensors"])) == ("masks", ["2:4"], 0.5, 14)
    write_npz(tmp_path / "m.npz", read_masks(file))
    assert "says neither shapes nor pattern" in call("inspect", tmp_path / "m.npz").stdout
    assert document("inspect", tmp_path / "m.npz")["n_bits"] == 18432


def test_inspect_nothing(call, tmp_path):
    result = call("inspect", tmp_path)
    assert result.exit_code == 2
    assert "config.json" in result.stderr


@pytest.fixture
def recipes(tmp_path) -> tuple[Path, Path]:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump({"model": "smollm2-135m", "method": "wanda", "pattern": "2:4"}))
    bad.write_text(
        yaml.safe_dump({"model": "m", "method": {"name": "sparsegpt", "dampning": 1}, "pattern": "5:4", "sed": 1})
    )
    return good, bad


def test_validate_names_every_fault_of_every_recipe(call, document, recipes):
    good, bad = recipes
    assert call("validate", good).exit_code == 0
    result = call("validate", good, bad, good.with_name("god.yaml"))
    assert result.exit_code == 2
    for words in (
        "'dampning'",
        "pattern 5:4 is not possible",
        "unknown key 'sed'",
        "Did you mean 'seed'",
        "Did you mean '" + str(good),
    ):
        assert words in result.stderr
    assert [line.split()[-1] for line in result.stdout.splitlines() if "yaml" in line] == ["ok", "faults", "faults"]
    found = document("validate", good, bad, "--quiet", exit_code=2)
    assert not found["ok"]
    assert [one["fault"] is None for one in found["recipes"]] == [True, False]


def test_the_recipes_that_come_with_the_project_are_sound(call):
    found = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert found
    assert call("validate", *found).exit_code == 0
