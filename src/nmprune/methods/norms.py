"""The statistics per input feature, checked before a method uses them.

Legend: I in_features.
"""

from __future__ import annotations

from torch import Tensor

from nmprune import masks
from nmprune.errors import InputError
from nmprune.stats import InputStats


def checked_squared_norms(stats: InputStats, weight: Tensor) -> Tensor:
    """The sum over tokens of x_j^2, fp64 (in,), for the linear of this weight (out, in).

    Raises:
        InputError: another width, no token seen, or an entry that is not finite.
    """
    return _checked("input_sq_norm", stats.squared_norms(), stats.n_tokens, weight)


def checked_sums(stats: InputStats, weight: Tensor) -> Tensor:
    """The sum over tokens of x_j, fp64 (in,), for the linear of this weight (out, in).

    Raises:
        InputError: another width, no token seen, or an entry that is not finite.
    """
    return _checked("input_sum", stats.sums(), stats.n_tokens, weight)


def _checked(name: str, values_I: Tensor, n_tokens: int, weight: Tensor) -> Tensor:
    if values_I.shape != weight.shape[-1:]:
        raise InputError(
            f"{name} has shape {tuple(values_I.shape)}, but the weight {tuple(weight.shape)} has {weight.shape[-1]} input "
            "features: the statistics belong to another linear."
        )
    if n_tokens == 0:
        raise InputError("this linear saw no calibration token. Give more calibration text.")
    if not masks.all_finite(values_I):
        raise InputError(
            f"{name}, summed over the calibration activations, holds NaN or infinity: check the checkpoint, "
            "or use --dtype float32."
        )
    return values_I
