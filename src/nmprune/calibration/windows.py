"""Text -> token windows, int64 (n, seq_len). No special tokens are added: a window is a piece of running text.

A text is one stream of tokens: its documents joined, then tokenised as one string. Windows never overlap, and there is
no search for "one document longer than seq_len": windows cross from one document to the next, as the field's do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmprune.calibration.text import Text
from nmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 5  # a first guess of how much text to tokenise; too low costs one more attempt
_TAIL = 64  # tokens next to a cut end that may differ from those of the whole text


def random_windows(text: Text, tokenizer: PreTrainedTokenizerBase, n_sequences: int, seq_len: int, seed: int) -> Tensor:
    """Calibration windows: documents in random order, joined; windows at random places, without overlap.

    Only as many documents are tokenised as are needed. The same text, tokenizer, numbers and seed: the same windows.

    Returns:
        int64 (n_sequences, seq_len).

    Raises:
        InputError: the text is too short, or a number makes no sense.
    """
    _check_sizes(n_sequences, seq_len, "n_sequences")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(text.documents), generator=generator).tolist()
    needed = n_sequences * seq_len
    stream = _first_tokens([text.documents[i] for i in order], text.joiner, tokenizer, needed)
    if len(stream) < needed:
        raise InputError(_too_short(text, len(stream), n_sequences, seq_len))
    # Distinct slots among (spare tokens + windows) are exactly the ways to place the windows without overlap.
    slots = torch.randperm(len(stream) - needed + n_sequences, generator=generator)[:n_sequences].sort().values
    starts = slots + torch.arange(n_sequences) * (seq_len - 1)
    starts = starts[torch.randperm(n_sequences, generator=generator)]
    return stream[starts[:, None] + torch.arange(seq_len)]


def consecutive_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, seq_len: int, max_windows: int | None = None
) -> Tensor:
    """Evaluation windows as the field cuts them: the joined text from its start, no overlap, the last piece dropped.

    Args:
        text: documents in the data set's order.
        tokenizer: the model's.
        seq_len: tokens per window.
        max_windows: only the first so many; None for all. A text that has fewer gives what it has.

    Returns:
        int64 (n, seq_len), n >= 1.

    Raises:
        InputError: the text does not fill one window, or a number makes no sense.
    """
    _check_sizes(1 if max_windows is None else max_windows, seq_len, "max_windows")
    needed = None if max_windows is None else max_windows * seq_len + _TAIL
    stream = _first_tokens(text.documents, text.joiner, tokenizer, needed)
    n_windows = len(stream) // seq_len
    if max_windows is not None:
        n_windows = min(n_windows, max_windows)
    if n_windows == 0:
        raise InputError(_too_short(text, len(stream), 1, seq_len))
    return stream[: n_windows * seq_len].view(n_windows, seq_len).clone()


def from_token_ids(ids: Tensor, vocabulary: int | None = None) -> Tensor:
    """Windows that the user made: checked, as int64 (n, seq_len) on the CPU.

    Args:
        ids: integers (n, seq_len).
        vocabulary: the model's number of tokens; None = only check that none is negative.

    Raises:
        InputError: wrong type or shape, or an id that is not in the vocabulary.
    """
    if not isinstance(ids, Tensor):
        raise InputError(
            f"token ids are a {type(ids).__name__}; expected a torch tensor of integers (n_sequences, seq_len)."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"token ids are {ids.dtype}; expected integers. Convert them with ids.long().")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        way_out = " For one sequence, write ids[None]." if ids.ndim == 1 else ""
        raise InputError(
            f"token ids have shape {tuple(ids.shape)}; expected (n_sequences, seq_len), "
            f"with a seq_len of at least 2.{way_out}"
        )
    ids = ids.detach().to("cpu", torch.int64).contiguous()
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
        bad = lowest if lowest < 0 else highest
        known = "0 or more" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise InputError(
            f"token id {bad} is not in the vocabulary ({known}). Tokenise with this model's own tokenizer."
        )
    return ids


def _first_tokens(
    documents: tuple[str, ...] | list[str], joiner: str, tokenizer: PreTrainedTokenizerBase, needed: int | None
) -> Tensor:
    """Tokens of the joined documents from the first on: at least `needed` where there are so many, else all of them."""
    target = sum(map(len, documents)) if needed is None else needed * _CHARACTERS_PER_TOKEN
    while True:
        n_documents, n_characters = 0, 0
        while n_documents < len(documents) and n_characters < target:
            n_characters += len(documents[n_documents])
            n_documents += 1
        ids = tokenizer(
            joiner.join(documents[:n_documents]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # else: "sequence is longer than the model's maximum", which is no fault of a stream
        )["input_ids"]
        if n_documents == len(documents) or (needed is not None and len(ids) >= needed):
            return torch.tensor(ids, dtype=torch.int64)
        target *= 2


def _check_sizes(count: int, seq_len: int, count_name: str) -> None:
    if count < 1:
        raise InputError(f"{count_name} is {count}; expected 1 or more.")
    if seq_len < 2:
        raise InputError(f"seq_len is {seq_len}; expected 2 or more: the first token of a window is not predicted.")


def _too_short(text: Text, found: int, n_sequences: int, seq_len: int) -> str:
    ways = []
    if found // seq_len >= 1:
        ways.append(f"at most {found // seq_len} sequences of {seq_len} tokens")
    if found // n_sequences >= 2:
        ways.append(f"a seq_len of at most {found // n_sequences}")
    ways.append("a longer text")
    return (
        f"text {text.label} has {found:,} tokens with this tokenizer; {n_sequences} x {seq_len} needs "
        f"{n_sequences * seq_len:,}. Ways out: {', or '.join(ways)}."
    )
