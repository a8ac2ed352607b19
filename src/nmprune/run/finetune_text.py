"""The token windows that a finetuning trains on and is judged by: all of a calibration text, none of it an evaluation split."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nmprune.calibration import consecutive_windows, load_text
from nmprune.errors import InputError
from nmprune.run.folder import RunFolder, read_tokens
from nmprune.run.progress import Progress, Report
from nmprune.run.recipe import Recipe
from nmprune.run.tokens import check_seq_len, check_windows, given_from_python, load_tokenizer

_TOKENS = ".safetensors"


@dataclass(frozen=True)
class FinetuneText:
    """Tokens, and where they came from.

    Attributes:
        name: data set, or file.
        split: which part of it.
        windows: int64 (n, seq_len), to train on.
        held_out: int64 (n_held_out, seq_len), other windows of the same text.
    """

    name: str
    split: str
    windows: Tensor
    held_out: Tensor


def text_of(recipe: Recipe) -> str:
    """The text source of a finetuning: what it says, or what its parent was calibrated on."""
    assert recipe.finetune is not None
    wanted = recipe.finetune.text or recipe.calibration.source
    if not given_from_python(wanted):
        return wanted
    return str(Path(recipe.finetune.parent) / "calibration.safetensors")


def finetune_text(recipe: Recipe, parent: RunFolder, config: PretrainedConfig, report: Report) -> FinetuneText:
    """Cut the text into windows: documents in an order of the seed, joined, cut without overlap, the first ones held out.

    Raises:
        InputError: the text cannot be had, is too short or does not fit the model.
    """
    settings = recipe.finetune
    assert settings is not None
    source = text_of(recipe)
    if source.endswith(_TOKENS):
        windows, origin = read_tokens(Path(source))
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))
        name, split, windows = origin["source"], origin["split"], windows[order]
    else:
        check_seq_len(settings.seq_len, config)
        text = load_text(source, "calibration")
        order = torch.randperm(len(text.documents), generator=torch.Generator().manual_seed(settings.seed))
        shuffled = dataclasses.replace(text, documents=tuple(text.documents[i] for i in order.tolist()))
        tokenizer = load_tokenizer(parent.model, recipe.trust_remote_code)
        most = max(settings.max_tokens // settings.seq_len, 1)
        windows = consecutive_windows(shuffled, tokenizer, settings.seq_len, most)
        name, split = text.name, text.split
    windows = check_windows(windows, config)
    held_out, windows = windows[: settings.n_held_out], windows[settings.n_held_out :]
    if not len(windows):
        raise InputError(
            f"text {name} ({split}) gives {len(held_out)} windows of {held_out.shape[1]} tokens, of which {settings.n_held_out} "
            "are held out: nothing is left to train on. Give a longer text (--text), a smaller seq_len or fewer n_held_out."
        )
    told = f"training on {name} ({split}): {windows.numel():,} tokens in {len(windows):,} windows"
    report(Progress("calibrate", text=f"{told}, {held_out.numel():,} tokens held out"))
    return FinetuneText(name, split, windows, held_out)
