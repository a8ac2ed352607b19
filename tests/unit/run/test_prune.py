from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_models
from nmprune import masks
from nmprune.checkpoint import checksum, read_masks
from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.results import Results
from nmprune.run.progress import Progress
from nmprune.run.prune import prune_run
from nmprune.run.recipe import CalibrationRecipe, Recipe
from runs import hashes, mtimes, output, prune


@pytest.fixture
def model(tmp_path):
    return tiny_models.save("llama", tmp_path / "base", max_shard_size="40KB")


def test_a_run_leaves_what_it_promises(model, tmp_path):
    out = tmp_path / "run"
    results = prune(model, out, "sparsegpt").results
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "calibration.safetensors",
        "masks.safetensors",
        "model",
        "recipe.yaml",
        "results.json",
    ]
    assert Results.read(out / "results.json") == results
    assert results.mask_checksum == checksum(out / "masks.safetensors")
    assert results.calibration == {
        "source": results.calibration["source"],
        "split": "given as token ids",
        "n_sequences": 6,
        "seq_len": 16,
        "seed": 0,
        "n_tokens": 96,
    }
    assert {"read", "forward", "statistics", "solve", "measure", "write"} <= set(results.seconds)
    assert all(seconds >= 0 for seconds in results.seconds.values())
    assert results.sessions == 1 and results.updates_weights
    assert (results.machine["device"], results.machine["dtype"]) == ("cpu", "float32")
    assert len(results.linears) == 14 and all(0 < one.output_error < 1 for one in results.linears)
    assert (
        results.weights_kept * 2
        == results.weights_in_linears
        == sum(a * b for a, b in (one.shape for one in results.linears))
    )
    parameters = sum(p.numel() for p in tiny_models.build("llama").parameters())
    assert results.parameters == parameters
    assert results.global_sparsity == pytest.approx(results.weights_kept / parameters)
    assert {one.name for one in results.dense} == {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral", "gpt_oss"])
def test_masks_and_model_agree_and_load_in_transformers(name, tmp_path):
    base = tiny_models.save(name, tmp_path / "base")
    prune(base, tmp_path / "run", exclude=["*layers.0*", "*h.0*"][name == "gpt2"])
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    mask_file = read_masks(tmp_path / "run/masks.safetensors")
    assert before.keys() == after.keys() and mask_file.masks
    for tensor, value in before.items():
        if tensor in mask_file.masks:
            kept = mask_file.mask(tensor)
            assert torch.equal(after[tensor], torch.where(kept, value, 0.0))
            assert mask_file.masks[tensor].n_wrong_groups() == 0
        else:
            assert torch.equal(after[tensor], value)
    assert model.config.nmprune["pattern"] == "2 kept of 4"


def test_an_excluded_expert_of_a_3d_tensor_stays_dense(tmp_path):
    base = tiny_models.save("gpt_oss", tmp_path / "base")
    prune(base, tmp_path / "run", exclude=["*.0.mlp.experts.gate_up_proj.2"])
    tensor = "model.layers.0.mlp.experts.gate_up_proj"
    entry = read_masks(tmp_path / "run/masks.safetensors").masks[tensor]
    assert entry.dense_rows == ((2 * 128, 3 * 128),)
    mask = entry.unpack()
    assert mask[2].all()
    assert masks.n_wrong_groups(mask[[0, 1, 3]].transpose(1, 2), Pattern(2, 4)) == 0


def test_the_model_describes_itself(model, tmp_path):
    prune(model, tmp_path / "run", exclude="*.down_proj")
    described = json.loads((tmp_path / "run/model/config.json").read_text())["nmprune"]
    assert described["pattern"] == "2 kept of 4"
    assert described["method"] == {"name": "wanda"}
    assert described["mask_checksum"] == "sha256:" + checksum(tmp_path / "run/masks.safetensors")
    assert described["pruned"]["model.layers.*.mlp.up_proj"] == 2
    assert {"linears": "model.layers.*.mlp.down_proj", "count": 2, "reason": "excluded by '*.down_proj'"} in described[
        "dense"
    ]


def test_a_run_begun_on_another_kind_of_device_is_not_mixed(model, tmp_path):
    def stop(one: Progress) -> None:
        if one.text.startswith("decoder layer 1/"):
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, report=stop)
    sessions = out / "progress" / "sessions.json"
    begun = json.loads(sessions.read_text())
    assert begun["compute"] == "float32 on cpu"
    sessions.write_text(json.dumps({**begun, "compute": "bfloat16 on cuda"}))
    with pytest.raises(
        InputError, match=r"begun in bfloat16 on cuda; here it would go on in float32 on cpu.*--device cuda"
    ):
        prune(model, out)
    sessions.write_text(json.dumps(begun))
    assert prune(model, out).results.sessions == 2


