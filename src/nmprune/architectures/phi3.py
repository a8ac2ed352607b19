"""Phi-3: q, k, v are one matrix, and so are gate and up."""

from nmprune.architectures.base import Family

PHI3 = Family(
    model_types=("phi3",),
    layers="model.layers",
    shared_inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
)
