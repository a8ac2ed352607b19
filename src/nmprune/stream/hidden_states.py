"""The hidden states between two decoder layers, of all calibration windows: in RAM, or in a file past a budget."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from nmprune.errors import InputError


class HiddenStates:
    """(n_sequences, seq_len, hidden) in the compute dtype, read and overwritten batch by batch.

    Args:
        shape: (n_sequences, seq_len, hidden).
        dtype: compute dtype.
        device: where a batch is handed out; the store itself is in CPU memory or in a file.
        budget: bytes that may stay in RAM; a larger store lies in a temporary file that the OS pages in and out.
        folder: where that file goes; None = the system's temporary folder.

    Attributes:
        all: the whole store.
        on_disk: whether it lies in a file.

    Raises:
        InputError: the file cannot be made (full or unwritable folder).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        budget: int,
        folder: Path | None = None,
    ) -> None:
        self._device = device
        self.on_disk = False
        size = math.prod(shape)
        n_bytes = size * dtype.itemsize
        if n_bytes <= budget:
            self.all = torch.empty(shape, dtype=dtype)
            return
        try:
            # Mapped, then closed and so removed: the pages live as long as the tensor, and a killed run leaves no file.
            with tempfile.NamedTemporaryFile(dir=folder, prefix="nmprune-hidden-") as file:
                _reserve(file.fileno(), n_bytes)
                self.all = torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
        except OSError as error:
            raise InputError(
                f"hidden states of {n_bytes / 2**30:.1f} GiB exceed the budget of {budget / 2**30:.1f} GiB and no file for them "
                f"could be made in {folder or tempfile.gettempdir()}: {error.strerror}. Free some disk space, use fewer or "
                "shorter sequences, or raise --hidden-budget."
            ) from error
        self.on_disk = True

    def batches(self, batch_size: int, n_apart: int = 0) -> list[slice]:
        """Slices over the sequences; see `batches`."""
        return batches(self.all.shape[0], batch_size, n_apart)

    def get(self, batch: slice) -> Tensor:
        """A batch on the compute device."""
        return self.all[batch].to(self._device)

    def rows(self, sequences: Tensor) -> Tensor:
        """Any sequences by their numbers, int64 (B,) on the CPU, on the compute device."""
        return self.all[sequences].to(self._device)

    def put(self, batch: slice, hidden: Tensor) -> None:
        """Overwrite a batch."""
        self.all[batch] = hidden

    def close(self) -> None:
        """Give the memory and the file back."""
        self.all = torch.empty(0)


def batches(n_sequences: int, batch_size: int, n_apart: int = 0) -> list[slice]:
    """Slices over the sequences, at most `batch_size` at a time; none holds both the last `n_apart` and others."""
    border = n_sequences - n_apart
    return [
        slice(start, min(start + batch_size, stop))
        for first, stop in ((0, border), (border, n_sequences))
        for start in range(first, stop, batch_size)
    ]


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Claim the blocks now: a full disk must be an error here, not a bus error at some page later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.ftruncate(descriptor, n_bytes)
