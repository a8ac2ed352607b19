"""Proof that a pruned checkpoint is its base and nothing else: masks legal, masked weights +0.0, all others untouched.

Works on the masks and on tensors read from disk, compared bit by bit; never on metadata and never on a count of zeros
(real checkpoints hold exact zeros).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nmprune.checkpoint import Checkpoint, MaskFile, TensorInfo, TensorMask, as_integers, as_rows
from nmprune.errors import InputError

What = Literal[
    "missing from the pruned checkpoint",
    "not in the base",
    "shape or dtype differs from the base",
    "mask without a tensor in the base",
    "mask does not fit the tensor",
    "groups that do not keep exactly N of M",
    "masked weights that are not +0.0",
    "kept weights that differ from the base",
    "kept weights that are NaN or infinite",
    "weights of rows that stay dense that differ from the base",
    "values that differ from the base",
    "values that are NaN or infinite",
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one tensor.

    Attributes:
        tensor: its name.
        what: what is wrong.
        count: how many groups, weights or values; 1 where the tensor as a whole is meant.
        detail: the facts in words, where the count does not say them.
    """

    tensor: str
    what: What
    count: int = 1
    detail: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """All that `verify` found.

    Attributes:
        findings: everything wrong, in the order of the base's tensors; empty for a sound checkpoint.
        n_tensors: tensors compared between base and pruned.
        n_masks: masks checked.
        n_groups: groups that the patterns rule.
        n_masked: weights the masks remove.
    """

    findings: tuple[Finding, ...] = field(default=())
    n_tensors: int = 0
    n_masks: int = 0
    n_groups: int = 0
    n_masked: int = 0

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.findings


def verify(
    base: Checkpoint,
    pruned: Checkpoint,
    masks: MaskFile,
    updates_weights: bool = False,
    may_change: Collection[str] = (),
    on_progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Compare a pruned checkpoint with its base and its masks, one tensor in memory at a time.

    Each mask keeps exactly N of M per group along its axis; masked weights are +0.0 (-0.0 is not); kept weights are the
    base's bit for bit, NaN payloads and signs of zero included; so is every tensor without a mask; no tensor is missing
    or extra; shapes and dtypes are the base's.

    Args:
        base: the dense checkpoint.
        pruned: what was made of it.
        masks: what was to be removed.
        updates_weights: the method moves kept weights: those need only be finite, and all the rest is as strict.
        may_change: tensors without a mask that were finetuned on purpose: they need only be finite.
        on_progress: called with the bytes of each base tensor when it is done; they add up to `base.nbytes`.
    """
    findings = [Finding(name, "not in the base") for name in pruned.names() if name not in base.tensors]
    findings += [Finding(name, "mask without a tensor in the base") for name in masks.masks if name not in base.tensors]
    for name, info in base.tensors.items():
        entry = masks.masks.get(name)
        if entry is not None:
            illegal = list(_mask_findings(entry, info))
            findings += illegal
            # A mask of another shape rules nothing: the tensor must then be the base's.
            entry = None if any(finding.what == "mask does not fit the tensor" for finding in illegal) else entry
        mismatch = _mismatch(info, pruned)
        if mismatch is not None:
            findings.append(mismatch)
        elif entry is not None:
            findings += _pruned_findings(info, base.read(name), pruned.read(name), entry, updates_weights)
        else:
            findings += _unmasked_findings(base, pruned, info, name in may_change)
        if on_progress is not None:
            on_progress(info.nbytes)
    return VerifyReport(
        tuple(findings),
        n_tensors=sum(name in pruned.tensors for name in base.tensors),
        n_masks=len(masks.masks),
        n_groups=sum(entry.n_groups for entry in masks.masks.values()),
        n_masked=sum(math.prod(entry.shape) - entry.n_kept for entry in masks.masks.values()),
    )


def _mask_findings(entry: TensorMask, info: TensorInfo) -> Iterator[Finding]:
    if entry.shape != info.shape:
        detail = f"mask {entry.shape}, tensor {info.shape}"
        yield Finding(info.name, "mask does not fit the tensor", detail=detail)
        return
    try:
        entry.check_structure()
        n_wrong = entry.n_wrong_groups()
    except InputError as error:
        yield Finding(info.name, "mask does not fit the tensor", detail=str(error))
        return
    if n_wrong:
        yield Finding(info.name, "groups that do not keep exactly N of M", n_wrong, entry.pattern.words)


def _mismatch(info: TensorInfo, pruned: Checkpoint) -> Finding | None:
    """Why the tensor cannot be compared value by value, if it cannot."""
    if info.name not in pruned.tensors:
        return Finding(info.name, "missing from the pruned checkpoint")
    other = pruned.info(info.name)
    if (other.shape, other.dtype) == (info.shape, info.dtype):
        return None
    detail = f"{other.dtype_name} {other.shape}, base {info.dtype_name} {info.shape}"
    return Finding(info.name, "shape or dtype differs from the base", detail=detail)


def _pruned_findings(
    info: TensorInfo, base: Tensor, pruned: Tensor, entry: TensorMask, updates_weights: bool
) -> Iterator[Finding]:
    """What is wrong with a tensor that has a mask; all compared as integers of the same width."""
    axis = entry.group_axis
    kept_RI = as_rows(entry.unpack(), axis)
    bits_RI = as_rows(as_integers(pruned), axis)
    differs_RI = bits_RI != as_rows(as_integers(base), axis)
    yield from _counted(info, "masked weights that are not +0.0", (bits_RI != 0) & ~kept_RI)
    if not updates_weights:
        yield from _counted(info, "kept weights that differ from the base", differs_RI & kept_RI)
        return
    yield from _counted(info, "kept weights that are NaN or infinite", as_rows(~_is_finite(pruned), axis) & kept_RI)
    if entry.dense_rows:
        dense_R = entry.is_dense_row()
        yield from _counted(info, "weights of rows that stay dense that differ from the base", differs_RI[dense_R])


def _unmasked_findings(base: Checkpoint, pruned: Checkpoint, info: TensorInfo, may_change: bool) -> Iterator[Finding]:
    """What is wrong with a tensor without a mask; in pieces, since embeddings can be larger than a decoder layer."""
    n_wrong = 0
    if may_change:
        n_wrong = int((~_is_finite(pruned.read(info.name))).sum())
    else:
        width = info.dtype.itemsize
        for ours, theirs in zip(pruned.chunks(info.name), base.chunks(info.name), strict=True):
            if ours != theirs:
                unequal = np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8)
                n_wrong += int(unequal.reshape(-1, width).any(axis=1).sum())
    if n_wrong:
        yield Finding(
            info.name, "values that are NaN or infinite" if may_change else "values that differ from the base", n_wrong
        )


def _counted(info: TensorInfo, what: What, wrong: Tensor) -> Iterable[Finding]:
    n_wrong = int(wrong.sum())
    return [Finding(info.name, what, n_wrong)] if n_wrong else []


def _is_finite(tensor: Tensor) -> Tensor:
    """bool, the tensor's shape; integers are finite. By way of fp32: torch lacks isfinite for some 8-bit floats."""
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return torch.isfinite(tensor.float() if narrow else tensor)
