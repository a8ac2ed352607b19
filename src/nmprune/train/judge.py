"""Held-out judgement of hard masks: the best ones are kept, and none are taken that are worse than the prior's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from nmprune import masks
from nmprune.methods.base import Course, State
from nmprune.train.masked_linear import MaskedModel
from nmprune.train.settings import TrainRecipe


@dataclass(frozen=True)
class Judgement:
    """What hard masks are worth.

    Attributes:
        step: optimiser steps that they come from.
        loss: on the held-out sequences, of the masks on the original weights.
        flips: share of the groups whose mask is not the prior's, 0..1.
    """

    step: int
    loss: float
    flips: float


@dataclass(frozen=True)
class Learned:
    """What a whole-model run came to.

    Attributes:
        bits: linear name -> packed mask that is taken.
        prior_loss: held-out loss of the prior masks.
        best: of all that were learned, the masks with the least held-out loss.
        last: the masks after the last step.
        guarded: True where `bits` are the prior's, because no learned ones are better.
        steps: optimiser steps that were made.
        epochs: how often each training sequence was seen.
    """

    bits: Mapping[str, Tensor]
    prior_loss: float
    best: Judgement
    last: Judgement
    guarded: bool
    steps: int
    epochs: float

    @property
    def loss(self) -> float:
        """Held-out loss of the masks that are taken."""
        return self.prior_loss if self.guarded else self.best.loss


class Judge:
    """Keeps the best masks.

    Args:
        masked: the model's masked parameters.
        held_out_loss: of packed masks, or (None) of what is being learned.
        priors: linear name -> packed mask.
        settings: of the loop.
    """

    def __init__(
        self,
        masked: MaskedModel,
        held_out_loss: Callable[[Mapping[str, Tensor] | None], float],
        priors: Mapping[str, Tensor],
        settings: TrainRecipe,
    ) -> None:
        self._masked, self._loss, self._priors, self._settings = masked, held_out_loss, dict(priors), settings
        self._prior_loss = math.nan
        self._best_bits = self._priors
        self._best = self._last = Judgement(0, math.inf, 0.0)
        self._without_gain = 0

    @property
    def out_of_patience(self) -> bool:
        """Whether nothing better came for as long as the settings allow."""
        return 0 < self._settings.patience <= self._without_gain

    @property
    def standing(self) -> float:
        """Held-out loss of the masks that were judged last; before any, of the prior's."""
        return self._last.loss if math.isfinite(self._last.loss) else self._prior_loss

    def prior_masks(self) -> AbstractContextManager[None]:
        """The prior masks in the model inside the body."""
        return self._masked.phase.fixed(self._priors)

    def begin(self) -> dict[str, float]:
        """Judge the prior masks."""
        self._prior_loss = self._loss(self._priors)
        return {"held_out_prior_loss": self._prior_loss}

    def look(self, course: Course) -> dict[str, float]:
        """Judge the masks of now; the numbers go to metrics.jsonl."""
        bits = self._masked.hard_bits()
        return self.take(course, bits, self._loss(bits), self._loss(None))

    def take(self, course: Course, bits: Mapping[str, Tensor], loss: float, soft: float) -> dict[str, float]:
        """`look`, where the held-out losses are known: of the masks, and of what is being learned."""
        self._last = Judgement(course.step, loss, self._flips(bits))
        if self._last.loss < self._best.loss:
            self._best, self._best_bits, self._without_gain = self._last, dict(bits), 0
        else:
            self._without_gain += 1
        return {
            "held_out_loss": self._last.loss,
            "held_out_soft_loss": soft,
            "soft_hard_gap": self._last.loss - soft,
            "held_out_prior_loss": self._prior_loss,
            "best_held_out_loss": self._best.loss,
            "flips": self._last.flips,
        }

    def _flips(self, bits: Mapping[str, Tensor]) -> float:
        changed = total = 0
        for one in self._masked.targets:
            now, before = (masks.unpack(packed[one.name], one.shape) for packed in (bits, self._priors))
            groups = (now != before).unflatten(-1, (-1, one.pattern.group)).any(-1)
            changed += int(groups.sum())
            total += groups.numel()
        return changed / total

    def verdict(self, epochs: float) -> Learned:
        """The masks that are taken: the best, unless the guard is on and the prior's are no worse."""
        guarded = self._settings.guard and not self._best.loss < self._prior_loss
        bits = self._priors if guarded else self._best_bits
        course = self._masked.phase.course
        return Learned(bits, self._prior_loss, self._best, self._last, guarded, course.step, epochs)

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """What `load` needs."""
        found: State = {f"best:{name}": bits for name, bits in self._best_bits.items()}
        numbers = [self._prior_loss, *asdict(self._best).values(), *asdict(self._last).values(), self._without_gain]
        return {**found, "judge": torch.tensor(numbers, dtype=torch.float64)}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        numbers = saved["judge"].tolist()
        self._prior_loss, self._without_gain = numbers[0], int(numbers[-1])
        self._best, self._last = (
            Judgement(int(step), loss, flips) for step, loss, flips in (numbers[1:4], numbers[4:7])
        )
        self._best_bits = {name: saved[f"best:{name}"].clone() for name in self._priors}
