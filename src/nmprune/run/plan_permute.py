"""What reordering channels adds to a plan: one pass over the dense model, a second reading of it, and the searches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from nmprune.architectures.channels import Kind
from nmprune.methods.wanda import Wanda
from nmprune.prepare.permutation import searched_scores
from nmprune.prepare.swap_search import search
from nmprune.run.permute import kinds_asked
from nmprune.run.plan_dense_pass import DensePassSizes
from nmprune.run.probe import measure
from nmprune.stream.permuted import channels_of

_PROBED = (256, 512)  # rows, channels


class PermuteSizes(DensePassSizes):
    """Bytes and seconds of the phase; the recipe permutes."""

    @cached_property
    def _searched(self) -> dict[Kind, int]:
        return searched_scores(channels_of(self._model), self._selections, kinds_asked(self._recipe))

    @property
    def passes(self) -> int:
        """Forwards of a decoder layer over all calibration tokens."""
        return self._model.n_layers if self._recipe.calibrated else 0

    def memory(self) -> dict[str, int]:
        """Part -> bytes at the worst moment, besides the hidden states."""
        size = self._model.dtype.itemsize
        scored = max((math.prod(one.shape) for selection in self._selections for one in selection.prune), default=0)
        forward = math.prod(self._batch) * self._forward_width * size if self._recipe.calibrated else 0
        parts = {
            "decoder layer": max(sum(p.numel() for p in layer.parameters()) for layer in self._model.layers) * size
        }
        # fp32: a linear's scores, in the new order, and what their best N of each group take
        parts["batch in the forward, or a linear's scores"] = max(forward, 4 * 4 * scored)
        if "residual" in self._recipe.permute:
            parts["scores of the residual stream"] = 3 * 4 * self._searched["residual"]
        return parts

    def seconds(self, observed: Sequence[Sequence[tuple[int, float]]], n_bytes: int, disk: Path) -> float:
        """Seconds of the phase on this machine; times its parts.

        Args:
            observed: by decoder layer, (in_features, share of the tokens that it sees) of every shared input.
            n_bytes: of the checkpoint.
            disk: a folder on the disk that it would be read from.
        """
        recipe = self._recipe
        rates = measure(self._model, Wanda(), recipe.pattern, self._batch, disk)
        seconds = n_bytes * rates.read_seconds * (2 if "residual" in recipe.permute else 1)
        if recipe.calibrated:
            seconds += self._pass_seconds(rates, observed)
        return seconds + sum(self._searched.values()) * self._seconds_per_score()

    def _seconds_per_score(self) -> float:
        rows, group = _PROBED[0], self._recipe.pattern.group
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(rows, _PROBED[1] // group * group, generator=generator).to(self._model.device)
        start = time.perf_counter()
        search(scores.pow(4), self._recipe.pattern, generator)
        return (time.perf_counter() - start) / scores.numel()
