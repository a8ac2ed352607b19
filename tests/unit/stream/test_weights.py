from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune.checkpoint import Checkpoint
from nmprune.stream import DecoderModel
from nmprune.stream.weights import commonest_float, entry, put


def test_an_entry_is_put_and_found_as_parameter_and_as_buffer():
    model = tiny_models.build("llama")
    put(model, "model.norm.weight", torch.full((32,), 3.0))
    assert isinstance(model.model.norm.weight, torch.nn.Parameter)
    assert torch.equal(entry(model, "model.norm.weight"), torch.full((32,), 3.0))
    put(model, "model.rotary_emb.inv_freq", torch.zeros(4))
    assert torch.equal(dict(model.named_buffers())["model.rotary_emb.inv_freq"], torch.zeros(4))


def test_random_and_zero_weights_leave_again_also_after_an_error(tmp_path):
    decoder = DecoderModel.from_config(tiny_models.save("llama", tmp_path))
    with decoder.stand_in(), decoder.random_layer(1) as layer:
        assert not any(one.is_meta for one in layer.parameters())
        assert layer.mlp.up_proj.weight.std() > 0
        assert all(one.is_meta for one in decoder.layers[0].parameters())
        embedding = decoder.model.get_input_embeddings().weight
        assert (embedding == 0).all() and embedding.untyped_storage().nbytes() == 4
    with pytest.raises(ZeroDivisionError), decoder.stand_in(), decoder.random_layer(0):
        raise ZeroDivisionError
    assert all(one.is_meta for one in decoder.model.parameters())


def test_the_commonest_dtype_is_told_by_bytes(tmp_path):
    assert commonest_float(Checkpoint.open(tiny_models.save("llama", tmp_path, dtype=torch.float16))) == torch.float16
