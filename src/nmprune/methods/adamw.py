"""AdamW on plain tensors, in place: no parameter groups, no hooks, and moments that are plain data.

Source: Loshchilov and Hutter 2019, algorithm 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
# Gradients with respect to masks are tiny (1e-9 and below for large layers): the usual 1e-8 would freeze them.
EPSILON = 1e-16


@torch.no_grad()
def step(
    value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, count: int, lr: float, decay: float = 0
) -> None:
    """One update of `value`, `first` and `second` in place.

    Args:
        value: any shape.
        gradient: of the same shape.
        first: running mean of the gradient.
        second: running mean of its square.
        count: this update's number, from 1.
        lr: learning rate.
        decay: decoupled weight decay.
    """
    beta1, beta2 = BETAS
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if decay:
        value.mul_(1 - lr * decay)
    # the bias corrections go into the step and into epsilon
    root = math.sqrt(1 - beta2**count)
    value.addcdiv_(first, second.sqrt().add_(EPSILON * root), value=-lr * root / (1 - beta1**count))
