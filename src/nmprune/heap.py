"""The heap of glibc, where torch's CPU tensors live: freed memory goes back to the system, or stays for the next tensor."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Parameters of mallopt (malloc.h), and glibc's own values of them.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USUAL = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}


@functools.cache
def _glibc() -> Any:
    """The process's C library, or None where its allocator is not glibc's."""
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim, library.mallopt  # noqa: B018 - asked for here, so that the callers need not
    except (OSError, AttributeError, TypeError):
        return None
    return library


def give_back() -> None:
    """Return the free pages of the heap.

    glibc keeps tensors of some MiB on its heap, where a small record that outlives them pins what was freed below it: without
    this a run's memory grew by about one decoder layer per decoder layer. It costs milliseconds.
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@contextmanager
def keep_freed() -> Iterator[None]:
    """Freed memory stays with the process inside the body, and goes back when it ends.

    A training step frees hundreds of tensors and asks for the same ones again. glibc takes each large one from the system anew
    and gives it back at once: zeroing its pages again takes longer than many an operation on it. For loops that repeat
    themselves only: what differs from turn to turn would pile up. Elsewhere than in glibc nothing happens.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            library.mallopt(parameter, value)
        give_back()
