"""The mask file: every mask of a pruned model, bit-packed in one safetensors file. Format: docs/formats.md."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nmprune import masks
from nmprune.checkpoint.bits import as_bytes
from nmprune.checkpoint.durable import atomic_file, writing
from nmprune.checkpoint.header import Header, TensorInfo, header_bytes, read_header
from nmprune.errors import InputError, near_matches
from nmprune.pattern import Pattern

FORMAT = "nmprune-masks"
FORMAT_VERSION = "1"
# Readers of version 1 would put these masks onto the wrong weights.
PERMUTED_VERSION = "2"
GroupAxis = Literal[-1, -2]


def as_rows(tensor: Tensor, group_axis: int) -> Tensor:
    """(rows, in): every row is one output feature (of one expert), and groups run along the last axis.

    Args:
        tensor: at least 2-D, as stored on disk.
        group_axis: -1 for tensors stored (..., out, in), -2 for (..., in, out).
    """
    matrix = tensor if group_axis == -1 else tensor.transpose(-1, -2)
    return matrix.reshape(-1, matrix.shape[-1])


@dataclass(frozen=True)
class TensorMask:
    """The mask of one checkpoint tensor, packed.

    Attributes:
        bits: uint8, `masks.pack` of the bool mask in the shape of the disk; or how to get them, so that the masks of a
            deep model need not be in memory together.
        shape: of the tensor on disk, 2-D or 3-D.
        pattern: N kept of M.
        group_axis: the axis of the stored tensor along which groups run: -1, or -2 where it is stored (in, out).
        dense_rows: [start, stop) ranges of `as_rows` that stay dense on purpose and are all True: a linear fused with
            pruned ones, or an expert that was excluded. Sorted, disjoint, not empty.
    """

    bits: Tensor | Callable[[], Tensor]
    shape: tuple[int, ...]
    pattern: Pattern
    group_axis: GroupAxis = -1
    dense_rows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_mask(
        cls, mask: Tensor, pattern: Pattern, group_axis: GroupAxis = -1, dense_rows: tuple[tuple[int, int], ...] = ()
    ) -> TensorMask:
        """Pack a bool mask that has the shape of the tensor on disk; it is not checked here, `check` does that."""
        return cls(masks.pack(mask.cpu()), tuple(mask.shape), pattern, group_axis, dense_rows)

    @property
    def packed(self) -> Tensor:
        """The packed bits, uint8."""
        return self.bits if isinstance(self.bits, Tensor) else self.bits()

    @property
    def n_bytes(self) -> int:
        """Bytes of the packed bits of this shape."""
        return -(-math.prod(self.shape) // 8)

    @property
    def in_features(self) -> int:
        """Length of the axis along which groups run."""
        return self.shape[self.group_axis]

    @property
    def n_rows(self) -> int:
        """Rows of `as_rows`, dense ones included."""
        return math.prod(self.shape) // self.in_features

    @property
    def n_groups(self) -> int:
        """Groups that the pattern rules: those of dense rows are not among them."""
        n_dense = sum(stop - start for start, stop in self.dense_rows)
        return (self.n_rows - n_dense) * (self.in_features // self.pattern.group)

    @property
    def n_kept(self) -> int:
        """Weights kept, counted from the bits."""
        bits_of_byte = torch.tensor([byte.bit_count() for byte in range(256)])
        return int((torch.bincount(self.packed, minlength=256) * bits_of_byte).sum())

    def unpack(self) -> Tensor:
        """The bool mask in the shape of the disk, True = kept."""
        return masks.unpack(self.packed, self.shape)

    def is_dense_row(self) -> Tensor:
        """bool (rows,), True where a row stays dense on purpose."""
        dense = torch.zeros(self.n_rows, dtype=torch.bool)
        for start, stop in self.dense_rows:
            dense[start:stop] = True
        return dense

    def n_wrong_groups(self) -> int:
        """Groups that do not keep exactly N of M, plus groups of dense rows that are not wholly kept."""
        rows = as_rows(self.unpack(), self.group_axis)
        if not self.dense_rows:
            return masks.n_wrong_groups(rows, self.pattern)
        dense = self.is_dense_row()
        gaps = (~rows[dense].unflatten(-1, (-1, self.pattern.group)).all(-1)).sum()
        return masks.n_wrong_groups(rows[~dense], self.pattern) + int(gaps)

    def check_structure(self) -> None:
        """Raise InputError unless shape, axis, pattern, dense rows and the number of bits fit each other."""
        if len(self.shape) not in (2, 3) or self.group_axis not in (-1, -2) or 0 in self.shape:
            raise InputError(
                f"shape {self.shape} with group_axis {self.group_axis}: expected 2 or 3 axes, none empty, and -1 or -2."
            )
        self.pattern.check_divides(self.in_features)
        ends = [0, *(end for span in self.dense_rows for end in span), self.n_rows]
        if any(a > b for a, b in pairwise(ends)) or any(start == stop for start, stop in self.dense_rows):
            raise InputError(f"dense_rows {self.dense_rows}: expected sorted, disjoint ranges within 0..{self.n_rows}.")
        packed = self.packed
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (self.n_bytes,):
            raise InputError(
                f"{packed.numel()} values of {packed.dtype}, shape {self.shape} needs {self.n_bytes} packed "
                "bytes: the masks belong to another model or are damaged."
            )

    def check(self, name: str) -> None:
        """Raise InputError, naming the tensor, unless the mask is well formed and every group is legal."""
        try:
            in_memory = replace(self, bits=self.packed)  # read once for both
            in_memory.check_structure()
            wrong = in_memory.n_wrong_groups()
            if wrong:
                raise InputError(
                    f"{wrong} of {self.n_rows * self.in_features // self.pattern.group} groups along axis "
                    f"{self.group_axis} do not keep exactly {self.pattern.words}. "
                    "It was made for another pattern or axis, or is damaged."
                )
        except InputError as error:
            raise error.located(f"mask of {name}") from error


@dataclass(frozen=True)
class MaskFile:
    """All masks of one pruned model. A mask is read and unpacked on access, so a deep model's stay on disk.

    Attributes:
        masks: checkpoint tensor name -> its mask.
        method: which method chose them.
        model: how the user named the model.
        fingerprint: `Checkpoint.fingerprint` of the model they belong to; empty where unknown.
        nmprune_version: of the package that wrote them; empty where another program did.
        permutation: sha256 of the permutation file, where the masks belong to the model with its channels so reordered and
            not to the one on the disk; else empty.
    """

    masks: dict[str, TensorMask]
    method: str
    model: str
    fingerprint: str
    nmprune_version: str
    permutation: str = ""

    def mask(self, name: str) -> Tensor:
        """The bool mask of one tensor, in its shape on disk, True = kept.

        Raises:
            InputError: no mask for that tensor.
        """
        if name not in self.masks:
            close = near_matches(name, self.masks).partition("Known: ")[0]
            raise InputError(f"no mask for tensor {name!r} among {len(self.masks)}. {close}".rstrip())
        return self.masks[name].unpack()

    def check(self) -> None:
        """Raise InputError for the first mask that breaks its pattern or contradicts its shape."""
        for name, entry in self.masks.items():
            entry.check(name)

    def patterns(self) -> list[Pattern]:
        """The different patterns, sorted; usually one."""
        return sorted({entry.pattern for entry in self.masks.values()})

    def density(self) -> float:
        """Share of weights kept among all tensors that have a mask, counted, 0..1."""
        kept = sum(entry.n_kept for entry in self.masks.values())
        return kept / sum(math.prod(entry.shape) for entry in self.masks.values())


def write_masks(path: Path, mask_file: MaskFile) -> None:
    """Write a mask file, whole or not at all; an existing one is replaced. Equal masks give equal bytes.

    Raises:
        InputError: the disk is full or not writable.
    """
    entries = dict(sorted(mask_file.masks.items()))
    described = {name: _describe(entry) for name, entry in entries.items()}
    metadata = {
        "format": FORMAT,
        "format_version": PERMUTED_VERSION if mask_file.permutation else FORMAT_VERSION,
        **({"permutation": mask_file.permutation} if mask_file.permutation else {}),
        "method": mask_file.method,
        "model": mask_file.model,
        "fingerprint": mask_file.fingerprint,
        "nmprune_version": mask_file.nmprune_version,
        "masks": json.dumps(described, separators=(",", ":"), ensure_ascii=False),
    }
    sizes = [(name, "U8", (entry.n_bytes,), entry.n_bytes) for name, entry in entries.items()]
    header = header_bytes(sizes, metadata)
    with writing(path, len(header) + sum(size[-1] for size in sizes)), atomic_file(path) as stream:
        stream.write(header)
        for entry in entries.values():
            packed = entry.packed
            if packed.numel() != entry.n_bytes:
                raise ValueError(f"{packed.numel()} bytes of bits for shape {entry.shape}; expected {entry.n_bytes}")
            stream.write(as_bytes(packed.contiguous()))


def read_masks(path: Path) -> MaskFile:
    """Read and check a mask file.

    Raises:
        InputError: no mask file, of another version, damaged, or a mask that is not legal.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: a safetensors file, but no mask file: its metadata says format {metadata.get('format')!r}, "
            f"expected {FORMAT!r}. Give the masks.safetensors of a run, or MaskLLM's .npz."
        )
    version = metadata.get("format_version")
    if version not in (FORMAT_VERSION, PERMUTED_VERSION):
        raise InputError(
            f"{path}: mask format version {version!r}; this nmprune reads versions {FORMAT_VERSION} and {PERMUTED_VERSION}. "
            "Use the nmprune that wrote it."
        )
    if (version == PERMUTED_VERSION) != bool(metadata.get("permutation")):
        raise InputError(
            f"{path}: mask format version {version} with permutation {metadata.get('permutation', '')!r}: only version "
            f"{PERMUTED_VERSION} has one. Damaged, or edited by hand: make it again."
        )
    absent = [key for key in ("method", "model", "fingerprint", "nmprune_version", "masks") if key not in metadata]
    if absent:
        raise InputError(f"{path}: its metadata lacks {', '.join(absent)}: damaged, or edited by hand. Make it again.")
    mask_file = MaskFile(
        dict(_entries(path, header)),
        metadata["method"],
        metadata["model"],
        metadata["fingerprint"],
        metadata["nmprune_version"],
        metadata.get("permutation", ""),
    )
    try:
        mask_file.check()
    except InputError as error:
        raise error.located(str(path)) from error
    return mask_file


