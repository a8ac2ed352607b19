"""Reorder the columns of a score matrix so that N:M keeps more of it: exact best swaps between groups, many at once.

Legend: R rows, I columns, G groups, M columns of a group, N kept of them, T a row's threshold.

Exchanging column a of group g for column b changes what row r keeps of g by max(0, s_rb - T_ra) less what a was worth,
where T_ra is the N-th largest score of g without a. Summed over the rows for all pairs (a, b) that is

    sum_r max(0, s_rb - T_ra) = (sum_r s_rb - sum_r T_ra + sum_r |s_rb - T_ra|) / 2,

one matrix of L1 distances: every swap between two groups is valued exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmprune.pattern import Pattern

# Columns among which all pairs are valued together. A sweep costs rows x columns x this; larger blocks find little more,
# since the blocks are drawn anew in each sweep (docs/permutation.md).
_BLOCK = 128
_MAX_SWEEPS = 60
# Stop where _PATIENCE sweeps together raise the objective by less than this share of what is still lost.
_LEAST_GAIN = 2e-2
_PATIENCE = 3


def retained(scores_RI: Tensor, pattern: Pattern) -> float:
    """The sum, in fp64, of the N largest scores of every group."""
    best = scores_RI.unflatten(-1, (-1, pattern.group)).topk(pattern.kept, -1).values
    return best.sum(-1, dtype=torch.float64 if best.device.type != "mps" else None).sum().item()


def search(scores_RI: Tensor, pattern: Pattern, generator: torch.Generator) -> Tensor:
    """An order of the columns in which N:M keeps at least as much as in the given one.

    A local search from the given order: no swap of two columns of one of the last blocks raises the objective by much.
    It does not see beyond swaps, so it is no global optimum.

    Args:
        scores_RI: (rows, columns), not negative, finite.
        pattern: N kept of M.
        generator: on the CPU; draws which groups are compared.

    Returns:
        int64 (columns,): new column i is old column `order[i]`. Groups are sorted by their first column and so are the
        columns in a group, so that what was not moved stays together.
    """
    size = pattern.group
    columns_IR = scores_RI.T.contiguous()
    groups_GM = torch.arange(len(columns_IR), device=scores_RI.device).view(-1, size)
    n_groups = len(groups_GM)
    in_block = max(2, _BLOCK // size)
    total = columns_IR.sum(dtype=torch.float64 if columns_IR.device.type != "mps" else None).item()
    lost = total - retained(scores_RI, pattern)
    recent: list[float] = []
    while n_groups > 1 and lost > 1e-6 * total and len(recent) < _MAX_SWEEPS:
        gain = 0.0
        for block in torch.randperm(n_groups, generator=generator).to(columns_IR.device).split(in_block):
            gain += _swap(columns_IR, groups_GM, block, pattern, floor=1e-7 * lost)
        recent.append(gain)
        lost -= gain
        if sum(recent[-_PATIENCE:]) < _LEAST_GAIN * lost and len(recent) >= _PATIENCE:
            break
    groups_GM = groups_GM.sort(1).values
    return groups_GM[groups_GM[:, 0].argsort()].flatten()


def _swap(columns_IR: Tensor, groups_GM: Tensor, block: Tensor, pattern: Pattern, floor: float) -> float:
    """Make the best swaps among the groups of a block, each group in at most one; returns what they raise the objective by."""
    n, size = len(block), pattern.group
    gain_nn, pair_nn = _best_swaps(columns_IR[groups_GM[block].flatten()].view(n, size, -1), pattern)
    gained = 0.0
    numbers = torch.arange(n, device=block.device)
    while True:
        gain_n, partner = gain_nn.max(1)
        # two groups that are each other's best; the pair with the largest gain of all is always among them
        agreed = (partner[partner] == numbers) & (numbers < partner) & (gain_n > floor)
        if not agreed.any():
            return gained
        one, other = numbers[agreed], partner[agreed]
        pair = pair_nn[one, other]
        place, other_place = (block[one], pair // size), (block[other], pair % size)
        groups_GM[place], groups_GM[other_place] = groups_GM[other_place], groups_GM[place]
        gained += gain_n[agreed].sum().item()
        for done in (one, other):
            gain_nn[done] = -1.0
            gain_nn[:, done] = -1.0


def _best_swaps(groups_nMR: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """For every two groups: what their best swap raises the objective by, and which (member x M + the other's member)."""
    n, size, _ = groups_nMR.shape
    ordered = groups_nMR.sort(1, descending=True)
    last_kept, first_lost = ordered.values[:, pattern.kept - 1, None], ordered.values[:, pattern.kept, None]
    rank = torch.empty_like(ordered.indices)
    rank.scatter_(1, ordered.indices, torch.arange(size, device=rank.device)[None, :, None].expand_as(rank))
    is_kept = rank < pattern.kept
    threshold = torch.where(is_kept, first_lost, last_kept).flatten(0, 1)
    # what a group loses when the member goes and the best of the others takes its place
    loss = torch.where(is_kept, groups_nMR - first_lost, 0.0).sum(2).flatten()
    members = groups_nMR.flatten(0, 1)
    distance = torch.cdist(threshold, members, p=1.0)
    worth = (members.sum(1) - threshold.sum(1)[:, None] + distance) / 2 - loss[:, None]
    gain, pair = (worth + worth.T).view(n, size, n, size).transpose(1, 2).flatten(2).max(-1)
    return gain.fill_diagonal_(-1.0), pair
