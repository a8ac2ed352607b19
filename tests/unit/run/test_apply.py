from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models
import tiny_runs
from nmprune.checkpoint import checksum, read_masks, write_npz
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.run.apply import apply_masks


def bits(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    base = tiny_runs.model(place / "base")
    return base, tiny_runs.finished(base, place / "wanda", exclude=("*.o_proj",))


def test_a_frozen_runs_masks_give_its_model_again(made, tmp_path):
    base, run = made
    seen = []
    done = apply_masks(run, str(base), tmp_path / "out", report=seen.append)
    assert bits(tmp_path / "out") == bits(run / "model") != bits(base)
    assert (done.n_masks, done.density, done.pattern, done.notices) == (12, 0.5, "2 kept of 4", ())
    assert seen[-1].done == seen[-1].total > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    key = json.loads((tmp_path / "out" / "config.json").read_text())["nmprune"]
    assert key["mask_checksum"] == f"sha256:{checksum(run / 'masks.safetensors')}"
    assert key["pruned"]["model.layers.*.mlp.up_proj"] == 2
    assert {"linears": "model.layers.*.self_attn.o_proj", "count": 2, "reason": "no mask for it"} in key["dense"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_maskllms_npz_also_for_transposed_weights(name, tmp_path):
    base = tiny_runs.model(tmp_path / "base", name)
    run = tiny_runs.finished(base, tmp_path / "run", "magnitude")
    npz = tmp_path / "masks.npz"
    write_npz(npz, read_masks(run / "masks.safetensors"))
    with pytest.raises(InputError, match=r"does not say which pattern its masks keep. Add --pattern"):
        apply_masks(npz, str(base), tmp_path / "out")
    done = apply_masks(npz, str(base), tmp_path / "out", Pattern(2, 4))
    assert bits(tmp_path / "out") == bits(run / "model")
    assert "does not say which model" in done.notices[0]


def test_a_finetuned_checkpoint_gets_a_notice(made, tmp_path):
    other = tiny_models.save("llama", tmp_path / "finetuned", seed=9)
    done = apply_masks(made[1] / "masks.safetensors", str(other), tmp_path / "out")
    assert "not for these very weights" in done.notices[0]
    mask = read_masks(made[1] / "masks.safetensors").mask("model.layers.1.mlp.up_proj.weight")
    kept = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"] != 0
    assert (kept == mask).all()


def test_masks_of_a_method_that_moves_weights_get_a_notice(tmp_path):
    base = tiny_runs.model(tmp_path / "base")
    run = tiny_runs.finished(base, tmp_path / "run", "sparsegpt")
    assert "chosen by sparsegpt, which also moves" in apply_masks(run, str(base), tmp_path / "out").notices[0]


def test_experts_that_the_mask_file_leaves_dense(tmp_path):
    base = tiny_runs.model(tmp_path / "moe", "gpt_oss")
    run = tiny_runs.finished(base, tmp_path / "run", exclude=("*.experts.down_proj.2",))
    apply_masks(run, str(base), tmp_path / "out")
    key = json.loads((tmp_path / "out" / "config.json").read_text())["nmprune"]
    reasons = {one["linears"]: (one["count"], one["reason"]) for one in key["dense"]}
    assert reasons["model.layers.*.mlp.experts.down_proj.*"] == (2, "dense by the mask file")
    assert key["pruned"]["model.layers.*.mlp.experts.down_proj.*"] == 6


def test_masks_of_another_model_are_refused_and_nothing_is_written(made, tmp_path):
    base = tiny_models.save("llama", tmp_path / "wide", hidden_size=64)
    with pytest.raises(InputError, match=r"(?s)does not fit.*a mask of shape.*and 7 more.*It belongs to another model"):
        apply_masks(made[1], str(base), tmp_path / "out")
    gpt2 = tiny_models.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(InputError, match="which the model does not have"):
        apply_masks(made[1], str(gpt2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_contradicts_the_file_an_existing_out_and_a_sparse_model(made, tmp_path):
    base, run = made
    with pytest.raises(InputError, match="its masks keep 2:4, --pattern says 4:8"):
        apply_masks(run, str(base), tmp_path / "out", Pattern(4, 8))
    with pytest.raises(InputError, match="exists already"):
        apply_masks(run, str(base), tmp_path)
    with pytest.raises(InputError, match="sparse already"):
        apply_masks(run, str(run / "model"), tmp_path / "out")
    apply_masks(run, str(run / "model"), tmp_path / "out", allow_sparse=True)
    assert bits(tmp_path / "out") == bits(run / "model")


def test_near_matches_are_looked_for_only_where_they_are_shown(made, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("nmprune.run.apply.near_matches", lambda name, known: asked.append(name) or "")
    gpt2 = tiny_models.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"(?s)does not fit.*and 7 more"):
        apply_masks(made[1], str(gpt2), tmp_path / "out")
    assert len(asked) == 5
