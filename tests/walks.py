"""Shortcuts for tests of the layer walker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmprune.methods import PerLinear, Pruned, create
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, LayerDone, LayerStep, StreamOptions, prune_layers, select

PATTERN = Pattern(2, 4)


def walk(
    model: PreTrainedModel | DecoderModel,
    windows: Tensor | None,
    method: str | PerLinear = "wanda",
    *,
    exclude: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[LayerStep | LayerDone]:
    """Everything that the walker yields; hidden states are copied, as they are valid for one step only."""
    decoder = model if isinstance(model, DecoderModel) else DecoderModel.from_model(model)
    chosen = create(method) if isinstance(method, str) else method
    selections = select(decoder, PATTERN, exclude)
    found: list[LayerStep | LayerDone] = []
    for step in prune_layers(
        decoder, windows, chosen, PATTERN, selections, StreamOptions(**{"batch_size": 2, **(options or {})}), **kwargs
    ):
        if isinstance(step, LayerDone):
            for key in ("hidden", "dense_hidden"):
                kept = getattr(step, key)
                object.__setattr__(step, key, None if kept is None else kept.clone())
        found.append(step)
    return found


def layers_done(steps: list[LayerStep | LayerDone]) -> list[LayerDone]:
    """Only the finished layers."""
    return [step for step in steps if isinstance(step, LayerDone)]


def pruned(steps: list[LayerStep | LayerDone]) -> dict[str, Pruned]:
    """Linear name -> what the method made of it."""
    return {one.name: one.pruned for done in layers_done(steps) for one in done.linears}


def wrong_share(a: dict[str, Pruned], b: dict[str, Pruned]) -> float:
    """Share of groups in which two sets of masks differ."""
    assert a.keys() == b.keys()
    differ = [(a[n].mask.cpu() != b[n].mask.cpu()).unflatten(-1, (-1, PATTERN.group)).any(-1).flatten() for n in a]
    return torch.cat(differ).float().mean().item()


@contextmanager
def counted_forwards(layers: nn.ModuleList) -> Iterator[Callable[[], list[int]]]:
    """Inside the body: how often each decoder layer's own forward ran (the recorders of `calls` do not count)."""
    counts = [0] * len(layers)
    attention = [next(m for n, m in layer.named_children() if "attn" in n or "attention" in n) for layer in layers]

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(i)) for i, module in enumerate(attention)]
    try:
        yield lambda: list(counts)
    finally:
        for handle in handles:
            handle.remove()
