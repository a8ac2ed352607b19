"""Collect input statistics while a decoder layer runs: one accumulator per shared input."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmprune.architectures import Family, ModuleLinear
from nmprune.distributed import ALONE, Processes
from nmprune.stats import InputStats, Statistic, StatsAccumulator
from nmprune.stream.experts import observed
from nmprune.stream.shares import Turn, close_turn


@dataclass(frozen=True)
class _Sum:
    """The sums of one shared input under one weighting of its tokens; None = all count 1."""

    key: str
    sums: StatsAccumulator
    weights: Tensor | None


class LayerObserver:
    """Statistics of one decoder layer's linears, by shared input.

    Args:
        layer: the decoder layer, weights in memory.
        family: its table.
        linears: the layer's linears as the module holds them.
        wanted: the shared inputs to collect.
        needs: the statistics to collect.
        device: where the sums live.
        weighted: shared input -> key -> (n_sequences, seq_len), what each token counts: such a shared input gets sums
            under each of these keys instead of one under its own name.
        goes_to: key -> the processes that get its total; None = all get all.
        processes: those that observe the layer together.

    Attributes:
        seconds: time spent adding up, inside the forwards.
        batch: the sequences that run now; set by the caller where tokens are weighted.
        held_out: whether they are held out; set by the caller.
    """

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        linears: Sequence[ModuleLinear],
        wanted: Collection[str],
        needs: frozenset[Statistic],
        device: torch.device,
        weighted: Mapping[str, Mapping[str, Tensor]] | None = None,
        goes_to: Mapping[str, Sequence[int]] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._layer = layer
        self._family = family
        self._first = {linear.shared_input: linear for linear in reversed(linears) if linear.shared_input in wanted}
        self._sums: dict[str, list[_Sum]] = {}
        for shared_input, linear in self._first.items():
            keys: Mapping[str, Tensor | None] = (weighted or {}).get(shared_input) or {shared_input: None}
            # the dense model routes other tokens to an expert: there is nothing to compare with
            own_needs = needs if linear.view.expert is None else needs - {"cross_gram"}
            self._sums[shared_input] = [
                _Sum(key, StatsAccumulator(linear.shape[1], own_needs, device), weights)
                for key, weights in keys.items()
            ]
        self._processes = processes
        everyone = range(processes.world_size)
        self._goes_to = {key: everyone if goes_to is None else goes_to[key] for key in self._keys()}
        self._device = device
        self._recording = False
        self._dense: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.batch = slice(None)
        self.held_out = False

    def _keys(self) -> list[str]:
        return [one.key for sums in self._sums.values() for one in sums]

    def close_turn(self, turn: Turn) -> None:
        """Put together what the processes have added up in a turn."""
        every = [one for sums in self._sums.values() for one in sums]
        parts = [(part, self._goes_to[one.key]) for one in every for part in one.sums.parts]
        close_turn(parts, turn, self._processes)

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

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the inputs of the one forward inside the body instead: what the dense model meets on the next batch.

        Experts are not kept: the two models route tokens differently.
        """
        self._dense.clear()
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def _hook(self, shared_input: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._recording:
                self._dense[shared_input] = args[0]
            else:
                self._add(shared_input, args[0])

        return add

    def _expert(self, name: str, expert: int, inputs: Tensor) -> None:
        assert self._family.experts is not None
        if self._recording:
            return
        self._add(f"{self._family.experts.module}.{name}.{expert}", inputs)

    def _add(self, shared_input: str, inputs: Tensor) -> None:
        if shared_input in self._sums:
            start = time.perf_counter()
            dense = self._dense.pop(shared_input, None)
            for one in self._sums[shared_input]:
                weights = None if one.weights is None else one.weights[self.batch].to(inputs.device)
                one.sums.add(inputs, dense, self.held_out, weights)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds += time.perf_counter() - start

    def results(self) -> dict[str, InputStats]:
        """Statistics by shared input, or by key where tokens are weighted, as far as this process gets them. Call it once."""
        for part in (part for sums in self._sums.values() for one in sums for part in one.sums.parts):
            part.last_segment()
        rank = self._processes.rank
        results = {
            one.key: one.sums.result() for sums in self._sums.values() for one in sums if rank in self._goes_to[one.key]
        }
        self._sums.clear()
        self._dense.clear()
        return results
