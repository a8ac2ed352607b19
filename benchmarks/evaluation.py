"""Token perplexity of a model in memory one decoder layer at a time, as the rows of benchmarks hold it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmprune.calibration import consecutive_windows, load_text
from nmprune.checkpoint import locate
from nmprune.evaluate.perplexity import summarise
from nmprune.evaluate.streamed import streamed_nlls
from nmprune.run.tokens import load_tokenizer
from nmprune.stream import DecoderModel


def evaluation_windows(arguments: argparse.Namespace, name: str) -> Tensor:
    """The first windows of a text's evaluation part."""
    tokenizer = load_tokenizer(locate(arguments.model))
    return consecutive_windows(load_text(name, "evaluation"), tokenizer, arguments.seq_len, arguments.max_windows)


def perplexities(folder: Path, texts: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Text -> perplexity and its standard error."""
    model = DecoderModel.open(folder, allow_sparse=True, device=device)
    found = {}
    for name, windows in texts.items():
        text = load_text(name, "evaluation")
        one = summarise(streamed_nlls(model, windows), text, windows.shape[1])
        found[name] = {"label": text.label, "value": one.value, "error": one.value_error, "n_windows": one.n_windows}
    return found
