from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune.checkpoint import Checkpoint
from nmprune.checkpoint.permuted import PermutedCheckpoint
from nmprune.stream import DecoderModel
from nmprune.stream.permuted import channels_of, permute

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def base(tmp_path):
    return Checkpoint.open(tiny_models.save("llama", tmp_path / "model", dtype=torch.bfloat16, max_shard_size="40KB"))


@pytest.fixture
def view(base):
    model = DecoderModel.open(base.folder)
    permute(model, channels_of(model), {DOWN: torch.arange(64).flip(0)[None]})
    assert isinstance(model.checkpoint, PermutedCheckpoint)
    return model.checkpoint


def test_only_the_axes_of_the_space_are_reordered(base, view):
    moved = {name for name in base.names() if not torch.equal(base.read(name), view.read(name))}
    assert moved == {f"model.layers.0.mlp.{role}_proj.weight" for role in ("gate", "up", "down")}
    assert torch.equal(view.read(f"{DOWN}.weight"), base.read(f"{DOWN}.weight").flip(1))
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(view.read(up), base.read(up).flip(0))


def test_it_says_what_the_checkpoint_says(base, view):
    assert view.fingerprint() == base.fingerprint()
    for attribute in ("folder", "config", "shards", "has_index", "metadata", "tensors", "nbytes"):
        assert getattr(view, attribute) == getattr(base, attribute)
    assert view.read(f"{DOWN}.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 1 << 20])
def test_chunks_are_the_bytes_of_what_is_read(view, chunk_bytes):
    for name in (f"{DOWN}.weight", "model.norm.weight"):
        whole = b"".join(bytes(piece) for piece in view.chunks(name, chunk_bytes))
        assert whole == view.read(name).contiguous().view(torch.uint8).numpy().tobytes()
        assert all(len(piece) <= chunk_bytes for piece in view.chunks(name, chunk_bytes))


def test_experts_that_are_files_of_their_own(tmp_path):
    folder = tiny_models.save("mixtral", tmp_path / "model")
    model = DecoderModel.open(folder)
    before = model.checkpoint
    name = "model.layers.1.mlp.experts.down_proj"
    moved = torch.stack([torch.arange(64).roll(expert) for expert in range(4)])
    permute(model, channels_of(model), {name: moved})
    prefix = "model.layers.1.block_sparse_moe.experts"
    for expert in range(4):
        for part, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
            tensor = f"{prefix}.{expert}.{part}.weight"
            assert torch.equal(model.checkpoint.read(tensor), before.read(tensor).roll(expert, axis)), tensor
