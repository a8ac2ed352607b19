"""Llama and the families that name their linears as it does; Gemma 3 with its vision tower, which stays dense."""

from nmprune.architectures.base import GATED_MLP, QKV_O, Family

LLAMA = Family(
    model_types=(
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo",
        "olmo2",
        "olmo3",
        "granite",
        "smollm3",
        "stablelm",
        "cohere",
        "cohere2",
    ),
    layers="model.layers",
    shared_inputs=QKV_O + GATED_MLP,
    # Command R+ has a row of scales per attention head: a matrix in shape, but multiplied value by value
    dense={"self_attn.q_norm": "norm, not a linear", "self_attn.k_norm": "norm, not a linear"},
)

GEMMA3 = Family(
    model_types=("gemma3",),
    layers="model.language_model.layers",
    shared_inputs=QKV_O + GATED_MLP,
)
