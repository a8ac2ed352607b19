"""What a pass over the dense model before the stream adds to a plan: allocation and permutation make one each."""

from __future__ import annotations

from collections.abc import Sequence

from nmprune.run.probe import Rates, signature
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, LayerSelection


class DensePassSizes:
    """What such a pass is planned from.

    Args:
        model: made from a config, weights on the meta device.
        selections: what is to be pruned.
        recipe: what would be done.
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

    def _pass_seconds(self, rates: Rates, observed: Sequence[Sequence[tuple[int, float]]]) -> float:
        """Every decoder layer over all calibration tokens once, and the statistics of its inputs.

        Args:
            rates: of this machine.
            observed: by decoder layer, (in_features, share of the tokens that it sees) of every shared input.
        """
        n_batches = self._recipe.calibration.n_sequences / self._batch[0]
        seconds = 0.0
        for layer, inputs in zip(self._model.layers, observed, strict=True):
            seconds += n_batches * rates.layer_seconds[signature(layer)]
            seconds += sum(n_batches * share * rates.statistics_seconds[width] for width, share in inputs)
        return seconds
