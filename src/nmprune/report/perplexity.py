"""Token perplexities, as a table that always says data set, split, sequence length and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmprune.report.layout import Table
from nmprune.report.quantities import duration


@dataclass(frozen=True)
class PerplexityRow:
    """One model's token perplexity.

    Attributes:
        what: "dense", "pruned" or "model".
        value: exp(mean nats per token).
        value_error: its standard error; None for one window.
        mean_nll: nats per token.
        standard_error: of `mean_nll`; None for one window.
        seconds: what measuring took; None where an earlier measurement is shown.
    """

    what: str
    value: float
    value_error: float | None
    mean_nll: float
    standard_error: float | None
    seconds: float | None


def perplexity_table(text: str, split: str, seq_len: int, n_windows: int, rows: Sequence[PerplexityRow]) -> Table:
    """Token perplexity of one or more models on one text; with two, also how many times the first one's it is.

    Args:
        text: data set.
        split: which part of it.
        seq_len: tokens per window.
        n_windows: windows, the same for every row.
        rows: the models; the first is what the others are compared with.
    """
    windows = f"{n_windows} window{'s' if n_windows != 1 else ''} of {seq_len} tokens"
    return Table(
        f"token perplexity on {text} ({split}), {windows}",
        ("", "perplexity>", "standard error>", "nats per token>", "times dense>", "time>"),
        tuple(
            (
                row.what,
                f"{row.value:.3f}",
                _with_sign(row.value_error, 3),
                f"{row.mean_nll:.4f} {_with_sign(row.standard_error, 4)}".strip(),
                f"{row.value / rows[0].value:.3f}" if row is not rows[0] else "",
                "before" if row.seconds is None else duration(row.seconds),
            )
            for row in rows
        ),
    )


def _with_sign(value: float | None, digits: int) -> str:
    return "" if value is None else f"± {value:.{digits}f}"
