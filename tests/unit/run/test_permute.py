from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nmprune
import tiny_models
import tiny_runs
from nmprune.checkpoint import checksum, read_masks, write_masks, write_npz
from nmprune.checkpoint.header import read_header
from nmprune.checkpoint.permutation_file import read_permutation
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.results import Results
from nmprune.run import Recipe, permute, rehearsal
from nmprune.run.apply import apply_masks
from nmprune.run.compare import compare_masks
from nmprune.run.plan import plan
from nmprune.run.verify import verify_run
from runs import hashes, output, prune

ALL = ("ffn", "heads", "residual")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model, and a run of it with every kind of permutation; to be copied, not changed."""
    place = tmp_path_factory.mktemp("made")
    base = tiny_runs.model(place / "base", max_shard_size="40KB")
    prune(base, place / "run", permute="all")
    return base, place / "run"


@pytest.fixture
def base(made):
    return made[0]


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[1], tmp_path / "run"))


def change_permutation(run, change=lambda tensors: None, **metadata):
    """Change a run's permutation file, and nothing that quotes its checksum."""
    file = run / "permutation.safetensors"
    tensors, kept = load_file(file), read_header(file).metadata | metadata
    change(tensors)
    save_file(tensors, file, kept)


def said(verdict):
    return "\n".join([*verdict.faults, *(f"{one.tensor}: {one.what}" for one in verdict.report.findings)])


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_is_sound_and_says_what_it_did(base, run):
    verdict = verify_run(run)
    assert verdict.ok, said(verdict)
    results = Results.read(run / "results.json")
    found = read_permutation(run / "permutation.safetensors")
    assert results.permutation == found.results
    assert [one.kind for one in found.results] == ["heads", "ffn", "heads", "ffn", "residual"]
    assert all(one.after > one.before and one.taken for one in found.results)
    assert found.moved == found.kinds == ALL
    assert found.fingerprint == results.model_fingerprint == read_masks(run / "masks.safetensors").fingerprint
    assert results.seconds["permute"] > 0
    digest = checksum(run / "permutation.safetensors")
    assert read_masks(run / "masks.safetensors").permutation == digest
    key = json.loads((run / "model/config.json").read_text())["nmprune"]
    assert key["permutation"] == {"kinds": list(ALL), "checksum": f"sha256:{digest}"}
    card = (run / "README.md").read_text()
    assert "| channels reordered first | heads 2 of 2 reordered, score lost " in card
    assert Recipe.from_yaml(run / "recipe.yaml").permute == ALL
    assert "permute:\n- ffn\n- heads\n- residual\n" in (run / "recipe.yaml").read_text()
    assert not (run / "progress").exists()


def test_the_exported_model_is_n_of_m_in_memory_order(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    for layer in model.model.layers:
        for linear in (layer.mlp.down_proj, layer.self_attn.o_proj, layer.self_attn.q_proj, layer.mlp.gate_proj):
            zeros = (linear.weight == 0).unflatten(-1, (-1, 4)).sum(-1)
            assert (zeros == 2).all()


def test_weights_lose_less(base, run, tmp_path):
    """Wanda's masks of the reordered model keep more of its scores, layer by layer the very share that was promised."""
    plain = prune(base, tmp_path / "plain").results
    assert plain.permutation == ()
    assert not (tmp_path / "plain/permutation.safetensors").exists()
    dense = AutoModelForCausalLM.from_pretrained(base)
    windows = tiny_models.windows()
    with torch.no_grad():
        expected = dense(input_ids=windows).logits.log_softmax(-1)
        lost = {}
        for name, folder in (("plain", tmp_path / "plain"), ("permuted", run)):
            logits = AutoModelForCausalLM.from_pretrained(folder / "model")(input_ids=windows).logits.log_softmax(-1)
            lost[name] = (expected.exp() * (expected - logits)).sum(-1).mean().item()
    assert lost["permuted"] < lost["plain"]


def test_magnitude_needs_no_calibration_and_is_judged_by_weights(base, tmp_path):
    done = nmprune.prune(base, "magnitude", out=tmp_path / "run", permute=("ffn",))
    assert done.results.calibration is None
    assert verify_run(tmp_path / "run").ok
    first = done.results.permutation[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    dense = AutoModelForCausalLM.from_pretrained(base)
    kept, whole = (m.model.layers[0].mlp.down_proj.weight.square().sum().item() for m in (model, dense))
    assert kept / whole == pytest.approx(first.after, rel=1e-4)


@pytest.mark.parametrize("method", ["sparsegpt", "descent"])
def test_other_methods(method, base, tmp_path):
    prune(base, tmp_path / "run", method, permute=ALL)
    assert verify_run(tmp_path / "run").ok


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "gpt2", "llama_tied"])
def test_other_families(name, tmp_path):
    base = tiny_models.save(name, tmp_path / "base", max_shard_size="40KB", dtype=torch.bfloat16)
    prune(base, tmp_path / "run", permute="all")
    verdict = verify_run(tmp_path / "run")
    assert verdict.ok, said(verdict)
    apply_masks(tmp_path / "run", str(base), tmp_path / "again")
    weights = {file.name: file.read_bytes() for file in (tmp_path / "run/model").glob("*.safetensors")}
    assert weights == {file.name: file.read_bytes() for file in (tmp_path / "again").glob("*.safetensors")}


