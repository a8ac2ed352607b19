"""Mask algebra: from scores to masks, checking, density, candidates, bit packing. A mask is bool and True means kept.

Legend: O out_features, I in_features, G groups per row, M group, K candidates. Groups are M consecutive entries of the
last axis; leading axes are free.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from nmprune import ranking
from nmprune.errors import InputError
from nmprune.pattern import Pattern

MAX_CANDIDATES = 20_000


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite: both extremes are finite, and a NaN would be both (one pass, no copy)."""
    return values.numel() == 0 or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))


def from_scores(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """The mask that keeps the `pattern.kept` highest scores of each group; equal scores: the lower index wins.

    Args:
        scores_OI: (..., in), any real dtype, higher = keep.
        pattern: N kept of M.

    Returns:
        bool, the shape of `scores_OI`, exactly N kept in every group.

    Raises:
        InputError: the last axis is not a whole number of groups, or a score is NaN or infinite.
    """
    pattern.check_divides(scores_OI.shape[-1])
    if not all_finite(scores_OI):
        n_bad = int((~torch.isfinite(scores_OI)).sum())
        raise InputError(
            f"{n_bad} of {scores_OI.numel()} scores are NaN or infinite, so there is no best {pattern.words}. "
            "The weights or the calibration activations hold NaN or infinity: check the checkpoint, "
            "or use --dtype float32."
        )
    return ranking.top(scores_OI.unflatten(-1, (-1, pattern.group)), pattern.kept).flatten(-2)


def n_wrong_groups(mask_OI: Tensor, pattern: Pattern) -> int:
    """How many groups of a mask do not keep exactly N of M; 0 for a legal mask.

    Raises:
        InputError: the last axis is not a whole number of groups.
    """
    pattern.check_divides(mask_OI.shape[-1])
    return int((mask_OI.unflatten(-1, (-1, pattern.group)).sum(-1) != pattern.kept).sum())


def density(mask: Tensor) -> float:
    """Share of True in a mask, 0..1."""
    return mask.sum(dtype=torch.int64).item() / mask.numel()


def candidates(pattern: Pattern) -> Tensor:
    """All C(M, N) legal masks of one group, bool (K, M), in the order of `itertools.combinations(range(M), N)`.

    Raises:
        InputError: there are more than 20,000 of them (8:16 has 12,870; 16:32 has 601 million).
    """
    if pattern.n_candidates > MAX_CANDIDATES:
        raise InputError(
            f"pattern {pattern} has {pattern.n_candidates:,} candidate masks per group; listing them stops at "
            f"{MAX_CANDIDATES:,}. Use a method that scores single weights, or a smaller group."
        )
    index_KN = torch.tensor(list(itertools.combinations(range(pattern.group), pattern.kept)))
    return torch.zeros(pattern.n_candidates, pattern.group, dtype=torch.bool).scatter_(1, index_KN, True)


def pack(mask: Tensor) -> Tensor:
    """Bits of a mask, uint8 (ceil(numel / 8),): row-major, first element in the highest bit (as `numpy.packbits`)."""
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask whose `pack` is `bits`.

    Raises:
        InputError: the number of bytes does not fit the shape, or a padding bit is set.
    """
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != -(-numel // 8):
        raise InputError(
            f"packed mask has {bits.numel()} values of {bits.dtype}; shape {tuple(shape)} needs {-(-numel // 8)} "
            "bytes. The mask file belongs to another model or is damaged."
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    flat = (bits.reshape(-1, 1) >> shifts & 1).bool().reshape(-1)
    if flat[numel:].any():
        raise InputError(f"packed mask for shape {tuple(shape)} has bits set past its end: the mask file is damaged.")
    return flat[:numel].reshape(shape)
