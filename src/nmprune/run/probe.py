"""Short timings of what a run will do: one decoder layer with random weights, one batch, the statistics, the solver, the disk."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nmprune.methods import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, StatsAccumulator
from nmprune.stream import DecoderModel, LinearDone
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.stream.per_linear import output_error

_REPEATS = 3
_LARGEST_PROBED_INPUT = 4096  # a wider linear's solver is extrapolated by its operation count
_LARGEST_PROBED_OUTPUT = 4096
_DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class Rates:
    """Measured on this machine.

    Attributes:
        layer_seconds: decoder layer signature -> one forward of a full batch.
        statistics_seconds: in_features -> one batch added to the statistics.
        solver_seconds: (out, in) -> one linear solved: the first of a shared input, and a later one, which finds what the
            first computed from the statistics.
        measure_seconds: (out, in) -> its output error measured.
        write_seconds: per byte, to write, flush, read back and check.
        read_seconds: per byte.
    """

    layer_seconds: dict[tuple[tuple[int, ...], ...], float]
    statistics_seconds: dict[int, float]
    solver_seconds: dict[tuple[int, int], tuple[float, float]]
    measure_seconds: dict[tuple[int, int], float]
    write_seconds: float
    read_seconds: float


def signature(layer: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Decoder layers with equal parameter shapes cost the same."""
    return tuple(tuple(parameter.shape) for parameter in layer.parameters())


def measure(model: DecoderModel, method: PerLinear, pattern: Pattern, batch: tuple[int, int], disk: Path) -> Rates:
    """Time the parts of a run; seconds to a minute, depending on the model's width.

    Args:
        model: made from a config, weights on the meta device; left that way.
        method: whose solver and statistics are timed.
        pattern: N kept of M.
        batch: (sequences, seq_len) of one forward.
        disk: a folder on the disk that the run will write to.
    """
    kinds: dict[tuple[tuple[int, ...], ...], int] = {}
    for index, layer in enumerate(model.layers):
        kinds.setdefault(signature(layer), index)
    shapes = {linear.shape for index in kinds.values() for linear in model.module_linears(index)}
    generator = torch.Generator(device="cpu").manual_seed(0)
    layer_seconds = {}
    if method.needs:
        with torch.no_grad(), observable_experts(model.config):
            calls = random_calls(model, batch)
            layer_seconds = {kind: _layer(model, index, calls) for kind, index in kinds.items()}
    widths = {shape[1] for shape in shapes}
    tokens = batch[0] * batch[1]
    statistics_seconds = {
        width: _statistics(method, torch.randn(tokens, width, generator=generator).to(model.device))
        for width in (widths if method.needs else ())
    }
    solvers = {shape: _Solver(method, pattern, shape, model.device, generator) for shape in shapes}
    return Rates(
        layer_seconds,
        statistics_seconds,
        {shape: solver.solve() for shape, solver in solvers.items()},
        {shape: solver.measure() for shape, solver in solvers.items()},
        *_disk(disk),
    )


def random_calls(model: DecoderModel, batch: tuple[int, int]) -> LayerCalls:
    """How the model calls its layers, asked without its weights: everything outside the layers stands in as zeros."""
    with model.stand_in():
        return model.calls(torch.zeros(batch, dtype=torch.long))


def _median(run: Callable[[], object], device: torch.device) -> float:
    run()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _layer(model: DecoderModel, index: int, calls: LayerCalls) -> float:
    hidden = torch.randn(calls.hidden.shape, generator=torch.Generator().manual_seed(0)).to(calls.hidden)
    with model.random_layer(index) as layer:
        return _median(lambda: calls.run(index, layer, hidden), model.device)


def _statistics(method: PerLinear, inputs: Tensor) -> float:
    sums = StatsAccumulator(inputs.shape[1], method.needs, inputs.device)
    return _median(lambda: sums.add(inputs), inputs.device)


class _Solver:
    """One linear of the shape (or of as much of it as is affordable) with random weights and inputs."""

    def __init__(
        self,
        method: PerLinear,
        pattern: Pattern,
        shape: tuple[int, int],
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self._method, self._pattern, self._device = method, pattern, device
        out_features = min(shape[0], _LARGEST_PROBED_OUTPUT)
        in_features = min(shape[1], _LARGEST_PROBED_INPUT // pattern.group * pattern.group)
        self._scale = method.solver_flops(*shape) / method.solver_flops(out_features, in_features)
        self._weight = torch.randn(out_features, in_features, generator=generator).to(device)
        sums = StatsAccumulator(in_features, method.needs, device)
        sums.add(torch.randn(max(64, in_features // 8), in_features, generator=generator).to(device))
        self._stats = sums.result()

    def solve(self) -> tuple[float, float]:
        """Seconds with fresh statistics, and with what was derived from them at hand."""
        first = _median(lambda: self._prune(replace(self._stats)), self._device)
        return first * self._scale, _median(lambda: self._prune(self._stats), self._device) * self._scale

    def _prune(self, stats: InputStats) -> Pruned:
        return self._method.prune(self._weight, stats, self._pattern)

    def measure(self) -> float:
        """Seconds to measure the output error."""
        done = LinearDone("", "", "", self._prune(self._stats), 0, 0.0)
        return _median(lambda: output_error(self._weight, done, self._stats), self._device) * self._scale


def _disk(folder: Path) -> tuple[float, float]:
    """Seconds per byte to write, flush, read back and check; and to read."""
    content = os.urandom(_DISK_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        wrote = time.perf_counter() - start
        start = time.perf_counter()
        Path(file.name).read_bytes()
        read = time.perf_counter() - start
        start = time.perf_counter()
        hashlib.sha256(content)
        digest = time.perf_counter() - start
    return (wrote + 2 * read + 2 * digest) / _DISK_BYTES, read / _DISK_BYTES
