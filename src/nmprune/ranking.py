"""Who is among the N best of a group: what masks from scores and sampled masks both ask. Higher wins; of equals the lower index.

Legend: M group or slots, G whatever stands before (rows and groups).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_COUNTING_GROUP = 8  # up to here, counting who beats whom (M*M comparisons) is faster than a sort


def top(values_GM: Tensor, n: int) -> Tensor:
    """bool (..., M): the `n` largest of each group; among equals the lower index wins."""
    if values_GM.shape[-1] > _COUNTING_GROUP:
        best = values_GM.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(values_GM, dtype=torch.bool).scatter_(-1, best, True)
    return torch.stack([rank < n for rank in ranks(values_GM.unbind(-1))], dim=-1)


def ranks(members: Sequence[Tensor]) -> list[Tensor]:
    """How many members beat each member, int8: a larger one does, and so does an equal one of lower index.

    Args:
        members: of all groups, of one shape: first members, second members, and so on.
    """
    # A member starts behind all those of lower index; each comparison that it wins moves it one up and the other down.
    found = [torch.full(one.shape, i, dtype=torch.int8, device=one.device) for i, one in enumerate(members)]
    for i, j in itertools.combinations(range(len(members)), 2):
        j_wins = (members[j] > members[i]).view(torch.int8)
        found[i] += j_wins
        found[j] -= j_wins
    return found
