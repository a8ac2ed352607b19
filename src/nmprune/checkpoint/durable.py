"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nmprune.errors import InputError

_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "no folder can be made there, or it has gone away",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file system does not hold files of this size",
}


@contextmanager
def writing(place: Path, needed_bytes: int) -> Iterator[None]:
    """Turn whatever the system refuses inside the block into an InputError: the place is the user's to choose.

    Args:
        place: what is being written.
        needed_bytes: said in the error; 0 = what is written takes no room to speak of.
    """
    try:
        yield
    except ConnectionError:
        raise  # no disk: the reader of our output, or another process, went away
    except OSError as error:
        needs = f"It needs {needed_bytes:,} bytes; nothing was kept. " if needed_bytes else ""
        room = ", or make room and run it again" if needed_bytes or error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise InputError(f"{place}: cannot be written: {refusal(error)}. {needs}Choose another place{room}.") from error


@contextmanager
def asking(place: Path) -> Iterator[None]:
    """Turn what the system refuses when it is asked whether `place` is there into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be looked at: {refusal(error)}. Choose another place.") from error


def refusal(error: OSError) -> str:
    """Why the system refuses, in a few words; its own where we have none."""
    return _WORDS.get(error.errno or 0) or error.strerror or str(error)


def flush_file(stream: BinaryIO) -> None:
    """Wait until an open file's bytes are on the disk, and let go of the cached copy: a read then asks the disk."""
    stream.flush()
    os.fsync(stream.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush_folder(folder: Path) -> None:
    """Wait until names created or renamed in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ordinary_mode(folder: Path) -> int:
    """The mode that a new file gets here, 0666 less the umask; asked by making one, as the umask is told only to who sets it."""
    probe = folder / f".mode-{secrets.token_hex(4)}"
    try:
        probe.touch(0o666, exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def finish_folder(folder: Path) -> None:
    """Give the files of a new folder the mode of ordinary files and wait until they are on the disk.

    For folders that other libraries filled: safetensors makes files that nobody but their owner may read.
    """
    mode = ordinary_mode(folder)
    for file in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        file.chmod(mode)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    flush_folder(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and leaves `path` as it was when it does not."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            yield stream
            flush_file(stream)
        partial.replace(path)
        flush_folder(path.parent)
    except BaseException:
        # what went wrong before stays the error, also where the partial file cannot be removed
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
