"""Text sources and token windows. The registry: one source = one file = one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from nmprune.calibration import builtin, c4, files, hub, wikitext2
from nmprune.calibration.text import Purpose, Text
from nmprune.calibration.windows import consecutive_windows, from_token_ids, random_windows
from nmprune.errors import InputError, near_matches


@dataclass(frozen=True)
class Source:
    """One named text source.

    Attributes:
        spelling: how the user writes it.
        summary: one line for `nmprune list`.
        load: (what stands after the colon, purpose) -> text.
    """

    spelling: str
    summary: str
    load: Callable[[str, Purpose], Text]


SOURCES: dict[str, Source] = {
    "builtin": Source("builtin", "Python's own help texts; no download, about 90,000 tokens", builtin.load),
    "wikitext2": Source(
        "wikitext2[:SPLIT]", "WikiText-2 raw, from $NMPRUNE_DATA, the cache or the hub", wikitext2.load
    ),
    "c4": Source("c4[:PART]", "English web pages, from $NMPRUNE_DATA, the cache or the hub", c4.load),
    "hf": Source("hf:DATASET[:CONFIG][:SPLIT][#COLUMN]", "any text data set of the Hugging Face hub", hub.load),
}

FILES = Source(
    "FILE[#FIELD]", ".txt, .jsonl, .json, .parquet, or a folder of .txt files", lambda path, _: files.load(path)
)


def load_text(source: str, purpose: Purpose) -> Text:
    """The one door to text.

    Args:
        source: a name of `SOURCES` (with an argument after a colon), or the path of a file or folder.
        purpose: chooses the split where the source has splits; a user's file is taken whole.

    Raises:
        InputError: unknown source (near matches are named), or it cannot be had or read.
    """
    if purpose not in get_args(Purpose):
        raise ValueError(f"purpose is {purpose!r}; expected one of {get_args(Purpose)}")
    name, _, argument = source.partition(":")
    if name in SOURCES:
        return SOURCES[name].load(argument, purpose)
    if source and files.is_path(source):
        return files.load(source)
    raise InputError(
        f"there is no text source {source!r}. {near_matches(name, SOURCES)} Or the path of {FILES.summary}."
    )


__all__ = [
    "FILES",
    "SOURCES",
    "Purpose",
    "Source",
    "Text",
    "consecutive_windows",
    "from_token_ids",
    "load_text",
    "random_windows",
]
