"""GPT-NeoX (Pythia): q, k, v are one matrix, interleaved by head; attention and MLP may run side by side."""

from nmprune.architectures.base import Family

GPT_NEOX = Family(
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    shared_inputs=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    qkv_by_head=True,
)
