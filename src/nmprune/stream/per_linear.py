"""Run a `PerLinear` method on the linears of one decoder layer and put the result into the layer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.errors import InputError
from nmprune.methods import PerLinear, Pruned
from nmprune.methods.magnitude import Magnitude
from nmprune.pattern import Pattern
from nmprune.stats import InputStats
from nmprune.stream.layer_done import LinearDone
from nmprune.stream.model import DecoderModel


def prune_linear(
    model: DecoderModel,
    linear: Linear,
    weight: Tensor,
    stats: InputStats,
    method: PerLinear,
    pattern: Pattern,
    min_expert_tokens: int,
) -> LinearDone:
    """Prune one linear, given its dense weight fp32 (out, in); the layer's weights are not touched yet.

    An expert that saw too few tokens is pruned by magnitude, with its weights frozen, and its notes say so.

    Raises:
        InputError: the method cannot use the weight or the statistics; the message names the linear.
    """
    start = time.perf_counter()
    try:
        if method.needs and linear.in_module.expert is not None and stats.n_tokens < min_expert_tokens:
            mask = Magnitude().prune(weight, InputStats(0), pattern).mask
            pruned = Pruned(mask, None, {"fallback": "magnitude", "fallback_tokens": stats.n_tokens})
        else:
            pruned = method.prune(weight, stats, pattern)
    except InputError as error:
        raise error.located(linear.name) from error
    _check(linear, pruned, pattern)
    return LinearDone(
        name=linear.name,
        role=linear.role,
        tensor=linear.tensor,
        pruned=_as_stored(model, linear, pruned),
        n_tokens=stats.n_tokens,
        seconds=time.perf_counter() - start,
    )


def _check(linear: Linear, pruned: Pruned, pattern: Pattern) -> None:
    """A method that breaks its promise is our bug, found here and not in the exported file."""
    if tuple(pruned.mask.shape) != linear.shape or masks.n_wrong_groups(pruned.mask, pattern):
        raise RuntimeError(f"{linear.name}: the method returned a mask that is not {pattern.words} of {linear.shape}")


def _as_stored(model: DecoderModel, linear: Linear, pruned: Pruned) -> Pruned:
    """Moved weights rounded to the dtype that the checkpoint stores, so that what runs on is what is written."""
    if pruned.weight is None:
        return pruned
    stored = pruned.weight.to(model.stored_dtype(linear))
    if not torch.isfinite(stored).all():
        raise InputError(
            f"{linear.name}: moved weights up to {pruned.weight.abs().max():.3g} do not fit the checkpoint's {stored.dtype}. "
            "Use more damping, or convert the checkpoint to bfloat16 or float32 first."
        )
    return Pruned(pruned.mask, stored, pruned.notes)


def output_error(weight: Tensor, done: LinearDone, stats: InputStats) -> float | None:
    """||X (W' - W)^T||_F^2 / ||X W^T||_F^2 on the calibration tokens; None without a Gram matrix or without output.

    Args:
        weight: fp32 (out, in), dense.
        done: the pruned linear.
        stats: the statistics of its input.
    """
    if stats.input_gram is None:
        return None
    new = torch.where(done.pruned.mask, weight, 0.0) if done.pruned.weight is None else done.pruned.weight.float()
    error = new - weight
    total = torch.sum((weight @ stats.input_gram) * weight).item()
    return torch.sum((error @ stats.input_gram) * error).item() / total if total > 0 else None


@torch.no_grad()
def apply(layer: nn.Module, linears: Iterable[Linear], pruned: Mapping[str, Pruned]) -> None:
    """Put masks and moved weights, by `Linear.name`, into the layer's parameters; pruned entries become +0.0."""
    for linear in linears:
        place = linear.in_module.of(layer.get_parameter(linear.parameter))
        result = pruned[linear.name]
        if result.weight is not None:
            place.copy_(result.weight)
        place.masked_fill_(~result.mask.to(place.device), 0.0)
