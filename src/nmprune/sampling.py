"""Soft and random masks: Gumbel-softmax, relaxed subsets, straight-through, draws without replacement and their scores.

Randomness comes only through a passed `torch.Generator`; numbers are drawn where the generator lives, so that a CPU
generator gives the same noise for every device.

Legend: G groups (any leading axes), M group, K candidates, N kept of M. Logits of a group mean the same up to a constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nmprune import ranking

_SMALLEST = 2.0**-25  # half a step of `torch.rand`: stands for the uniform numbers that it rounds to 0
_SURE = 20.0  # a slot this far from the cut is in or out: e^-20 is below what fp32 adds to 1; e^(20 * 31) fits in fp64
_CHUNK = 1 << 12  # groups whose tables stand in memory together
_FEW = 16  # softmax over so few numbers in a row is slow; over as many planes it is fast


def gumbel(shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise, fp32, always finite (between -2.9 and 16.7): -log(-log(u)), u uniform in (0, 1)."""
    noise = torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float32).to(device)
    return noise.clamp_(min=_SMALLEST).log_().neg_().log_().neg_()


def soft_mask(logits_GK: Tensor, candidates_KM: Tensor, temperature: float, noise_GK: Tensor | None = None) -> Tensor:
    """Gumbel-softmax over the candidate masks: softmax((logits + noise) / temperature) @ candidates.

    Source: MaskLLM (Fang et al. 2024, equations 6 and 7); HyperPrune, equation 37.

    Args:
        logits_GK: (..., K), differentiable.
        candidates_KM: (K, M), as `masks.candidates` lists them.
        temperature: > 0; towards 0 the mask becomes hard.
        noise_GK: (..., K) Gumbel noise; None = without.

    Returns:
        (..., M), entries in [0, 1], every group sums to N.
    """
    scaled_GK = _scaled(logits_GK, temperature, noise_GK)
    return _softmax(scaled_GK) @ candidates_KM.to(scaled_GK)


def soft_top(slot_GM: Tensor, n: int, temperature: float, noise_GM: Tensor | None = None) -> Tensor:
    """The relaxed n-subset, for patterns with too many candidates to list: how likely each slot is to be kept.

    It is `soft_mask` of the logits sum over j in S of slot_j, one for each n-subset S, without listing the subsets: the
    marginals of that softmax, by the recursion of the elementary symmetric polynomials (Chen, Dempster, Liu 1994). The
    successive softmax of Xie and Ermon 2019 has the same limit towards temperature 0, but its entries can exceed 1.

    Args:
        slot_GM: (..., M) one logit per slot, differentiable.
        n: how many of M are kept, 1 <= n < M.
        temperature: > 0; towards 0 the n largest get 1.
        noise_GM: (..., M) Gumbel noise; None = without. With it and towards temperature 0: Plackett-Luce draws.

    Returns:
        (..., M), entries in [0, 1] and groups that sum to n, both up to rounding.
    """
    marginals: Tensor = _Marginals.apply(_scaled(slot_GM, temperature, noise_GM), n)
    return marginals