def test_the_card_says_what_was_done(model, tmp_path):
    prune(model, tmp_path / "run", "sparsegpt")
    card = (tmp_path / "run/README.md").read_text()
    assert card.startswith(f"# {model}, pruned to 2:4 (2 kept of 4) by sparsegpt\n")
    assert "damping 0.01, block_size 128" in card and "| weights | moved |" in card
    assert "6 x 16 tokens, seed 0" in card and "mean relative output error" in card
    assert "- `lm_head`: head: dense" in card


def test_two_runs_are_bit_identical(model, tmp_path):
    for name in ("a", "b"):
        prune(model, tmp_path / name, "sparsegpt")
    assert output(tmp_path / "a") == output(tmp_path / "b")


def test_a_finished_run_changes_nothing(model, tmp_path):
    first = prune(model, tmp_path / "run").results
    before, written = hashes(tmp_path / "run"), mtimes(tmp_path / "run")
    told: list[Progress] = []
    assert prune(model, tmp_path / "run", report=told.append).results == first
    assert (hashes(tmp_path / "run"), mtimes(tmp_path / "run")) == (before, written)
    assert [one.stage for one in told] == ["done"] and "finished already" in told[0].text


def test_a_run_killed_just_before_its_last_breath_is_cleaned(model, tmp_path):
    prune(model, tmp_path / "run")
    (tmp_path / "run/progress").mkdir()
    (tmp_path / "run/progress/layer_00000.safetensors").write_text("x")
    prune(model, tmp_path / "run")
    assert not (tmp_path / "run/progress").exists()


class Stop(Exception):
    pass


def stop_at(n_layers: int):
    def report(progress: Progress) -> None:
        if progress.text.startswith(f"decoder layer {n_layers}/"):
            raise Stop

    return report


@pytest.mark.parametrize("hidden_kept", [False, True])
def test_a_stopped_run_goes_on(hidden_kept, tmp_path, monkeypatch):
    model = tmp_path / "base"
    tiny_models.build("llama", num_hidden_layers=4).save_pretrained(model)
    prune(model, tmp_path / "whole", "sparsegpt")
    if hidden_kept:
        monkeypatch.setattr("nmprune.run.folder.HIDDEN_INTERVAL_SECONDS", 0.0)
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", "sparsegpt", report=stop_at(3))
    progress = tmp_path / "run/progress"
    files = {file.name: file.stat().st_mtime_ns for file in progress.glob("layer_*")}
    assert len(files) == 3 and (progress / "hidden.safetensors").exists() == hidden_kept
    told: list[str] = []

    def keep(one: Progress) -> None:
        told.append(one.text)
        if progress.exists():
            now = {file.name: file.stat().st_mtime_ns for file in progress.glob("layer_*")}
            assert now.items() >= files.items(), "a finished layer was written again"

    results = prune(model, tmp_path / "run", "sparsegpt", report=keep).results
    assert output(tmp_path / "run") == output(tmp_path / "whole")
    assert results.sessions == 2 and len(results.linears) == 28
    assert "resuming: 3 of 4 decoder layers are finished" in told
    taken_over = [text for text in told if text.endswith("taken over")]
    assert len(taken_over) == (0 if hidden_kept else 3)


def test_a_damaged_layer_can_be_deleted_and_made_again(tmp_path, monkeypatch):
    model = tmp_path / "base"
    tiny_models.build("llama", num_hidden_layers=4).save_pretrained(model)
    prune(model, tmp_path / "whole", "sparsegpt")
    monkeypatch.setattr("nmprune.run.folder.HIDDEN_INTERVAL_SECONDS", 0.0)
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", "sparsegpt", report=stop_at(3))
    damaged = tmp_path / "run/progress/layer_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{re.escape(str(damaged))} is damaged: .*Delete it"):
        prune(model, tmp_path / "run", "sparsegpt")
    damaged.unlink()
    prune(model, tmp_path / "run", "sparsegpt")
    assert output(tmp_path / "run") == output(tmp_path / "whole")


