from __future__ import annotations

import dataclasses

import pytest
import yaml

from nmprune.errors import InputError
from nmprune.methods import SparseGPT, Wanda
from nmprune.methods.base import PerLinear
from nmprune.pattern import Pattern
from nmprune.refine import Chain, Polish, Reconstruct
from nmprune.run.loss_aware import LossAware
from nmprune.run.recipe import CalibrationRecipe, Recipe, StreamRecipe, with_settings


def read(text: str, tmp_path, settings: tuple[str, ...] = ()) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return Recipe.from_yaml(file, settings)


def faults(text: str, tmp_path, settings: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as error:
        read(text, tmp_path, settings)
    return str(error.value).removeprefix(f"recipe {tmp_path / 'r.yaml'}")


def test_every_default_is_written_out(tmp_path):
    recipe = read("model: m\nmethod: sparsegpt\n", tmp_path)
    assert yaml.safe_load(recipe.to_yaml()) == {
        "model": "m",
        "method": {"name": "sparsegpt", "damping": 0.01, "block_size": 128},
        "pattern": "2:4",
        "exclude": [],
        "calibration": {"source": "builtin", "n_sequences": 32, "seq_len": 512, "n_held_out": 0},
        "seed": 0,
        "stream": {
            "propagate": "pruned",
            "true_sequential": False,
            "batch_size": 0,
            "min_expert_tokens": 32,
            "sum_segments": 8,
        },
        "dtype": "auto",
        "trust_remote_code": False,
        "allow_sparse": False,
        "allocate": {"patterns": [], "density": 0.0, "rule": "error", "owl_m": 5.0, "owl_lambda": 0.08},
        "permute": [],
        "polish": None,
        "reconstruct": None,
        "loss_aware": None,
    }
    of_some = {"finetune", "train"}  # written where they say something
    assert list(recipe.to_dict()) == [f.name for f in dataclasses.fields(Recipe) if f.name not in of_some]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("m", Wanda(), Pattern(2, 4)),
        Recipe(
            "runs/with: odd # name",
            SparseGPT(damping=1e-5, block_size=64),
            Pattern(8, 16),
            ("*.down_proj", "model.layers.0.*"),
            CalibrationRecipe("hf:a/b", 8, 64),
            7,
            StreamRecipe("pruned", True, 3, 0),
            "bfloat16",
            True,
            True,
        ),
    ],
)
def test_round_trip(recipe, tmp_path):
    again = read(recipe.to_yaml(), tmp_path)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize(
    ("pattern", "expected"), [("2:4", (2, 4)), ("1:30", (1, 30)), ("'4:8'", (4, 8)), ("8:16", (8, 16))]
)
def test_a_pattern_needs_no_quotes(pattern, expected, tmp_path):
    recipe = read(f"model: m\nmethod: wanda\npattern: {pattern}\n", tmp_path)
    assert (recipe.pattern.kept, recipe.pattern.group) == expected


@pytest.mark.parametrize("method", ["sparsegpt", "{name: sparsegpt}", "\n  name: sparsegpt\n  damping: 0.01"])
def test_a_method_is_a_name_or_a_section(method, tmp_path):
    assert read(f"model: m\nmethod: {method}\n", tmp_path).method == SparseGPT()


def test_all_faults_at_once_with_near_matches(tmp_path):
    text = """
modle: m
method: {name: sparsegpt, dampnig: 0.1, block_size: big}
pattern: 4:2
exclude: {a: b}
calibration: {n_sequences: 0, seqlen: 5, seq_len: many}
stream: {propagate: densely, batch_size: -1}
seed: -3
dtype: float23
trust_remote_code: maybe
"""
    given = faults(text, tmp_path)
    lines = [line.removeprefix("  - ") for line in given.splitlines()]
    assert lines[0] == ": 14 faults:"
    for expected in (
        "unknown key 'modle'. Did you mean 'model'",
        "model is missing: an HF folder",
        "method sparsegpt has no hyper-parameter 'dampnig'. Did you mean 'damping'?",
        "sparsegpt.block_size is 'big'; expected a int such as 128.",
        "pattern 4:2 is not possible",
        "exclude is {'a': 'b'}; expected a list of shell patterns",
        "unknown key calibration.seqlen. Did you mean ",
        "calibration.n_sequences is 0; expected at least 1.",
        "calibration.seq_len is 'many'; expected int, such as 512.",
        "stream.propagate is 'densely'. Did you mean 'dense'?",
        "stream.batch_size is -1; expected at least 0.",
        "seed is -3; expected at least 0.",
        "dtype is 'float23'. Did you mean 'float32'",
        "trust_remote_code is 'maybe'; expected true or false, such as False.",
    ):
        assert any(line.startswith(expected) for line in lines[1:]), expected


