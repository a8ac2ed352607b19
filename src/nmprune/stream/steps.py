"""Signs of life inside a decoder layer, counted."""

from __future__ import annotations

from nmprune.methods.base import LearnStep
from nmprune.stream.layer_done import LayerStep


class LayerSteps:
    """Counts a layer's parts: batches and linears; of a layer that is learned, learning is nine tenths.

    Args:
        index: 0-based number of the decoder layer.
        total: batches and linears.
        learns: whether the layer is learned.
    """

    _LEARNING = 9

    def __init__(self, index: int, total: int, learns: bool) -> None:
        self._index, self._done = index, 0
        self._reserved = self._LEARNING * total if learns else 0
        self._total = total + self._reserved

    def next(self, phase: str) -> LayerStep:
        """One part done."""
        self._done += 1
        return LayerStep(self._index, phase, self._done, self._total)

    def learned(self, step: LearnStep) -> LayerStep:
        """A step of the learner; after its last one all that was reserved for it is done."""
        part = self._reserved * step.step // max(step.total, 1)
        found = LayerStep(self._index, "learn", self._done + part, self._total, step)
        if step.step >= step.total:
            self._done, self._reserved = self._done + self._reserved, 0
        return found
