"""What gradient methods read: sums over calibration sequences of a weight's gradient, checked before use."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from nmprune import masks
from nmprune.errors import InputError
from nmprune.stats import InputStats


def checked_gradient(
    stats: InputStats, name: Literal["weight_grad_abs", "weight_grad_sq"], shape: tuple[int, ...]
) -> Tensor:
    """The statistic `name`, fp32 (out, in), after checking that it fits and is usable.

    Args:
        stats: what was collected for the linear.
        name: the sum of |dL/dW| or of (dL/dW)^2 over sequences.
        shape: the weight's.

    Raises:
        InputError: another shape, no sequence seen, or an entry that is not finite.
        ValueError: it was not collected (a method that forgot to declare it).
    """
    sum_OI: Tensor | None = getattr(stats, name)
    if sum_OI is None:
        raise ValueError(f"{name} was not collected: the method does not declare it in `needs`")
    if sum_OI.shape != shape:
        raise InputError(
            f"{name} has shape {tuple(sum_OI.shape)}, but the weight {tuple(shape)}: the gradients belong to another linear."
        )
    if stats.n_grad_sequences == 0:
        raise InputError("the gradients of this linear saw no calibration token. Give more calibration text.")
    if not masks.all_finite(sum_OI):
        raise InputError(
            f"{name} holds NaN or infinity: the model's loss or its gradient does. Check the checkpoint, or use "
            "--dtype float32."
        )
    return sum_OI
