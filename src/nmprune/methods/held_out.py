"""The judge of a layer's masks: the loss of hard masks on sequences that took no part in learning.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nmprune import masks
from nmprune.methods.base import State

Masks = Mapping[str, Tensor]


class HeldOut:
    """Remembers the prior's loss, and the best masks that it was shown.

    Args:
        loss: held-out loss of masked weights; None where nothing is held out.
        weights: fp32 (O, I) by linear, dense.
        keep_best: remember the masks with the lowest loss; else the last ones.
    """

    def __init__(self, loss: Callable[[Masks], float] | None, weights: Masks, keep_best: bool) -> None:
        self._loss, self._weights, self._keep_best = loss, weights, keep_best
        self.prior = math.nan  # the loss of the prior's masks
        self.best = math.nan
        self.best_step = 0
        self.since_best = 0  # looks without a better mask
        self._packed: dict[str, Tensor] = {}

    def of(self, chosen: Masks) -> float:
        """The held-out loss of masks, hard or soft; NaN where nothing is held out."""
        if self._loss is None:
            return math.nan
        return self._loss({name: self._weights[name] * mask_OI for name, mask_OI in chosen.items()})

    def show(self, found: Masks, loss: float, step: int) -> None:
        """Consider the masks of a step."""
        self.since_best += 1
        if not self._keep_best or not self._packed or not loss >= self.best:  # NaN: nothing to judge by
            self.best, self.best_step, self.since_best = loss, step, 0
            self._packed = {name: masks.pack(mask_OI) for name, mask_OI in found.items()}

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks that it kept."""
        shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in self._weights.items()}
        return {name: masks.unpack(bits, shapes[name]) for name, bits in self._packed.items()}

    def snapshot(self) -> State:
        """Copies of what changes from look to look."""
        numbers = [self.prior, self.best, float(self.best_step), float(self.since_best)]
        packed = {f"best.{name}": bits.clone() for name, bits in self._packed.items()}
        return {"judged": torch.tensor(numbers, dtype=torch.float64), **packed}

    def restore(self, state: State) -> None:
        """Go on from `state`, as `snapshot` made it."""
        self.prior, self.best, best_step, since_best = state["judged"].tolist()
        self.best_step, self.since_best = int(best_step), int(since_best)
        self._packed = {
            name: state[f"best.{name}"].to(weight.device)
            for name, weight in self._weights.items()
            if f"best.{name}" in state
        }
