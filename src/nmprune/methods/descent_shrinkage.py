"""Descent's shrinkage, chosen for a linear by held-out tokens: descend on the others, on a sample of the rows, and compare.

Legend: O out_features, I in_features, R sampled rows. D, X, T: see methods/descent.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmprune.methods.descent_sweep import descend, load_diagonal
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

SHRINKAGES = (0.1, 0.3, 0.5, 1.0)
SAMPLED_ROWS, SAMPLED_SWEEPS = 64, 3  # errors differ long before the last sweep and the last row


@torch.no_grad()
def held_out_shrinkage(
    weight_OI: Tensor, stats: InputStats, mask_OI: Tensor, pattern: Pattern, target: float, sweeps: int
) -> float | None:
    """The shrinkage of `SHRINKAGES` whose mask has the least ||X (w - e) - T w||^2 on the held-out tokens.

    Args:
        weight_OI: fp32 (out, in), dense; not modified.
        stats: with `input_gram`, checked, and `held_out_gram`; `cross_gram` for a target above 0, where it is there.
        mask_OI: bool (out, in), where to start.
        pattern: N kept of M.
        target: t of T = t D + (1 - t) X, on the held-out tokens, too.
        sweeps: at most so many, and no more than `SAMPLED_SWEEPS`.

    Returns:
        None where no token was held out, or all were: an expert may have seen few.

    Raises:
        ValueError: `held_out_gram` was not collected.
    """
    if stats.held_out_gram is None:
        raise ValueError("held_out_gram was not collected: the method does not declare it in `needs`")
    if not 0 < stats.held_out_tokens < stats.n_tokens:
        return None
    rows_R = torch.arange(0, len(weight_OI), max(1, len(weight_OI) // SAMPLED_ROWS), device=weight_OI.device)
    weight_RI, mask_RI = weight_OI[rows_R], mask_OI[rows_R]
    train_II = stats.gram() - stats.held_out_gram
    pull_RI = held_pull_RI = None
    if target and stats.cross_gram is not None and stats.held_out_cross is not None:
        held_pull_RI = _pull(weight_RI, stats.held_out_cross, stats.held_out_gram, target)
        pull_RI = _pull(weight_RI, stats.cross_gram, stats.gram(), target) - held_pull_RI
    errors: dict[float, float] = {}
    for shrinkage in SHRINKAGES:
        loaded_II, factor = load_diagonal(train_II, shrinkage)
        scaled_RI = None if pull_RI is None else pull_RI * factor
        found = descend(weight_RI, loaded_II, mask_RI, pattern, min(sweeps, SAMPLED_SWEEPS), pull_OI=scaled_RI)
        dropped_RI = weight_RI * ~found.mask
        product_RI = dropped_RI @ stats.held_out_gram
        if held_pull_RI is not None:
            product_RI.add_(held_pull_RI, alpha=2.0)
        errors[shrinkage] = product_RI.mul_(dropped_RI).sum().item()
    return min(errors, key=lambda shrinkage: errors[shrinkage])


def _pull(weight_RI: Tensor, cross_II: Tensor, gram_II: Tensor, target: float) -> Tensor:
    """P = W (T - X)^T X = t W (D^T X - X^T X)."""
    return (weight_RI @ cross_II.T).sub_(weight_RI @ gram_II).mul_(target)
