"""How a model calls its own decoder layers, taken from the model itself.

Rotary embeddings, causal and sliding-window masks, positions: each family builds them in its own forward and hands them to
the layers. Instead of rebuilding them, the layers are replaced for one call by recorders that keep what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerCalls:
    """What the model would give its decoder layers for one batch.

    Attributes:
        hidden: (batch, seq_len, hidden), the first layer's input.
        arguments: per layer, the positional arguments after the hidden states and the keyword arguments.
    """

    hidden: Tensor
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, index: int, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The output of decoder layer `index`, (batch, seq_len, hidden)."""
        args, kwargs = self.arguments[index]
        output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Recorded(Exception):
    """Ends the model's forward once the last decoder layer was called."""


@contextmanager
def _replaced(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    # a layer of a dispatched model carries a forward of its own (accelerate's hooks), which must come back
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def record_layer_calls(model: PreTrainedModel, layers: nn.ModuleList, token_ids: Tensor) -> LayerCalls:
    """Run the model's forward up to its last decoder layer, with every layer passing its input on unchanged."""
    first: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not first:
            first.append(hidden_states)
        arguments.append((args, kwargs))
        if len(arguments) == len(layers):
            raise _Recorded
        return hidden_states

    with torch.no_grad(), _replaced(list(layers), [record] * len(layers)):
        try:
            model(input_ids=token_ids, use_cache=False)
        except _Recorded:
            return LayerCalls(first[0], tuple(arguments))
    raise RuntimeError(f"{type(model).__name__} called {len(arguments)} of its {len(layers)} decoder layers")


def last_logits(model: PreTrainedModel, layers: nn.ModuleList, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """The model's logits where its decoder layers gave `hidden`: its own final norm, head and soft-capping.

    Gradients flow back to `hidden` where it asks for them.
    """

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def give(*args: Any, **kwargs: Any) -> Tensor:
        return hidden

    with torch.set_grad_enabled(hidden.requires_grad), _replaced(list(layers), [skip] * (len(layers) - 1) + [give]):
        return model(input_ids=token_ids, use_cache=False).logits
