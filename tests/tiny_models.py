"""Two-layer models of every family, made from a config with random weights; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 96

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_MOE: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mistral_sliding": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3": ("gemma3", {}),
    "ministral": ("ministral", {"head_dim": 8, "sliding_window": 8}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {"use_parallel_residual": True}),
    "cohere": ("cohere", {}),
    "cohere_command_r_plus": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"head_dim": 8, "sliding_window": 8}),
    "phi3": ("phi3", {}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt_projected": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 8}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}),
}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of the family, weights large enough that layers differ."""
    model_type, extra = CONFIGS[name]
    shape = dict(_SHAPE)
    if model_type == "gpt2":
        shape = {k: v for k, v in shape.items() if k not in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    if model_type == "gemma3":
        text = {**shape, **CONFIGS["gemma3_text"][1], **changes}
        config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=_VISION)
    else:
        config = CONFIG_MAPPING[model_type](**{**shape, **extra, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(name: str, folder: Path, *, max_shard_size: str = "5GB", **kwargs: Any) -> Path:
    """The same model as an HF folder."""
    build(name, **kwargs).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def windows(n_sequences: int = 6, seq_len: int = 16, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 (n_sequences, seq_len)."""
    return torch.randint(3, VOCABULARY, (n_sequences, seq_len), generator=torch.Generator().manual_seed(seed))


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer for these models beside a saved one: one token per printable character, from id 3 on."""
    characters = [chr(code) for code in range(32, 32 + VOCABULARY - 4)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder
