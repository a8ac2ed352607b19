"""The safetensors header: 8 bytes little-endian length, then JSON, then the tensors' bytes one after another.

Parsed and written here, and not by the safetensors library, because that maps whole files into memory (so that peak
memory grows with the file) and writes metadata in no fixed order (so that equal content gives unequal files).
Format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nmprune.errors import InputError

# The limit of the safetensors library: a longer header is an attack or no header at all.
MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
}
# torch.float8_e8m0fnu (the scales of MXFP4) came with torch 2.7; everything else here is older than our oldest torch.
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies on disk.

    Attributes:
        name: the checkpoint's name for it.
        dtype: as torch calls it.
        dtype_name: as safetensors spells it ("BF16").
        shape: as stored.
        shard: name of the file that holds it.
        start: byte offset in that file.
        nbytes: its length in bytes.
    """

    name: str
    dtype: torch.dtype
    dtype_name: str
    shape: tuple[int, ...]
    shard: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A file's tensors in the order of their bytes, and its metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Parse and check the header of a safetensors file: every byte after it belongs to exactly one tensor.

    Raises:
        InputError: the file cannot be read, is no safetensors file, is truncated, or its header contradicts itself.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            raw = _raw_header(file, stream, size)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    try:
        entries = json.loads(raw, object_pairs_hook=_without_duplicates)
    except _Duplicate as duplicate:
        raise InputError(
            f"{file}: its header lists the tensor {duplicate.args[0]!r} twice. Save the model again."
        ) from duplicate
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: its header is not valid JSON ({error}): damaged, or no safetensors file. Download it again."
        ) from error
    if not isinstance(entries, dict):
        raise InputError(f"{file}: its header is a JSON {type(entries).__name__}, expected an object of tensors.")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file}: __metadata__ in its header must map text to text. Save the model again.")
    data_start = 8 + len(raw)
    tensors = sorted((_tensor(file, data_start, *item) for item in entries.items()), key=lambda t: (t.start, t.nbytes))
    _check_contiguous(file, tensors, data_start, size)
    return Header(tuple(tensors), metadata)


class _Duplicate(Exception):
    """A JSON object names a key twice; `json` alone would keep the last in silence."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(key)
            seen.add(key)
    return result


def _raw_header(file: Path, stream: BinaryIO, size: int) -> bytes:
    prefix = stream.read(len(_LFS_POINTER))
    if prefix == _LFS_POINTER:
        raise InputError(
            f"{file}: a git-lfs pointer, not the weights. Run `git lfs pull` in its folder, or download it again."
        )
    length = int.from_bytes(prefix[:8], "little")
    if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise InputError(
            f"{file}: the header should take {length:,} of {size:,} bytes (at most {MAX_HEADER_BYTES:,} are allowed): "
            "the file is truncated or no safetensors file. Download it again."
        )
    stream.seek(8)
    return stream.read(length)


def _tensor(file: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{file}: tensor {name!r}: its header entry {entry!r} lacks dtype, shape or data_offsets. "
            "Download it again."
        ) from error
    # bool is an int in Python but not in JSON, hence the exact type
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"{file}: tensor {name!r}: shape and offsets must be whole numbers >= 0, given {entry!r}.")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InputError(
            f"{file}: tensor {name!r} has dtype {dtype_name!r}, which torch does not hold as plain numbers; "
            f"known: {', '.join(DTYPES)}. Give an unquantised checkpoint."
        )
    needed = math.prod(shape) * DTYPES[dtype_name].itemsize
    if end - begin != needed:
        raise InputError(
            f"{file}: tensor {name!r} of {dtype_name} {shape} needs {needed:,} bytes, its offsets {begin}..{end} give "
            f"{end - begin:,}. The file is damaged: download it again."
        )
    return TensorInfo(name, DTYPES[dtype_name], dtype_name, shape, file.name, data_start + begin, needed)


def _check_contiguous(file: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise InputError(
                f"{file}: tensor {tensor.name!r} starts at byte {tensor.start:,}, expected {end:,}: tensors overlap or "
                "leave a hole. The file is damaged: download it again."
            )
        end += tensor.nbytes
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise InputError(f"{file}: {state}: {size:,} bytes, expected {end:,}. Download it again.")


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a header, padded with spaces to a multiple of 8 bytes as the safetensors library does.

    Args:
        tensors: (name, dtype name, shape, bytes) in the order in which the bytes will follow.
        metadata: text to text; written sorted, so that equal content gives equal bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype_name, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
