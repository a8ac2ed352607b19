"""Masks in the form MaskLLM publishes: an npz with one packed uint8 array per parameter, without shapes or pattern.

Key `<parameter name>.mask`, value `numpy.packbits` of the flattened mask: the same bits as our own mask file.
Source: https://github.com/NVlabs/MaskLLM, output of its compression tool.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from nmprune.checkpoint.durable import atomic_file, writing
from nmprune.checkpoint.mask_file import GroupAxis, MaskFile, TensorMask
from nmprune.errors import InputError, near_matches
from nmprune.pattern import Pattern

_SUFFIX = ".mask"


def read_npz(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pattern: Pattern,
    group_axes: Mapping[str, GroupAxis] | None = None,
) -> MaskFile:
    """Read and check masks in MaskLLM's form.

    Args:
        path: the npz; never unpickled.
        shapes: tensor name -> shape on disk, such as `Checkpoint.shapes()`; the file holds none.
        pattern: what the masks are to keep; the file does not say.
        group_axes: tensors stored (in, out) -> -2; all others have their groups along the last axis.

    Raises:
        InputError: no npz, an array that is not packed bits, a name without a shape, a wrong length, or groups that do
            not keep exactly N of M.
    """
    axes = group_axes or {}
    entries: dict[str, TensorMask] = {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            # np.load also opens .npy, which gives a bare array
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an npz")
            for key in arrays.files:
                name = _tensor_name(path, key, shapes)
                packed = torch.from_numpy(np.ascontiguousarray(arrays[key]))
                entries[name] = TensorMask(packed, tuple(shapes[name]), pattern, axes.get(name, -1))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: cannot be read as an npz of packed masks ({error}). Pickled arrays are refused."
        ) from error
    if not entries:
        raise InputError(f"{path}: holds no masks. Expected keys such as 'model.layers.0.mlp.up_proj.weight.mask'.")
    mask_file = MaskFile(entries, method="unknown (npz)", model="", fingerprint="", nmprune_version="")
    try:
        mask_file.check()
    except InputError as error:
        raise error.located(str(path)) from error
    return mask_file


def write_npz(path: Path, mask_file: MaskFile) -> None:
    """Write masks in MaskLLM's form; shapes, patterns, axes and the model's fingerprint are lost.

    Equal masks give equal bytes.

    Raises:
        InputError: the disk is full or not writable, or the masks belong to a model whose channels were reordered, which an
            npz cannot say.
    """
    if mask_file.permutation:
        raise InputError(
            f"{path}: the masks belong to a model whose channels were reordered (permutation {mask_file.permutation[:12]}), "
            "which an npz cannot say: they would fall on other weights. Use the mask file and its permutation file."
        )
    arrays = {name + _SUFFIX: entry.packed.numpy() for name, entry in sorted(mask_file.masks.items())}
    with writing(path, sum(array.nbytes for array in arrays.values())), atomic_file(path) as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # keys end in .mask, none is an option


def _tensor_name(path: Path, key: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The checkpoint tensor that a key means; some files leave out the ".weight"."""
    name = key.removesuffix(_SUFFIX)
    for candidate in (name, name + ".weight"):
        if key.endswith(_SUFFIX) and candidate in shapes:
            return candidate
    close = near_matches(name, shapes).partition("Known: ")[0]
    raise InputError(
        f"{path}: key {key!r} names no tensor of the checkpoint (expected '<tensor name>{_SUFFIX}'). {close}"
        "The masks belong to another model."
    )
