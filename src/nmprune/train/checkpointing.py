"""Activation checkpointing: a decoder layer keeps its input and is run again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(layers: Sequence[nn.Module], on: bool = True) -> Iterator[None]:
    """Inside the body the layers keep no activations where gradients are recorded.

    Unlike a model's own `gradient_checkpointing_enable` this needs no training mode, so that dropout stays off.

    Args:
        layers: decoder layers.
        on: False: nothing is done.
    """
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        if on:
            for layer in layers:
                layer.forward = partial(_run, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # no random state is kept: dropout is off, and masks draw from generators of their own
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)
