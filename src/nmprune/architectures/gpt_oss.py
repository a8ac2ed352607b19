"""gpt-oss: experts are stored (expert, in, out), gate and up interleaved along out."""

from nmprune.architectures.base import QKV_O, ROUTER, Experts, Family

GPT_OSS = Family(
    model_types=("gpt_oss",),
    layers="model.layers",
    shared_inputs=QKV_O,
    experts=Experts(module="mlp.experts", transposed=True, interleaved=True),
    dense={"mlp.router": ROUTER},
)
