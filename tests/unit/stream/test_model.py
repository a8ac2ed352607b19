from __future__ import annotations

import json

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


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral"])
def test_a_twin_is_the_same_model_and_keeps_what_is_brought_in(name, tmp_path):
    decoder = DecoderModel.open(tiny_models.save(name, tmp_path))
    twin = decoder.twin()
    twin.bring_in(0)
    assert not any(parameter.is_meta for parameter in twin.layers[0].parameters())
    assert all(parameter.is_meta for parameter in twin.layers[1].parameters())
    twin.bring_in(1)
    twin.bring_in(None)
    expected = tiny_models.build(name).state_dict()
    found = twin.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    head, embedding = twin.model.get_output_embeddings(), twin.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == bool(twin.model.all_tied_weights_keys)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


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


def test_auto_on_an_accelerator_is_what_the_config_says_or_most_weights_are(tmp_path):
    # the meta device stands in for an accelerator: opening computes nothing
    tiny_models.save("llama", tmp_path, dtype=torch.bfloat16)
    assert DecoderModel.open(tmp_path, device="meta").dtype == torch.bfloat16
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = {name: t.float() if t.dim() == 1 else t.half() for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    said = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in said.items() if key != "dtype"}))
    assert DecoderModel.open(tmp_path, device="meta").dtype == torch.float16
    assert DecoderModel.open(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("make", [DecoderModel.open, DecoderModel.from_config])
def test_computed_buffers_go_to_the_device(make, tmp_path):
    decoder = make(tiny_models.save("llama", tmp_path), device="meta")
    assert {buffer.device.type for buffer in decoder.model.buffers()} == {"meta"}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_nothing_stays_after_the_models_ends(name, tmp_path):
    decoder = DecoderModel.open(tiny_models.save(name, tmp_path))
    for ends in (decoder.embedding, decoder.head):
        with ends():
            assert not decoder.model.get_input_embeddings().weight.is_meta
        assert all(one.is_meta for _, one in decoder.model.named_parameters(remove_duplicate=False))
    with pytest.raises(ZeroDivisionError), decoder.head():
        raise ZeroDivisionError
    assert decoder.model.get_output_embeddings().weight.is_meta


def test_a_tied_model_whose_file_holds_the_head_alone(tmp_path):
    tiny_models.save("llama_tied", tmp_path)
    file, windows = tmp_path / "model.safetensors", tiny_models.windows(2)
    expected = DecoderModel.open(tmp_path).embed(windows, 2, 1 << 20)[0].get(slice(0, 2))
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    decoder = DecoderModel.open(tmp_path)
    assert torch.equal(decoder.embed(windows, 2, 1 << 20)[0].get(slice(0, 2)), expected)
    with decoder.head():
        assert torch.equal(decoder.model.lm_head.weight, tensors["lm_head.weight"])


def tied_by_config_alone(folder, change=1.0):
    """A model whose config ties the head to the embedding while the file holds both."""
    tiny_models.save("llama_tied", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * change
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def test_what_the_config_ties_and_the_file_holds_apart_stays_apart_as_in_transformers(tmp_path):
    tensors = tied_by_config_alone(tmp_path, change=2.0)
    decoder, windows = DecoderModel.open(tmp_path), tiny_models.windows(2)
    assert decoder.untied == ("lm_head.weight",)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(whole.lm_head.weight, tensors["lm_head.weight"])
    with decoder.embedding():
        assert torch.equal(decoder.model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
        assert decoder.model.lm_head.weight.is_meta
    for _ in range(2):
        with decoder.head():
            assert torch.equal(decoder.model.lm_head.weight, tensors["lm_head.weight"])
            assert torch.equal(decoder.model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
        assert decoder.model.lm_head.weight.is_meta and decoder.model.model.embed_tokens.weight.is_meta
    with torch.no_grad(), decoder.head():
        hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
        logits = decoder.logits(hidden, windows)
        torch.testing.assert_close(logits, whole.lm_head(whole.model.norm(hidden)))
    reasons = {one.name: one.reason for one in decoder.dense_outside()}
    assert reasons == {"model.embed_tokens": "embedding: dense", "lm_head": "head: dense"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_stored_twice_stays_tied(dtype, tmp_path):
    tensors = tied_by_config_alone(tmp_path)
    # of another dtype but the same value in the compute dtype: no difference
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    decoder = DecoderModel.open(tmp_path, dtype="bfloat16")
    assert decoder.untied == ()
    with decoder.head():
        assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight


def test_matrices_of_any_module_outside_the_layers_are_listed():
    decoder = DecoderModel.from_model(tiny_models.build("gemma3"))
    dense = {one.name: (one.shape, one.reason) for one in decoder.dense_outside()}
    outside = "outside the decoder layers: dense"
    patches = next(name for name in dense if name.endswith("patch_embedding"))
    assert dense[patches] == ((16, 3, 14, 14), outside)
    assert dense["model.multi_modal_projector.mm_input_projection_weight"] == ((16, 32), outside)
    assert dense["lm_head"][1].startswith("head")
    assert not any("bias" in name or name.startswith(decoder.family.layers) for name in dense)
