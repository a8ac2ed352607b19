"""One linear while its masks are learned: its rows in blocks, its prior, its free scores, its outlier term, its features.

Legend: O out_features, I in_features, G groups, M group, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmprune import masks
from nmprune.methods.base import LayerWork, State
from nmprune.methods.group_features import Features
from nmprune.methods.hyperprune_settings import HyperPruneSettings
from nmprune.methods.mask_logits import MaskLogits, planes


@dataclass(frozen=True)
class Block:
    """Some rows of a linear; their groups are `start * G .. stop * G` of it, with G groups per row.

    Attributes:
        number: of the block in its linear.
        start: first row.
        stop: row after the last.
        groups: where the block's groups are, as columns of planes.
    """

    number: int
    start: int
    stop: int
    groups: slice


class LinearMasks:
    """What the learner keeps for one linear.

    Args:
        settings: of the method.
        work: the layer.
        name: of the linear in it.
        role: its number among the components.
        logits: the arithmetic of its pattern.
    """

    def __init__(self, settings: HyperPruneSettings, work: LayerWork, name: str, role: int, logits: MaskLogits) -> None:
        self.name, self.role, self.logits = name, role, logits
        self._free, self._stands = settings.residual, settings.sample_share < 1
        self.weight_OI = work.weights[name]
        self.blocks = _blocks(self.weight_OI, logits.pattern.group, settings.block, settings.sample_share)
        self.prior_OI = work.priors.get(name)
        self.energy_I = self._energy(settings, work)
        self.norm_I = self._norms(settings, work)
        self.features = self._features(settings, work) if settings.network else None
        self.masked_OI = torch.empty_like(self.weight_OI)  # W' of the current step
        self.outputs_KG: Tensor | None = None  # the network's, where it is not run in every step
        if settings.residual:
            self.residual_MG = self._start(settings)
            self.first_MG, self.second_MG = torch.zeros_like(self.residual_MG), torch.zeros_like(self.residual_MG)
            self.counts_B = torch.zeros(len(self.blocks), dtype=torch.int64)

    def _energy(self, settings: HyperPruneSettings, work: LayerWork) -> Tensor | None:
        """What w_ij^2 of a kept weight counts in the outlier term; equation 10."""
        if not settings.lambda1:
            return None
        norms_I = work.stats[self.name].squared_norms()
        if settings.outlier == "sum":  # the sum over a sequence's tokens, as in the loss
            return (norms_I / (len(work.train) + len(work.held_out))).float()
        total = (self.weight_OI.double().square() @ norms_I.double()).sum().item()
        return (norms_I / max(total * len(work.weights), 1e-300)).float()

    def _norms(self, settings: HyperPruneSettings, work: LayerWork) -> Tensor | None:
        wanted = settings.features in ("activations", "first_order") or settings.prior_form == "scores"
        return work.stats[self.name].squared_norms().float().sqrt() if wanted else None

    def _features(self, settings: HyperPruneSettings, work: LayerWork) -> Features:
        gram_II = work.stats[self.name].gram() if settings.features == "first_order" else None
        norm_I = self.norm_I if settings.features in ("activations", "first_order") else None
        features = Features(settings.features, self.weight_OI, self.logits.pattern.group, norm_I, gram_II)
        if gram_II is not None:
            features.refresh(self.first_mask())
        return features

    def first_mask(self) -> Tensor:
        """bool (O, I): the prior's mask; without a prior the largest w^2 x^2 (Wanda's), as far as norms are known."""
        if self.prior_OI is not None:
            return self.prior_OI
        scores_OI = self.weight_OI.abs() if self.norm_I is None else self.weight_OI.abs() * self.norm_I
        return masks.from_scores(scores_OI, self.logits.pattern)

    def prior_slots(self, form: str, start: int, stop: int) -> Tensor | None:
        """(M, G): the prior as slot scores: 1 where it keeps, or standardised scores; None without a prior."""
        if self.prior_OI is None:
            return None
        if form == "mask" or self.norm_I is None:
            return planes(self.prior_OI[start:stop], self.logits.pattern.group)
        score_MG = planes(self.weight_OI[start:stop].abs() * self.norm_I, self.logits.pattern.group)
        score_MG -= score_MG.mean(0, keepdim=True)
        return score_MG.div_(score_MG.square().mean(0, keepdim=True).sqrt_().clamp_(min=1e-30))

    def _start(self, settings: HyperPruneSettings) -> Tensor:
        group = self.logits.pattern.group
        start_MG = self.weight_OI.new_zeros(group, self.weight_OI.numel() // group)
        for block in self.blocks:
            prior_MG = self.prior_slots(settings.prior_form, block.start, block.stop)
            if prior_MG is not None:
                start_MG[:, block.groups] = prior_MG * settings.residual_start
        return start_MG

    def along(self, gradient_OI: Tensor, block: Block, lambda1: float) -> Tensor:
        """(M, G): dL/dM of a block, from dL/dW'."""
        weight_RI = self.weight_OI[block.start : block.stop]
        along_RI = gradient_OI[block.start : block.stop] * weight_RI
        if self.energy_I is not None:
            along_RI -= weight_RI.square().mul_(self.energy_I * lambda1)
        return planes(along_RI, self.logits.pattern.group)

    def snapshot(self) -> State:
        """Copies of what changes from step to step."""
        state: State = {}
        if self._free:
            state[f"residual.{self.name}"] = self.residual_MG.clone()
            state[f"residual_first.{self.name}"] = self.first_MG.clone()
            state[f"residual_second.{self.name}"] = self.second_MG.clone()
            state[f"residual_counts.{self.name}"] = self.counts_B.clone()
        if self._stands:  # what was not chosen stands at the mask of an earlier step
            state[f"standing.{self.name}"] = masks.pack(self.masked_OI != 0)
        if self.features is not None and self.features.mask_OI is not None:
            state[f"feature_mask.{self.name}"] = masks.pack(self.features.mask_OI)
        return state

    def restore(self, state: State) -> None:
        """Go on from `state`, as `snapshot` made it; W' comes last, with `restore_standing`."""
        device = self.weight_OI.device
        if self._free:
            self.residual_MG = state[f"residual.{self.name}"].to(device, copy=True)
            self.first_MG = state[f"residual_first.{self.name}"].to(device, copy=True)
            self.second_MG = state[f"residual_second.{self.name}"].to(device, copy=True)
            self.counts_B = state[f"residual_counts.{self.name}"].clone()
        if self.features is not None and self.features.mask_OI is not None:
            self.features.refresh(self._unpacked(state[f"feature_mask.{self.name}"]))

    def restore_standing(self, state: State) -> None:
        """W' of the groups that do not learn in every step."""
        if self._stands:
            torch.mul(self.weight_OI, self._unpacked(state[f"standing.{self.name}"]), out=self.masked_OI)

    def _unpacked(self, bits: Tensor) -> Tensor:
        shape = (self.weight_OI.shape[0], self.weight_OI.shape[1])
        return masks.unpack(bits.to(self.weight_OI.device), shape)


def _blocks(weight_OI: Tensor, group: int, most_groups: int, share: float) -> list[Block]:
    """Whole rows, `most_groups` groups at most where a row allows it; at least 1 / share blocks where there are rows."""
    n_rows, per_row = len(weight_OI), weight_OI.shape[1] // group
    size = max(1, min(most_groups // per_row, int(n_rows * share)))
    starts = range(0, n_rows, size)
    stops = [min(start + size, n_rows) for start in starts]
    return [Block(i, a, b, slice(a * per_row, b * per_row)) for i, (a, b) in enumerate(zip(starts, stops, strict=True))]