def checksum(path: Path) -> str:
    """sha256 (hex) of a file's bytes.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def _describe(entry: TensorMask) -> dict[str, Any]:
    described: dict[str, Any] = {
        "shape": list(entry.shape),
        "kept": entry.pattern.kept,
        "group": entry.pattern.group,
        "group_axis": entry.group_axis,
    }
    return described | ({"dense_rows": [list(span) for span in entry.dense_rows]} if entry.dense_rows else {})


def _entries(path: Path, header: Header) -> Iterator[tuple[str, TensorMask]]:
    try:
        described = json.loads(header.metadata["masks"])
        names = set(described)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: the metadata key 'masks' is not valid JSON ({error}). Make the file again."
        ) from error
    different = names ^ {info.name for info in header.tensors}
    if different or not isinstance(described, dict):
        raise InputError(
            f"{path}: {len(different)} names are only in the metadata or only among the tensors, such as "
            f"{sorted(different)[:1]}. Damaged, or edited by hand: make it again."
        )
    for info in header.tensors:
        if info.dtype != torch.uint8:
            raise InputError(f"{path}: mask of {info.name} is {info.dtype_name}, expected packed bits in U8.")
        yield info.name, _entry(path, info.name, partial(_read_bits, path, info), described[info.name])


def _read_bits(path: Path, info: TensorInfo) -> Tensor:
    with path.open("rb") as stream:
        stream.seek(info.start)
        content = bytearray(stream.read(info.nbytes))
    if len(content) != info.nbytes:
        raise InputError(f"{path}: became shorter while it was read.")
    return torch.frombuffer(content or bytearray(1), dtype=torch.uint8)[: info.nbytes]


def _entry(path: Path, name: str, bits: Callable[[], Tensor], described: Any) -> TensorMask:
    try:
        numbers = [described["kept"], described["group"], described["group_axis"], *described["shape"]]
        dense_rows = tuple((start, stop) for start, stop in described.get("dense_rows", []))
        if not all(type(n) is int for n in numbers + [end for span in dense_rows for end in span]):
            raise TypeError("a number is not whole")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: mask of {name}: cannot read its description {described!r} ({error}). Make the file again."
        ) from error
    try:
        pattern = Pattern(described["kept"], described["group"])
    except InputError as error:
        raise error.located(f"{path}: mask of {name}") from error
    return TensorMask(bits, tuple(described["shape"]), pattern, described["group_axis"], dense_rows)
