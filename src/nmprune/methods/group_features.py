"""What a mask network is told about a group of M weights. Everything but the raw weights is free of scale.

| set | per slot | per group |
|---|---|---|
| raw | w (the paper) | |
| scaled | w over the group's rms | log of the group's rms, minus the linear's mean |
| activations | scaled, and s = |w| ||x||, Wanda's score, over the group's rms | the same log of it |
| first_order | activations, and q over the group's mean q, the pull v over the same, and the current mask | |

q_j = w_j^2 H_jj is what the squared output error rises by when w_j alone is dropped. v_j = w_j (E H)_j, E what the current
hard mask drops in the row outside of the group: with it, dropping a set S of the group costs
sum over S of q_j + 2 v_j, plus the cross terms inside S. The current mask is there because groups that all react to the
same E at once overshoot: the network can learn to stay. v is pressed to v / sqrt(1 + |v|), logs stop at 8.

Legend: O out_features, I in_features, R rows, G groups, M group, F features; `M` planes of one number per slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmprune.methods.mask_logits import planes

SETS = ("raw", "scaled", "activations", "first_order")
_TINY = 1e-30
_LARGEST_LOG = 8.0


def n_features(name: str, group: int) -> int:
    """Features of a group under the set of that name."""
    return {"raw": group, "scaled": group + 1, "activations": 2 * group + 2, "first_order": 5 * group + 2}[name]


class Features:
    """The features of one linear's groups, made for some rows at a time.

    Args:
        name: of the feature set.
        weight_OI: fp32, dense.
        group: M.
        norm_I: fp32, ||x_j||; None for "raw" and "scaled".
        gram_II: fp32; None but for "first_order".
    """

    def __init__(
        self, name: str, weight_OI: Tensor, group: int, norm_I: Tensor | None = None, gram_II: Tensor | None = None
    ) -> None:
        self._name, self._weight_OI, self._group, self._norm_I, self._gram_II = name, weight_OI, group, norm_I, gram_II
        self._pull_OI: Tensor | None = None
        self.mask_OI: Tensor | None = None  # the hard mask of the last refresh
        self._mean_log_weight = self._mean_log(weight_OI)
        self._mean_log_score = 0.0 if norm_I is None else self._mean_log(weight_OI * norm_I)

    def refresh(self, mask_OI: Tensor) -> None:
        """Take `mask_OI`, bool, as the current hard mask."""
        if self._name != "first_order":
            return
        assert self._gram_II is not None
        dropped_OI = self._weight_OI.masked_fill(mask_OI, 0.0)
        pull_OI = dropped_OI @ self._gram_II
        blocks = self._gram_II.view(-1, self._group, len(self._gram_II) // self._group, self._group)
        own_GMM = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # each group's own part of the Gram matrix
        own_OGM = torch.einsum("ogm,gmn->ogn", dropped_OI.unflatten(1, (-1, self._group)), own_GMM)
        self._pull_OI = pull_OI.sub_(own_OGM.flatten(1)).mul_(self._weight_OI)
        self.mask_OI = mask_OI

    def of(self, start: int, stop: int) -> Tensor:
        """(F, G): the features of the groups of rows start..stop."""
        weight_MG = planes(self._weight_OI[start:stop], self._group)
        if self._name == "raw":
            return weight_MG
        parts = _scaled(weight_MG, self._mean_log_weight)
        if self._norm_I is not None:
            norm_MG = self._norm_I.view(-1, self._group).T.repeat(1, stop - start)
            parts += _scaled(weight_MG.abs() * norm_MG, self._mean_log_score)
        if self._pull_OI is not None and self.mask_OI is not None and self._gram_II is not None:
            diagonal_MG = self._gram_II.diagonal().view(-1, self._group).T.repeat(1, stop - start)
            cost_MG = weight_MG.square() * diagonal_MG
            mean_1G = cost_MG.mean(0, keepdim=True).clamp_(min=_TINY)
            pull_MG = planes(self._pull_OI[start:stop], self._group)
            parts += [cost_MG / mean_1G, _pressed(pull_MG / mean_1G), planes(self.mask_OI[start:stop], self._group)]
        return torch.cat(parts)

    def _mean_log(self, values_OI: Tensor) -> float:
        """Mean over the groups of the log of their rms."""
        return _log_rms(values_OI.unflatten(1, (-1, self._group)).square().mean(-1)).mean().item()


def _scaled(values_MG: Tensor, mean_log: float) -> list[Tensor]:
    """The values over their group's rms, and the log of the rms minus the linear's mean."""
    mean_square_1G = values_MG.square().mean(0, keepdim=True)
    log_1G = (_log_rms(mean_square_1G) - mean_log).clamp_(-_LARGEST_LOG, _LARGEST_LOG)
    return [values_MG / mean_square_1G.clamp(min=_TINY).sqrt_(), log_1G]


def _pressed(values: Tensor) -> Tensor:
    """Odd, and grows like a square root; a logarithm would take half the time of all features."""
    return values * values.abs().add_(1.0).rsqrt_()


def _log_rms(mean_square: Tensor) -> Tensor:
    return mean_square.clamp(min=_TINY).log_().mul_(0.5)
