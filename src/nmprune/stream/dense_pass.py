"""A pass over the dense model, one decoder layer in memory at a time: what the phases before pruning look at."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from nmprune.heap import give_back
from nmprune.stats import InputStats, Statistic
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.stream.hidden_states import HiddenStates
from nmprune.stream.layer_done import LayerStep, StreamOptions
from nmprune.stream.model import DecoderModel
from nmprune.stream.observe import LayerObserver
from nmprune.stream.phases import Phases
from nmprune.stream.selection import LayerSelection
from nmprune.stream.walker import default_batch_size


@dataclass(frozen=True)
class LayerObserved:
    """One dense decoder layer, its weights in memory.

    Attributes:
        index: 0-based number of the decoder layer.
        layer: the layer's module; its weights are there until the generator goes on.
        stats: statistics by shared input, of the linears that are to be pruned; empty without calibration windows.
        seconds: by phase: read, forward, statistics.
    """

    index: int
    layer: nn.Module
    stats: dict[str, InputStats]
    seconds: dict[str, float] = field(default_factory=dict)


def observe_layers(
    model: DecoderModel,
    windows: Tensor | None,
    selections: Sequence[LayerSelection],
    needs: frozenset[Statistic],
    options: StreamOptions | None = None,
    *,
    scratch: Path | None = None,
) -> Generator[LayerStep | LayerObserved, None, None]:
    """Run every decoder layer once, dense, and observe it; yields a LayerStep per batch and a LayerObserved per layer.

    Layers after the last one with something to prune are left out. Of `options`, `batch_size` and `hidden_budget` count.

    Args:
        model: streamed from a folder, or in memory; its weights stay as they are.
        windows: int64 (n_sequences, seq_len) calibration token ids; None = no forward: weights without statistics.
        selections: from `select`, one per layer; the inputs of what is to be pruned are observed.
        needs: the statistics to collect.
        options: how hidden states flow.
        scratch: folder for hidden states past the budget.
    """
    pass_ = _DensePass(model, selections, needs, Phases(model.device))
    with observable_experts(model.config):
        if windows is None:
            yield from pass_.without_forwards()
        else:
            yield from pass_.run(windows, options or StreamOptions(), scratch)


@dataclass(frozen=True)
class _DensePass:
    model: DecoderModel
    selections: Sequence[LayerSelection]
    needs: frozenset[Statistic]
    phases: Phases

    @property
    def n_layers(self) -> int:
        """Layers to visit: up to the last one with something to prune."""
        return max((index + 1 for index, one in enumerate(self.selections) if one.prune), default=0)

    def without_forwards(self) -> Iterator[LayerObserved]:
        for index in range(self.n_layers):
            before = dict(self.phases.seconds)
            with ExitStack() as stack:
                with self.phases("read"):
                    layer = stack.enter_context(self.model.layer(index))
                yield LayerObserved(index, layer, {}, self._since(before))

    def run(self, windows: Tensor, options: StreamOptions, scratch: Path | None) -> Iterator[LayerStep | LayerObserved]:
        size = options.batch_size or default_batch_size(windows.shape[1])
        before: dict[str, float] = {}
        with self.phases("read"):
            hidden, calls = self.model.embed(windows, size, options.hidden_budget, scratch)
        try:
            for index in range(self.n_layers):
                with ExitStack() as stack:
                    with self.phases("read"):
                        layer = stack.enter_context(self.model.layer(index))
                    observer = self._observer(index, layer)
                    with observer.watching():
                        yield from self._forwards(index, layer, hidden, size, calls)
                    self.phases.move("forward", "statistics", observer.seconds)
                    with self.phases("statistics"):
                        stats = observer.results()
                    yield LayerObserved(index, layer, stats, self._since(before))
                    before = dict(self.phases.seconds)
                    del stats, observer
        finally:
            hidden.close()

    def _observer(self, index: int, layer: nn.Module) -> LayerObserver:
        wanted = {linear.shared_input for linear in self.selections[index].prune}
        linears = self.model.module_linears(index)
        return LayerObserver(layer, self.model.family, linears, wanted, self.needs, self.model.device)

    def _forwards(
        self, index: int, layer: nn.Module, hidden: HiddenStates, size: int, calls: dict[int, LayerCalls]
    ) -> Iterator[LayerStep]:
        """Run the layer over all batches; its output replaces its input where a later layer wants it."""
        batches = hidden.batches(size)
        for done, batch in enumerate(batches, start=1):
            with self.phases("forward"), torch.no_grad():
                output = calls[batch.stop - batch.start].run(index, layer, hidden.get(batch))
                if index + 1 < self.n_layers:
                    hidden.put(batch, output)
                del output
            yield LayerStep(index, "observe", done, len(batches))
        give_back()

    def _since(self, before: dict[str, float]) -> dict[str, float]:
        return {name: total - before.get(name, 0.0) for name, total in self.phases.seconds.items()}
