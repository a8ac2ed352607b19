"""What a model family's table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Experts:
    """Experts held as 3-D parameters, one matrix per expert.

    Attributes:
        module: path of the experts module inside the decoder layer.
        shared_inputs: parameters of that module in order of execution; each reads its own input.
        transposed: a matrix is stored (in, out).
        interleaved: gate and up alternate along the output features; else gate comes first, then up.
    """

    module: str
    shared_inputs: tuple[str, ...] = ("gate_up_proj", "down_proj")
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its decoder layers and their linears.

    Attributes:
        model_types: `config.model_type` values that it covers.
        layers: path of the decoder layer list inside the `...ForCausalLM` module.
        shared_inputs: roles that are fed by one tensor stand together; the tuples stand in order of execution. A role that
            a layer does not have (a dense layer among expert layers) is passed over. They come in pairs, attention first:
            what reads the residual stream, then what reads their product and writes to the stream (see `channels`).
        transposed: linears are stored (in, out), as GPT-2's Conv1D.
        experts: 3-D experts, where the family has them.
        qkv_by_head: a fused q, k, v holds a head's q, k and v together; else all of q comes first, then k, then v.
        dense: roles that are never pruned -> the reason that reports show. A role whose weight is a vector is passed over.
    """

    model_types: tuple[str, ...]
    layers: str
    shared_inputs: tuple[tuple[str, ...], ...]
    transposed: bool = False
    experts: Experts | None = None
    qkv_by_head: bool = False
    dense: Mapping[str, str] = field(default_factory=dict)


ROUTER = "router: decides which expert sees a token; tiny, and N:M would change the routing"
QKV_O = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
GATED_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
