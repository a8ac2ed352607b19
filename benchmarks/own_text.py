"""Text that a model writes itself, for models that know nothing else (../shared/data/stories260k); and how to load them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from measurement import ROOT, text_source, token_windows
from torch import Tensor
from transformers import AutoModelForCausalLM

from nmprune.architectures import Linear
from nmprune.calibration import consecutive_windows, load_text, random_windows
from nmprune.checkpoint import locate
from nmprune.pattern import Pattern
from nmprune.run.tokens import load_tokenizer
from nmprune.stream import DecoderModel, select
from nmprune.train.masked_linear import Target, targets_of

STORIES = "stories260k"
TEMPERATURE = 0.9
# Seeds apart: what is calibrated on, what chooses settings, what is evaluated.
SPLITS = {"calibration": 1_000, "choose": 2_000, "evaluation": 3_000}
_TOGETHER = 256  # sequences that are written at a time


def model_folder(name: str) -> Path:
    """The folder of a --model; stories260k lies in the shared data: $NMPRUNE_DATA, or beside the project."""
    if name != STORIES:
        return locate(name)
    folder = Path(os.environ.get("NMPRUNE_DATA", ROOT.parent / "shared" / "data")) / STORIES
    if not folder.is_dir():
        raise SystemExit(
            f"{folder}: not found. {STORIES} is no public model: set NMPRUNE_DATA, or say --model smollm2-135m."
        )
    return folder


def windows_of(folder: Path, source: str, split: str, n: int, seq_len: int, seed: int = 0) -> tuple[Tensor, str]:
    """Token ids, int64 (n, seq_len), and what they are.

    Args:
        folder: of the model.
        source: "own": sampled from the model; else a text source, "auto" the usual one.
        split: a key of `SPLITS`.
        n: windows.
        seq_len: tokens of each.
        seed: other windows of the same split; evaluation windows are always the first ones of the text.
    """
    if source == "own":
        return sample(folder, n, seq_len, SPLITS[split] + seed), f"the model's own text, temperature {TEMPERATURE}"
    if split == "calibration":
        return token_windows(folder, source, n, seq_len, seed)
    text = load_text(text_source(source), split)
    tokenizer = load_tokenizer(folder)
    if split == "evaluation":
        return consecutive_windows(text, tokenizer, seq_len, n), text.label
    return random_windows(text, tokenizer, n, seq_len, seed), text.label


@torch.no_grad()
def sample(folder: Path, n: int, seq_len: int, seed: int) -> Tensor:
    """Sequences of a model's own from its first token on, int64 (n, seq_len); the same seed, the same text."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n, _TOGETHER):
        ids = torch.full((min(_TOGETHER, n - start), 1), model.config.bos_token_id)
        written, past = [ids], None
        while len(written) < seq_len:
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            p = (out.logits[:, -1].float() / TEMPERATURE).softmax(-1)
            ids, past = torch.multinomial(p, 1, generator=generator), out.past_key_values
            written.append(ids)
        parts.append(torch.cat(written, 1))
    return torch.cat(parts)


def in_memory(folder: Path, pattern: Pattern) -> tuple[Any, list[Any], list[Target]]:
    """A model, its decoder layers, and the linears whose masks are learned (those that pruning takes, too)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = DecoderModel.from_model(model)
    chosen: list[list[tuple[Linear, Pattern]]] = [
        [(linear, pattern) for linear in one.prune] for one in select(decoder, pattern)
    ]
    layers = list(decoder.layers)
    return model, layers, targets_of(layers, chosen)
