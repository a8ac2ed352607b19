"""OWL's rule: decoder layers with more outliers keep more of their weights.

Yin et al. 2024, Outlier Weighed Layerwise Sparsity (OWL), arXiv 2310.05175, section 3.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor


def outlier_share(scores_OI: Callable[[], Iterable[Tensor]], above: float) -> float:
    """Share of a decoder layer's Wanda scores that exceed `above` times their mean (the paper's layerwise outlier share).

    Args:
        scores_OI: gives |w| * norm of its input for every linear of the layer, one after the other; called twice, so that
            they need not be in memory together.
        above: the paper's M.

    Returns:
        0..1; 0 for a layer without linears.
    """
    n_scores, total = 0, 0.0
    for one in scores_OI():
        n_scores += one.numel()
        total += one.sum().item()
    if not n_scores:
        return 0.0
    return sum(int((one > above * total / n_scores).sum()) for one in scores_OI()) / n_scores


def keep_ratios(shares: Sequence[float], n_weights: Sequence[int], density: float, spread: float) -> list[float]:
    """Share of weights that each decoder layer keeps: its outlier share scaled to a range of 2 * spread around `density`.

    The mean is weighted by the layers' sizes, so that the ratios meet the density; the authors' is not, for their layers
    are of one size. Equal shares give every layer `density`. A ratio may lie outside 0..1.

    Args:
        shares: of outliers, one per layer.
        n_weights: of each layer.
        density: of all layers together.
        spread: the paper's lambda.
    """
    low, high = min(shares), max(shares)
    raised = [2 * spread * (share - low) / (high - low) if high > low else 0.0 for share in shares]
    mean = math.fsum(r * n for r, n in zip(raised, n_weights, strict=True)) / sum(n_weights)
    return [value - mean + density for value in raised]
