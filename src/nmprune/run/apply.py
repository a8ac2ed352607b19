"""Put a mask file onto a checkpoint: frozen weights, +0.0 where the mask says so, a new HF folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nmprune.architectures import DenseLinear, Linear
from nmprune.checkpoint import (
    Checkpoint,
    MaskFile,
    TensorMask,
    apply_mask,
    checksum,
    read_masks,
    read_npz,
    write_checkpoint,
)
from nmprune.checkpoint.durable import asking
from nmprune.checkpoint.permutation_file import PERMUTATION_FILE
from nmprune.errors import InputError, near_matches
from nmprune.methods import METHODS
from nmprune.pattern import Pattern
from nmprune.refine import Reconstruct
from nmprune.run.compare import mask_path
from nmprune.run.description import self_description, words_of
from nmprune.run.find_model import find_model
from nmprune.run.permute import permute_as
from nmprune.run.permuted_base import read_permutation_for
from nmprune.run.progress import Progress, Report, silent
from nmprune.stream import DecoderModel

_SHOWN = 5


@dataclass(frozen=True)
class Applied:
    """What `apply_masks` did.

    Attributes:
        out: the new HF folder.
        model: the folder of the dense model.
        masks: the mask file.
        pattern: N kept of M, in words.
        n_masks: tensors masked.
        density: share of their weights kept, 0..1.
        notices: what the user should know: other fingerprint, weights that a method would have moved.
    """

    out: str
    model: str
    masks: str
    pattern: str
    n_masks: int
    density: float
    notices: tuple[str, ...]


def apply_masks(
    masks: Path,
    model: str,
    out: Path,
    pattern: Pattern | None = None,
    trust_remote_code: bool = False,
    allow_sparse: bool = False,
    report: Report = silent,
) -> Applied:
    """Write `model` with `masks` applied to the new folder `out`; kept weights keep their bits.

    Args:
        masks: our mask file, a run folder, or an npz in MaskLLM's form.
        model: an HF folder, .gguf file, hub id or smollm2-135m.
        out: a folder that does not exist.
        pattern: what an npz keeps (it does not say); for our files only checked.
        trust_remote_code: run Python code from the model's folder, where its config names some.
        allow_sparse: take a model that is sparse already.
        report: called at every sign of life.

    Raises:
        InputError: masks that cannot be read or do not fit the model; an npz without a pattern; `out` exists.
    """
    with asking(out):
        there = out.exists()
    if there:
        raise InputError(f"{out}: exists already and is left alone. Choose another --out folder.")
    file = mask_path(masks)
    report(Progress("open", text=f"opening {model}"))
    decoder = DecoderModel.open(find_model(model), trust_remote_code=trust_remote_code, allow_sparse=allow_sparse)
    assert decoder.checkpoint is not None
    linears = _linears_by_tensor(decoder)
    entries = _read(file, decoder.checkpoint, linears, pattern)
    permutation = _permute(decoder, entries, file)
    base = decoder.checkpoint
    _check_fit(file, entries, base, linears)
    words = words_of(entries.patterns())
    pruned, dense = _split(decoder, linears, entries)
    key = self_description(pruned, {"name": entries.method}, checksum(file), dense, permutation, entries.permutation)
    done = 0

    def wrote(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report(Progress("model", done, base.nbytes))

    def masked(tensor: str, weight: Tensor) -> Tensor:
        return apply_mask(weight, entries.mask(tensor))

    report(Progress("model", 0, base.nbytes, f"writing {out} ({base.nbytes / 2**20:,.0f} MiB)"))
    write_checkpoint(base, out, masked, set(entries.masks), {"nmprune": key}, wrote)
    return Applied(
        str(out), str(base.folder), str(file), words, len(entries.masks), entries.density(), _notices(entries, base)
    )


def _permute(decoder: DecoderModel, entries: MaskFile, file: Path) -> tuple[str, ...]:
    """Bring the model's channels into the order that the masks are for; the kinds that were moved."""
    if not entries.permutation:
        return ()
    place = file.with_name(PERMUTATION_FILE)
    found = read_permutation_for(place, entries.permutation, file)
    try:
        permute_as(decoder, found)
    except InputError as error:
        raise error.located(str(place)) from error
    return found.moved


