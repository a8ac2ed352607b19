"""Mixtral: every layer has experts; on disk each expert's w1, w2, w3 is a 2-D tensor of its own."""

from nmprune.architectures.base import QKV_O, ROUTER, Experts, Family

MIXTRAL = Family(
    model_types=("mixtral",),
    layers="model.layers",
    shared_inputs=QKV_O,
    experts=Experts(module="mlp.experts"),
    dense={"mlp.gate": ROUTER},
)