def test_where_nothing_is_gained_the_masks_are_the_plain_ones(tmp_path):
    model = tiny_models.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(torch.tensor([2.0, 2.0, 0.0, 0.0]).repeat(16).expand(32, 64))
    model.save_pretrained(tmp_path / "base")
    done = prune(tmp_path / "base", tmp_path / "run", "magnitude", permute="ffn")
    prune(tmp_path / "base", tmp_path / "plain", "magnitude")
    assert [one.taken for one in done.results.permutation] == [0, 0]
    assert verify_run(tmp_path / "run").ok
    assert checksum(tmp_path / "run/masks.safetensors") == checksum(tmp_path / "plain/masks.safetensors")
    compare_masks(tmp_path / "run", tmp_path / "plain")  # of the same order, so it can be done


# -- resume ---------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run where it is reported to be."""


def stopping(when):
    def report(progress):
        if when(progress):
            raise Stop

    return report


MOMENTS = {
    "while looking": lambda one: one.stage == "permute" and one.done > 0.5,
    "found": lambda one: one.stage == "permute" and one.total == 0,
    "first layer": lambda one: one.stage == "layers" and one.done >= 1,
    "all layers": lambda one: one.stage == "masks",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_and_run_again(moment, made, tmp_path, monkeypatch):
    base, undisturbed = made
    with pytest.raises(Stop):
        prune(base, tmp_path / "run", permute="all", report=stopping(MOMENTS[moment]))
    found = (tmp_path / "run/permutation.safetensors").exists()
    assert found == (moment != "while looking")
    looked = []
    real = permute.find_permutations
    monkeypatch.setattr(permute, "find_permutations", lambda *args, **kwargs: looked.append(1) or real(*args, **kwargs))
    lines = []
    results = prune(base, tmp_path / "run", permute="all", report=lambda one: lines.append(one.text)).results
    assert looked == ([] if found else [1])
    assert any("resuming: permutation.safetensors is there" in line for line in lines) == found
    assert output(tmp_path / "run") == output(undisturbed)
    assert checksum(tmp_path / "run/permutation.safetensors") == checksum(undisturbed / "permutation.safetensors")
    assert results.sessions == 2 and "permute" in results.seconds
    assert verify_run(tmp_path / "run").ok


def test_another_choice_of_kinds_is_another_run(base, tmp_path):
    with pytest.raises(Stop):
        prune(base, tmp_path / "run", permute="ffn", report=stopping(MOMENTS["found"]))
    with pytest.raises(InputError, match="holds another run"):
        prune(base, tmp_path / "run", permute="heads")


def test_a_damaged_permutation_file_stops_a_resumed_run(base, tmp_path):
    with pytest.raises(Stop):
        prune(base, tmp_path / "run", permute="ffn", report=stopping(MOMENTS["found"]))
    change_permutation(tmp_path / "run", lambda tensors: next(iter(tensors.values())).zero_())
    with pytest.raises(InputError, match="is no permutation"):
        prune(base, tmp_path / "run", permute="ffn")


def test_progress_counts_up_to_the_total(base, tmp_path):
    seen = []
    prune(base, tmp_path / "run", permute="all", report=seen.append)
    counted = [one.done for one in seen if one.stage == "permute" and one.total]
    assert counted == sorted(counted) and counted[0] == 0 and counted[-1] == 4
    assert {one.total for one in seen if one.stage == "permute"} == {0, 4}


# -- verify ---------------------------------------------------------------------------------------------------------------


def test_another_permutation_is_found_out(run):
    def swap(tensors):
        tensors["residual"][0, :2] = tensors["residual"][0, :2].flip(0)

    change_permutation(run, swap)
    verdict = verify_run(run)
    assert not verdict.ok
    assert "masks.safetensors holds the permutation checksum" in said(verdict)
    assert "model.embed_tokens.weight: values that differ from the base" in said(verdict)


def test_another_permutation_with_all_checksums_forged_is_found_out(run):
    def swap(tensors):
        down = tensors["model.layers.1.mlp.down_proj"]
        down[0, :2] = down[0, :2].flip(0)

    change_permutation(run, swap)
    digest = checksum(run / "permutation.safetensors")
    masks = read_masks(run / "masks.safetensors")
    in_memory = {
        name: nmprune.checkpoint.TensorMask.from_mask(one.unpack(), one.pattern) for name, one in masks.masks.items()
    }
    write_masks(run / "masks.safetensors", type(masks)(in_memory, *list(vars(masks).values())[1:5], digest))
    config = json.loads((run / "model/config.json").read_text())
    config["nmprune"]["permutation"]["checksum"] = f"sha256:{digest}"
    config["nmprune"]["mask_checksum"] = f"sha256:{checksum(run / 'masks.safetensors')}"
    (run / "model/config.json").write_text(json.dumps(config))
    results = json.loads((run / "results.json").read_text())
    results["mask_checksum"] = checksum(run / "masks.safetensors")
    (run / "results.json").write_text(json.dumps(results))
    verdict = verify_run(run)
    assert verdict.faults == ()
    assert {one.tensor for one in verdict.report.findings} == {
        f"model.layers.1.mlp.{role}_proj.weight" for role in ("gate", "up", "down")
    }


def test_what_is_no_permutation_fails(run):
    change_permutation(run, lambda tensors: tensors["residual"][0, :2].fill_(5))
    verdict = verify_run(run)
    assert not verdict.ok and verdict.report is None
    assert "residual is no permutation" in verdict.faults[0]


def test_an_absent_file_fails(run):
    (run / "permutation.safetensors").unlink()
    verdict = verify_run(run)
    assert not verdict.ok
    assert "permutation.safetensors: cannot be read" in verdict.faults[0]


def test_channels_of_another_model_fail(run):
    change_permutation(run, lambda tensors: tensors.update(residual=torch.arange(8, dtype=torch.int32)[None]))
    verdict = verify_run(run)
    assert "the permutation of residual is for (blocks, channels) (1, 8); this model has (1, 32)" in verdict.faults[0]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"pattern": "1:4"}, "permutation.safetensors is of ffn, heads, residual for 1:4; recipe.yaml asks for"),
        ({"fingerprint": "00"}, "permutation.safetensors names the dense model 00; the one compared with is"),
    ],
)
def test_contradictions(metadata, message, run):
    change_permutation(run, **metadata)
    assert message in said(verify_run(run))


