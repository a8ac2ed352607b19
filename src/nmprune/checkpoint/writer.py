"""Writes a changed copy of a checkpoint, one tensor in memory at a time, and reads it back before it gets its name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from nmprune.checkpoint.bits import as_bytes
from nmprune.checkpoint.durable import asking, flush_file, flush_folder, writing
from nmprune.checkpoint.header import TensorInfo, header_bytes
from nmprune.checkpoint.reader import CONFIG_FILE, INDEX_FILE, Checkpoint
from nmprune.errors import InputError

Replace = Callable[[str, Tensor], Tensor | None]

# What travels beside the weights: tokenizers, chat templates, generation settings, a model's own code, licences.
_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".spm", ".vocab", ".py"})
_COPIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_NOT_COPIED_ENDINGS = (".index.json",)  # they name weight files; the base's own index is written with the shards


def write_checkpoint(
    base: Checkpoint,
    out: Path,
    replace: Replace,
    replaced_names: Collection[str],
    config_update: dict[str, Any],
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `base` with some tensors replaced to the new folder `out`.

    Shards, index, names, order and dtypes stay those of the base; tensors that are not replaced are copied byte for
    byte. config.json is the base's with `config_update` merged at the top and without `quantization_config`.
    Tokenizer, templates, licences and other small text files of the folder come along; READMEs, hidden files,
    subfolders and other weight files do not. Equal input gives equal bytes. Everything is written to `<out>.partial`,
    flushed, read back from the disk and compared with what was meant, then renamed; a `.partial` left by a killed
    process is removed first.

    Args:
        base: the checkpoint to copy.
        out: a folder that does not exist.
        replace: given a tensor's name and the base's tensor (its own memory, may be changed), the tensor to write, or
            None to keep the base's bytes.
        replaced_names: the only tensors that are read and offered to `replace`.
        config_update: top-level keys for config.json.
        on_progress: called with the bytes just written, tensor by tensor; they add up to `base.nbytes`.

    Raises:
        InputError: `out` exists, the disk is full or not writable, a name in `replaced_names` is not in the base, or
            the disk does not give back what was written.
        ValueError: a replacement has another shape or dtype than the base's tensor.
    """
    with asking(out):
        there = out.exists() or out.is_symlink()
    if there:
        raise InputError(f"{out}: exists already and is left alone. Choose another folder, or remove it.")
    for name in replaced_names:
        base.info(name)
    side_files = [*_side_files(base.folder), *([INDEX_FILE] if base.has_index else [])]
    needed = sum((base.folder / name).stat().st_size for name in [*base.shards, *side_files, CONFIG_FILE])
    partial = out.with_name(out.name + ".partial")
    with writing(out, needed):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        _check_room(out, needed)
        try:
            partial.mkdir()
            digests: dict[str, bytes] = {}
            for shard in base.shards:
                _write_shard(base, partial / shard, replace, frozenset(replaced_names), digests, on_progress)
            for name in side_files:
                _write_file(partial / name, (base.folder / name).read_bytes())
            config = {**base.config, **config_update}
            config.pop("quantization_config", None)
            _write_file(partial / CONFIG_FILE, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
            flush_folder(partial)
            _read_back(base, partial, digests)
            partial.rename(out)
            flush_folder(out.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(partial)
            raise


def _side_files(folder: Path) -> list[str]:
    """Names of the files that are copied as they are, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CONFIG_FILE and _is_side_file(p))


def _is_side_file(file: Path) -> bool:
    if file.name.startswith(".") or file.stem.upper() == "README" or file.name.endswith(_NOT_COPIED_ENDINGS):
        return False
    return file.suffix.lower() in _COPIED_SUFFIXES or file.name.upper().startswith(_COPIED_STEMS)


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise InputError(
            f"{out}: needs {needed:,} bytes and {out.parent} has {free:,} free. Make room or choose another place."
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        flush_file(stream)
    if path.read_bytes() != content:
        raise _disk_lies(path)


def _write_shard(
    base: Checkpoint,
    path: Path,
    replace: Replace,
    replaced_names: frozenset[str],
    digests: dict[str, bytes],
    on_progress: Callable[[int], None] | None,
) -> None:
    """Write one shard and note the sha256 of every tensor's intended bytes."""
    infos = [info for info in base.tensors.values() if info.shard == path.name]
    # transformers wants to know who wrote the tensors; every weight file of a torch model says "pt".
    metadata = {"format": "pt", **base.metadata[path.name]}
    with path.open("wb") as stream:
        stream.write(header_bytes(((i.name, i.dtype_name, i.shape, i.nbytes) for i in infos), metadata))
        for info in infos:
            digest = hashlib.sha256()
            for piece in _pieces(base, info, replace if info.name in replaced_names else None):
                digest.update(piece)
                stream.write(piece)
            digests[info.name] = digest.digest()
            if on_progress is not None:
                on_progress(info.nbytes)
        flush_file(stream)


def _pieces(base: Checkpoint, info: TensorInfo, replace: Replace | None) -> Iterator[memoryview]:
    """The bytes to write for one tensor: the replacement's, or the base's."""
    new = replace(info.name, base.read(info.name)) if replace is not None else None
    if new is None:
        yield from base.chunks(info.name)
        return
    if tuple(new.shape) != info.shape or new.dtype != info.dtype:
        raise ValueError(
            f"replacement of {info.name} is {new.dtype} {tuple(new.shape)}, the checkpoint has "
            f"{info.dtype} {info.shape}"
        )
    yield as_bytes(new.detach().cpu().contiguous())


def _read_back(base: Checkpoint, folder: Path, digests: dict[str, bytes]) -> None:
    """Open what was written as any reader would, and compare every tensor's place and bytes with what was meant."""
    written = Checkpoint.open(folder)
    for shard in base.shards:
        meant = [(i.name, i.dtype, i.shape) for i in base.tensors.values() if i.shard == shard]
        if meant != [(i.name, i.dtype, i.shape) for i in written.tensors.values() if i.shard == shard]:
            raise _disk_lies(folder / shard)
    for name, info in written.tensors.items():
        digest = hashlib.sha256()
        for piece in written.chunks(name):
            digest.update(piece)
        if digest.digest() != digests[name]:
            raise _disk_lies(folder / info.shard)


def _disk_lies(path: Path) -> InputError:
    return InputError(
        f"{path}: reading it back gives other bytes than were written, so nothing was kept. The disk or the memory of "
        "this machine is failing, or another process writes to the same folder."
    )
