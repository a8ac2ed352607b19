"""Compare the masks of two files or runs."""

from __future__ import annotations

from pathlib import Path

from nmprune.checkpoint import MaskDiff, MaskFile, diff, read_masks, read_npz
from nmprune.errors import InputError

_MASKS_FILE = "masks.safetensors"


def mask_path(place: Path) -> Path:
    """The mask file that is meant: the file itself, or a run folder's.

    Raises:
        InputError: nothing there, or a folder without masks.
    """
    if place.is_dir():
        inner = place / _MASKS_FILE
        if not inner.is_file():
            is_run = (place / "recipe.yaml").is_file()
            why = "the run is not finished" if is_run else "not a run folder"
            raise InputError(f"{place} holds no {_MASKS_FILE}: {why}. Give a finished run or a mask file.")
        return inner
    if not place.is_file():
        raise InputError(f"{place}: no such file or folder. Give a run folder, a {_MASKS_FILE}, or MaskLLM's .npz.")
    return place


def compare_masks(a: Path, b: Path) -> MaskDiff:
    """What two mask files have in common. One may be an npz: shapes and pattern are then the other one's.

    Raises:
        InputError: a file cannot be read, both are npz, or they belong to different models.
    """
    file_a, file_b = mask_path(a), mask_path(b)
    npz = [file for file in (file_a, file_b) if file.suffix == ".npz"]
    if len(npz) == 2:
        raise InputError(
            f"{file_a} and {file_b} are both npz, which say neither shapes nor pattern. Give one of them as a "
            f"{_MASKS_FILE}."
        )
    if file_a in npz:
        masks_b = read_masks(file_b)
        return diff(_like(file_a, masks_b), masks_b)
    masks_a = read_masks(file_a)
    if file_b in npz:
        return diff(masks_a, _like(file_b, masks_a))
    masks_b = read_masks(file_b)
    if masks_a.permutation != masks_b.permutation:
        which = [
            f"{file}: {(masks.permutation or 'none')[:12]}" for file, masks in ((file_a, masks_a), (file_b, masks_b))
        ]
        raise InputError(
            f"the masks belong to different orders of the model's channels (permutation {', '.join(which)}): at the same place "
            "they rule different weights. Compare runs with the same --permute and the same permutation."
        )
    return diff(masks_a, masks_b)


def _like(npz: Path, other: MaskFile) -> MaskFile:
    """An npz read with the shapes, axes and pattern of another file."""
    if other.permutation:
        raise InputError(
            f"{npz}: an npz does not say in which order its model's channels are, and the other file's were reordered: at the "
            "same place they may rule different weights."
        )
    patterns = other.patterns()
    if len(patterns) != 1:
        raise InputError(f"{npz}: an npz has one pattern, the other file has {', '.join(map(str, patterns))}.")
    shapes = {name: entry.shape for name, entry in other.masks.items()}
    axes = {name: entry.group_axis for name, entry in other.masks.items()}
    return read_npz(npz, shapes, patterns[0], axes)
