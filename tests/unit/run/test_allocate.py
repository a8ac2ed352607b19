from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import nmprune
import tiny_models
from nmprune import masks
from nmprune.checkpoint import read_masks
from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.prepare.choices import n_kept, name_of
from nmprune.results import Results
from nmprune.run import AllocateRecipe, CalibrationRecipe, Recipe, allocate, allocation_file
from nmprune.run.apply import apply_masks
from nmprune.run.plan import plan
from nmprune.run.progress import Progress
from nmprune.run.prune import prune_run
from nmprune.run.verify import verify_run
from runs import output, prune

MIXED = {"patterns": ["1:4", "2:4", "3:4", "dense"], "density": 0.55}


class Stop(Exception):
    pass


def stop_when(words: str):
    def report(progress: Progress) -> None:
        if progress.text.startswith(words):
            raise Stop

    return report


@pytest.fixture
def model(tmp_path):
    return tiny_models.save("llama", tmp_path / "base")


@pytest.mark.parametrize("rule", ["error", "owl"])
@pytest.mark.parametrize(("name", "method"), [("llama", "sparsegpt"), ("gpt2", "wanda"), ("gpt_oss", "magnitude")])
def test_a_mixed_run_is_what_its_files_say(name, method, rule, tmp_path):
    base, out = tiny_models.save(name, tmp_path / "base"), tmp_path / "run"
    results = prune(base, out, method, allocate={**MIXED, "rule": rule, "owl_lambda": 0.3}).results
    assert verify_run(out).ok and Results.read(out / "results.json") == results
    found, seconds = allocation_file.read(out / "allocation.json")
    chosen = found.by_linear
    assert results.seconds["allocate"] == seconds > 0

    facts = results.allocation
    assert (facts.rule, facts.choices, facts.density_asked) == (rule, ("1:4", "2:4", "3:4", "dense"), 0.55)
    assert facts.kept == sum(n_kept(c, u.n_weights) for u, c in zip(found.units, found.chosen, strict=True))
    assert facts.kept <= facts.budget == math.floor(0.55 * facts.weights) and facts.exact
    assert facts.density == facts.kept / facts.weights
    assert sum(sum(row.values()) for row in facts.roles.values()) == len(chosen)

    mask_file = read_masks(out / "masks.safetensors")
    assert len(mask_file.patterns()) > 1 and results.pattern == ", ".join(map(str, mask_file.patterns()))
    for one in results.linears:
        assert one.pattern == str(chosen[one.name]) == str(mask_file.masks[one.tensor].pattern)
        assert one.density == chosen[one.name].density
    dense = {one.name for one in results.dense if one.reason == "allocated: dense"}
    assert dense == {linear for linear, choice in chosen.items() if choice is None}
    before, after = load_file(base / "model.safetensors"), load_file(out / "model/model.safetensors")
    assert all(torch.equal(before[t], after[t]) for t in before if t not in mask_file.masks)

    key = json.loads((out / "model/config.json").read_text())["nmprune"]
    assert key["pattern"].startswith("mixed: ") and key["pattern"] == results.pattern_words
    assert set(key["patterns"].values()) == set(results.pattern.split(", "))
    assert f"pruned to {results.pattern} (mixed: " in (out / "README.md").read_text()
    assert f"patterns by {rule}: density 0.5" in (out / "README.md").read_text()


def test_the_config_names_experts_of_a_kind_together(tmp_path):
    base = tiny_models.save("qwen3_moe", tmp_path / "base")
    prune(base, tmp_path / "run", allocate={"patterns": "1:4,2:4,3:4"})
    key = json.loads((tmp_path / "run/model/config.json").read_text())["nmprune"]
    names = [name for name in key["patterns"] if "experts" in name]
    assert names and all(".experts.*." in name for name in names) and len(key["patterns"]) == 14
    # applied to the dense model, the masks describe themselves in the same way
    done = apply_masks(tmp_path / "run", str(base), tmp_path / "applied")
    again = json.loads((tmp_path / "applied/config.json").read_text())["nmprune"]
    assert again["patterns"] == key["patterns"] and done.pattern == again["pattern"] == key["pattern"]


