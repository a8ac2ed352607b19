"""Logits of a checkpoint with one decoder layer in memory at a time, so that what can be pruned can be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nmprune.evaluate.perplexity import score_windows
from nmprune.stream import DecoderModel, default_batch_size
from nmprune.stream.hidden_states import HiddenStates


def streamed_nlls(
    model: DecoderModel,
    windows: Tensor,
    *,
    batch_size: int = 0,
    hidden_budget: int = 8 << 30,
    scratch: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The mean cross-entropy of each window in nats per token, fp64 (n,).

    Args:
        model: opened from a folder; dense or pruned.
        windows: int64 (n, seq_len).
        batch_size: windows per forward; 0 = about 2048 tokens.
        hidden_budget: bytes of hidden states kept in RAM; past it they live in a file in `scratch`.
        scratch: folder for that file; None = the system's temporary folder.
        on_progress: called with (batches done, batches in all) over all decoder layers and the head.

    Raises:
        InputError: no windows, too short windows, or logits that give NaN or infinity.
    """
    size = batch_size or default_batch_size(windows.shape[1])
    n_batches = -(-windows.shape[0] // size)
    done, total = 0, n_batches * (model.n_layers + 1)

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    with torch.no_grad():
        hidden, calls = model.embed(windows, size, hidden_budget, scratch)
        try:
            for index in range(model.n_layers):
                with model.layer(index) as layer:
                    for batch in hidden.batches(size):
                        output = calls[batch.stop - batch.start].run(index, layer, hidden.get(batch))
                        hidden.put(batch, output)
                        step()
            return _score(model, hidden, windows, size, step)
        finally:
            hidden.close()


def _score(
    model: DecoderModel, hidden: HiddenStates, windows: Tensor, batch_size: int, step: Callable[[], None]
) -> Tensor:
    batches = iter(hidden.batches(batch_size))
    with model.head():
        return score_windows(
            lambda ids: model.logits(hidden.get(next(batches)), ids), windows, batch_size, lambda done, total: step()
        )
