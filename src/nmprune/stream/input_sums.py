"""Gram matrices of what all linears of a model in memory read, added up while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from nmprune.distributed import Processes
from nmprune.stats import Statistic
from nmprune.stream.model import DecoderModel
from nmprune.stream.observe import LayerObserver
from nmprune.stream.selection import LayerSelection


class InputSums:
    """Watches the forwards that it is told to.

    Args:
        model: in memory, all of it.
        selections: from `select`, one per decoder layer: what is watched.
    """

    def __init__(self, model: DecoderModel, selections: Sequence[LayerSelection]) -> None:
        self._model = model
        self._reads = [{one.name: one.shared_input for one in selection.prune} for selection in selections]
        # asked now: masked parameters go by other names
        self._linears = [model.module_linears(index) for index in range(model.n_layers)]
        self._observers: list[LayerObserver] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up the inputs of every forward inside the body."""
        if not self._observers:
            self._observers = [self._observer(index) for index in range(len(self._reads))]
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.watching())
            yield

    def _observer(self, index: int) -> LayerObserver:
        model = self._model
        wanted = set(self._reads[index].values())
        needs: frozenset[Statistic] = frozenset({"input_gram"})
        return LayerObserver(model.layers[index], model.family, self._linears[index], wanted, needs, model.device)

    def take(self, processes: Processes) -> dict[str, Tensor]:
        """Linear name -> fp32 (in, in), the mean of x x^T over the tokens of all processes; the next sums start from zero.

        Linears with the same input share the tensor. What saw no token (an expert) has zeros.
        """
        found: dict[str, Tensor] = {}
        for observer, reads in zip(self._observers, self._reads, strict=True):
            sums = observer.results()
            for stats in sums.values():
                gram, (n_tokens,) = stats.gram(), processes.sum_values([stats.n_tokens])
                processes.sum_([gram])
                gram.div_(max(1.0, n_tokens))
            found |= {name: sums[shared_input].gram() for name, shared_input in reads.items()}
        self._observers = []
        return found
