"""Source `c4`: English web pages (Raffel et al. 2020), the usual calibration text; split by document number."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from pathlib import Path

from nmprune.calibration import files, hub
from nmprune.calibration.text import Purpose, Text
from nmprune.errors import InputError, near_matches

_FILE = "calibration/c4_sample.jsonl"
_HUB_NAME, _SHARD = "allenai/c4", "en/c4-train.00000-of-01024.json.gz"

# first and last document, inclusive; the end only bounds the work where the source is the hub's file of 356,317
_DOCUMENTS: dict[Purpose, tuple[int, int]] = {
    "calibration": (0, 999),
    "choose": (1000, 1199),
    "evaluation": (1200, 2199),
}


def load(argument: str, purpose: Purpose) -> Text:
    """Documents 0-999 to calibrate, 1000-1199 to choose settings by, 1200 and on (at most 1000) to evaluate.

    Looked for at `$NMPRUNE_DATA/calibration/c4_sample.jsonl`, then in the Hugging Face cache, then on the hub (the
    first file of the train split, 0.3 GB). The name says which of the two it was, since their documents differ.

    Raises:
        InputError: no such part, found nowhere (the message says how to get it), or too few documents.
    """
    if argument and argument not in _DOCUMENTS:
        raise InputError(f"text source c4:{argument}: no part {argument!r}. {near_matches(argument, _DOCUMENTS)}")
    part: Purpose = argument or purpose
    first, last = _DOCUMENTS[part]
    path = files.in_data_folder(_FILE)
    if path is not None:
        name, documents = "c4 sample", files.read_jsonl(path)[first : last + 1]
    else:
        name, documents = "c4", _first_documents(_shard(), last + 1)[first:]
    if not documents:
        raise InputError(
            f"{name}, {part}: the text ends before document {first}, where this part begins. Use a larger sample."
        )
    return Text(name, f"documents {first}-{first + len(documents) - 1}", tuple(documents))


def _shard() -> Path:
    way_out = (
        f'How to get it: put documents as {{"text": "..."}}, one a line, at ${files.DATA_VARIABLE}/{_FILE}; or, where '
        f"there is network, run\n  hf download --repo-type dataset {_HUB_NAME} {_SHARD}"
    )
    try:
        return hub.fetch_file(_HUB_NAME, _SHARD, way_out=way_out)
    except InputError as error:
        raise error.located(f"c4 was not found: {files.data_folder_says(_FILE)}") from error


def _first_documents(shard: Path, count: int) -> list[str]:
    """Only as much of the file as is needed is unpacked."""
    try:
        with gzip.open(shard, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in itertools.islice(lines, count)]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise InputError(
            f"{shard}: damaged ({type(error).__name__}: {error}). Delete it, so that it is loaded anew."
        ) from error
