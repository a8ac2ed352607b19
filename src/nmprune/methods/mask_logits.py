"""From the logits of groups to soft and hard masks and back, many groups at a time and without a graph.

The logit of a candidate mask S is the sum over its slots of their scores u_j, plus a logit of its own where there is one. The
soft mask is the softmax over candidates at a temperature, applied to the candidates (HyperPrune, equation 37). With
c_S = sum over j in S of dL/dM_j and z the softmax, dL/dlogit_S = z_S (c_S - sum over S' of z_S' c_S') / temperature: no graph
is needed to pull a gradient back through the mask. Beyond 128 candidates (8:16) they are not listed, and `soft_top`
computes the same from the slots.

Groups lie along the last axis: one plane per slot or candidate, so that every operation runs over contiguous numbers
(a softmax over 6 numbers in a row takes 30 times as long as over 6 planes).

Legend: R rows, I in_features, G groups, M group, K candidates; L planes of noise: K where candidates are listed, else M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmprune import masks, ranking, sampling
from nmprune.pattern import Pattern

MAX_LISTED = 128  # candidates of a group that get a logit each: all of 4:8 (70); 8:16 has 12,870


@dataclass(frozen=True)
class SoftMask:
    """Soft masks of some groups, with what is needed to pull a gradient back.

    Attributes:
        mask: fp32 (M, G), entries in [0, 1]; 0 or 1 where it was made hard.
        softmax: fp32 (K, G), over the candidates; None where they are not listed.
        slots: fp32 (M, G), the slot scores with their noise, over the temperature; None where candidates are listed.
    """

    mask: Tensor
    softmax: Tensor | None
    slots: Tensor | None


class MaskLogits:
    """The arithmetic of one pattern on one device."""

    def __init__(self, pattern: Pattern, device: torch.device | str = "cpu") -> None:
        self.pattern = pattern
        self.listed = pattern.n_candidates <= MAX_LISTED
        self.candidates_KM = masks.candidates(pattern).to(device, torch.float32) if self.listed else None

    @property
    def n_noise(self) -> int:
        """Planes of Gumbel noise: one per candidate, or per slot where candidates are not listed."""
        return self.pattern.n_candidates if self.listed else self.pattern.group

    def candidate_logits(self, slots_MG: Tensor, own_KG: Tensor | None = None) -> Tensor:
        """(K, G): the sum of a candidate's slots, plus its own logit."""
        assert self.candidates_KM is not None
        if own_KG is None:
            return self.candidates_KM @ slots_MG
        return torch.addmm(own_KG, self.candidates_KM, slots_MG)

    def soft(
        self,
        slots_MG: Tensor,
        own_KG: Tensor | None,
        temperature: float,
        noise_LG: Tensor | None = None,
        hard: bool = False,
    ) -> SoftMask:
        """Soft masks, or hard ones (the best candidate with its noise) that keep what a soft gradient needs.

        Args:
            slots_MG: slot scores.
            own_KG: logits of whole candidates, where the head makes them.
            temperature: > 0.
            noise_LG: Gumbel noise.
            hard: straight-through: a hard mask forward, the soft one's gradient backward.
        """
        if self.candidates_KM is None:
            noisy_MG = slots_MG if noise_LG is None else slots_MG + noise_LG
            scaled_MG = noisy_MG / temperature
            soft_MG = self._top(noisy_MG) if hard else _soft_top(scaled_MG, self.pattern.kept, 1.0)
            return SoftMask(soft_MG, None, scaled_MG)
        logits_KG = self.candidate_logits(slots_MG, own_KG)
        if noise_LG is not None:
            logits_KG += noise_LG
        best_1G = logits_KG.amax(0, keepdim=True)
        hard_MG = self.candidates_KM.T @ _first_best(logits_KG, best_1G) if hard else None
        softmax_KG = logits_KG.sub_(best_1G).div_(temperature).exp_()
        softmax_KG /= softmax_KG.sum(0, keepdim=True)
        return SoftMask(self.candidates_KM.T @ softmax_KG if hard_MG is None else hard_MG, softmax_KG, None)

    def pull(self, soft: SoftMask, along_MG: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """The gradient with respect to the slot scores and to the candidates' own logits, from dL/dM.

        Args:
            soft: as `soft` made it; its softmax is overwritten.
            along_MG: dL/dM.
            temperature: the one that `soft` was made with.

        Returns:
            (M, G), and (K, G) where candidates are listed.
        """
        if self.candidates_KM is None or soft.softmax is None:
            assert soft.slots is not None
            with torch.enable_grad():
                slots_MG = soft.slots.detach().requires_grad_()
                made_MG = _soft_top(slots_MG, self.pattern.kept, 1.0)
            (pulled_MG,) = torch.autograd.grad(made_MG, slots_MG, along_MG)
            return pulled_MG / temperature, None
        cost_KG = self.candidates_KM @ along_MG
        cost_KG -= (cost_KG * soft.softmax).sum(0, keepdim=True)
        pulled_KG = soft.softmax.mul_(cost_KG).div_(temperature)
        return self.candidates_KM.T @ pulled_KG, pulled_KG

    def hard(self, slots_MG: Tensor, own_KG: Tensor | None) -> Tensor:
        """fp32 (M, G), 1 where kept: the best candidate of each group; among equals the first."""
        if own_KG is None or self.candidates_KM is None:
            return self._top(slots_MG)
        logits_KG = self.candidate_logits(slots_MG, own_KG)
        return self.candidates_KM.T @ _first_best(logits_KG, logits_KG.amax(0, keepdim=True))

    def _top(self, slots_MG: Tensor) -> Tensor:
        """The N largest slots: for slot scores the same as the best candidate, and exact where sums would round."""
        kept_GM = ranking.top(slots_MG.T, self.pattern.kept)
        return kept_GM.T.to(slots_MG.dtype, memory_format=torch.contiguous_format)


def _first_best(logits_KG: Tensor, best_1G: Tensor) -> Tensor:
    """fp32 (K, G): 1 at the first candidate that reaches the best logit."""
    is_best_KG = logits_KG == best_1G
    free_G = torch.ones_like(is_best_KG[0])
    for is_best_G in is_best_KG:
        is_best_G &= free_G
        free_G ^= is_best_G
    return is_best_KG.to(logits_KG.dtype)


def _soft_top(slots_MG: Tensor, kept: int, temperature: float) -> Tensor:
    return sampling.soft_top(slots_MG.T, kept, temperature).T


def planes(values_RI: Tensor, group: int) -> Tensor:
    """(M, G), a copy: slot j of every group of these rows, row after row."""
    # slot by slot: a transposing copy takes three times as long
    return torch.stack(values_RI.reshape(-1, group).to(torch.float32).unbind(-1))


def rows(values_MG: Tensor, in_features: int) -> Tensor:
    """(R, I): the inverse of `planes`."""
    return values_MG.T.reshape(-1, in_features)
