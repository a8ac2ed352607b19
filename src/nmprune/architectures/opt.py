"""OPT."""

from nmprune.architectures.base import Family

OPT = Family(
    model_types=("opt",),
    layers="model.decoder.layers",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
)
