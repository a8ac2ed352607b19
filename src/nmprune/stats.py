"""Running statistics of a linear's input. Sums in fp32 or fp64 with a token count; normalising is a method's business.

Legend: T tokens, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
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


class SegmentSum:
    """A sum over segments of the calibration sequences, added up in their order: ((s0 + s1) + s2) + ...

    Whoever adds up which segment, the bits are the same, as long as segments are closed in order. In memory are the sum so
    far and the segment in work.

    Args:
        make: zeros for one segment: tensors that are added element by element.
    """

    def __init__(self, make: Callable[[], list[Tensor]]) -> None:
        self._make = make
        self._segment: list[Tensor] | None = None
        self._total: list[Tensor] | None = None
        self.n_segment = 0
        self.n_total = 0

    def segment(self) -> list[Tensor]:
        """What the segment in work adds up in; to be changed in place."""
        if self._segment is None:
            self._segment = self._make()
        return self._segment

    def total(self) -> list[Tensor]:
        """The sum over the segments that were closed."""
        if self._total is None:
            self._total = self._make()
        return self._total

    def close_segment(self) -> None:
        """Add the segment in work to the total; the next one starts from zero."""
        if self._segment is None:
            return
        if self._total is None:
            self._total, self._segment = self._segment, None  # 0 + s = s
        else:
            for total, part in zip(self._total, self._segment, strict=True):
                total += part
                part.zero_()
        self.n_total, self.n_segment = self.n_total + self.n_segment, 0

    def forget_segment(self) -> None:
        """Start the next segment from zero: this one is added up in another process."""
        for part in self._segment or ():
            part.zero_()
        self.n_segment = 0

    def last_segment(self) -> None:
        """Close the segment in work and give its memory back: none follows."""
        self.close_segment()
        self._segment = None

    def take(self) -> list[Tensor]:
        """The total with the segment in work; what is left here is nothing."""
        self.close_segment()
        total, self._total, self._segment = self.total(), None, None
        return total


class StatsAccumulator:
    """Adds up batches of one linear's input. Adding N batches equals adding their concatenation, up to rounding.

    Args:
        in_features: width of the input.
        needs: which statistics to collect.
        device: where the sums live.

    Attributes:
        parts: the sums over all tokens; or over those that are not held out, and over those that are.
    """

    def __init__(self, in_features: int, needs: frozenset[Statistic], device: torch.device | str = "cpu") -> None:
        self._in_features, self._device = in_features, device
        self._wide = _widest(torch.device(device))
        vectors: tuple[Statistic, ...] = ("input_sq_norm", "input_sum")
        self._vectors = [name for name in vectors if name in needs]
        self._has_gram, self._has_cross = "input_gram" in needs, "cross_gram" in needs
        self._all_paired = True
        self._splits = "held_out_gram" in needs
        self.parts = [SegmentSum(self._zeros) for _ in range(1 + self._splits)]

    def _zeros(self) -> list[Tensor]:
        """Vectors, the blocks of the Gram matrix on and above the diagonal, the cross Gram matrix; as far as needed."""
        shapes = [*gram_block_shapes(self._in_features)] if self._has_gram else []
        shapes += [(self._in_features, self._in_features)] if self._has_cross else []
        vectors = [torch.zeros(self._in_features, dtype=self._wide, device=self._device) for _ in self._vectors]
        return [*vectors, *(torch.zeros(shape, dtype=torch.float32, device=self._device) for shape in shapes)]

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
        part = self.parts[held_out and self._splits]
        part.n_segment += x_TI.shape[0]
        sums = iter(part.segment())
        root_T1 = None if weights is None else weights.reshape(-1, 1).sqrt().to(x_TI)
        weighted_TI = x_TI if root_T1 is None else x_TI * root_T1  # on products: the square root on each side
        for name in self._vectors:
            sum_I = next(sums)
            if name == "input_sum":
                for rows_TI in (x_TI if root_T1 is None else x_TI * root_T1.square()).split(_SQ_NORM_ROWS):
                    sum_I += rows_TI.sum(0)
            else:
                for rows_TI in weighted_TI.split(_SQ_NORM_ROWS):
                    sum_I += rows_TI.square().sum(0)
        if self._has_gram:
            for start in range(0, self._in_features, _GRAM_BLOCK):
                next(sums).addmm_(weighted_TI[:, start : start + _GRAM_BLOCK].T, weighted_TI[:, start:])
        if dense_inputs is None:
            self._all_paired = False
        elif self._has_cross:
            dense_TI = dense_inputs.detach().reshape(-1, self._in_features).float()
            next(sums).addmm_(weighted_TI.T, dense_TI if root_T1 is None else dense_TI * root_T1)

    def result(self) -> InputStats:
        """The statistics so far. Call it once, when everything has been added.

        Raises:
            ValueError: it was called before.
        """
        if not self.parts:
            raise ValueError("result() was called before: the sums were given away")
        held_out_tokens = sum(part.n_total + part.n_segment for part in self.parts[1:])
        n_tokens = sum(part.n_total + part.n_segment for part in self.parts[:1]) + held_out_tokens
        sums, held_out = self.parts[0].take(), self.parts[1].take() if self._splits else []
        self.parts = []
        for one, part in zip(sums, held_out, strict=False):
            one += part
        vectors: dict[str, Tensor] = {name: sums.pop(0) for name in self._vectors}
        del held_out[: len(self._vectors)]
        cross_II, held_cross_II = (_last(one) if self._has_cross else None for one in (sums, held_out))
        return InputStats(
            n_tokens=n_tokens,
            input_sq_norm=vectors.get("input_sq_norm"),
            input_gram=_symmetric(sums) if self._has_gram else None,
            input_sum=vectors.get("input_sum"),
            held_out_gram=_symmetric(held_out) if self._has_gram and self._splits else None,
            held_out_tokens=held_out_tokens,
            cross_gram=cross_II if self._all_paired else None,
            held_out_cross=held_cross_II if self._all_paired else None,
        )


def gram_block_shapes(in_features: int) -> Iterator[tuple[int, int]]:
    """Of the blocks of rows of a Gram matrix, from the diagonal on."""
    for start in range(0, in_features, _GRAM_BLOCK):
        yield min(_GRAM_BLOCK, in_features - start), in_features - start


def _last(tensors: list[Tensor]) -> Tensor | None:
    return tensors.pop() if tensors else None


def _symmetric(blocks: list[Tensor]) -> Tensor:
    """The whole of X^T X, fp32 (in, in), from its blocks and their mirror images; `blocks` is emptied on the way."""
    size = blocks[0].shape[1]
    gram_II = torch.empty(size, size, dtype=torch.float32, device=blocks[0].device)
    start = 0
    while blocks:
        rows = blocks.pop(0)
        stop = start + len(rows)
        square = rows[:, : len(rows)]
        gram_II[start:stop, start:stop] = square.triu() + square.triu(1).T
        gram_II[start:stop, stop:] = rows[:, len(rows) :]
        gram_II[stop:, start:stop] = rows[:, len(rows) :].T
        start = stop
    return gram_II
