"""MaskPro's central claim, measured: how much the policy gradient varies with the loss, the residual, and the tracker.

All three multiply the same scores of the same masks, and have the same expectation: a score's is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmprune import masks, sampling
from nmprune.methods.maskpro import MaskPro
from nmprune.train.batches import Batches
from nmprune.train.losses import lm_loss
from nmprune.train.masked_linear import MaskedModel, Phase, Target, noise

ESTIMATORS = ("vanilla", "residual", "tracker")


@dataclass(frozen=True)
class ScoreVariance:
    """What was found; every mapping has the keys of `ESTIMATORS`.

    Attributes:
        variance: E ||g - E g||^2 of the gradient of all logits together, unbiased, over the draws that count.
        mean_sq_norm: ||E g||^2, unbiased: the squared norm of the mean less its own variance; may be below 0.
        weight: mean and standard deviation of what multiplies the score: loss, r, or r - d.
        draws: that count.
        flips: share of groups that a draw takes off the prior mask, mean.
    """

    variance: Mapping[str, float]
    mean_sq_norm: Mapping[str, float]
    weight: Mapping[str, tuple[float, float]]
    draws: int
    flips: float


@torch.no_grad()
def score_variance(
    model: Any,
    targets: Sequence[Target],
    method: MaskPro,
    priors: Mapping[str, Tensor],
    token_ids: Tensor,
    batch_size: int,
    draws: int,
    run_in: int,
    seed: int,
) -> ScoreVariance:
    """Draw masks again and again from where MaskPro begins, without moving, and compare the three estimators.

    Args:
        model: a causal language model in evaluation mode.
        targets: from `targets_of`.
        method: whose start, tracker and score are used.
        priors: linear name -> packed prior mask.
        token_ids: int64 (n_sequences, seq_len).
        batch_size: sequences per draw; other ones each time, until all were seen.
        draws: that count, at least 2.
        run_in: draws before them that only move the tracker, as a run's first steps do.
        seed: of masks and batches.
    """
    if draws < 2:
        raise ValueError(f"a variance takes two draws, not {draws}")
    phase = Phase()
    masked = MaskedModel(targets, method, phase, priors, seed)
    batches, carried = Batches(len(token_ids), batch_size, 1, seed), method.carried()
    sums, flips = _Sums(), 0.0
    with masked.installed():
        for step in range(run_in + draws):
            tokens = token_ids[batches.of(step)[0]]
            phase.kind, phase.draw = "learn", step
            loss = _loss(model, tokens)
            with phase.fixed(priors):
                prior_loss = _loss(model, tokens)
            advantage, carried = method.advantage(loss, prior_loss, carried)
            if step < run_in:
                continue
            score, flipped = _score(masked, method, priors, step, seed)
            sums.add({"vanilla": loss, "residual": loss - prior_loss, "tracker": advantage}, score)
            flips += flipped / draws
    return sums.result(flips)


def _loss(model: Any, tokens: Tensor) -> float:
    value: float = lm_loss(model(input_ids=tokens, use_cache=False).logits, tokens).double().mean().item()
    return value


def _score(
    masked: MaskedModel, method: MaskPro, priors: Mapping[str, Tensor], step: int, seed: int
) -> tuple[Tensor, float]:
    """fp32 (logits of the model,): the score of what the step drew; and the share of groups off the prior."""
    scores, changed, total = [], 0, 0
    for one in masked.targets:
        logits_OI = masked.state(one.name)["logits"]
        logits_OGM = logits_OI.unflatten(-1, (-1, one.pattern.group))
        generator = noise(seed, one, step, logits_OI.device)
        drawn_OGN = sampling.draw_without_replacement(logits_OGM, one.pattern.kept, generator)
        scores.append(method.score_of(logits_OGM, drawn_OGN, one.pattern).flatten())
        prior_OGM = masks.unpack(priors[one.name].to(drawn_OGN.device), one.shape).view(logits_OGM.shape)
        changed += int((~prior_OGM.gather(-1, drawn_OGN)).any(-1).sum())
        total += drawn_OGN[..., 0].numel()
    return torch.cat(scores), changed / total


class _Sums:
    """Running sums of each estimator's gradients, and of what multiplies the scores."""

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._squares = dict.fromkeys(ESTIMATORS, 0.0)
        self._weights: dict[str, list[float]] = {name: [] for name in ESTIMATORS}

    def add(self, weights: Mapping[str, float], score: Tensor) -> None:
        """One draw."""
        score = score.double()
        square = score.square().sum().item()
        for name, weight in weights.items():
            self._gradients.setdefault(name, torch.zeros_like(score)).add_(score, alpha=weight)
            self._squares[name] += weight**2 * square
            self._weights[name].append(weight)

    def result(self, flips: float) -> ScoreVariance:
        """Of all draws so far."""
        n = len(self._weights["vanilla"])
        variance, mean_sq_norm, spread = {}, {}, {}
        for name in ESTIMATORS:
            of_mean = (self._gradients[name] / n).square().sum().item()
            variance[name] = (self._squares[name] / n - of_mean) * n / (n - 1)
            mean_sq_norm[name] = of_mean - variance[name] / n
            weights = torch.tensor(self._weights[name], dtype=torch.float64)
            spread[name] = (weights.mean().item(), weights.std().item())
        return ScoreVariance(variance, mean_sq_norm, spread, n, flips)
