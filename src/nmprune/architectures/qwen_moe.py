"""Qwen2-MoE and Qwen3-MoE: experts, in Qwen2 beside a shared expert; some layers may be plain."""

from nmprune.architectures.base import GATED_MLP, QKV_O, ROUTER, Experts, Family

QWEN_MOE = Family(
    model_types=("qwen2_moe", "qwen3_moe"),
    layers="model.layers",
    shared_inputs=(
        *QKV_O,
        *GATED_MLP,
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mlp.shared_expert.down_proj",),
    ),
    experts=Experts(module="mlp.experts"),
    dense={
        "mlp.gate": ROUTER,
        "mlp.shared_expert_gate": "gate of the shared expert: one output, decides how much of that expert is added",
    },
)
