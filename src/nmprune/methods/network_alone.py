"""The shared network without the free scores of a layer: what it alone makes of it, and teaching it what was found.

Legend: O out_features, I in_features, G groups, M group, F features, N remembered groups.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nmprune import masks
from nmprune.methods.base import State
from nmprune.methods.linear_masks import LinearMasks
from nmprune.methods.mask_learner import MaskLearner, Masks, seeded
from nmprune.methods.mask_logits import planes
from nmprune.pattern import Pattern

_STRATA = 64  # groups that are looked at for each one that is remembered


def without_scores(learner: MaskLearner) -> MaskLearner:
    """The same layer with the network and the prior alone: the prior stands where the free scores started."""
    settings = learner.settings
    resting = settings.residual_start if settings.residual else 0.0
    for linear in learner.linears:
        linear.outputs_KG = None
    alone = dataclasses.replace(settings, residual=False, network_every=1, sample_share=1.0)
    made = MaskLearner(alone, learner.work, learner.linears, learner.network, learner.seed, resting)
    made.step = settings.steps
    return made


def regenerate(alone: MaskLearner) -> Masks:
    """The masks that the network makes of a layer; with first-order features in rounds, as in training.

    A network that was taught the final masks (`distil`) was taught them from the first masks' features: one round.
    """
    settings = alone.settings
    for _ in range(settings.refreshes if settings.features == "first_order" and not settings.distil else 0):
        alone.refresh()
    return alone.hard_masks()


def distil(alone: MaskLearner, found: Masks, steps: int) -> None:
    """Teach the network the masks that a layer ended with: the likelihood of each group's mask, on random blocks.

    The features are those that `regenerate` will meet: taken at the first masks.

    Args:
        alone: the layer without free scores.
        found: bool (O, I) by linear.
        steps: updates; each looks at one block of every linear.
    """
    network, settings = alone.network, alone.settings
    assert network is not None
    network.restart()
    for linear in alone.linears:
        if linear.features is not None:
            linear.features.refresh(linear.first_mask())
    for step in range(steps):
        for linear in alone.linears:
            drawn = torch.randint(len(linear.blocks), (1,), generator=seeded(alone.seed, "distil", step, linear.name))
            block = linear.blocks[int(drawn)]
            slots_MG, own_KG = alone.block_logits(linear, block)
            soft = linear.logits.soft(slots_MG, own_KG, 1.0)
            kept_MG = planes(found[linear.name][block.start : block.stop], linear.logits.pattern.group)
            if settings.head == "slots":
                gradient = soft.mask - kept_MG  # of the negative log-likelihood: the marginals minus the mask
            else:
                assert soft.softmax is not None
                is_it_KG = linear.logits.candidate_logits(kept_MG) == linear.logits.pattern.kept
                gradient = soft.softmax - is_it_KG.float()
            assert linear.features is not None
            gradient /= gradient.shape[1] * len(alone.linears)
            network.gather(linear.features.of(block.start, block.stop), linear.role, gradient)
        network.gather_terms()
        network.update(settings.network_lr)


def remembered(learner: MaskLearner, cache_size: int) -> State:
    """The network's state for the next layer, with some groups of each linear of this one in its cache."""
    assert learner.network is not None
    features, roles = [], []
    for linear in learner.linears:
        features.append(_strata(linear, cache_size, seeded(learner.seed, "cache", linear.name)))
        roles.append(torch.full((features[-1].shape[1],), linear.role, device=linear.weight_OI.device))
    return learner.network.state(torch.cat(features, 1), torch.cat(roles))


def _strata(linear: LinearMasks, cache_size: int, generator: torch.Generator) -> Tensor:
    """(F, N): features of groups from small scores to large ones: of many random groups in order of size, every 64th."""
    assert linear.features is not None
    group = linear.logits.pattern.group
    n_groups, per_row = linear.weight_OI.numel() // group, linear.weight_OI.shape[1] // group
    wanted = min(cache_size, n_groups)
    drawn = torch.randperm(n_groups, generator=generator)[: wanted * _STRATA].to(linear.weight_OI.device)
    weight_NM = linear.weight_OI.view(-1, group)[drawn]
    if linear.norm_I is not None:
        weight_NM = weight_NM * linear.norm_I.view(-1, group)[drawn % per_row]
    order = weight_NM.square().sum(-1).argsort(stable=True)
    places = torch.arange(wanted, device=drawn.device) * len(drawn) // max(1, wanted) + len(drawn) // max(1, 2 * wanted)
    picked = drawn[order[places]]
    columns = [
        linear.features.of(row, row + 1)[:, column : column + 1]
        for row, column in zip((picked // per_row).tolist(), (picked % per_row).tolist(), strict=True)
    ]
    return torch.cat(columns, 1)


def agreement(one_OI: Tensor, other_OI: Tensor, pattern: Pattern) -> float:
    """Share of the groups that have the same mask in both, 0..1."""
    return 1.0 - masks.density((one_OI != other_OI).unflatten(1, (-1, pattern.group)).any(-1))
