"""Small HF folders for tests, written by the safetensors library and so independent of our own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_folder(
    folder: Path, shards: Mapping[str, Mapping[str, Tensor]], config: dict[str, Any] | None = None, index: bool = False
) -> Path:
    """An HF folder with config.json and the given shards; with an index where asked for."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for shard, tensors in shards.items():
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / shard, metadata={"format": "pt"})
    if index:
        write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """The index file with the given weight_map."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Two linears, a norm, a 0-d and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(10, 8, generator=generator),
        "layers.0.q.weight": torch.randn(6, 8, generator=generator).bfloat16(),
        "layers.0.up.weight": torch.randn(4, 12, generator=generator).half(),
        "layers.0.norm.weight": torch.ones(8),
        "layers.0.scale": torch.tensor(3.5),
        "layers.0.none": torch.empty(0, 4),
    }


def sharded(folder: Path, seed: int = 0) -> Path:
    """`tensors` in two shards with an index."""
    every = tensors(seed)
    first = {name: t for name, t in every.items() if "up" not in name}
    shards = {
        "model-00001-of-00002.safetensors": first,
        "model-00002-of-00002.safetensors": {"layers.0.up.weight": every["layers.0.up.weight"]},
    }
    return write_folder(folder, shards, index=True)