def test_one_fault_is_one_line(tmp_path):
    assert faults("model: m\nmethod: wnada\n", tmp_path).startswith(
        ": there is no method 'wnada'. Did you mean 'wanda'"
    )
    assert faults("model: m\n", tmp_path) == ": method is missing: name one of `nmprune list`."
    assert faults("model: m\nmethod: {damping: 1}\n", tmp_path).startswith(
        ": method is {'damping': '1'}; expected a name"
    )
    assert faults("model: [a, b]\nmethod: wanda\n", tmp_path) == ": model is ['a', 'b']; expected one name or path."
    assert faults("model: m\nmethod: [wanda]\n", tmp_path).startswith(": method is ['wanda']; expected a name")
    assert faults("model: m\nmethod: wanda\nstream: fast\n", tmp_path).startswith(
        ": stream is 'fast'; expected keys under it: propagate, true_sequential"
    )


def test_contradictions_name_the_recipe(tmp_path):
    text = "model: m\nmethod: wanda\nstream: {propagate: dense, true_sequential: true}\n"
    assert faults(text, tmp_path).startswith(": stream.true_sequential observes pruned inputs")


def test_a_pattern_that_the_method_cannot_do():
    class OnlyTwoFour(Wanda):
        def why_not(self, pattern: Pattern) -> str | None:
            return None if pattern == Pattern(2, 4) else "its formula is for 2:4"

    method: PerLinear = OnlyTwoFour()
    with pytest.raises(InputError, match="method wanda cannot do 1:4: its formula is for 2:4"):
        Recipe("m", method, Pattern(1, 4))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n- b\n", "holds no keys"),
        ("", "holds no keys"),
        ("a: [", "is not YAML"),
        ("\xff", "is not YAML|holds no keys"),
    ],
)
def test_a_file_that_is_no_recipe(content, expected, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=expected):
        Recipe.from_yaml(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml: No such file or directory"):
        Recipe.from_yaml(tmp_path / "absent.yaml")


def test_yaml_never_makes_objects(tmp_path):
    text = "model: m\nmethod: wanda\nseed: !!python/object/apply:os.system ['true']\n"
    assert "is not YAML" in faults(text, tmp_path) or "seed is" in faults(text, tmp_path)


def test_settings(tmp_path):
    text = "model: m\nmethod: sparsegpt\nexclude: ['*.up_proj']\n"
    settings = ("method.damping=0.05", "pattern=1:4", "calibration.seq_len=64", "seed=3", "exclude=*.down_proj")
    recipe = read(text, tmp_path, settings)
    assert recipe.method == SparseGPT(damping=0.05)
    assert (recipe.pattern, recipe.seed, recipe.calibration.seq_len) == (Pattern(1, 4), 3, 64)
    assert recipe.exclude == ("*.down_proj",)


def test_a_set_method_drops_the_other_ones_settings(tmp_path):
    recipe = read("model: m\nmethod: {name: sparsegpt, damping: 0.5}\n", tmp_path, ("method=wanda",))
    assert recipe.method == Wanda()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("method.damping", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("exclude.a=3", r"exclude is \['x'\] and has no keys"),
        ("method.dampin=3", "Did you mean 'damping'"),
        ("stream.a.b=3", r"unknown key stream\.a\.b"),
        ("sede=3", "unknown key 'sede'. Did you mean 'seed'"),
    ],
)
def test_settings_that_cannot_be(setting, expected, tmp_path):
    with pytest.raises(InputError, match=expected):
        read("model: m\nmethod: sparsegpt\nexclude: [x]\n", tmp_path, (setting,))