def test_the_density_is_the_patterns_unless_said_and_groups_may_differ(model, tmp_path):
    results = prune(model, tmp_path / "run", pattern="4:8", allocate={"patterns": ("2:4", "1:4", "6:8")}).results
    assert results.allocation.choices == ("1:4", "2:4", "6:8")
    assert results.allocation.density_asked == results.allocation.density == 0.5
    assert verify_run(tmp_path / "run").ok


def test_in_memory_equals_streamed(model, tmp_path):
    streamed = prune(model, tmp_path / "run", "sparsegpt", allocate=MIXED)
    in_memory = prune(tiny_models.build("llama"), None, "sparsegpt", allocate=MIXED)
    assert in_memory.allocation == streamed.allocation is not None
    patterns = {one.name: Pattern.parse(one.pattern) for one in streamed.linears}
    assert {one.name: Pattern.parse(one.pattern) for one in in_memory.linears} == patterns
    assert all(masks.n_wrong_groups(mask, patterns[name]) == 0 for name, mask in in_memory.masks.items())


def test_two_mixed_runs_are_bit_identical(model, tmp_path):
    for name in ("a", "b"):
        prune(model, tmp_path / name, "sparsegpt", allocate=MIXED)
    assert output(tmp_path / "a") == output(tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("decoder layer 1/2: measured", False),
        ("allocated: ", True),
        ("decoder layer 1/2: 7", True),
        ("writing", True),
    ],
)
def test_a_stopped_run_goes_on_with_the_same_choice(words, kept, model, tmp_path, monkeypatch):
    allocation = {**MIXED, "patterns": ["1:4", "2:4", "3:4"]}
    prune(model, tmp_path / "whole", "sparsegpt", allocate=allocation)
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", "sparsegpt", allocate=allocation, report=stop_when(words))
    file = tmp_path / "run/allocation.json"
    assert file.is_file() == kept
    if kept:
        written = file.stat().st_mtime_ns
        monkeypatch.setattr(allocate, "measure_layers", None)
    told: list[Progress] = []
    results = prune(model, tmp_path / "run", "sparsegpt", allocate=allocation, report=told.append).results
    assert output(tmp_path / "run") == output(tmp_path / "whole")
    assert results.sessions == 2 and verify_run(tmp_path / "run").ok
    assert any(one.text.startswith("allocation taken over: ") for one in told) == kept
    assert not kept or file.stat().st_mtime_ns == written
    assert not list((tmp_path / "run").glob("*.partial"))


def test_progress_counts_layers(model, tmp_path):
    told: list[Progress] = []
    prune(model, tmp_path / "run", "magnitude", allocate=MIXED, report=told.append)
    stages = list(dict.fromkeys(one.stage for one in told))
    assert stages == ["open", "calibrate", "allocate", "layers", "masks", "model", "done"]
    numbers = [one.done for one in told if one.stage == "allocate"]
    assert numbers == sorted(numbers) and numbers[-1] == 2 and len(numbers) > 10
    assert {one.total for one in told if one.stage == "allocate"} == {2}


def damaged(text: str) -> str:
    return text[:100]


def other_version(text: str) -> str:
    return text.replace('"format_version": 1', '"format_version": 2')


def other_model(text: str) -> str:
    return text.replace("self_attn.q_proj", "self_attn.z_proj")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (damaged, r"allocation.json is damaged \(JSONDecodeError.*Delete it and run the command again"),
        (other_version, "is 'nmprune-allocation' of version 2; expected 'nmprune-allocation' of version 1"),
        (other_model, r"is of other linears than this model's \(4 differ, such as model.layers.0.self_attn.q_proj\)"),
    ],
)
def test_a_file_that_cannot_be_taken_over(change, expected, model, tmp_path):
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", allocate=MIXED, report=stop_when("allocated: "))
    file = tmp_path / "run/allocation.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=expected):
        prune(model, tmp_path / "run", allocate=MIXED)
    file.unlink()
    prune(model, tmp_path / "run", allocate=MIXED)


