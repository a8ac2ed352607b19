"""A round of global descent: every linear's slope and curvature, and the damping that held-out text likes best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nmprune import masks
from nmprune.distributed import Processes
from nmprune.train.masked_linear import MaskedModel

_TRIES, _JUDGED = 16, 6  # dampings of a round: that are tried, and that are judged because their masks differ
_BOLDER = 1.5  # between two dampings on the way down; from the third gain on more and more


class InputSums(Protocol):
    """Adds up what the linears of a model read; `stream.input_sums` has one."""

    def watching(self) -> AbstractContextManager[None]:
        """Every forward inside the body is added up."""

    def take(self, processes: Processes) -> dict[str, Tensor]:
        """Linear name -> fp32 (in, in), the mean of x x^T over the tokens of all processes; then from zero again."""


@dataclass(frozen=True)
class Terms:
    """The quadratic model of the loss around one linear's mask; see methods/global_descent.py.

    Attributes:
        slope: (out, in), dL/dW at the masked weight.
        curvature: (out,), s.
        gram: (in, in), A.
    """

    slope: Tensor
    curvature: Tensor
    gram: Tensor


class LossTerms:
    """Adds them up for all linears, micro-batch by micro-batch.

    Per row, the mean square of the micro-batches' gradients is s tr(A) / n, with n tokens each, where tokens are independent:
    that gives s. Where they are not (a document pulls one way throughout) s is larger, and the step more careful.

    Args:
        masked: the model's masked parameters, whose states are masks.
        inputs: watches the forwards.
    """

    def __init__(self, masked: MaskedModel, inputs: InputSums) -> None:
        self._masked, self._inputs = masked, inputs
        device_of = {one.name: masked.state(one.name)["mask"].device for one in masked.targets}
        self._slopes = {one.name: torch.zeros(one.shape, device=device_of[one.name]) for one in masked.targets}
        self._squares = {one.name: torch.zeros(one.shape[0], device=device_of[one.name]) for one in masked.targets}

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients of a micro-batch's mean loss from the states."""
        for one, weight_OI, state in self._masked.linears():
            mask = state["mask"]
            if mask.grad is None:  # an expert without a token
                continue
            slope_OI = torch.where(weight_OI != 0, mask.grad / weight_OI, 0.0)
            self._slopes[one.name] += slope_OI
            self._squares[one.name] += slope_OI.square().sum(1)
            mask.grad = None

    @torch.no_grad()
    def take(self, processes: Processes, n_micro_batches: int, n_tokens: int) -> dict[str, Terms]:
        """Linear name -> its terms, over all micro-batches of all processes.

        Args:
            processes: that share them.
            n_micro_batches: of all processes together.
            n_tokens: of a micro-batch.
        """
        grams = self._inputs.take(processes)
        processes.sum_([*self._slopes.values(), *self._squares.values()])
        found = {}
        for name, slope_OI in self._slopes.items():
            gram_II = grams[name]
            mean_square_O = self._squares[name] / n_micro_batches
            trace = gram_II.diagonal().sum()
            curvature_O = torch.where(trace > 0, n_tokens * mean_square_O / trace, 0.0)
            found[name] = Terms(slope_OI / n_micro_batches, curvature_O, gram_II)
        return found


@torch.no_grad()
def revised(masked: MaskedModel, terms: Mapping[str, Terms], damping: float) -> dict[str, Tensor]:
    """Linear name -> packed next mask, on the CPU."""
    found = {}
    for one, weight_OI, state in masked.linears():
        its = terms[one.name]
        before_OI = masked.method.hard_mask(weight_OI, state, one.pattern)
        mask_OI = masked.method.revise(weight_OI, before_OI, its.slope, its.curvature, its.gram, one.pattern, damping)
        found[one.name] = masks.pack(mask_OI).cpu()
    return found


@dataclass(frozen=True)
class Choice:
    """The masks that a round takes, what they are worth on held-out text, and the damping that they come from."""

    bits: Mapping[str, Tensor]
    loss: float
    damping: float


def choose(
    masks_of: Callable[[float], Mapping[str, Tensor]],
    loss_of: Callable[[Mapping[str, Tensor]], float],
    before: Mapping[str, Tensor],
    standing: float,
    damping: float,
) -> tuple[Choice | None, float]:
    """Search the damping: one under which masks get better, then smaller ones for as long as they get better still.

    Args:
        masks_of: damping -> packed masks.
        loss_of: their held-out loss.
        before: the masks of now, packed.
        standing: their held-out loss.
        damping: where to begin.

    Returns:
        The best masks, None where none were better; and the damping to begin with next time.
    """
    best: Choice | None = None
    too_bold, too_careful = 0.0, math.inf
    judged = gains = 0
    for _ in range(_TRIES):
        bits = masks_of(damping)
        if all(torch.equal(one, before[name]) for name, one in bits.items()):
            too_careful = damping
            damping = math.sqrt(too_bold * damping) if too_bold else damping / _BOLDER**4
            continue
        judged += 1
        loss = loss_of(bits)
        if loss < (standing if best is None else best.loss):
            best = Choice(bits, loss, damping)
            gains += 1
            damping /= _BOLDER ** max(1, gains - 1)
        elif best is None:
            too_bold = damping
            damping = damping * _BOLDER**2 if math.isinf(too_careful) else math.sqrt(damping * too_careful)
        else:
            break
        if judged == _JUDGED or damping <= too_bold:
            break
    return best, damping if best is None else best.damping