def test_settings_leave_the_raw_recipe_alone():
    raw = {"method": {"name": "sparsegpt"}, "stream": {}}
    with_settings(raw, ["method.damping=1", "stream.batch_size=2"])
    assert raw == {"method": {"name": "sparsegpt"}, "stream": {}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ridge": 0.1}, Reconstruct(ridge=0.1)),
        ({"ridge": "0.1", "iterations": "3"}, Reconstruct(ridge=0.1, iterations=3)),
        ({}, Reconstruct()),
        (True, Reconstruct()),
        ("true", Reconstruct()),
        (False, None),
        ("false", None),
        (None, None),
        ("null", None),
        ("", None),
    ],
)
def test_a_step_is_absent_or_given_with_its_settings(given, expected, tmp_path):
    recipe = Recipe.from_dict({"model": "m", "method": "wanda", "reconstruct": given})
    assert recipe.reconstruct == expected
    assert recipe.pruner == (Wanda() if expected is None else Chain(Wanda(), None, expected))
    assert read(recipe.to_yaml(), tmp_path) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_with_steps_is_read_back(tmp_path):
    recipe = Recipe(
        *("m", SparseGPT(), Pattern(2, 4)),
        calibration=CalibrationRecipe("builtin", 8, 64, 3),
        polish=Polish(shrinkage=0.25, sweeps=2),
        reconstruct=Reconstruct(target=0.0),
    )
    again = read(recipe.to_yaml(), tmp_path)
    assert again == recipe and again.to_yaml() == recipe.to_yaml()
    assert again.pruner == Chain(SparseGPT(), Polish(shrinkage=0.25, sweeps=2), Reconstruct(target=0.0))
    assert yaml.safe_load(recipe.to_yaml())["reconstruct"] == dataclasses.asdict(Reconstruct(target=0.0))


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("", ("reconstruct=true",), Reconstruct()),
        ("", ("reconstruct=True", "reconstruct.ridge=0.1"), Reconstruct(ridge=0.1)),
        ("", ("reconstruct.ridge=0.1",), Reconstruct(ridge=0.1)),
        ("reconstruct: null\n", ("reconstruct.ridge=0.1",), Reconstruct(ridge=0.1)),
        ("reconstruct: false\n", ("reconstruct=True",), Reconstruct()),
        ("reconstruct: true\n", ("reconstruct.ridge=0.1", "reconstruct.iterations=2"), Reconstruct(0.1, iterations=2)),
        ("reconstruct: {ridge: 0.3}\n", ("reconstruct=True",), Reconstruct(ridge=0.3)),
        ("reconstruct: {ridge: 0.3}\n", ("reconstruct.iterations=2",), Reconstruct(0.3, iterations=2)),
        ("reconstruct: {ridge: 0.3}\n", ("reconstruct=False",), None),
    ],
)
def test_settings_of_a_step(recipe, settings, expected, tmp_path):
    assert read(f"model: m\nmethod: wanda\n{recipe}", tmp_path, settings).reconstruct == expected


def test_all_faults_of_the_steps_at_once(tmp_path):
    text = """
model: m
method: sparsegpt
calibration: {n_sequences: 4, n_held_out: 4}
polish: {sweeps: 0}
reconstruct: {ridge: -1, foo: 3}
stream: {true_sequential: true}
"""
    lines = [line.removeprefix("  - ") for line in faults(text, tmp_path).splitlines()]
    assert lines[0] == ": 5 faults:"
    for expected in (
        "polish.sweeps is 0; expected a whole number >= 1",
        "unknown key reconstruct.foo. Known: ",
        "reconstruct.ridge is -1.0; expected a number >= 0.",
        "sparsegpt+polish+reconstruct compares with the dense model's outputs, which needs stream.propagate pruned",
        "sparsegpt+polish+reconstruct holds 4 of calibration.n_sequences 4 out: nothing is left to solve on.",
    ):
        assert any(line.startswith(expected) for line in lines[1:]), expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reconstruct: fast\n", "reconstruct is 'fast'; expected keys under it: ridge, target, iterations."),
        ("reconstruct: {ridge: much}\n", "reconstruct.ridge is 'much'; expected float"),
        ("reconstruct: {target: 1.5}\n", "reconstruct.target is 1.5; expected a number >= 0 and <= 1."),
        ("polish: {swepes: 2}\n", "unknown key polish.swepes. Did you mean 'sweeps'?"),
        ("calibration: {n_held_out: -1}\n", "calibration.n_held_out is -1; expected at least 0."),
        ("calibration: {n_held_out: few}\n", "calibration.n_held_out is 'few'; expected int"),
        (
            "reconstruct: true\ncalibration: {n_sequences: 1}\n",
            "wanda+reconstruct holds 1 of calibration.n_sequences 1 ",
        ),
        ("polish: true\nstream: {propagate: dense}\n", "wanda+polish compares with the dense model's outputs"),
    ],
)
def test_one_fault_of_a_step(text, expected, tmp_path):
    assert faults(f"model: m\nmethod: wanda\n{text}", tmp_path).startswith(f": {expected}")


