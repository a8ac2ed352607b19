"""A user's own text: .txt, .jsonl, .json, .parquet, or a folder of .txt files. And where `$NMPRUNE_DATA` points."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nmprune.calibration.columns import text_column
from nmprune.calibration.text import Text
from nmprune.errors import InputError

DATA_VARIABLE = "NMPRUNE_DATA"


def in_data_folder(relative: str) -> Path | None:
    """`$NMPRUNE_DATA/<relative>`; None where the variable is not set or the file is not there.

    Raises:
        InputError: the variable is set, but not to a folder.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise InputError(
            f"${DATA_VARIABLE} is {folder!r}, which is not a folder. Set it to the folder that holds the texts."
        )
    path = Path(folder, relative)
    return path if path.is_file() else None


def data_folder_says(relative: str) -> str:
    """Where `in_data_folder` looked, for the message that it found nothing."""
    folder = os.environ.get(DATA_VARIABLE)
    return f"{Path(folder, relative)} is absent" if folder else f"${DATA_VARIABLE} is not set"


def load(source: str) -> Text:
    """Everything in a file or folder, split "all". `FILE#COLUMN` names the field of .jsonl, .json and .parquet.

    .txt: one document. .jsonl: one JSON object a line. .json: a list of objects, or as .jsonl. .parquet: one document a
    row. A folder: its .txt files by name, one document each. Blank documents are left out.

    Raises:
        InputError: absent, empty, another suffix, bytes that are not UTF-8, or a line that is not what it should be.
    """
    path, column = _path_and_column(source)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        documents = _read_folder(path)
    else:
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise InputError(
                f"{path}: cannot read text from a file named *{path.suffix or ' (no suffix)'}. "
                f"Expected {', '.join(_READERS)}, or a folder of .txt files."
            )
        documents = reader(path, column)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{path}: holds no text. Give a file with some text in it.")
    return Text(path.name or str(path.resolve()), "all", tuple(documents))


def is_path(source: str) -> bool:
    """Whether a source can only be meant as a file or folder: it exists, has a separator, or a suffix we read."""
    path, _ = _path_and_column(source)
    return path.exists() or len(path.parts) > 1 or path.suffix.lower() in _READERS


def _path_and_column(source: str) -> tuple[Path, str | None]:
    path = Path(source).expanduser()
    if "#" not in source or path.exists():
        return path, None
    name, _, column = source.rpartition("#")
    return Path(name).expanduser(), column


def read_utf8(path: Path) -> str:
    """The text of a file, line ends as they are.

    Raises:
        InputError: it cannot be read, or is not UTF-8 (the message says in which line).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from error


def _read_txt(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise InputError(f"{path}: a .txt file has no field {column!r}. Leave out #{column}.")
    return [read_utf8(path)]


def _read_folder(path: Path) -> list[str]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
    if not files:
        raise InputError(f"{path}: the folder holds no .txt file. Give such a folder, or one file.")
    return [read_utf8(file) for file in files]


def read_jsonl(path: Path, field: str | None = None) -> list[str]:
    """The field (`text` where none is named) of every non-blank line.

    Raises:
        InputError: unreadable, or a line without that field as a string; the message says which line.
    """
    lines = enumerate(read_utf8(path).split("\n"), start=1)
    return [_document(f"{path}, line {n}", _parsed(path, n, line), field) for n, line in lines if line.strip()]


def _read_json(path: Path, field: str | None) -> list[str]:
    text = read_utf8(path)
    if not text.lstrip().startswith("["):
        return read_jsonl(path, field)
    entries = _parsed(path, 1, text)
    return [_document(f"{path}, entry {n}", entry, field) for n, entry in enumerate(entries, start=1)]


def _parsed(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0
        reason = getattr(error, "msg", None) or str(error)
        raise InputError(f'{path}, line {line}: not JSON ({reason}). Expected one {{"text": "..."}} a line.') from error


def _document(place: str, entry: Any, field: str | None) -> str:
    wanted = field or "text"
    if not isinstance(entry, dict):
        raise InputError(f'{place}: a {type(entry).__name__}; expected an object such as {{"{wanted}": "..."}}.')
    if wanted not in entry:
        there = ", ".join(entry) or "none"
        raise InputError(f"{place}: there is no field {wanted!r}; fields: {there}. Name one with FILE#FIELD.")
    if not isinstance(entry[wanted], str):
        raise InputError(f"{place}: field {wanted!r} is a {type(entry[wanted]).__name__}; expected a string.")
    return entry[wanted]


def _read_parquet(path: Path, column: str | None) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading .parquet needs pyarrow: pip install 'nmprune[data]'.") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        types = pyarrow.types
        strings = [f.name for f in file.schema_arrow if types.is_string(f.type) or types.is_large_string(f.type)]
        wanted = text_column(str(path), column, file.schema_arrow.names, strings)
        values = file.read(columns=[wanted])[wanted].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error}).") from error
    return [value for value in values if value is not None]


_READERS: dict[str, Callable[[Path, str | None], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
