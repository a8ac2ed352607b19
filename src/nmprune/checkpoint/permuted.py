"""A checkpoint seen through channel permutations: the same tensors with some axes reordered, nothing written.

Whatever reads a `Checkpoint` (the streamed model, the writer, verify) reads the permuted model from this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from nmprune.architectures.channels import Channels, take
from nmprune.checkpoint.bits import as_bytes
from nmprune.checkpoint.names import Piece
from nmprune.checkpoint.reader import CHUNK_BYTES, Checkpoint

Gathers = tuple[tuple[int, Tensor], ...]


@dataclass(frozen=True)
class PermutedCheckpoint(Checkpoint):
    """A view of a checkpoint; names, shapes, dtypes, config and `fingerprint` are those of the checkpoint itself.

    Attributes:
        gathers: tensor on disk -> (axis, index) for each axis that is reordered; see `architectures.channels.take`.
    """

    gathers: Mapping[str, Gathers] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        channels: Channels,
        pieces: Mapping[str, Sequence[Piece]],
        permutations: Mapping[str, Tensor],
    ) -> PermutedCheckpoint:
        """`base` with the channels of some spaces reordered.

        Args:
            base: the checkpoint as it lies on the disk.
            channels: which axes carry which space.
            pieces: parameter -> the tensors on disk that it is made of.
            permutations: space -> int64 (blocks, channels).
        """
        gathers: dict[str, Gathers] = {}
        for parameter, of_parameter in pieces.items():
            moved = channels.gathers(parameter, permutations)
            for piece in of_parameter if moved else ():
                gathers[piece.tensor] = tuple((axis, _inside(index, piece, axis)) for axis, index in moved)
        return cls(**{one.name: getattr(base, one.name) for one in fields(Checkpoint)}, gathers=gathers)

    def read(self, name: str) -> Tensor:
        """The tensor with its channels reordered; else as `Checkpoint.read`."""
        tensor = super().read(name)
        for axis, index in self.gathers.get(name, ()):
            tensor = take(tensor, axis, index)
        return tensor

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The reordered tensor's raw bytes in pieces. A reordered tensor is in memory whole meanwhile."""
        if name not in self.gathers:
            yield from super().chunks(name, chunk_bytes)
            return
        content = as_bytes(self.read(name).contiguous())
        for offset in range(0, len(content), chunk_bytes):
            yield content[offset : offset + chunk_bytes]


def _inside(index: Tensor, piece: Piece, axis: int) -> Tensor:
    """The part of a parameter's index that concerns one tensor on disk."""
    if piece.region is None:
        return index
    assert piece.region.expert is not None
    own = index[piece.region.expert] if index.dim() == 2 else index
    if axis == -1 or piece.region.rows is None:
        return own
    start, stop = piece.region.rows
    own = own[start:stop] - start
    if not torch.equal(own.sort().values, torch.arange(stop - start)):
        raise ValueError(f"{piece.tensor}: its rows {start}..{stop} would change places with another tensor's")
    return own
