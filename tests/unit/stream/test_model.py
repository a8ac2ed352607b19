from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

import tiny_models
from nmprune.errors import InputError
from nmprune.stream import DecoderModel


def test_only_the_layer_in_the_body_has_weights(tmp_path):
    decoder = DecoderModel.open(tiny_models.save("llama", tmp_path))
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    with decoder.layer(1) as layer:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for parameter in decoder.layers[0].parameters())
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_a_layer_is_dropped_when_the_body_fails(tmp_path):
    decoder = DecoderModel.open(tiny_models.save("mixtral", tmp_path))
    with pytest.raises(ZeroDivisionError), decoder.layer(0):
        raise ZeroDivisionError
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "gemma3_text"])
def test_a_loaded_layer_equals_what_transformers_loads(name, tmp_path):
    decoder = DecoderModel.open(tiny_models.save(name, tmp_path))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).get_submodule(f"{decoder.family.layers}.1").state_dict()
    with decoder.layer(1) as layer:
        state = layer.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_a_weight_is_the_disks_own_matrix(name, tmp_path):
    decoder = DecoderModel.open(tiny_models.save(name, tmp_path, dtype=torch.bfloat16))
    stored = load_file(tmp_path / "model.safetensors")
    with decoder.layer(0) as layer:
        for linear in decoder.linears(0)[0]:
            weight = decoder.weight(layer, linear)
            assert weight.dtype == torch.float32 and weight.is_contiguous()
            assert torch.equal(weight, linear.on_disk.of(stored[linear.tensor]).float()), linear.name


def test_whatever_stays_dense_outside_the_layers_is_listed():
    def dense(name: str) -> dict[str, str]:
        return {one.name: one.reason for one in DecoderModel.from_model(tiny_models.build(name)).dense_outside()}

    assert dense("llama") == {"model.embed_tokens": "embedding: dense", "lm_head": "head: dense"}
    assert dense("llama_tied")["lm_head"] == "head, tied with the embedding: always dense"
    assert dense("opt_projected")["model.decoder.project_in"] == "outside the decoder layers: dense"
    assert set(dense("opt_projected")) == {
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
        "model.decoder.project_in",
        "model.decoder.project_out",
        "lm_head",
    }


def test_leftover_tensors_are_told():
    assert DecoderModel.from_model(tiny_models.build("llama")).unused_tensors == ()


def test_leftover_tensors_of_a_folder_are_told(tmp_path):
    tiny_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(file), **old}, file, metadata={"format": "pt"})
    assert DecoderModel.open(tmp_path).unused_tensors == tuple(old)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floats_are_refused(dtype, tmp_path):
    tiny_models.save("llama", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} is {dtype}; expected float32.*unquantised"):
        DecoderModel.open(tmp_path)


def test_a_model_without_a_head_is_refused():
    model = LlamaModel(tiny_models.build("llama").config)
    with pytest.raises(InputError, match=r"LlamaModel has no model\.layers: a causal language model is needed"):
        DecoderModel.from_model(model)


def test_an_empty_model_is_refused(tmp_path):
    empty = DecoderModel.open(tiny_models.save("llama", tmp_path)).model
    with pytest.raises(InputError, match="weights on the meta device"):
        DecoderModel.from_model(empty)


def test_a_model_in_memory_that_says_it_is_sparse_is_refused():
    model = tiny_models.build("llama")
    model.config.nmprune = {"pattern": "2 kept of 4"}
    with pytest.raises(InputError, match=r"the model is sparse already: its config.json says so"):
        DecoderModel.from_model(model)
    assert DecoderModel.from_model(model, allow_sparse=True).n_layers == 2


def test_the_compute_dtype_on_a_cpu_is_fp32_unless_said(tmp_path):
    tiny_models.save("llama", tmp_path, dtype=torch.bfloat16)
    assert DecoderModel.open(tmp_path).dtype == torch.float32
    assert DecoderModel.open(tmp_path, dtype="float16").dtype == torch.float16
