"""What finetuning found, as a table."""

from __future__ import annotations

import math

from nmprune.report.layout import Table, facts
from nmprune.report.quantities import duration, size
from nmprune.results import Results


def finetune_table(results: Results) -> Table:
    """Held-out losses before and after, what was trained on, how long.

    Args:
        results: of a finetuned run.
    """
    found = results.finetune
    assert found is not None
    before, after = found.held_out_before, found.held_out_after
    name = "KL from the dense model" if found.loss == "kl" else "language-model loss"
    return facts(
        f"{results.model}: {results.pattern} ({results.pattern_words}) by {results.method['name']}, finetuned",
        {
            "started from": found.parent,
            f"held-out {name}": f"{before['loss']:.4f} before, {after['loss']:.4f} after, in nats per token",
            "held-out token perplexity": f"{perplexity(before['nll'])} before, {perplexity(after['nll'])} after",
            "steps": f"{found.steps}; the weights after step {found.best_step} were written",
            "trained beside the masks": f"{len(found.tensors)} tensors" if found.tensors else "",
            "text": f"{found.text} ({found.split}): {found.n_tokens:,} tokens, {found.epochs:.2f} epochs",
            "time": f"{duration(found.seconds)}, forwards in {found.compute}",
            "peak memory": "" if results.peak_memory is None else f"{size(results.peak_memory)} above the start",
            "peak on the device": "" if results.device_peak_memory is None else size(results.device_peak_memory),
            "sessions": f"{results.sessions}: the run was resumed" if results.sessions > 1 else "",
        },
    )


def perplexity(nll: float) -> str:
    """exp of nats per token."""
    return f"{math.exp(min(nll, 700.0)):,.2f}"
