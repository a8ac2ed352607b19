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
# What a method may declare in `needs`. Gradients come from a pass over the whole model before the stream, the others from
# the forward of the layer in work.
Statistic = Literal[
    "input_sq_norm", "input_sum", "input_gram", "held_out_gram", "cross_gram", "weight_grad_abs", "weight_grad_sq"
]
GRADIENTS: frozenset[Statistic] = frozenset({"weight_grad_abs", "weight_grad_sq"})

# Columns per block of the Gram matrix. Only blocks on and above the diagonal are multiplied, the rest is mirrored: at
# 1536 inputs that is 10/16 of the full product's work.
_GRAM_BLOCK = 384
# Tokens squared or summed at a time: the temporary stays small, and fp32 rounding stays inside a piece (the total is fp64).
_SQ_NORM_ROWS = 512


@dataclass(frozen=True)
class InputStats:
    """What calibration tells about one linear: its input X (tokens, in), and its weight's gradients.

    Everything but the token counts is None where the method did not ask for it. The held-out tokens are part of all
    sums: what was not held out is the difference.

    Attributes:
        n_tokens: rows of X that were seen.
        input_sq_norm: fp64 (in,), the sum over tokens of x_j^2.
        input_gram: fp32 (in, in), X^T X summed over tokens, symmetric.
        input_sum: fp64 (in,), the sum over tokens of x_j.
        held_out_gram: fp32 (in, in), the part of `input_gram` that comes from the held-out sequences.
        held_out_tokens: rows of X that were held out.
        cross_gram: fp32 (in, in), X^T D summed over tokens: D (tokens, in) is the input of the same linear in the dense
            model, X the one that it meets in the pruned model. None as well for experts, whose tokens differ.
        held_out_cross: fp32 (in, in), the part of `cross_gram` that comes from the held-out sequences.
        weight_grad_abs: fp32 (out, in), the sum over calibration sequences of |dL/dW|, L the dense model's mean
            next-token loss on the sequence.
        weight_grad_sq: fp32 (out, in), the sum of (dL/dW)^2.
        n_grad_sequences: sequences in those two sums.
    """

    n_tokens: int
    input_sq_norm: Tensor | None = None
    input_gram: Tensor | None = None
    input_sum: Tensor | None = None
    held_out_gram: Tensor | None = None
    held_out_tokens: int = 0
    cross_gram: Tensor | None = None
    held_out_cross: Tensor | None = None
    weight_grad_abs: Tensor | None = None
    weight_grad_sq: Tensor | None = None
    n_grad_sequences: int = 0
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

    def sums(self) -> Tensor:
        """`input_sum`, fp64 (in,).

        Raises:
            ValueError: it was not collected (a method that forgot to declare it).
        """
        if self.input_sum is None:
            raise ValueError("input_sum was not collected: the method does not declare it in `needs`")
        return self.input_sum

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
        self._in_features = in_features
        wide = _widest(torch.device(device))
        self._sq_norm_I = torch.zeros(in_features, dtype=wide, device=device) if "input_sq_norm" in needs else None
        self._sum_I = torch.zeros(in_features, dtype=wide, device=device) if "input_sum" in needs else None
        self._splits = "held_out_gram" in needs
        parts = 1 + self._splits  # all tokens, or those held out in a sum of their own
        self._n_tokens = [0] * parts
        self._grams = [_Gram(in_features, device) for _ in range(parts) if "input_gram" in needs]
        self._crosses = [_Gram(in_features, device) for _ in range(parts) if "cross_gram" in needs]

    def add(
        self,
        inputs: Tensor,
        dense_inputs: Tensor | None = None,
        held_out: bool = False,
        weights: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            inputs: (..., in), any float dtype.
            dense_inputs: the same tokens' inputs in the dense model, of the same shape; without them no later
                `cross_gram`.
            held_out: whether these tokens are held out.
            weights: (...,), what each token counts in every sum, >= 0; None = 1.

        Raises:
            ValueError: the batch has another width.
        """
        if inputs.shape[-1] != self._in_features:
            raise ValueError(f"inputs {tuple(inputs.shape)} given to statistics of {self._in_features} input features")
        x_TI = inputs.detach().reshape(-1, self._in_features).float()
        part = int(held_out and self._splits)
        self._n_tokens[part] += x_TI.shape[0]
        root_T1 = None if weights is None else weights.reshape(-1, 1).sqrt().to(x_TI)
        if self._sum_I is not None:
            for rows_TI in (x_TI if root_T1 is None else x_TI * root_T1.square()).split(_SQ_NORM_ROWS):
                self._sum_I += rows_TI.sum(0)
        if root_T1 is not None:
            x_TI = x_TI * root_T1  # a token's weight on its products: the square root on each side
        if self._sq_norm_I is not None:
            for rows_TI in x_TI.split(_SQ_NORM_ROWS):
                self._sq_norm_I += rows_TI.square().sum(0)
        if self._grams:
            self._grams[part].add(x_TI)
        if dense_inputs is None:
            self._crosses.clear()
        elif self._crosses:
            dense_TI = dense_inputs.detach().reshape(-1, self._in_features).float()
            self._crosses[part].add(x_TI, dense_TI if root_T1 is None else dense_TI * root_T1)

    def result(self) -> InputStats:
        """The statistics so far. Call it once, when everything has been added."""
        gram_II, held_gram_II = _total([one.symmetric() for one in self._grams])
        cross_II, held_cross_II = _total([one.sum_II for one in self._crosses])
        return InputStats(
            n_tokens=sum(self._n_tokens),
            input_sq_norm=self._sq_norm_I,
            input_gram=gram_II,
            input_sum=self._sum_I,
            held_out_gram=held_gram_II,
            held_out_tokens=self._n_tokens[1] if self._splits else 0,
            cross_gram=cross_II,
            held_out_cross=held_cross_II,
        )


class _Gram:
    """A sum of X^T D over batches, fp32 (in, in)."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.sum_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, x_TI: Tensor, dense_TI: Tensor | None = None) -> None:
        """Add a batch; without D it is X, and only the blocks on and above the diagonal are multiplied."""
        if dense_TI is not None:
            self.sum_II.addmm_(x_TI.T, dense_TI)
            return
        for start in range(0, x_TI.shape[1], _GRAM_BLOCK):
            stop = min(start + _GRAM_BLOCK, x_TI.shape[1])
            self.sum_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])

    def symmetric(self) -> Tensor:
        """The whole of X^T X: the blocks that were multiplied, and their mirror images."""
        for start in range(0, len(self.sum_II), _GRAM_BLOCK):
            stop = min(start + _GRAM_BLOCK, len(self.sum_II))
            block = self.sum_II[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            self.sum_II[stop:, start:stop] = self.sum_II[start:stop, stop:].T
        return self.sum_II


def _total(parts: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The sum over all tokens, and the part of it that was held out."""
    if not parts:
        return None, None
    if len(parts) == 1:
        return parts[0], None
    return parts[0].add_(parts[1]), parts[1]