def test_polish_after_moved_weights_needs_reconstruct(tmp_path):
    text = "model: m\nmethod: sparsegpt\npolish: true\n"
    assert faults(text, tmp_path).startswith(": polish chooses another mask, and the weights that sparsegpt moved")
    with pytest.raises(InputError, match="Add reconstruct"):
        Recipe("m", SparseGPT(), Pattern(2, 4), polish=Polish())
    assert read(f"{text}reconstruct: true\n", tmp_path).pruner.name == "sparsegpt+polish+reconstruct"


def test_targets_of_0_go_with_every_stream(tmp_path):
    text = "model: m\nmethod: wanda\npolish: {target: 0}\nreconstruct: {target: 0}\nstream: {propagate: dense}\n"
    assert "cross_gram" not in read(text, tmp_path).pruner.needs


@pytest.mark.parametrize(
    ("n_sequences", "given", "expected"), [(2, 0, 1), (31, 0, 1), (32, 0, 2), (128, 0, 8), (32, 5, 5)]
)
def test_one_in_sixteen_is_held_out_unless_said(n_sequences, given, expected):
    calibration = CalibrationRecipe(n_sequences=n_sequences, n_held_out=given)
    assert Recipe("m", Wanda(), Pattern(2, 4), calibration=calibration).n_held_out == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("loss_aware: true\n", LossAware()),
        ("loss_aware: {power: 1}\n", LossAware(power=1.0)),
        ("loss_aware: {blocks: 4}\n", LossAware(blocks=4)),
        ("loss_aware: false\n", None),
        ("", None),
    ],
)
def test_loss_aware_is_absent_or_given_with_its_settings(given, expected, tmp_path):
    recipe = read(f"model: m\nmethod: wanda\n{given}", tmp_path)
    assert recipe.loss_aware == expected
    assert (recipe.gradient_pass, recipe.token_blocks) == (expected is not None, expected.blocks if expected else 0)
    assert Recipe.from_dict(recipe.to_dict()) == recipe == read(recipe.to_yaml(), tmp_path)
    assert recipe.pruner == Wanda(), "it is no part of the method"


def test_faults_of_loss_aware(tmp_path):
    told = faults("model: m\nmethod: magnitude\nloss_aware: {power: 0, block: 2}\n", tmp_path)
    for expected in (
        ": 3 faults:",
        "loss_aware.power is 0.0; expected a number above 0, such as 0.5.",
        "unknown key loss_aware.block. Did you mean 'blocks'?",
        "loss_aware weights tokens in the statistics of inputs, and magnitude reads none. Leave it out.",
    ):
        assert expected in told
    assert "loss_aware.blocks is 0; expected" in faults("model: m\nmethod: wanda\nloss_aware: {blocks: 0}\n", tmp_path)


def test_settings_of_a_method_may_need_each_other():
    """Each alone would be a fault: what is judged is all of them together."""
    together = {"name": "hyperprune", "residual": "false", "network_every": "1"}
    method = Recipe.from_dict({"model": "m", "method": together}).method
    assert (method.residual, method.network_every) == (False, 1)
    with pytest.raises(InputError, match="residual is off"):
        Recipe.from_dict({"model": "m", "method": {"name": "hyperprune", "residual": "false"}})
