"""The sweeps of descent: columns in blocks, groups one after the other, each set to its best mask. See methods/descent.py.

The rows do not depend on each other and go side by side. Columns go in blocks: what a block owes to the rest of the row is
one large product with H, once per block, and inside it a group reads only the block. No running gradient is kept: nothing
drifts, and a sweep costs one product H E in all.

Legend: O out_features, I in_features, M group, G groups of a block, B columns of a block, K candidates, L pairs of a
group's members. Columns are stored as rows (I, O), so that one column of all output rows is contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nmprune import masks
from nmprune.pattern import Pattern
from nmprune.threads import one_thread

MAX_LISTED = 70  # candidates of a group that are compared one by one: all of 4:8; beyond, best swaps
_BLOCK = 128  # columns between two large products
# What a dropped weight must gain, as a share of the group's terms, before another takes its place: above fp32 rounding,
# so that the objective never rises, ties stay as they are, and the result does not depend on the order of a sum.
_MARGIN = 2.0**-20


@dataclass(frozen=True)
class Descended:
    """What `descend` made of a mask.

    Attributes:
        mask: bool (out, in), True = kept.
        sweeps: passes over the columns that were made, the last one included where it changed nothing.
        changed_groups: share of the groups that differ from the mask at the start.
        start: the objective of the mask at the start: tr(E H E^T), and 2 tr(E P^T) where there is a pull P.
        end: the objective of `mask`, not above `start` (both are rounded fp32 sums).
    """

    mask: Tensor
    sweeps: int
    changed_groups: float
    start: float
    end: float


def load_diagonal(gram_II: Tensor, shrinkage: float) -> tuple[Tensor, float]:
    """H = G + shrinkage * diag(G), up to a factor: (in, in), largest entry of the diagonal in [0.5, 1).

    A factor on H changes no mask. It is chosen such that the diagonal is G's times a power of two, and the rest shrinks
    by 1 / (1 + shrinkage): no shrinkage overflows, and in the limit H is G's diagonal exactly.

    Args:
        gram_II: (in, in), symmetric and finite; not modified.
        shrinkage: >= 0.

    Returns:
        H, and the factor.
    """
    _, exponent = math.frexp(gram_II.diagonal().max().item())
    # in two halves: a power of two may itself be out of range
    loaded_II = (gram_II * 2.0 ** (-exponent // 2)).mul_(2.0 ** (-exponent - -exponent // 2))
    diagonal_I = loaded_II.diagonal().clone()
    loaded_II.mul_(1.0 / (1.0 + shrinkage)).diagonal().copy_(diagonal_I)
    return loaded_II, math.ldexp(1.0 / (1.0 + shrinkage), -exponent)


def descend(
    weight_OI: Tensor,
    hessian_II: Tensor,
    mask_OI: Tensor,
    pattern: Pattern,
    sweeps: int,
    max_listed: int = MAX_LISTED,
    pull_OI: Tensor | None = None,
) -> Descended:
    """Lower tr(E H E^T) + 2 tr(E P^T), E = W * (1 - mask), group by group, from any mask.

    Groups with at most `max_listed` candidates are set to the best of all of them; larger ones make their best swap of a
    kept and a dropped weight until no swap helps. Equal candidates: the one that moves the fewest weights, then the
    lower index in `masks.candidates`.

    Args:
        weight_OI: fp32 (out, in), dense and finite; not modified.
        hessian_II: fp32 (in, in), symmetric, positive semi-definite, finite; a factor on it changes nothing.
        mask_OI: bool (out, in), the mask to start from; not modified.
        pattern: N kept of M.
        sweeps: most passes over all groups.
        max_listed: candidates up to which a group's are listed.
        pull_OI: fp32 (out, in), P; None = zeros. A factor on H belongs on it, too.

    Raises:
        ValueError: the mask at the start does not keep exactly N of every M.
    """
    if wrong := masks.n_wrong_groups(mask_OI, pattern):
        raise ValueError(f"descent starts from a legal mask; this one has {wrong} groups that are not {pattern.words}")
    # Each row is scaled by a power of two to entries below 1: squares neither overflow nor vanish, and no bit changes.
    exponent_O = torch.frexp(weight_OI.detach().abs().amax(1)).exponent.clamp(-126, 126)
    weight_IO = torch.ldexp(weight_OI.detach(), -exponent_O.unsqueeze(1)).T.contiguous()
    dropped_IO = (~mask_OI).T.to(weight_IO, memory_format=torch.contiguous_format)
    error_IO = weight_IO * dropped_IO
    pull_IO = None if pull_OI is None else torch.ldexp(pull_OI, -exponent_O.unsqueeze(1)).T.contiguous()
    update = _BestOfAll(pattern, weight_IO) if pattern.n_candidates <= max_listed else _BestSwaps(pattern)
    start = _objective(error_IO, hessian_II, exponent_O, pull_IO)
    done, moving = 0, True
    while moving and done < sweeps:
        moving = _sweep(weight_IO, hessian_II, pull_IO, dropped_IO, error_IO, update, pattern)
        done += 1
    end = _objective(error_IO, hessian_II, exponent_O, pull_IO)
    found_OI = (dropped_IO == 0).T.contiguous()
    changed_OG = (found_OI != mask_OI).unflatten(1, (-1, pattern.group)).any(-1)
    return Descended(found_OI, done, masks.density(changed_OG), start, end)


def _objective(error_IO: Tensor, hessian_II: Tensor, exponent_O: Tensor, pull_IO: Tensor | None) -> float:
    """tr(E H E^T) + 2 tr(E P^T) of the rows before they were scaled.

    H is symmetric: only the blocks from the diagonal on are read.
    """
    total_O = torch.zeros(error_IO.shape[1], dtype=torch.float64)
    for start in range(0, len(error_IO), _BLOCK):
        here, later = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        product_BO = hessian_II[here, later] @ error_IO[later]
        product_BO = torch.addmm(product_BO, hessian_II[here, here], error_IO[here], beta=2.0)
        if pull_IO is not None:
            product_BO.add_(pull_IO[here], alpha=2.0)
        total_O += product_BO.mul_(error_IO[here]).sum(0).cpu()
    return (total_O * torch.exp2(2 * exponent_O.cpu().double())).sum().item()  # ldexp would overflow: 2^k in fp32


class _Update(Protocol):
    """How the groups of a block are set, one after the other, to what is best for them."""

    def __call__(
        self, weight_BO: Tensor, hessian_BB: Tensor, outside_BO: Tensor, dropped_BO: Tensor, error_BO: Tensor
    ) -> None:
        """Update `dropped_BO` (1 = dropped, 0 = kept) and `error_BO`, the weight where it is dropped, in place.

        Args:
            weight_BO: the block's columns.
            hessian_BB: the block of H.
            outside_BO: H e of the columns outside the block, and the pull.
            dropped_BO: read and written.
            error_BO: read and written.
        """


def _sweep(
    weight_IO: Tensor,
    hessian_II: Tensor,
    pull_IO: Tensor | None,
    dropped_IO: Tensor,
    error_IO: Tensor,
    update: _Update,
    pattern: Pattern,
) -> bool:
    """Go once over all groups, from left to right; whether any of them changed."""
    block = -(-_BLOCK // pattern.group) * pattern.group
    moved = False
    for start in range(0, len(weight_IO), block):
        here, later = slice(start, start + block), slice(start + block, None)
        outside_BO = hessian_II[here, :start] @ error_IO[:start]  # the large products: all threads
        outside_BO.addmm_(hessian_II[here, later], error_IO[later])
        if pull_IO is not None:
            outside_BO.add_(pull_IO[here])
        before_BO = dropped_IO[here].clone()
        with one_thread():
            update(weight_IO[here], hessian_II[here, here], outside_BO, dropped_IO[here], error_IO[here])
        moved = moved or not torch.equal(before_BO, dropped_IO[here])
    return moved


def _own_blocks(hessian_BB: Tensor, group: int) -> Tensor:
    """The groups' own blocks on the diagonal of H, (G, M, M); a view."""
    return hessian_BB.unflatten(0, (-1, group)).unflatten(2, (-1, group)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _margins(squares_GMO: Tensor, twice_GMO: Tensor, outside_GMO: Tensor) -> Tensor:
    """(G, 1, O): the least gain that is more than rounding, from the size of the terms of a group's costs."""
    return (twice_GMO * outside_GMO).abs_().add_(squares_GMO).sum(1, keepdim=True).mul_(_MARGIN)


class _BestOfAll:
    """The best of all candidates, by their costs: for groups that have few of them.

    A candidate's cost is linear in what its dropped weights bring: w_i^2 H_ii + 2 w_i r_i each, and 2 w_i w_j H_ij each
    pair. So the costs are one small product of these terms with a matrix of zeros and ones.
    """

    def __init__(self, pattern: Pattern, weight_IO: Tensor) -> None:
        drops_KM = ~masks.candidates(pattern)
        first_L, second_L = torch.triu_indices(pattern.group, pattern.group, offset=1)
        counted_KC = torch.cat([drops_KM, drops_KM[:, first_L] & drops_KM[:, second_L]], dim=1)
        self._group = pattern.group
        self._counted_KC = counted_KC.to(weight_IO)
        self._drops_MK = drops_KM.T.contiguous().to(weight_IO)
        self._first_L, self._second_L = first_L.to(weight_IO.device), second_L.to(weight_IO.device)

    def __call__(
        self, weight_BO: Tensor, hessian_BB: Tensor, outside_BO: Tensor, dropped_BO: Tensor, error_BO: Tensor
    ) -> None:
        """See `_Update`."""
        m = self._group
        terms_GCO, single_GMO, twice_GMO = self._terms(weight_BO, hessian_BB, outside_BO, dropped_BO)
        rest_BB = hessian_BB.clone()
        _own_blocks(rest_BB, m).zero_()
        reached_MO = torch.empty_like(weight_BO[:m])
        cost_KO = weight_BO.new_empty(len(self._counted_KC), weight_BO.shape[1])
        least_O = torch.empty_like(cost_KO[0])
        best_O = torch.empty_like(least_O, dtype=torch.int64)
        for outside_MO, rest_MB, single_MO, twice_MO, terms_CO, linear_MO, weight_MO, dropped_MO, error_MO in zip(
            outside_BO.split(m),
            rest_BB.split(m),
            single_GMO.unbind(),
            twice_GMO.unbind(),
            terms_GCO.unbind(),
            terms_GCO[:, :m].unbind(),
            weight_BO.split(m),
            dropped_BO.split(m),
            error_BO.split(m),
            strict=True,
        ):
            torch.addmm(outside_MO, rest_MB, error_BO, out=reached_MO)  # r
            torch.addcmul(single_MO, reached_MO, twice_MO, out=linear_MO)
            torch.mm(self._counted_KC, terms_CO, out=cost_KO)
            torch.min(cost_KO, 0, out=(least_O, best_O))  # the first of equals; far faster than argmin
            torch.index_select(self._drops_MK, 1, best_O, out=dropped_MO)
            torch.mul(dropped_MO, weight_MO, out=error_MO)

    def _terms(
        self, weight_BO: Tensor, hessian_BB: Tensor, outside_BO: Tensor, dropped_BO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The terms (G, C, O) of the costs, M singles (still to be filled) and all pairs; what is fixed of the singles;
        and 2 w."""
        m = self._group
        weight_GMO, dropped_GMO = weight_BO.unflatten(0, (-1, m)), dropped_BO.unflatten(0, (-1, m))
        own_GMM, twice_GMO = _own_blocks(hessian_BB, m), 2 * weight_GMO
        single_GMO = weight_GMO.square().mul_(own_GMM.diagonal(dim1=1, dim2=2).unsqueeze(-1))
        margin_G1O = _margins(single_GMO, twice_GMO, outside_BO.unflatten(0, (-1, m)))
        # Whoever no longer drops a weight that is dropped now pays the margin: so near-ties stay as they are.
        single_GMO.addcmul_(dropped_GMO, margin_G1O, value=-1)
        terms_GCO = weight_BO.new_empty(len(weight_GMO), self._counted_KC.shape[1], weight_BO.shape[1])
        row = m
        for i in range(m - 1):  # the pairs (i, i + 1), ..., (i, m - 1)
            torch.mul(twice_GMO[:, i : i + 1], weight_GMO[:, i + 1 :], out=terms_GCO[:, row : row + m - 1 - i])
            row += m - 1 - i
        terms_GCO[:, m:].mul_(own_GMM[:, self._first_L, self._second_L].unsqueeze(-1))
        return terms_GCO, single_GMO, twice_GMO


class _BestSwaps:
    """The best swap of a kept and a dropped weight, again and again until none helps: for groups of many candidates.

    Dropping i and keeping j instead changes the objective by (w_i^2 H_ii + 2 w_i f_i) + (w_j^2 H_jj - 2 w_j f_j)
    - 2 w_i w_j H_ij, where f = H e^T of the whole row.
    """

    def __init__(self, pattern: Pattern) -> None:
        self._group = pattern.group

    def __call__(
        self, weight_BO: Tensor, hessian_BB: Tensor, outside_BO: Tensor, dropped_BO: Tensor, error_BO: Tensor
    ) -> None:
        """See `_Update`."""
        m = self._group
        own_GMM = _own_blocks(hessian_BB, m)
        twice_GMO = (2 * weight_BO).unflatten(0, (-1, m))
        square_GMO = weight_BO.unflatten(0, (-1, m)).square().mul_(own_GMM.diagonal(dim1=1, dim2=2).unsqueeze(-1))
        margin_G1O = _margins(square_GMO, twice_GMO, outside_BO.unflatten(0, (-1, m)))
        for g in range(len(own_GMM)):
            here = slice(g * m, (g + 1) * m)
            pair_MMO = twice_GMO[g].unsqueeze(1) * weight_BO[here].unsqueeze(0) * own_GMM[g].unsqueeze(-1)
            for _ in range(m):  # always enough in practice; if not, the next sweep goes on
                full_MO = torch.addmm(outside_BO[here], hessian_BB[here], error_BO)
                gradient_MO = full_MO.mul_(twice_GMO[g])
                if not self._swap(square_GMO[g], gradient_MO, pair_MMO, margin_G1O[g, 0], dropped_BO[here]):
                    break
                torch.mul(dropped_BO[here], weight_BO[here], out=error_BO[here])

    def _swap(
        self, square_MO: Tensor, gradient_MO: Tensor, pair_MMO: Tensor, margin_O: Tensor, dropped_MO: Tensor
    ) -> bool:
        """Make the best swap of each row, in place, where it helps; whether any row had one."""
        is_dropped_MO = dropped_MO > 0
        drop_MO = (square_MO + gradient_MO).masked_fill_(is_dropped_MO, math.inf)
        keep_MO = (square_MO - gradient_MO).masked_fill_(~is_dropped_MO, math.inf)
        change_MMO = drop_MO.unsqueeze(1) - pair_MMO  # still without what keeping j brings, the same for every i
        least_O, keep_O = change_MMO.amin(0).add_(keep_MO).min(0)
        helps_1O = (least_O < -margin_O).unsqueeze(0)
        if not helps_1O.any():
            return False
        keep_1O = keep_O.unsqueeze(0)
        drop_1O = change_MMO.gather(1, keep_1O.expand_as(drop_MO).unsqueeze(1)).min(0).indices
        dropped_MO.scatter_(0, drop_1O, helps_1O.to(dropped_MO))  # 0 before: stays 0 where no swap helps
        dropped_MO.scatter_(0, keep_1O, (~helps_1O).to(dropped_MO))  # 1 before
        return True