def test_verify_compares_allocation_masks_and_results(model, tmp_path):
    out = tmp_path / "run"
    prune(model, out, allocate=MIXED)
    file = out / "allocation.json"
    true = file.read_text()

    def faults() -> str:
        return " ".join(verify_run(out).faults)

    raw = json.loads(true)
    unit = next(one for one in raw["units"] if one["choice"] == "2:4")
    unit["choice"] = "1:4"
    file.write_text(json.dumps(raw))
    assert (
        f"{unit['name']} is not pruned to the same everywhere: allocation.json 1:4, results.json 2:4, its mask 2:4."
        in (faults())
    )
    unit["choice"] = "dense"
    file.write_text(json.dumps(raw))
    assert f"allocation.json gives {unit['name']} dense, and results.json does not." in faults()
    raw = json.loads(true)
    raw["kept"] += 4
    file.write_text(json.dumps(raw))
    assert "allocation.json and results.json do not say the same of the allocation." in faults()
    assert "masks and dense linears keep 10,112 weights; allocation.json says 10,116" in faults()
    file.unlink()
    assert "allocation.json is damaged (FileNotFoundError" in faults()
    file.write_text(true)
    assert verify_run(out).ok
    # a recipe that asks for other patterns, or for less
    recipe = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(recipe.replace("  - '3:4'\n", ""))
    assert "the pattern is not the same everywhere: recipe.yaml 2:4, results.json " in faults()
    (out / "recipe.yaml").write_text(recipe.replace("density: 0.55", "density: 0.4"))
    assert "the recipe's density 0.4 allows 7,372." in faults()


def test_what_cannot_be_done_leaves_no_folder(model, tmp_path):
    def recipe(**allocate) -> Recipe:
        return Recipe(
            str(model),
            create("wanda"),
            Pattern(2, 4),
            calibration=CalibrationRecipe("builtin", 4, 16),
            allocate=AllocateRecipe(**allocate),
        )

    for make, expected in (
        (
            lambda: recipe(patterns=("2:4",)),
            "2:4 alone is not applicable: with one pattern there is nothing to allocate",
        ),
        (lambda: recipe(rule="owl"), "allocate.rule is owl, which is not applicable: with one pattern, 2:4, there is"),
        (lambda: recipe(patterns=("1:4", "2:4")), "allocate.density 0.5 leaves nothing to allocate"),
    ):
        with pytest.raises(InputError, match=expected):
            make()
    wide = recipe(patterns=("2:4", "dense", "3:24"), density=0.4)
    with pytest.raises(InputError, match=r"in_features 32 is not a multiple of 24, the group of pattern 3:24"):
        prune_run(wide, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_least_budget_above_all_sparse_leaves_nothing_out(tmp_path):
    """Two choices far apart: of equal linears, exactly as many as the budget pays for stay dense."""
    torch.manual_seed(0)
    model = tiny_models.build("opt", ffn_dim=32)
    found = nmprune.prune(
        model, "wanda", calibration=tiny_models.windows(), allocate={"patterns": ["2:4", "dense"], "density": 0.75}
    )
    counts: dict[str, int] = {}
    for row in found.allocation.roles.values():
        for choice, n in row.items():
            counts[choice] = counts.get(choice, 0) + n
    assert counts == {"2:4": 6, "dense": 6} and len(found.linears) == 6
    assert name_of(None) not in {one.pattern for one in found.linears}


def test_a_plan_counts_the_phase(model):
    recipe = Recipe(
        str(model),
        create("magnitude"),
        Pattern(2, 4),
        calibration=CalibrationRecipe("builtin", 4, 16),
        allocate=AllocateRecipe(("1:4", "2:4", "dense"), 0.6),
    )
    made = plan(recipe)
    assert made.seconds is not None and made.seconds["allocate"] > 0
    assert made.layer_passes == 2 and made.calibration == (4, 16, 4)
    assert made.global_sparsity == pytest.approx(0.4 * 18432 / made.parameters)
    assert made.pattern == "mixed: 1 kept of 4, 2 kept of 4, or dense, 60.00% kept in all"
    assert any("is known once the dense model is measured" in note for note in made.notes)
    far = plan(recipe, device_memory=1 << 30)
    assert {"decoder layer", "statistics"} < far.memory["allocation"].keys() and "embedding" in far.memory


@pytest.mark.parametrize("steps", [{"permute": "all"}, {"polish": True, "reconstruct": True, "permute": "ffn"}])
def test_other_phases_and_steps_work_on_each_linears_own_pattern(steps, model, tmp_path):
    results = prune(model, tmp_path / "run", allocate=MIXED, **steps).results
    assert verify_run(tmp_path / "run").ok
    assert len({one.pattern for one in results.linears}) > 1
    in_memory = prune(tiny_models.build("llama"), None, allocate=MIXED, **steps)
    assert in_memory.allocation == results.allocation
