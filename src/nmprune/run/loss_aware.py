"""Loss-aware statistics in a recipe: tokens count by what the loss feels of a linear's outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nmprune.errors import InputError
from nmprune.methods.base import option


@dataclass(frozen=True)
class LossAware:
    """How tokens are weighted in the Gram matrices and squared norms of a linear's inputs.

    A token's weight is the mean square of the language-model loss's gradient with respect to the linear's outputs (of a
    block of its rows) at that token, to the power `power`, divided by its mean over tokens: with power 1 the squared output
    error becomes the loss's second-order term under independent outputs (empirical Fisher).
    """

    power: float = option(
        0.5, "exponent of the weights; 0 = all tokens count the same, 1 = squared gradients as they are"
    )
    blocks: int = option(1, "blocks of output rows of a linear, each with weights and statistics of its own")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power > 0):
            raise InputError(f"loss_aware.power is {self.power!r}; expected a number above 0, such as 0.5.")
        if self.blocks < 1:
            raise InputError(f"loss_aware.blocks is {self.blocks!r}; expected a whole number >= 1, such as 1.")

    def weights(self, squares: Tensor) -> Tensor:
        """What each token counts; mean 1 over tokens.

        Args:
            squares: fp32 (n_sequences, seq_len, n_blocks), mean squared gradients; not modified.

        Raises:
            InputError: a gradient is not finite.
        """
        flat = squares.double().flatten(0, 1)
        if not flat.isfinite().all():
            raise InputError("the loss's gradient is not finite, so tokens have no weight: use --dtype float32.")
        powered = (flat / flat.amax(0).clamp_min(1e-300)).pow(self.power)
        mean = powered.mean(0)
        return powered.where(mean > 0, 1.0).div(mean.where(mean > 0, 1.0)).float().view_as(squares)