def test_other_weights_under_the_same_name_are_noticed(model, tmp_path):
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", report=stop_at(1))
    for file in model.iterdir():
        file.unlink()
    tiny_models.save("llama", model, seed=9, max_shard_size="40KB")
    with pytest.raises(InputError, match="begun on other weights"):
        prune(model, tmp_path / "run")


def test_progress_grows_from_stage_to_stage(model, tmp_path):
    told: list[Progress] = []
    prune(model, tmp_path / "run", report=told.append)
    stages = [one.stage for one in told]
    assert list(dict.fromkeys(stages)) == ["open", "calibrate", "layers", "masks", "model", "done"]
    for stage in ("layers", "model"):
        numbers = [one.done for one in told if one.stage == stage]
        assert numbers == sorted(numbers)
        assert [one for one in told if one.stage == stage][-1].done == next(o for o in told if o.stage == stage).total
    assert any(re.fullmatch(r"decoder layer 2/2: 7 linears, \d+\.\d s", one.text) for one in told)


def test_tensors_that_the_model_does_not_know_are_told_and_kept(tmp_path):
    model = tiny_models.save("llama", tmp_path / "base")
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {**load_file(model / "model.safetensors"), extra: torch.ones(4)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    told: list[Progress] = []
    prune(model, tmp_path / "run", report=told.append)
    line = f"1 checkpoint tensors belong to no part of the model and are copied as they are, such as {extra}"
    assert line in [one.text for one in told]
    assert torch.equal(load_file(tmp_path / "run/model/model.safetensors")[extra], torch.ones(4))


def test_a_head_that_the_file_holds_apart_is_told_and_kept(tmp_path):
    model = tiny_models.save("llama_tied", tmp_path / "base")
    file, head = "model.safetensors", "lm_head.weight"
    tensors = load_file(model / file)
    save_file({**tensors, head: 2 * tensors["model.embed_tokens.weight"]}, model / file, metadata={"format": "pt"})
    told: list[Progress] = []
    prune(model, tmp_path / "run", report=told.append)
    assert [one.text for one in told if "config.json ties lm_head.weight to the embedding" in one.text]
    written = load_file(tmp_path / "run/model" / file)
    assert torch.equal(written[head], 2 * written["model.embed_tokens.weight"])


def recipe(model, **kwargs) -> Recipe:
    return Recipe(str(model), create("wanda"), Pattern(2, 4), **kwargs)


def test_a_run_repeats_from_its_own_tokens(model, tmp_path):
    prune(model, tmp_path / "run")
    source = str(tmp_path / "run/calibration.safetensors")
    again = recipe(model, calibration=CalibrationRecipe(source, 6, 16))
    prune_run(again, tmp_path / "again")
    assert output(tmp_path / "again")["masks.safetensors"] == output(tmp_path / "run")["masks.safetensors"]
    with pytest.raises(
        InputError, match=r"holds 6 sequences of 16 tokens; the recipe says 32 of 512. Say --n-sequences 6 --seq"
    ):
        prune_run(recipe(model, calibration=CalibrationRecipe(source)), tmp_path / "other")


def test_a_recipe_of_token_ids_says_where_they_are(model, tmp_path):
    prune(model, tmp_path / "run")
    copied = Recipe.from_yaml(tmp_path / "run/recipe.yaml")
    with pytest.raises(InputError, match="stands for token ids that were given from Python"):
        prune_run(copied, tmp_path / "again")


def test_inputs_that_do_not_fit_leave_no_folder(model, tmp_path):
    out = tmp_path / "run"
    for bad, expected in (
        (recipe(model), "seq_len 512 is more than the model's 64 positions"),
        (recipe(model, calibration=CalibrationRecipe("nowhere.txt", 1, 16)), "nowhere"),
        (recipe(model, calibration=CalibrationRecipe("builtin", 1, 16)), "has no tokenizer that transformers can load"),
        (recipe(model, exclude=("*.nothing",)), "matches no linear"),
        (recipe(tmp_path / "absent"), "no such folder"),
    ):
        with pytest.raises(InputError, match=expected):
            prune_run(bad, out)
        assert not out.exists()