def test_numbers_that_differ_are_found_out(run):
    results = json.loads((run / "results.json").read_text())
    results["permutation"][0]["after"] = 1.0
    (run / "results.json").write_text(json.dumps(results))
    assert "permutation.safetensors and results.json do not say the same" in said(verify_run(run))


def test_a_recipe_without_permutations_contradicts_masks_with_one(run):
    text = (run / "recipe.yaml").read_text().replace("permute:\n- ffn\n- heads\n- residual\n", "permute: []\n")
    (run / "recipe.yaml").write_text(text)
    assert "recipe.yaml asks for nothing such" in said(verify_run(run))


# -- apply, diff, npz -------------------------------------------------------------------------------------------------------


def test_apply_makes_the_runs_model_again(base, run, tmp_path):
    done = apply_masks(run, str(base), tmp_path / "out")
    assert done.notices == ()
    weights = {file.name: file.read_bytes() for file in (run / "model").glob("*.safetensors")}
    assert weights == {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    key = json.loads((tmp_path / "out/config.json").read_text())["nmprune"]
    assert key["permutation"]["kinds"] == list(ALL)


def test_masks_without_their_permutation_are_not_applied(base, run, tmp_path):
    alone = shutil.copy(run / "masks.safetensors", tmp_path / "masks.safetensors")
    with pytest.raises(
        InputError, match=r"channels were reordered first; the order is in permutation.safetensors, which is not"
    ):
        apply_masks(Path(alone), str(base), tmp_path / "out")
    change_permutation(run, lambda tensors: tensors["residual"].copy_(torch.arange(32)[None]))
    with pytest.raises(InputError, match=r"is not the file that .* was made with"):
        apply_masks(run, str(base), tmp_path / "out")


def test_masks_of_another_shape_of_model_are_not_applied(run, tmp_path):
    other = tiny_models.save("llama", tmp_path / "other", intermediate_size=128)
    with pytest.raises(InputError):
        apply_masks(run, str(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_of_different_orders_are_not_compared(base, run, tmp_path):
    prune(base, tmp_path / "plain")
    with pytest.raises(InputError, match="different orders of the model's channels"):
        compare_masks(run, tmp_path / "plain")
    compare_masks(run, run)


def test_an_npz_cannot_say_it(base, run, tmp_path):
    masks = read_masks(run / "masks.safetensors")
    with pytest.raises(InputError, match=r"channels were reordered .* which an npz cannot say"):
        write_npz(tmp_path / "m.npz", masks)
    prune(base, tmp_path / "plain")
    write_npz(tmp_path / "m.npz", read_masks(tmp_path / "plain/masks.safetensors"))
    with pytest.raises(InputError, match="an npz does not say in which order"):
        compare_masks(tmp_path / "m.npz", run)


# -- models in memory -------------------------------------------------------------------------------------------------------


def test_a_model_in_memory_is_reordered_in_place(base, run):
    model = AutoModelForCausalLM.from_pretrained(base)
    done = prune(model, None, permute="all")
    found = read_permutation(run / "permutation.safetensors")
    assert done.permutations.keys() == found.permutations.keys()
    assert all(torch.equal(one, found.permutations[name]) for name, one in done.permutations.items())
    written = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, written[name]), name


def test_a_model_in_memory_with_a_run_folder(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    done = prune(model, tmp_path / "run", permute=["residual"])
    assert done.permutations == {} and done.results.permutation[0].kind == "residual"
    assert verify_run(tmp_path / "run").ok
    embedding = AutoModelForCausalLM.from_pretrained(base).model.embed_tokens.weight
    order = read_permutation(tmp_path / "run/permutation.safetensors").permutations["residual"][0]
    assert torch.equal(model.model.embed_tokens.weight, embedding[:, order])


# -- recipe, plan -----------------------------------------------------------------------------------------------------------


def recipe(**settings):
    return Recipe.from_dict({"model": "m", "method": "wanda", "pattern": "2:4", **settings})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        ("", ()),
        ("all", ALL),
        ("residual,ffn", ("ffn", "residual")),
        (["heads", "heads"], ("heads",)),
        (["all", "ffn"], ALL),
    ],
)
def test_the_recipes_key(given, expected):
    made = recipe(permute=given)
    assert made.permute == expected
    assert recipe(**made.to_dict()) == made


def test_faults_of_the_key():
    with pytest.raises(InputError, match=r"permute 'ffm' is no kind of channels. Did you mean 'ffn'"):
        recipe(permute="ffm")
    with pytest.raises(InputError, match=r"permute is \{'ffn': 1\}; expected a list"):
        recipe(permute={"ffn": 1})
    with pytest.raises(InputError, match="permute is exact for transformers' own model code only"):
        recipe(permute="ffn", trust_remote_code=True)


def test_what_a_model_cannot_have_is_refused_before_anything_is_written(base, tmp_path):
    with pytest.raises(InputError, match=r"permute heads: .* not a whole number of groups of 16"):
        prune(base, tmp_path / "run", pattern="8:16", permute="heads")
    assert not (tmp_path / "run").exists()


def test_a_plan_shows_the_phase(base, monkeypatch):
    monkeypatch.setattr(rehearsal, "layer_peak", lambda *_: None)  # takes seconds, and is not about this
    asked = Recipe.from_dict(
        {
            "model": str(base),
            "method": "wanda",
            "calibration": {"n_sequences": 4, "seq_len": 16},
            "permute": "all",
        }
    )
    found = plan(asked)
    assert found.seconds["permute"] > 0
    assert found.layer_passes == 3 + 2
    assert found.memory["permutation"]["scores of the residual stream"] > 0
    plain = plan(Recipe.from_dict({**asked.to_dict(), "permute": []}), timed=False)
    assert "permutation" not in plain.memory and plain.layer_passes == 3
    with pytest.raises(InputError, match="Leave heads out"):
        plan(Recipe.from_dict({**asked.to_dict(), "pattern": str(Pattern(8, 16))}), timed=False)


def test_a_finished_run_repeated_changes_no_file(base, run):
    before = hashes(run)
    prune(base, run, permute="all")
    assert hashes(run) == before
