"""Collect input statistics while a decoder layer runs: one accumulator per shared input."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nmprune.architectures import Family, ModuleLinear
from nmprune.stats import InputStats, Statistic, StatsAccumulator
from nmprune.stream.experts import observed


class LayerObserver:
    """Statistics of one decoder layer's linears, by shared input.

    Args:
        layer: the decoder layer, weights in memory.
        family: its table.
        linears: the layer's linears as the module holds them.
        wanted: the shared inputs to collect.
        needs: the statistics to collect.
        device: where the sums live.

    Attributes:
        seconds: time spent adding up, inside the forwards.
    """

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        linears: Sequence[ModuleLinear],
        wanted: Collection[str],
        needs: frozenset[Statistic],
        device: torch.device,
    ) -> None:
        self._layer = layer
        self._family = family
        self._first = {linear.shared_input: linear for linear in reversed(linears) if linear.shared_input in wanted}
        self._sums = {
            shared_input: StatsAccumulator(linear.shape[1], needs, device)
            for shared_input, linear in self._first.items()
        }
        self._device = device
        self.seconds = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up the inputs of every forward inside the body."""
        with ExitStack() as stack:
            expert_names = {one.role for one in self._first.values() if one.view.expert is not None}
            for shared_input, linear in self._first.items():
                if linear.view.expert is None:
                    hook = self._hook(shared_input)
                    stack.callback(self._layer.get_submodule(linear.module).register_forward_pre_hook(hook).remove)
            if expert_names and self._family.experts is not None:
                stack.enter_context(observed(self._layer.get_submodule(self._family.experts.module), self._expert))
            yield

    def _hook(self, shared_input: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(shared_input, args[0])

        return add

    def _expert(self, name: str, expert: int, inputs: Tensor) -> None:
        assert self._family.experts is not None
        self._add(f"{self._family.experts.module}.{name}.{expert}", inputs)

    def _add(self, shared_input: str, inputs: Tensor) -> None:
        if shared_input in self._sums:
            start = time.perf_counter()
            self._sums[shared_input].add(inputs)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds += time.perf_counter() - start

    def results(self) -> dict[str, InputStats]:
        """Statistics by shared input. Call it once."""
        results = {shared_input: sums.result() for shared_input, sums in self._sums.items()}
        self._sums.clear()
        return results