def _scaled(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """(logits + noise) / temperature with one temporary."""
    return logits / temperature if noise is None else (logits + noise).div_(temperature)


def _softmax(values_GK: Tensor) -> Tensor:
    """Softmax over the last axis, over planes where it is short."""
    if values_GK.shape[-1] > _FEW:
        return values_GK.softmax(-1)
    return values_GK.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


class _Marginals(torch.autograd.Function):
    """P(slot in S) where P(S) is in proportion to exp(sum over S of z); the gradient is a covariance times a vector.

    Only z is kept for the backward pass; the tables are made again, some groups at a time.
    """

    @staticmethod
    def forward(ctx: Any, z_GM: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(z_GM)
        ctx.n = n
        return torch.cat([_marginals(z, n) for z in _chunks(z_GM)]).reshape(z_GM.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z_GM,) = ctx.saved_tensors
        pairs = zip(_chunks(z_GM), _chunks(grads[0]), strict=True)
        return torch.cat([_marginals(z, ctx.n, along) for z, along in pairs]).reshape(z_GM.shape), None


def _chunks(values_GM: Tensor) -> tuple[Tensor, ...]:
    return values_GM.reshape(-1, values_GM.shape[-1]).split(_CHUNK)


def _marginals(z_GM: Tensor, n: int, along_GM: Tensor | None = None) -> Tensor:
    """(G, M): the marginals, or where there is a direction their derivative along it.

    The covariance of the slots is symmetric: the derivative along a vector is also the gradient of the product with it.
    """
    cut_G1 = z_GM.topk(n + 1, dim=-1).values[:, n - 1 :].mean(-1, keepdim=True)
    weight_MG = (z_GM - cut_G1).double().clamp_(-_SURE, _SURE).exp_().T.contiguous()
    left, right = _polynomials(weight_MG, n), _polynomials(weight_MG.flip(0), n)[::-1]
    # k of the n - 1 others come from the left of a slot, the rest from its right
    others_MG = torch.stack([(ahead[:n] * _falling(after, n)).sum(0) for ahead, after in _pairs(left, right)])
    marginal_MG = others_MG * weight_MG / left[-1][n]
    if along_GM is None:
        return marginal_MG.T.to(z_GM)
    along_MG = along_GM.double().T.contiguous()
    left_along = _derivatives(weight_MG, along_MG, left)
    right_along = _derivatives(weight_MG.flip(0), along_MG.flip(0), right[::-1])[::-1]
    moved_MG = along_MG * others_MG
    for slot, (ahead, after) in enumerate(_pairs(left, right_along)):
        moved_MG[slot] += (ahead[:n] * _falling(after, n)).sum(0)
    for slot, (ahead, after) in enumerate(_pairs(left_along, right)):
        moved_MG[slot] += (ahead[:n] * _falling(after, n)).sum(0)
    moved_MG *= weight_MG / left[-1][n]
    return moved_MG.addcmul_(marginal_MG, left_along[-1][n] / left[-1][n], value=-1).T.to(z_GM)


def _pairs(left: list[Tensor], right: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Per slot, the tables of all slots ahead of it and of all after it."""
    return zip(left[:-1], right[1:], strict=True)


def _falling(table: Tensor, n: int) -> Tensor:
    return table[:n].flip(0)


def _polynomials(weight_MG: Tensor, n: int) -> list[Tensor]:
    """Before, between and after the slots: elementary symmetric polynomials 0..n of the weights so far, (n + 1, G)."""
    table = weight_MG.new_zeros(n + 1, weight_MG.shape[1])
    table[0] = 1
    tables = [table]
    for w_G in weight_MG:
        tables.append(table := table.clone())
        table[1:].addcmul_(w_G, tables[-2][:-1])
    return tables


def _derivatives(weight_MG: Tensor, along_MG: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """Of `_polynomials`, where the logarithms of the weights move along `along_MG`."""
    moved = [torch.zeros_like(tables[0])]
    for w_G, v_G, table in zip(weight_MG, along_MG, tables[:-1], strict=True):
        moved.append(moved[-1].clone())
        moved[-1][1:].addcmul_(w_G, torch.addcmul(moved[-2][:-1], v_G, table[:-1]))
    return moved


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of `hard`, exactly, with the gradient of `soft` (Bengio et al. 2013)."""
    result: Tensor = _StraightThrough.apply(soft, hard)
    return result


class _StraightThrough(torch.autograd.Function):
    """hard + (soft - soft.detach()) would be `hard` only up to rounding."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.to(soft.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def draw_without_replacement(logits_GM: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` slots of each group, one after the other, each with probability softmax(logits of those that remain).

    Plackett-Luce, by Gumbel top-n: the n largest of logits + Gumbel noise, in falling order (Yellott 1977).

    Returns:
        int64 (..., n), in the order drawn.
    """
    keys = gumbel(logits_GM.shape, generator, logits_GM.device).add_(logits_GM.detach())
    drawn = [keys.argmax(-1, keepdim=True)]
    for _ in range(n - 1):
        keys.scatter_(-1, drawn[-1], -torch.inf)
        drawn.append(keys.argmax(-1, keepdim=True))
    return torch.cat(drawn, -1)


def draw_mask(logits_GM: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """bool (..., M): the set that `draw_without_replacement` draws from a generator in the same state."""
    return ranking.top(gumbel(logits_GM.shape, generator, logits_GM.device).add_(logits_GM.detach()), n)


def ordered_log_score(logits_GM: Tensor, drawn_GN: Tensor) -> Tensor:
    """(...,): log-probability of drawing these slots in this order, sum over k of l[s_k] - logsumexp(l of the remaining)."""
    return _walk_draws(logits_GM, drawn_GN, None)


def ordered_score_gradient(logits_GM: Tensor, drawn_GN: Tensor) -> Tensor:
    """(..., M): gradient of `ordered_log_score` with respect to the logits, in closed form and without a graph.

    sum over k of (one-hot(s_k) - softmax(l of the slots that remained at draw k)); O(N M) a group.
    """
    gradient_MG = torch.zeros_like(logits_GM.detach().movedim(-1, 0), memory_format=torch.contiguous_format)
    _walk_draws(logits_GM, drawn_GN, gradient_MG)
    return gradient_MG.movedim(0, -1)


def _walk_draws(logits_GM: Tensor, drawn_GN: Tensor, gradient_MG: Tensor | None) -> Tensor:
    """`ordered_log_score`; its gradient is added to `gradient_MG` where there is one."""
    remaining_MG = logits_GM.detach().movedim(-1, 0).clone(memory_format=torch.contiguous_format)
    score_1G = torch.zeros_like(remaining_MG[:1])
    for slot_1G in drawn_GN.movedim(-1, 0).contiguous().split(1):
        log_p_MG = remaining_MG.log_softmax(0)
        score_1G += log_p_MG.gather(0, slot_1G)
        if gradient_MG is not None:
            gradient_MG -= log_p_MG.exp_()
            gradient_MG.scatter_add_(0, slot_1G, torch.ones_like(score_1G))
        remaining_MG.scatter_(0, slot_1G, -torch.inf)
    return score_1G.squeeze(0)


def set_log_score(logits_GM: Tensor, drawn_GN: Tensor) -> Tensor:
    """(...,): log-probability of drawing this set of slots in any order: exact, sums N! orders (N <= 5 or so)."""
    return _all_orders(logits_GM, drawn_GN).logsumexp(0)


def set_score_gradient(logits_GM: Tensor, drawn_GN: Tensor) -> Tensor:
    """(..., M): gradient of `set_log_score`: the orders' gradients, weighted by how likely each was given the set.

    Lower variance than `ordered_score_gradient` (Rao-Blackwell) at N! times its cost. For N = 2 it is MaskPro's own score.
    """
    share_LG = _all_orders(logits_GM, drawn_GN).softmax(0)
    gradient = torch.zeros_like(logits_GM)
    for share_G, order in zip(share_LG, _orders(drawn_GN), strict=True):
        gradient.addcmul_(ordered_score_gradient(logits_GM, order), share_G.unsqueeze(-1))
    return gradient


def _all_orders(logits_GM: Tensor, drawn_GN: Tensor) -> Tensor:
    """(N!, ...): log-probability of each order of the set."""
    return torch.stack([ordered_log_score(logits_GM, order) for order in _orders(drawn_GN)])


def _orders(drawn_GN: Tensor) -> list[Tensor]:
    return [drawn_GN[..., list(order)] for order in itertools.permutations(range(drawn_GN.shape[-1]))]
