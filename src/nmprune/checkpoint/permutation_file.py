"""The permutation file: which channels of a model were reordered before it was pruned. Format: docs/formats.md."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmprune.checkpoint.bits import as_bytes
from nmprune.checkpoint.durable import atomic_file, writing
from nmprune.checkpoint.header import TensorInfo, header_bytes, read_header
from nmprune.errors import InputError
from nmprune.results import PermutationResult

PERMUTATION_FILE = "permutation.safetensors"
FORMAT = "nmprune-permutation"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class PermutationFile:
    """Channel permutations of one model.

    Attributes:
        permutations: space -> int64 (blocks, channels): new channel s of block b is old channel `permutations[space][b, s]`.
            A space that is not named keeps its order.
        results: what was found for every space that was looked at, taken or not.
        kinds: which kinds of spaces were looked at.
        pattern: "N:M", what they were judged by.
        model: how the user named the model.
        fingerprint: `Checkpoint.fingerprint` of the model as it lies on the disk, not permuted.
        nmprune_version: of the package that wrote the file.
    """

    permutations: dict[str, Tensor]
    results: tuple[PermutationResult, ...]
    kinds: tuple[str, ...]
    pattern: str
    model: str
    fingerprint: str
    nmprune_version: str

    @property
    def moved(self) -> tuple[str, ...]:
        """The kinds of which some channels were reordered."""
        return tuple(kind for kind in self.kinds if any(one.kind == kind and one.taken for one in self.results))


def write_permutation(path: Path, file: PermutationFile) -> None:
    """Write a permutation file, whole or not at all. Equal permutations give equal bytes.

    Raises:
        InputError: the disk is full or not writable.
    """
    tensors = {name: one.to(torch.int32).contiguous() for name, one in sorted(file.permutations.items())}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kinds": json.dumps(file.kinds),
        "pattern": file.pattern,
        "model": file.model,
        "fingerprint": file.fingerprint,
        "nmprune_version": file.nmprune_version,
        "results": json.dumps([dataclasses.asdict(one) for one in file.results], separators=(",", ":")),
    }
    header = header_bytes(((name, "I32", tuple(one.shape), one.nbytes) for name, one in tensors.items()), metadata)
    with writing(path, len(header) + sum(one.nbytes for one in tensors.values())), atomic_file(path) as stream:
        stream.write(header)
        for one in tensors.values():
            stream.write(as_bytes(one))


def read_permutation(path: Path) -> PermutationFile:
    """Read a permutation file and check that every row of it is a permutation.

    Raises:
        InputError: no permutation file, of another version, damaged, or one that would lose a channel.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: a safetensors file, but no permutation file: its metadata says format {metadata.get('format')!r}, "
            f"expected {FORMAT!r}. Give the {PERMUTATION_FILE} of a run."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: permutation format version {metadata.get('format_version')!r}; this nmprune reads version "
            f"{FORMAT_VERSION}. Use the nmprune that wrote it."
        )
    try:
        results = tuple(PermutationResult(**one) for one in json.loads(metadata["results"]))
        kinds: Any = tuple(json.loads(metadata["kinds"]))
        words = {key: metadata[key] for key in ("pattern", "model", "fingerprint", "nmprune_version")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: its metadata cannot be read ({error}): damaged, or edited by hand. Delete it."
        ) from error
    permutations = {info.name: _read(path, info) for info in header.tensors}
    taken = {one.name for one in results if one.taken}
    if taken != set(permutations):
        different = sorted(taken ^ set(permutations))
        raise InputError(
            f"{path}: {len(different)} spaces are only in the metadata or only among the tensors, such as {different[0]}. "
            "Damaged, or edited by hand: make the run again."
        )
    return PermutationFile(permutations, results, kinds, **words)


def _read(path: Path, info: TensorInfo) -> Tensor:
    if info.dtype != torch.int32 or len(info.shape) != 2:
        raise InputError(
            f"{path}: {info.name} is {info.dtype_name} {info.shape}, expected I32 of two axes. Make the run again."
        )
    with path.open("rb") as stream:
        stream.seek(info.start)
        content = bytearray(stream.read(info.nbytes))
    permutation_BS = torch.frombuffer(content, dtype=torch.int32).view(info.shape).long()
    if not torch.equal(permutation_BS.sort(1).values, torch.arange(info.shape[1]).expand(info.shape)):
        raise InputError(
            f"{path}: {info.name} is no permutation: a channel occurs twice or not at all, so the model would not be the same. "
            "Damaged, or edited by hand: make the run again."
        )
    return permutation_BS
