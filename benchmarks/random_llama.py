"""A Llama checkpoint of any depth with random weights, written one decoder layer (one shard) at a time."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """The shape of the decoder layers; the default layer has 67 MB of linears in fp32 (16.8 million weights)."""

    hidden: int = 1024
    ffn: int = 4096
    heads: int = 16
    vocabulary: int = 512

    @property
    def layer_bytes(self) -> int:
        """fp32 bytes of a layer's linears."""
        return 4 * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name in the layer -> (out, in)."""
        square, up = (self.hidden, self.hidden), (self.ffn, self.hidden)
        attention = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
        return {**attention, "mlp.gate_proj.weight": up, "mlp.up_proj.weight": up, "mlp.down_proj.weight": up[::-1]}


def check_space(folder: Path, shape: Shape, n_layers: int) -> None:
    """End with a message where the disk cannot hold the model, its pruned copy and a run's progress files."""
    needed = int(3.2 * n_layers * shape.layer_bytes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(
            f"{folder} has {free / 1e9:.1f} GB free; {n_layers} layers need {needed / 1e9:.1f} GB (the model, its pruned copy, "
            "and the moved weights of unfinished runs). Name another place with --folder, or fewer layers."
        )


def write(folder: Path, shape: Shape, n_layers: int) -> Path:
    """Write the checkpoint; `folder` must not exist."""
    check_space(folder.parent, shape, n_layers)
    folder.mkdir()
    files: dict[str, str] = {}
    n_shards = n_layers + 1

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    embedding = torch.randn(shape.vocabulary, shape.hidden, generator=torch.Generator().manual_seed(0))
    save(1, {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(shape.hidden)})
    for index in range(n_layers):
        generator = torch.Generator().manual_seed(index + 1)
        prefix = f"model.layers.{index}."
        tensors = {
            prefix + name: torch.randn(*size, generator=generator).mul_(size[1] ** -0.5)
            for name, size in shape.linears().items()
        }
        tensors |= {
            prefix + name: torch.ones(shape.hidden)
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight")
        }
        save(index + 2, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(_config(shape, n_layers)))
    return folder


def describe(shape: Shape, n_layers: int) -> str:
    """In words, for tables."""
    sizes = asdict(shape)
    return f"random Llama, {n_layers} layers, hidden {sizes['hidden']}, ffn {sizes['ffn']}"


def _config(shape: Shape, n_layers: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": n_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
