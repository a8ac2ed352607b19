"""Run a `PerLinear` method on the linears of one decoder layer and put the result into the layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

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
    stats: Sequence[InputStats],
    method: PerLinear,
    pattern: Pattern,
    min_expert_tokens: int,
) -> LinearDone:
    """Prune one linear, given its dense weight fp32 (out, in); the layer's weights are not touched yet.

    With several statistics, each block of output rows (as `torch.tensor_split` cuts them) is pruned by its own. An expert
    that saw too few tokens is pruned by magnitude, with its weights frozen, and its notes say so.

    Raises:
        InputError: the method cannot use the weight or the statistics; the message names the linear.
    """
    start = time.perf_counter()
    try:
        n_tokens = stats[0].n_tokens
        if method.needs and linear.in_module.expert is not None and n_tokens < min_expert_tokens:
            pruned = by_magnitude(weight, pattern, n_tokens)
        else:
            blocks = zip(weight.tensor_split(len(stats)), stats, strict=True)
            pruned = _together(weight, [method.prune(rows, of_rows, pattern) for rows, of_rows in blocks])
    except InputError as error:
        raise error.located(linear.name) from error
    return finished(model, linear, pruned, pattern, n_tokens, time.perf_counter() - start)


def by_magnitude(weight: Tensor, pattern: Pattern, n_tokens: int) -> Pruned:
    """An expert that saw too few tokens: its weights stay, and the notes say so."""
    mask = Magnitude().prune(weight, InputStats(0), pattern).mask
    return Pruned(mask, None, {"fallback": "magnitude", "fallback_tokens": n_tokens})


def finished(
    model: DecoderModel, linear: Linear, pruned: Pruned, pattern: Pattern, n_tokens: int, seconds: float
) -> LinearDone:
    """What a method made of a linear, checked, its moved weights as the checkpoint stores them.

    Raises:
        InputError: moved weights do not fit the checkpoint's dtype.
    """
    _check(linear, pruned, pattern)
    stored = _as_stored(model, linear, pruned)
    return LinearDone(linear.name, linear.role, linear.tensor, stored, n_tokens, seconds, pattern=pattern)


def _together(weight: Tensor, blocks: Sequence[Pruned]) -> Pruned:
    """Blocks of output rows as one linear; of their notes numbers are averaged, and of words the first block's stand.

    A block whose weights stay has the dense `weight`'s where another's move.
    """
    if len(blocks) == 1:
        return blocks[0]
    weights = None
    if any(one.weight is not None for one in blocks):
        rows = zip(weight.tensor_split(len(blocks)), blocks, strict=True)
        weights = torch.cat([dense if one.weight is None else one.weight for dense, one in rows])
    notes: dict[str, float | int | str] = {"row_blocks": len(blocks)}
    for key, value in blocks[0].notes.items():
        values = [found for one in blocks if not isinstance(found := one.notes.get(key, value), str)]
        notes[key] = value if isinstance(value, str) else sum(values) / len(values)
    return Pruned(torch.cat([one.mask for one in blocks]), weights, notes)


def statistics_keys(linear: Linear, token_weights: Mapping[str, Tensor]) -> list[str]:
    """Under which names the statistics of a linear's blocks of rows are collected: of its shared input, where its tokens
    have equal weights."""
    if linear.name not in token_weights:
        return [linear.shared_input]
    return [f"{linear.name}:{block}" for block in range(token_weights[linear.name].shape[-1])]


def weightings(linears: Iterable[Linear], token_weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Shared input -> key of `statistics_keys` -> (n_sequences, seq_len), what each token counts."""
    found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for linear in linears:
        if linear.name in token_weights:
            blocks = token_weights[linear.name].unbind(-1)
            found[linear.shared_input] |= dict(zip(statistics_keys(linear, token_weights), blocks, strict=True))
    return dict(found)


def with_gradients(stats: Sequence[InputStats], gradients: InputStats, device: torch.device) -> list[InputStats]:
    """The statistics of a linear's blocks of rows and its gradients together, on the device.

    What was derived from the statistics stays shared with the linears that read the same input.

    Args:
        stats: of its input; with no tokens where the method reads gradients only: the tokens are then those of the
            gradients.
        gradients: `weight_grad_abs`, `weight_grad_sq` as far as they were collected.
        device: where the method runs.
    """
    found = []
    for block, of_rows in enumerate(stats):
        absolute, square = (
            None if one is None else one.tensor_split(len(stats))[block].to(device)
            for one in (gradients.weight_grad_abs, gradients.weight_grad_sq)
        )
        together = replace(
            of_rows,
            n_tokens=of_rows.n_tokens or gradients.n_tokens,
            weight_grad_abs=absolute,
            weight_grad_sq=square,
            n_grad_sequences=gradients.n_grad_sequences,
        )
        object.__setattr__(together, "_derived", of_rows._derived)  # `replace` starts an empty one
        found.append(together)
    return found


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


def measured(weight: Tensor, done: LinearDone, stats: Sequence[InputStats]) -> LinearDone:
    """`done` with its output errors, on all calibration tokens and on those held out, where Gram matrices were collected.

    Args:
        weight: fp32 (out, in), dense.
        done: the pruned linear.
        stats: of its input, one per block of output rows; tokens count as they do there.
    """
    new = torch.where(done.pruned.mask, weight, 0.0) if done.pruned.weight is None else done.pruned.weight.float()
    error = new - weight
    grams, held_out = [one.input_gram for one in stats], [one.held_out_gram for one in stats]
    return replace(
        done, output_error=relative_error(error, weight, grams), held_out_error=relative_error(error, weight, held_out)
    )


def relative_error(error: Tensor, weight: Tensor, grams: Sequence[Tensor | None]) -> float | None:
    """||X E^T||_F^2 / ||X W^T||_F^2; None without a Gram matrix, or where there is no output.

    Args:
        error: E, fp32 (out, in).
        weight: W, fp32 (out, in), dense.
        grams: X^T X, one for each block of output rows.
    """
    lost, total = 0.0, 0.0
    for gram, error_rows, rows in zip(
        grams, error.tensor_split(len(grams)), weight.tensor_split(len(grams)), strict=True
    ):
        if gram is None:
            return None
        lost += torch.sum((error_rows @ gram) * error_rows).item()
        total += torch.sum((rows @ gram) * rows).item()
    return lost / total if total > 0 else None


@torch.no_grad()
def apply(layer: nn.Module, linears: Iterable[Linear], pruned: Mapping[str, Pruned]) -> None:
    """Put masks and moved weights, by `Linear.name`, into the layer's parameters; pruned entries become +0.0."""
    for linear in linears:
        place = linear.in_module.of(layer.get_parameter(linear.parameter))
        result = pruned[linear.name]
        if result.weight is not None:
            place.copy_(result.weight)
        place.masked_fill_(~result.mask.to(place.device), 0.0)
