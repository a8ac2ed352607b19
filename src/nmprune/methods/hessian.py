"""The damped Hessian of a linear's squared output error, and its factor.

For one row w of a linear the squared output error of a change d is d^T H d with H = X^T X. A constant factor on H (the
papers write 2 X^T X, or divide by samples) cancels, because damping is relative to the mean diagonal.

Legend: I in_features. H_II = R_II R_II^T with R upper triangular.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmprune import masks
from nmprune.errors import InputError
from nmprune.stats import InputStats
from nmprune.threads import one_thread

MAX_DAMPING_STEPS = 6
_FIRST_DAMPING = 1e-5  # where the steps start for a caller who asked for no damping
_ROWS = 64  # turned round at a time


@dataclass(frozen=True)
class HessianFactor:
    """R of H = R R^T, R upper triangular. U = R^-1 is the upper Cholesky factor of H^-1 (H^-1 = U^T U).

    Attributes:
        upper: fp32 (in, in), R; a diagonal block of it is the inverse of the same block of U.
        dead: bool (in,), inputs that were zero on every token.
        damping: the share of the mean diagonal that was added in the end.
        damping_steps: how often the factorisation failed and damping was raised.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    damping_steps: int


def checked_gram(stats: InputStats, in_features: int) -> Tensor:
    """`input_gram`, fp32 (in, in), after checking that it fits and is usable.

    Raises:
        InputError: another width, no token seen, or an entry that is not finite, of `cross_gram` likewise.
    """
    gram_II = stats.gram()
    if gram_II.shape != (in_features, in_features):
        raise InputError(
            f"input_gram has shape {tuple(gram_II.shape)}, but the weight has {in_features} input features: "
            "the statistics belong to another linear."
        )
    if stats.n_tokens == 0:
        raise InputError("this linear saw no calibration token. Give more calibration text.")
    if not masks.all_finite(gram_II) or (stats.cross_gram is not None and not masks.all_finite(stats.cross_gram)):
        raise InputError(
            "the Gram matrix of the calibration activations holds NaN or infinity: check the checkpoint, "
            "or use --dtype float32."
        )
    return gram_II


def factorise(gram_II: Tensor, damping: float) -> HessianFactor:
    """Factor H = gram + damping * mean(diag(gram)) * I, with more damping where that is not positive definite.

    Dead inputs (zero diagonal) get the mean diagonal: they are decoupled from the rest and scale with it. One Cholesky
    factorisation of the matrix read backwards gives R. The papers' chain, Cholesky -> inverse -> Cholesky of the
    inverse, ends in U = R^-1 at four times the work and with more rounding. Runs in fp64 on one thread.

    Args:
        gram_II: (in, in), symmetric and finite; not modified.
        damping: share of the mean diagonal, >= 0.

    Raises:
        InputError: not positive definite even after `MAX_DAMPING_STEPS` steps of ten times more damping.
    """
    dead_I = gram_II.diagonal() == 0
    mean = gram_II.diagonal().mean().item() or 1.0
    tried = damping
    for step in range(MAX_DAMPING_STEPS + 1):
        if step:
            tried = max(10 * tried, _FIRST_DAMPING)
        upper_II = _reverse_cholesky(gram_II, torch.where(dead_I, mean, 0.0) + tried * mean)
        if upper_II is not None:
            return HessianFactor(upper_II, dead_I, tried, step)
    raise InputError(
        f"the Gram matrix of the inputs is not positive definite, even with {tried:g} times its mean diagonal added "
        f"({MAX_DAMPING_STEPS} steps up from damping {damping:g}). Use more calibration tokens or --dtype float32, "
        "or leave this linear dense with --exclude."
    )


def _reverse_cholesky(gram_II: Tensor, added_I: Tensor) -> Tensor | None:
    """R of gram + diag(added) = R R^T, R upper triangular, fp32; None where that is not positive definite."""
    # MPS has no fp64
    backwards_II = _backwards(gram_II.cpu() if gram_II.device.type == "mps" else gram_II, torch.float64)
    backwards_II.diagonal().add_(added_I.flip(0).to(backwards_II))
    with one_thread():
        lower_II, failed = torch.linalg.cholesky_ex(backwards_II)
    del backwards_II
    return None if failed.item() else _backwards(lower_II, torch.float32).to(gram_II.device)


def _backwards(matrix_II: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy as `dtype`, rows and columns in reverse order.

    Some rows at a time: `flip` of the whole makes one copy more, and where glibc puts that into a hole of its heap (as it may
    once a run has pruned a few layers), its pages stay under the factorisation's peak although it is freed.
    """
    turned_II = torch.empty_like(matrix_II, dtype=dtype)
    last = len(matrix_II)
    for start in range(0, last, _ROWS):
        rows_RI = matrix_II[start : start + _ROWS]
        turned_II[last - start - len(rows_RI) : last - start] = rows_RI.flip(0, 1)
    return turned_II
