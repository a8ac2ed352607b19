"""Source `wikitext2`: WikiText-2 raw (Merity et al. 2016), the text of most perplexity tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nmprune.calibration import files, hub
from nmprune.calibration.text import BLANK_LINE, Purpose, Text
from nmprune.errors import InputError, near_matches

_HUB_NAME, _HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
_FILES = {
    split: f"wikitext2/wiki.{short}.raw"
    for split, short in (("train", "train"), ("validation", "valid"), ("test", "test"))
}
_SPLIT_FOR: dict[Purpose, str] = {"calibration": "train", "choose": "validation", "evaluation": "test"}
_TITLE = re.compile(r" = [^=].*[^=] = \n?|^ = [^=] = \n?")


def load(argument: str, purpose: Purpose) -> Text:
    """One split: the one named in `argument`, else train to calibrate, test to evaluate, validation to choose.

    Looked for in `$NMPRUNE_DATA/wikitext2/`, the Hugging Face cache, the hub. To calibrate, validation is taken where
    `$NMPRUNE_DATA` holds that and no train file; `Text.split` says which it was.

    Raises:
        InputError: no such split, or found nowhere; the message says how to get it.
    """
    if argument and argument not in _FILES:
        raise InputError(f"text source wikitext2:{argument}: no split {argument!r}. {near_matches(argument, _FILES)}")
    split = argument or _SPLIT_FOR[purpose]
    for candidate in (split, "validation") if split == "train" and not argument else (split,):
        path = files.in_data_folder(_FILES[candidate])
        if path is not None:
            return Text("wikitext2", candidate, articles(rows_of_raw_file(path)))
    way_out = (
        f"How to get it: put {Path(_FILES[split]).name} of {_HUB_CONFIG} at ${files.DATA_VARIABLE}/{_FILES[split]}; "
        'or, where there is network, run\n  python -c "import datasets; '
        f"datasets.load_dataset('{_HUB_NAME}', '{_HUB_CONFIG}')\""
    )
    try:
        rows, _ = hub.fetch(_HUB_NAME, _HUB_CONFIG, (split,), way_out=way_out)
    except InputError as error:
        raise error.located(f"wikitext2 ({split}) was not found: {files.data_folder_says(_FILES[split])}") from error
    return Text("wikitext2", split, articles(rows["text"]))


def rows_of_raw_file(path: Path) -> list[str]:
    r"""The rows as the hub has them: lines with their "\n", where a blank line (" \n") becomes ""."""
    lines = files.read_utf8(path).replace("\r\n", "\n").split("\n")
    # a "\n" ends a line: what follows the last one is a line only where the file lacks its final "\n"
    rows = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    return [row if row.strip() else "" for row in rows]


def articles(rows: Iterable[str]) -> tuple[str, ...]:
    r"""Rows gathered into articles, each joined by "\n\n", so that joining the articles gives `"\n\n".join(rows)`.

    The corpus is the field's to the byte; articles instead of rows let calibration draw pieces that hang together.
    """
    gathered: list[list[str]] = [[]]
    for row in rows:
        if _TITLE.fullmatch(row) and any(gathered[-1]):
            gathered.append([])
        gathered[-1].append(row)
    return tuple(BLANK_LINE.join(article) for article in gathered)
