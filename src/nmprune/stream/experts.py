"""Experts held as 3-D parameters: an implementation whose inputs can be observed.

transformers runs such experts through one grouped matrix product, which passes no `nn.Linear` and so no hook. Registering
an implementation with its experts interface is the supported way in; this one runs expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "nmprune"
ExpertObserver = Callable[[str, int, Tensor], None]
_OBSERVER = "_nmprune_observer"


def experts_forward(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts module computes, one expert at a time.

    Args:
        experts: holds gate_up_proj (or up_proj) and down_proj, 3-D, with the flags that transformers sets on it.
        hidden_TD: (tokens, hidden).
        top_k_index: (tokens, k) numbers of the experts that see each token.
        top_k_weights: (tokens, k) their routing weights.

    Returns:
        (tokens, hidden).
    """
    observe: ExpertObserver | None = getattr(experts, _OBSERVER, None)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    output_TD = torch.zeros_like(hidden_TD)
    for expert in range(experts.num_experts):
        token, slot = torch.where(top_k_index == expert)
        if token.numel() == 0:
            continue
        inputs = hidden_TD[token]
        if observe:
            observe(first, expert, inputs)
        inner = _product(experts, first, expert, inputs)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        if observe:
            observe("down_proj", expert, inner)
        result = _product(experts, "down_proj", expert, inner)
        if experts.has_post_expert_norm:
            result = experts.post_expert_norm(result)
        output_TD.index_add_(0, token, (result * top_k_weights[token, slot, None]).to(output_TD.dtype))
    return output_TD


def _product(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(inputs, weight.T if experts.is_transposed else weight, bias)


@contextmanager
def observable_experts(config: PretrainedConfig) -> Iterator[None]:
    """Let models of this config run their experts through `experts_forward` inside the body."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    before = config._experts_implementation
    config._experts_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._experts_implementation = before


@contextmanager
def observed(experts: nn.Module, observer: ExpertObserver) -> Iterator[None]:
    """Call `observer(parameter name, expert, inputs (tokens, in))` for each expert that runs inside the body."""
    setattr(experts, _OBSERVER, observer)
    try:
        yield
    finally:
        delattr(experts, _OBSERVER)
