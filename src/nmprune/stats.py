"""Running statistics of a linear's input. Sums in fp32 or fp64 with a token count; normalising is a method's business.

Legend: T tokens, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Statistic = Literal["input_sq_norm", "input_gram"]

# Columns per block of the Gram matrix. Only blocks on and above the diagonal are multiplied, the rest is mirrored: at
# 1536 inputs that is 10/16 of the full product's work.
_GRAM_BLOCK = 384
# Tokens squared at a time: the temporary stays small, and fp32 rounding stays inside a piece (the total is fp64).
_SQ_NORM_ROWS = 512


@dataclass(frozen=True)
class InputStats:
    """What calibration tells about the input X (tokens, in) of one linear.

    Attributes:
        n_tokens: rows of X that were seen.
        input_sq_norm: fp64 (in,), the sum over tokens of x_j^2; None where the method did not ask for it.
        input_gram: fp32 (in, in), X^T X summed over tokens, symmetric; None where the method did not ask for it.
    """

    n_tokens: int
    input_sq_norm: Tensor | None = None
    input_gram: Tensor | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make()` computes from these statistics, computed once: q, k and v share one factorisation.

        Args:
            key: names the computation and its settings.
            make: the computation.
        """
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def squared_norms(self) -> Tensor:
        """`input_sq_norm`, fp64 (in,); from the Gram matrix's diagonal where only that was collected.

        Raises:
            ValueError: neither statistic was collected (a method that forgot to declare what it needs).
        """
        if self.input_sq_norm is not None:
            return self.input_sq_norm
        gram_II = self.gram()
        return gram_II.diagonal().to(_widest(gram_II.device))

    def gram(self) -> Tensor:
        """`input_gram`, fp32 (in, in).

        Raises:
            ValueError: it was not collected (a method that forgot to declare it).
        """
        if self.input_gram is None:
            raise ValueError("input_gram was not collected: the method does not declare it in `needs`")
        return self.input_gram


def _widest(device: torch.device) -> torch.dtype:
    """fp64, except on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class StatsAccumulator:
    """Adds up batches of one linear's input. Adding N batches equals adding their concatenation, up to rounding.

    Args:
        in_features: width of the input.
        needs: which statistics to collect.
        device: where the sums live.
    """

    def __init__(self, in_features: int, needs: frozenset[Statistic], device: torch.device | str = "cpu") -> None:
        self._n_tokens = 0
        self._in_features = in_features
        self._gram_II: Tensor | None = None
        self._sq_norm_I: Tensor | None = None
        if "input_gram" in needs:
            self._gram_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        if "input_sq_norm" in needs:
            self._sq_norm_I = torch.zeros(in_features, dtype=_widest(torch.device(device)), device=device)

    def add(self, inputs: Tensor) -> None:
        """Add a batch, (..., in), any float dtype.

        Raises:
            ValueError: the batch has another width.
        """
        if inputs.shape[-1] != self._in_features:
            raise ValueError(f"inputs {tuple(inputs.shape)} given to statistics of {self._in_features} input features")
        x_TI = inputs.detach().reshape(-1, self._in_features).float()
        self._n_tokens += x_TI.shape[0]
        if self._sq_norm_I is not None:
            for rows_TI in x_TI.split(_SQ_NORM_ROWS):
                self._sq_norm_I += rows_TI.square().sum(0)
        if self._gram_II is not None:
            for start in range(0, self._in_features, _GRAM_BLOCK):
                stop = min(start + _GRAM_BLOCK, self._in_features)
                self._gram_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])

    def result(self) -> InputStats:
        """The statistics so far. Call it once, when everything has been added."""
        if self._gram_II is not None:
            for start in range(0, self._in_features, _GRAM_BLOCK):
                stop = min(start + _GRAM_BLOCK, self._in_features)
                block = self._gram_II[start:stop, start:stop]
                block.copy_(block.triu() + block.triu(1).T)
                self._gram_II[stop:, start:stop] = self._gram_II[start:stop, stop:].T
        return InputStats(self._n_tokens, self._sq_norm_I, self._gram_II)
