"""GPT-2: its Conv1D holds a linear's weight transposed, (in, out)."""

from nmprune.architectures.base import Family

GPT2 = Family(
    model_types=("gpt2",),
    layers="transformer.h",
    shared_inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    transposed=True,
)
