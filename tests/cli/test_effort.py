from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nmprune.cli import recipe_flags
from nmprune.pattern import Pattern
from nmprune.run import Recipe, RunFolder, plan
from nmprune.run.effort import DEFAULT_EFFORT, EFFORTS, recipe_of

PICKED = recipe_of(DEFAULT_EFFORT)["method"]["name"]
SMALL = ("--n-sequences", 4, "--seq-len", 16)


@pytest.fixture
def planned(monkeypatch):
    """Plans that time nothing, which takes seconds (tests/cli/test_plan.py does); what the dictionary holds is put in."""
    made, facts = plan.plan, {"seconds": {"forward": 60.0, "solve": 5.0}}
    monkeypatch.setattr(
        plan, "plan", lambda recipe, machine, out: replace(made(recipe, machine, out=out, timed=False), **facts)
    )
    return facts


def test_without_a_method_the_default_effort_is_said_planned_and_done(call, base, tmp_path, planned):
    out = tmp_path / "run"
    result = call("prune", base, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    said = result.stderr
    assert f"effort good: {EFFORTS['good'].words}" in said and "calibrated on 4 x 16 tokens of builtin" in said
    assert "Others: --effort fast, --effort best, or --method." in said
    assert "about 1 min 05 s, " in said and " of memory, " in said and " of disk" in said
    assert said.index(" of memory") < said.index("decoder layer 1/2")
    expected = {**recipe_of("good"), "model": str(base), "calibration": {"n_sequences": 4, "seq_len": 16}}
    assert RunFolder(out).read_recipe() == Recipe.from_dict(expected)
    again = call("prune", base, *SMALL, "--out", out)
    assert "nothing to do" in again.stderr and "timing" not in again.stderr


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_does_what_it_says(call, base, tmp_path, effort):
    out = tmp_path / "run"
    result = call("prune", base, "--effort", effort, "--pattern", "4:8", *SMALL, "--seed", 3, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == "", "--quiet plans nothing"
    recipe = RunFolder(out).read_recipe()
    assert (recipe.pattern, recipe.seed, recipe.calibration.n_sequences) == (Pattern(4, 8), 3, 4)
    steps = recipe.pruner.name.split("+")
    assert (steps[0], "reconstruct" in steps) == (
        recipe_of(effort)["method"]["name"],
        "reconstruct" in recipe_of(effort),
    )


def test_a_plan_of_an_effort(document, base):
    words = ("plan", base, "--seq-len", 16, "--no-time")
    found = {name: document(*words, "--effort", name) for name in EFFORTS}
    assert document(*words) == found[DEFAULT_EFFORT]
    for name, planned_one in found.items():
        recipe = Recipe.from_dict({"model": "m", **recipe_of(name)})
        assert planned_one["method"] == recipe.pruner.name
        assert planned_one["calibration"][0] == recipe.calibration.n_sequences


def test_settings_go_on_top(document, base, tmp_path):
    words = (*SMALL, "--effort", "good", "--no-reconstruct", "--set", "method.target=0.25", "--set", "polish.sweeps=2")
    assert document("prune", base, *words, "--out", tmp_path / "run", "--quiet")
    recipe = RunFolder(tmp_path / "run").read_recipe()
    picked = Recipe.from_dict({"model": "m", **recipe_of("good")}).method
    assert recipe.method == replace(picked, target=0.25)
    assert recipe.reconstruct is None and recipe.polish is not None and recipe.polish.sweeps == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--effort", "god"), "there is no effort 'god'. Did you mean 'good'?"),
        (
            ("--effort", "fast", "--method", "wanda"),
            "--effort fast picks a method and its steps, and there is a method, too",
        ),
        (("--effort", "fast", "--set", "method=wanda"), "there is a method, too"),
        (("--effort", "fast", "--set", "method.name=wanda"), "there is a method, too"),
        (("--set", "method.nonsense=0.1"), f"method {PICKED} has no hyper-parameter 'nonsense'"),
    ],
)
def test_what_does_not_go_together(call, base, words, says):
    for command in ("prune", "plan"):
        result = call(command, base, *words)
        assert result.exit_code == 2 and says in result.stderr


def test_a_recipe_names_its_method(call, base, tmp_path):
    recipe = Recipe.from_dict({"model": str(base), "method": "magnitude"})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    result = call("prune", tmp_path / "recipe.yaml", "--effort", "best")
    assert result.exit_code == 2 and "a recipe, which names its method, too" in result.stderr


def test_a_model_that_is_not_there(call, tmp_path):
    result = call("prune", tmp_path / "none")
    assert result.exit_code == 2 and "Traceback" not in result.stderr


def test_a_run_that_does_not_fit_is_said_and_done(call, base, tmp_path, planned):
    planned |= {"seconds": None, "limit": 1000, "notes": ("a note of the plan",)}
    result = call("prune", base, *SMALL, "--effort", "fast", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "(DOES NOT FIT: 1000 B may be used)" in result.stderr and "a note of the plan" in result.stderr
    assert "about" not in result.stderr.partition("timing this machine")[2].partition("of memory")[0]


def test_the_flag_and_the_table_name_the_same_efforts():
    assert (*EFFORTS,) == recipe_flags.EFFORTS and DEFAULT_EFFORT == recipe_flags.DEFAULT_EFFORT
    json.dumps({name: recipe_of(name) for name in EFFORTS})  # plain data


def test_every_effort_is_a_whole_recipe_for_usual_patterns():
    for name in EFFORTS:
        for pattern in ("1:4", "2:4", "4:8", "8:16"):
            recipe = Recipe.from_dict({"model": "m", "pattern": pattern, **recipe_of(name)})
            assert str(recipe.pattern) == pattern and (recipe.reconstruct is not None) == (name == "good")


def test_an_effort_is_not_changed_by_who_takes_it():
    recipe_of(DEFAULT_EFFORT)["method"]["name"] = "magnitude"
    assert recipe_of(DEFAULT_EFFORT)["method"]["name"] == PICKED != "magnitude"


def test_the_page_has_the_table():
    page = (Path(__file__).resolve().parents[2] / "docs" / "effort.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(EFFORTS)
    for row, (name, effort) in zip(rows, EFFORTS.items(), strict=True):
        assert row.startswith(f"| `{name}` |") and row.endswith(f"| {effort.words} |")
        assert str(recipe_of(name)["method"]["name"]) in row
