"""Llama and the families that name their linears as it does."""

from nmprune.architectures.base import GATED_MLP, QKV_O, Family

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    layers="model.layers",
    shared_inputs=QKV_O + GATED_MLP,
)
