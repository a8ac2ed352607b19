from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models
from nmprune.architectures import View
from nmprune.checkpoint.names import NameMap, Piece
from nmprune.errors import InputError
from nmprune.stream.config import empty_model


def saved(name: str, folder, **changes) -> dict[str, torch.Tensor]:
    """A model's tensors as save_pretrained writes them."""
    return load_file(tiny_models.save(name, folder, **changes) / "model.safetensors")


def mapped(name: str, tensors: dict[str, torch.Tensor], **changes) -> NameMap:
    model = empty_model(tiny_models.build(name, **changes).config, torch.float32)
    return NameMap(model, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gpt2", "gpt_neox", "phi3"])
def test_plain_families_are_one_to_one(name, tmp_path):
    tensors = saved(name, tmp_path)
    names = mapped(name, tensors)
    assert names.unused == ()
    assert sorted(piece.tensor for pieces in names.pieces.values() for piece in pieces) == sorted(tensors)
    assert all(len(pieces) == 1 and pieces[0].region is None for pieces in names.pieces.values())


def test_llama_is_the_identity(tmp_path):
    tensors = saved("llama", tmp_path)
    assert mapped("llama", tensors).pieces == {key: (Piece(key),) for key in tensors}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_pieces_put_together_are_what_transformers_loads(name, tmp_path):
    tensors = saved(name, tmp_path)
    names = mapped(name, tensors)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert names.pieces.keys() == expected.keys()
    for key, pieces in names.pieces.items():
        whole = torch.full_like(expected[key], float("nan"))
        for piece in pieces:
            (whole if piece.region is None else piece.region.of(whole)).copy_(tensors[piece.tensor])
        assert torch.equal(whole, expected[key]), key


def test_mixtral_experts_are_rows_of_one_parameter(tmp_path):
    names = mapped("mixtral", saved("mixtral", tmp_path))
    disk = "model.layers.1.block_sparse_moe.experts"
    gate_up = names.pieces["model.layers.1.mlp.experts.gate_up_proj"]
    assert set(gate_up) == {
        Piece(f"{disk}.{e}.{w}.weight", View(e, rows))
        for e in range(4)
        for w, rows in (("w1", (0, 64)), ("w3", (64, 128)))
    }
    down = names.pieces["model.layers.1.mlp.experts.down_proj"]
    assert set(down) == {Piece(f"{disk}.{e}.w2.weight", View(e, (0, 32))) for e in range(4)}


def test_ten_experts_and_more_keep_their_numbers(tmp_path):
    names = mapped("mixtral", saved("mixtral", tmp_path, num_local_experts=12), num_local_experts=12)
    for piece in names.pieces["model.layers.0.mlp.experts.down_proj"]:
        assert f".experts.{piece.region.expert}." in piece.tensor


def test_a_tied_head_needs_no_tensor_of_its_own(tmp_path):
    tensors = saved("llama_tied", tmp_path)
    assert "lm_head.weight" not in tensors
    assert "lm_head.weight" not in mapped("llama_tied", tensors).pieces


def test_a_tied_model_may_hold_the_head_alone(tmp_path):
    tensors = saved("llama_tied", tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    pieces = mapped("llama_tied", tensors).pieces
    assert pieces["lm_head.weight"] == pieces["model.embed_tokens.weight"] == (Piece("lm_head.weight"),)


def test_the_old_name_of_gpt_neox_head(tmp_path):
    tensors = saved("gpt_neox", tmp_path)
    current = next(key for key in tensors if key in ("embed_out.weight", "lm_head.weight"))
    for old in ("embed_out.weight", "lm_head.weight"):
        renamed = {old if key == current else key: tensor for key, tensor in tensors.items()}
        pieces = mapped("gpt_neox", renamed).pieces
        assert [piece.tensor for piece in pieces["lm_head.weight"]] == [old]


def test_both_names_of_one_parameter_at_once_are_an_error(tmp_path):
    tensors = saved("gpt_neox", tmp_path)
    head = tensors.get("embed_out.weight", tensors.get("lm_head.weight"))
    with pytest.raises(InputError, match=r"embed_out\.weight and lm_head\.weight are both lm_head\.weight"):
        mapped("gpt_neox", {**tensors, "embed_out.weight": head, "lm_head.weight": head})


def test_gpt2_without_prefix_and_with_old_buffers(tmp_path):
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in saved("gpt2", tmp_path).items()}
    buffers = [f"h.{i}.attn.{kind}" for i in range(2) for kind in ("bias", "masked_bias")]
    names = mapped("gpt2", {**tensors, **{name: torch.ones(1, 1, 64, 64) for name in buffers}})
    assert sorted(names.unused) == sorted(buffers)
    assert names.pieces["transformer.h.1.attn.c_attn.weight"] == (Piece("h.1.attn.c_attn.weight"),)


@pytest.mark.parametrize("lost", ["w1", "w2", "w3"])
def test_a_missing_expert_tensor_is_told(lost, tmp_path):
    tensors = saved("mixtral", tmp_path)
    del tensors[f"model.layers.0.block_sparse_moe.experts.2.{lost}.weight"]
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.experts\.\w+ of shape .* needs .* weights; the \d checkpoint tens"
    ):
        mapped("mixtral", tensors)


def test_an_expert_of_another_shape_is_told(tmp_path):
    tensors = saved("mixtral", tmp_path)
    first, second = (f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in (0, 1))
    tensors[first], tensors[second] = torch.zeros(24, 64), torch.zeros(40, 64)
    with pytest.raises(InputError, match=r"experts\.down_proj is assembled from 4 checkpoint tensors"):
        mapped("mixtral", tensors)


def test_a_wrong_shape_is_told(tmp_path):
    tensors = saved("llama", tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32)
    with pytest.raises(InputError) as error:
        mapped("llama", tensors)
    assert str(error.value).startswith(
        "checkpoint tensor model.layers.1.mlp.up_proj.weight has shape (48, 32); config.json makes "
        "model.layers.1.mlp.up_proj.weight (64, 32). The weights and config.json belong to different models"
    )


def test_an_incomplete_checkpoint_names_what_is_absent(tmp_path):
    tensors = saved("llama", tmp_path)
    del tensors["model.norm.weight"]
    with pytest.raises(InputError, match=r"holds no tensor for model\.norm\.weight\. It is incomplete"):
        mapped("llama", tensors)
    fewer = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}
    with pytest.raises(InputError, match=r"holds no tensor for (model\.layers\.1\.\S+, ){4}\S+ and 5 more\."):
        mapped("llama", fewer)
