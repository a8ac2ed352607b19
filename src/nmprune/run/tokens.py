"""The token ids that a run calibrates on: from a text, from a file of token ids, or given by the caller."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from nmprune.calibration import from_token_ids, load_text, random_windows
from nmprune.errors import InputError
from nmprune.run.folder import read_tokens
from nmprune.run.recipe import Recipe

_GIVEN = "token-ids"


def calibration_windows(
    recipe: Recipe,
    tokenizer: Path | PreTrainedTokenizerBase | None,
    config: PretrainedConfig,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The token ids that a recipe asks for, int64 (n_sequences, seq_len), and where they came from.

    Args:
        recipe: names the text, or a .safetensors file of token ids.
        tokenizer: the model's, or its folder, from which it is loaded when a text needs it; None only without a text.
        config: the model's.
        token_ids: given by the caller in place of a text.

    Raises:
        InputError: the text or the file cannot be had, is too short, or does not fit the model.
    """
    wanted = recipe.calibration
    if token_ids is not None:
        windows, origin = token_ids, {"source": wanted.source, "split": "given as token ids"}
    elif given_from_python(wanted.source):
        raise InputError(
            f"calibration.source {wanted.source} stands for token ids that were given from Python. Give the run's own "
            "calibration.safetensors as calibration source, or pass the token ids again."
        )
    elif wanted.source.endswith(".safetensors"):
        windows, origin = read_tokens(Path(wanted.source))
        _check_size(wanted.source, windows, wanted.n_sequences, wanted.seq_len)
    else:
        check_seq_len(wanted.seq_len, config)
        text = load_text(wanted.source, "calibration")
        if isinstance(tokenizer, Path):
            tokenizer = load_tokenizer(tokenizer, recipe.trust_remote_code)
        assert tokenizer is not None
        windows = random_windows(text, tokenizer, wanted.n_sequences, wanted.seq_len, recipe.seed)
        origin = {"source": text.name, "split": text.split}
    windows = check_windows(windows, config)
    return windows, {
        **origin,
        "n_sequences": windows.shape[0],
        "seq_len": windows.shape[1],
        "seed": recipe.seed,
        "n_tokens": windows.numel(),
    }


def check_windows(windows: Tensor, config: PretrainedConfig) -> Tensor:
    """Token ids as int64 (n_sequences, seq_len) on the CPU, checked against the model.

    Raises:
        InputError: not such a tensor, an id outside the vocabulary, or more tokens than the model has positions.
    """
    windows = from_token_ids(windows, config.get_text_config().vocab_size)
    check_seq_len(windows.shape[1], config)
    return windows


def check_seq_len(seq_len: int, config: PretrainedConfig) -> None:
    """Raise InputError where a sequence is longer than the model has positions."""
    n_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if n_positions is not None and seq_len > n_positions:
        raise InputError(
            f"seq_len {seq_len} is more than the model's {n_positions} positions. Choose --seq-len {n_positions} or less."
        )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: the folder has none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder} has no tokenizer that transformers can load ({reason}). Put the model's tokenizer files beside its "
            "config.json, or pass token ids from Python."
        ) from error


def token_source(token_ids: Tensor) -> str:
    """What a recipe calls token ids that were passed in: their checksum stands for them."""
    digest = hashlib.sha256(token_ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
    return f"{_GIVEN}:{digest[:16]}"


def given_from_python(source: str) -> bool:
    """Whether a recipe's calibration source stands for token ids, which nobody can read from it."""
    return source.startswith(f"{_GIVEN}:")


def _check_size(file: str, windows: Tensor, n_sequences: int, seq_len: int) -> None:
    """The recipe must say what ran."""
    if tuple(windows.shape) != (n_sequences, seq_len):
        there = f"--n-sequences {windows.shape[0]} --seq-len {windows.shape[1]}"
        raise InputError(
            f"{file} holds {windows.shape[0]} sequences of {windows.shape[1]} tokens; the recipe says {n_sequences} of "
            f"{seq_len}. Say {there}."
        )
