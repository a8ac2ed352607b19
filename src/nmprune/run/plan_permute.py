"""What reordering channels adds to a plan: one pass over the dense model, a second reading of it, and the searches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nmprune.methods.wanda import Wanda
from nmprune.prepare.permutation import searched_scores
from nmprune.prepare.swap_search import search
from nmprune.run.permute import kinds_asked
from nmprune.run.probe import measure, signature
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, LayerSelection
from nmprune.stream.permuted import channels_of

_PROBED = (256, 512)  # rows, channels


class PermuteSizes:
    """Bytes and seconds of the phase.

    Args:
        model: made from a config, weights on the meta device.
        selections: what is to be pruned.
        recipe: what would be done; it permutes.
        batch: (sequences, seq_len) of one forward.
        forward_width: values per token alive at once in a decoder layer's forward.
    """

    def __init__(
        self,
        model: DecoderModel,
        selections: Sequence[LayerSelection],
        recipe: Recipe,
        batch: tuple[int, int],
        forward_width: int,
    ) -> None:
        self._model, self._selections, self._recipe, self._batch = model, selections, recipe, batch
        self._forward_width = forward_width
        self._searched = searched_scores(channels_of(model), selections, kinds_asked(recipe))

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
            n_batches = recipe.calibration.n_sequences / self._batch[0]
            for index, inputs in enumerate(observed):
                seconds += n_batches * rates.layer_seconds[signature(self._model.layers[index])]
                seconds += sum(n_batches * share * rates.statistics_seconds[width] for width, share in inputs)
        return seconds + sum(self._searched.values()) * self._seconds_per_score()

    def _seconds_per_score(self) -> float:
        rows, group = _PROBED[0], self._recipe.pattern.group
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(rows, _PROBED[1] // group * group, generator=generator).to(self._model.device)
        start = time.perf_counter()
        search(scores.pow(4), self._recipe.pattern, generator)
        return (time.perf_counter() - start) / scores.numel()
