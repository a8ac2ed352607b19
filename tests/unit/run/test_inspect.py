from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoConfig

import tiny_models
import tiny_runs
from nmprune.checkpoint import MaskFile, read_masks, write_npz
from nmprune.errors import InputError
from nmprune.report import ModelFacts
from nmprune.run.inspect import NpzFacts, RunFacts, inspect


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    base = tiny_runs.model(place / "base")
    return base, tiny_runs.finished(base, place / "run")


def test_a_model(made):
    found = inspect(str(made[0]))
    assert isinstance(found, ModelFacts)
    assert (found.model_type, found.n_layers, found.dtype) == ("llama", 2, "F32 (21 tensors)")
    assert found.parameters == 24736
    roles = {one.role: (one.count, one.shape, one.shared_input) for one in found.linears}
    assert roles["self_attn.k_proj"] == (2, (16, 32), "self_attn.q_proj")
    assert roles["mlp.down_proj"] == (2, (32, 64), "mlp.down_proj")
    assert found.dense["lm_head"] == (1, "head: dense")
    assert set(found.patterns.values()) == {None}
    assert not found.pruned


def test_a_model_whose_widths_do_not_take_every_pattern(tmp_path):
    found = inspect(str(tiny_models.save("llama", tmp_path / "m", intermediate_size=60)))
    assert isinstance(found, ModelFacts)
    assert found.patterns["2:4"] is None
    assert found.patterns["4:8"] == "mlp.down_proj (in 60)"


def test_the_config_alone_says_the_same(made, tmp_path):
    shutil.copy(made[0] / "config.json", tmp_path)
    alone, whole = inspect(str(tmp_path)), inspect(str(made[0]))
    assert isinstance(alone, ModelFacts)
    assert isinstance(whole, ModelFacts)
    assert alone.folder == ""
    assert (alone.parameters, alone.linears, alone.dense, alone.patterns) == (
        whole.parameters,
        whole.linears,
        whole.dense,
        whole.patterns,
    )


def test_a_model_with_experts_and_a_damaged_one(tmp_path):
    found = inspect(str(tiny_models.save("qwen2_moe", tmp_path / "moe")))
    assert isinstance(found, ModelFacts)
    experts = {one.role: (one.count, one.shared_input) for one in found.linears if "experts." in one.role}
    assert experts["mlp.experts.gate_proj"] == (4, "mlp.experts.gate_up_proj")
    assert found.dense["model.layers.*.mlp.gate"][0] == 1
    file = tmp_path / "moe" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        inspect(str(tmp_path / "moe"))


def test_a_run_finished_or_not(made, tmp_path):
    found = inspect(str(made[1]))
    assert isinstance(found, RunFacts)
    assert found.results is not None
    assert found.recipe.method.name == "wanda"
    half = shutil.copytree(made[1], tmp_path / "half")
    (half / "results.json").unlink()
    (half / "progress").mkdir(exist_ok=True)
    (half / "progress" / "layer_00000.safetensors").touch()
    found = inspect(str(half))
    assert isinstance(found, RunFacts)
    assert (found.results, found.n_layers_finished) == (None, 1)


def test_mask_files_and_a_pruned_model(made, tmp_path):
    file = made[1] / "masks.safetensors"
    assert isinstance(inspect(str(file)), MaskFile)
    write_npz(tmp_path / "m.npz", read_masks(file))
    npz = inspect(str(tmp_path / "m.npz"))
    assert isinstance(npz, NpzFacts)
    assert (len(npz.keys), npz.n_bits) == (14, 18432)
    pruned = inspect(str(made[1] / "model"))
    assert isinstance(pruned, ModelFacts)
    assert pruned.pruned["pattern"] == "2 kept of 4"


def test_what_is_none_of_these(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        inspect(str(tmp_path))
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as an npz"):
        inspect(str(tmp_path / "x.npz"))


def test_a_gguf_is_read_from_its_header_alone(made, tmp_path, monkeypatch):
    monkeypatch.setenv("NMPRUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + b"\xff" * 400)
    with pytest.raises(InputError, match=r"m\.gguf: transformers cannot read this GGUF model"):
        inspect(str(file))
    read = AutoConfig.from_pretrained

    def from_gguf(folder: str, gguf_file: str | None = None, **kwargs: object) -> object:
        return read(made[0] if gguf_file == "m.gguf" else folder, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_gguf)
    found = inspect(str(file))
    assert isinstance(found, ModelFacts)
    assert found.dtype.startswith("GGUF: dequantised")
    assert (found.folder, found.parameters) == ("", 24736)


def test_an_uncached_sharded_model_of_the_hub_is_told_by_its_config(made, tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    shutil.copy(made[0] / "config.json", snapshot)
    index = {"weight_map": {"lm_head.weight": "model-00007-of-00007.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    found = inspect("someone/model")
    assert isinstance(found, ModelFacts)
    assert (found.folder, found.parameters) == ("", 24736)
    with pytest.raises(InputError, match=r"names model-00007-of-00007\.safetensors, which is absent"):
        inspect(str(snapshot))


def test_the_config_of_a_sparse_model_alone(made, tmp_path):
    shutil.copy(made[1] / "model" / "config.json", tmp_path)
    found = inspect(str(tmp_path))
    assert isinstance(found, ModelFacts)
    assert found.pruned["pattern"] == "2 kept of 4"
