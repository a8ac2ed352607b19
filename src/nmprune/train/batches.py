"""Which sequences a training step sees: epochs in a new order each, known for any step without the steps before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmprune.train.seeds import generator_of


@dataclass(frozen=True)
class Batches:
    """The order of the sequences, a function of the seed: a run that goes on sees what it would have seen.

    Every sequence comes once before any comes again.

    Attributes:
        n_sequences: of the text to learn from.
        batch_size: sequences per micro-batch; all are of that size.
        accumulation: micro-batches per optimiser step.
        seed: of the order.
    """

    n_sequences: int
    batch_size: int
    accumulation: int
    seed: int

    @property
    def per_step(self) -> int:
        """Sequences per optimiser step."""
        return self.batch_size * self.accumulation

    def epochs(self, steps: int) -> float:
        """How often each sequence is seen in so many steps."""
        return steps * self.per_step / self.n_sequences

    def of(self, step: int) -> Sequence[Tensor]:
        """The micro-batches of a step (from 0), each int64 (batch_size,) sequence numbers."""
        first = step * self.per_step
        numbers: list[int] = []
        while len(numbers) < self.per_step:
            epoch, at = divmod(first + len(numbers), self.n_sequences)
            numbers += self._order(epoch)[at : at + self.per_step - len(numbers)].tolist()
        return torch.tensor(numbers).split(self.batch_size)

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.n_sequences, generator=generator_of(self.seed, "epoch", epoch))
