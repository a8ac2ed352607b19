"""Token perplexity as the field computes it: exp of the mean, over windows, of each window's mean cross-entropy.

Within a window of seq_len tokens each token but the first is predicted from those before it (seq_len - 1 targets);
nothing is carried from one window to the next. Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from nmprune.calibration.text import Text
from nmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 24  # logits turned to fp32 at a time: 64 MiB, and as much again for their log-softmax


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with everything needed to compare it with another one.

    Attributes:
        text: the data set.
        split: which part of it.
        seq_len: tokens per window.
        n_windows: how many windows.
        n_tokens: tokens scored, n_windows * (seq_len - 1).
        mean_nll: nats per token, the mean over windows.
        standard_error: of `mean_nll`, from the spread over windows; None for one window.
        value: exp(mean_nll); infinite where that is more than a float holds.
        value_error: the error of `value` that follows, value * standard_error; None for one window.
        kind: per token of the model's tokenizer (not per word).
    """

    text: str
    split: str
    seq_len: int
    n_windows: int
    n_tokens: int
    mean_nll: float
    standard_error: float | None
    value: float
    value_error: float | None
    kind: Literal["token"] = "token"


def score_windows(
    logits_of: Callable[[Tensor], Tensor],
    windows: Tensor,
    batch_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The mean cross-entropy of each window, in nats per token.

    Args:
        logits_of: token ids (B, T) -> logits (B, T, V), any float dtype and device.
        windows: int64 (n, seq_len).
        batch_size: windows per call of `logits_of`.
        on_progress: called after each batch with (windows done, windows in all).

    Returns:
        fp64 (n,) on the CPU; the cross-entropies themselves are computed in fp32 and added up in fp64.

    Raises:
        InputError: no windows, windows too short to predict anything, or logits that give NaN or infinity.
    """
    n_windows = _check_windows(windows)
    nlls = torch.empty(n_windows, dtype=torch.float64)
    for start in range(0, n_windows, max(1, batch_size)):
        ids_BT = windows[start : start + max(1, batch_size)]
        logits_BTV = logits_of(ids_BT)
        if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != ids_BT.shape:
            raise ValueError(
                f"logits_of gave {tuple(logits_BTV.shape)} for ids {tuple(ids_BT.shape)}; expected (B, T, V)"
            )
        for i, (ids_T, logits_TV) in enumerate(zip(ids_BT, logits_BTV, strict=True), start=start):
            nlls[i] = _mean_cross_entropy(logits_TV[:-1], ids_T[1:].to(logits_TV.device))
            if not torch.isfinite(nlls[i]):
                raise InputError(
                    f"window {i + 1} of {n_windows}: the cross-entropy is {nlls[i].item()}. The logits overflow "
                    "or hold NaN: try --dtype float32; if it stays, the weights are damaged (nmprune verify)."
                )
        if on_progress is not None:
            on_progress(start + len(ids_BT), n_windows)
    return nlls


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """`score_windows` for a causal language model of transformers that is in memory; its train/eval mode is kept.

    Raises:
        InputError: as `score_windows`; or seq_len is more than the positions the model was made for, or an id is not in
            its vocabulary.
    """
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    _check_windows(windows)
    if n_positions is not None and windows.shape[1] > n_positions:
        raise InputError(f"seq_len {windows.shape[1]} is more than the model's {n_positions} positions. Choose fewer.")
    n_embeddings = model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= n_embeddings:
        raise InputError(
            f"token id {int(windows.max())} is not in the model's vocabulary of {n_embeddings}. Use its own tokenizer."
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return score_windows(
                lambda ids_BT: model(input_ids=ids_BT.to(device), use_cache=False).logits,
                windows,
                batch_size,
                on_progress,
            )
    finally:
        model.train(was_training)


def summarise(nlls: Tensor, text: Text, seq_len: int) -> Perplexity:
    """One number, its error, and what it was measured on.

    Args:
        nlls: fp64 (n,), from `score_windows`.
        text: where the windows came from.
        seq_len: tokens per window.

    Raises:
        InputError: there are no windows.
    """
    n_windows = nlls.numel()
    if n_windows == 0:
        raise InputError(f"text {text.label}: no window was scored, so there is no perplexity. Give a longer text.")
    mean = nlls.mean().item()
    error = nlls.std().item() / math.sqrt(n_windows) if n_windows > 1 else None
    value = math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf
    return Perplexity(
        text=text.name,
        split=text.split,
        seq_len=seq_len,
        n_windows=n_windows,
        n_tokens=n_windows * (seq_len - 1),
        mean_nll=mean,
        standard_error=error,
        value=value,
        value_error=None if error is None else value * error,
    )


def _mean_cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> float:
    """In pieces of tokens, so that the fp32 copy of 16-bit logits stays small however long the window."""
    rows = max(1, _CHUNK // logits_TV.shape[-1])
    total = 0.0
    for logits, targets in zip(logits_TV.split(rows), targets_T.split(rows), strict=True):
        nll_T = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        total += nll_T.sum(dtype=torch.float64).item()
    return total / len(targets_T)


def _check_windows(windows: Tensor) -> int:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(
            f"windows have shape {tuple(windows.shape)}; expected (n, seq_len) with n >= 1 and seq_len >= 2."
        )
    return windows.shape[0]