def _linears_by_tensor(decoder: DecoderModel) -> dict[str, list[Linear]]:
    linears: dict[str, list[Linear]] = {}
    for index in range(decoder.n_layers):
        for linear in decoder.linears(index)[0]:
            linears.setdefault(linear.tensor, []).append(linear)
    return linears


def _read(file: Path, base: Checkpoint, linears: dict[str, list[Linear]], pattern: Pattern | None) -> MaskFile:
    if file.suffix == ".npz":
        if pattern is None:
            raise InputError(f"{file}: an npz does not say which pattern its masks keep. Add --pattern, such as 2:4.")
        axes = {tensor: of_tensor[0].on_disk.group_axis for tensor, of_tensor in linears.items()}
        return read_npz(file, base.shapes(), pattern, axes)
    entries = read_masks(file)
    if pattern is not None and entries.patterns() != [pattern]:
        found = ", ".join(map(str, entries.patterns()))
        raise InputError(f"{file}: its masks keep {found}, --pattern says {pattern}. Leave --pattern out.")
    return entries


def _check_fit(file: Path, entries: MaskFile, base: Checkpoint, linears: dict[str, list[Linear]]) -> None:
    """Raise InputError naming the first masks that do not fit the checkpoint."""

    def fits(tensor: str, entry: TensorMask) -> bool:
        place = linears.get(tensor)
        shape_and_axis = (entry.shape, entry.group_axis)
        return place is not None and shape_and_axis == (base.info(tensor).shape, place[0].on_disk.group_axis)

    misfits = [tensor for tensor, entry in entries.masks.items() if not fits(tensor, entry)]
    if misfits:
        more = f"\n  and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        # near matches among thousands of names take long: they are looked for only where they are shown
        faults = (_misfit(tensor, entries.masks[tensor], base, linears) for tensor in misfits[:_SHOWN])
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise InputError(f"{file} does not fit {base.folder}: it holds{listed}{more}\nIt belongs to another model.")


def _misfit(tensor: str, entry: TensorMask, base: Checkpoint, linears: dict[str, list[Linear]]) -> str:
    """Why a mask does not fit, in words."""
    if tensor not in linears:
        known = "which is no linear that can be pruned" if tensor in base.tensors else "which the model does not have"
        close = near_matches(tensor, linears).partition("Known: ")[0]
        return f"a mask for {tensor}, {known}. {close}".rstrip()
    if entry.shape != base.info(tensor).shape:
        return f"a mask of shape {entry.shape} for {tensor} of shape {base.info(tensor).shape}."
    return f"groups along axis {entry.group_axis} of {tensor}, which runs along the other axis."


def _split(
    decoder: DecoderModel, linears: dict[str, list[Linear]], entries: MaskFile
) -> tuple[dict[str, Pattern], list[DenseLinear]]:
    """Names of the linears that the masks prune, with their patterns; all other linears, with reasons."""
    dense = [*decoder.dense_outside()]
    for index in range(decoder.n_layers):
        dense += decoder.linears(index)[1]
    pruned: dict[str, Pattern] = {}
    for tensor, of_tensor in linears.items():
        entry = entries.masks.get(tensor)
        for linear in of_tensor:
            start = (linear.on_disk.expert or 0) * linear.shape[0]
            if entry is None:
                dense.append(DenseLinear(linear.name, linear.shape, "no mask for it"))
            elif any(a <= start < b for a, b in entry.dense_rows):
                dense.append(DenseLinear(linear.name, linear.shape, "dense by the mask file"))
            else:
                pruned[linear.name] = entry.pattern
    return pruned, dense


def _notices(entries: MaskFile, base: Checkpoint) -> tuple[str, ...]:
    notices: Sequence[str] = []
    if not entries.fingerprint:
        notices = [*notices, "the mask file does not say which model its masks were made for; shapes and names fit."]
    elif entries.fingerprint != base.fingerprint():
        notices = [
            *notices,
            f"the masks were made for {entries.model or 'another model'} ({entries.fingerprint[:12]}), not for these very "
            "weights; shapes and names fit. Measure the result.",
        ]
    parts = entries.method.split("+")  # a method, and the steps after it
    if Reconstruct.name in parts or any(METHODS[part].updates_weights for part in parts if part in METHODS):
        notices = [
            *notices,
            f"the masks were chosen by {entries.method}, which also moves kept weights; here they stay as they are.",
        ]
    return tuple(notices)
