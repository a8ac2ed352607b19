"""Short timings of what a run will do: one decoder layer with random weights, one batch, the statistics, the solver, the disk."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmprune.checkpoint.durable import asking, writing
from nmprune.methods import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.prepare.gradients import back_through
from nmprune.prepare.layer_sums import LayerSums
from nmprune.stats import GRADIENTS, InputStats, Statistic, StatsAccumulator
from nmprune.stream import DecoderModel, LinearDone
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.stream.per_linear import measured

_REPEATS = 3
_LONG_SECONDS = 2.0  # what takes so long is timed once, and what would take so long on a smaller piece
_LARGEST_PROBED_INPUT = 4096  # a wider linear's solver is extrapolated by its operation count
_LARGEST_PROBED_OUTPUT = 4096
_LARGEST_PROBED_VOCABULARY = 8192
_LARGEST_PROBED_SUMS = 10**11  # multiplications of a Gram matrix; past it fewer tokens are timed
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
        gradient_seconds: decoder layer signature -> one sequence through it, and back with the gradients of all its linears
            added up; empty where nothing asks for gradients.
        head_seconds: the loss of one sequence and its gradient, from the last hidden states; 0 likewise.
    """

    layer_seconds: dict[tuple[tuple[int, ...], ...], float]
    statistics_seconds: dict[int, float]
    solver_seconds: dict[tuple[int, int], tuple[float, float]]
    measure_seconds: dict[tuple[int, int], float]
    write_seconds: float
    read_seconds: float
    gradient_seconds: dict[tuple[tuple[int, ...], ...], tuple[float, float]] = field(default_factory=dict)
    head_seconds: float = 0.0


def signature(layer: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Decoder layers with equal parameter shapes cost the same."""
    return tuple(tuple(parameter.shape) for parameter in layer.parameters())


def measure(
    model: DecoderModel,
    method: PerLinear,
    pattern: Pattern,
    batch: tuple[int, int],
    disk: Path,
    token_blocks: int = 0,
) -> Rates:
    """Time the parts of a run; seconds to a minute, depending on the model's width.

    Args:
        model: made from a config, weights on the meta device; left that way.
        method: whose solver and statistics are timed.
        pattern: N kept of M.
        batch: (sequences, seq_len) of one forward.
        disk: a folder on the disk that the run will write to.
        token_blocks: blocks of output rows of loss-aware token weights; 0 = no such weights.
    """
    kinds: dict[tuple[tuple[int, ...], ...], int] = {}
    for index, layer in enumerate(model.layers):
        kinds.setdefault(signature(layer), index)
    shapes = {linear.shape for index in kinds.values() for linear in model.linears(index)[0]}
    generator = torch.Generator(device="cpu").manual_seed(0)
    layer_seconds, gradient_seconds, head_seconds = {}, {}, 0.0
    gradients = method.needs & GRADIENTS
    if gradients or token_blocks:
        with observable_experts(model.config):
            calls = random_calls(model, (1, batch[1]))
            gradient_seconds = {
                kind: _there_and_back(model, index, calls, gradients, token_blocks) for kind, index in kinds.items()
            }
        head_seconds = head_seconds_of(model, calls.hidden)
    if method.runs_layers:
        with torch.no_grad(), observable_experts(model.config):
            layer_seconds = {kind: _layer(model, index, batch) for kind, index in kinds.items()}
    widths = {shape[1] for shape in shapes}
    tokens = batch[0] * batch[1]
    statistics_seconds = {
        width: _statistics(method, tokens, width, generator, model.device)
        for width in (widths if method.needs - GRADIENTS else ())
    }
    solvers = {shape: _Solver(method, pattern, shape, model.device, generator) for shape in shapes}
    return Rates(
        layer_seconds,
        statistics_seconds,
        {shape: solver.solve() for shape, solver in solvers.items()},
        {shape: solver.measure() for shape, solver in solvers.items()},
        *disk_seconds(disk),
        gradient_seconds,
        head_seconds,
    )


def random_calls(model: DecoderModel, batch: tuple[int, int]) -> LayerCalls:
    """How the model calls its layers, asked without its weights: everything outside the layers stands in as zeros."""
    with model.stand_in():
        return model.calls(torch.zeros(batch, dtype=torch.long))


def _median(run: Callable[[], object], device: torch.device) -> float:
    seconds: list[float] = []
    while len(seconds) <= _REPEATS:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if device.type == "cpu" and seconds[0] > _LONG_SECONDS:
            return seconds[0]
    return statistics.median(seconds[1:])  # the first makes caches ready, and loads an accelerator's kernels


def _layer(model: DecoderModel, index: int, batch: tuple[int, int]) -> float:
    """Seconds of a forward of the batch; told from one sequence where the batch would take long."""

    def seconds(n_sequences: int) -> float:
        calls = random_calls(model, (n_sequences, batch[1]))
        hidden = torch.randn(calls.hidden.shape, generator=torch.Generator().manual_seed(0)).to(calls.hidden)
        with model.random_layer(index) as layer:
            return _median(lambda: calls.run(index, layer, hidden), model.device)

    one = seconds(1)
    return one * batch[0] if batch[0] == 1 or one * batch[0] > _LONG_SECONDS else seconds(batch[0])


def _there_and_back(
    model: DecoderModel, index: int, calls: LayerCalls, needs: frozenset[Statistic], token_blocks: int
) -> tuple[float, float]:
    """Seconds of one sequence through a decoder layer, and of running it back."""
    hidden = torch.randn(calls.hidden.shape, generator=torch.Generator().manual_seed(0)).to(calls.hidden)
    shape = (1, hidden.shape[1])
    sums = LayerSums(model.family, model.linears(index)[0], needs, token_blocks, shape, 1.0, model.device)
    with model.random_layer(index) as layer:
        with torch.no_grad():
            there = _median(lambda: calls.run(index, layer, hidden), model.device)
        with sums.collecting(layer):
            back = _median(
                lambda: back_through(calls, index, layer, hidden.detach().requires_grad_(), hidden), model.device
            )
    return there, back


def head_seconds_of(model: DecoderModel, hidden: Tensor) -> float:
    """Seconds of the loss of one sequence and its gradient, told from a part of the vocabulary."""
    vocabulary: int = model.config.get_text_config().vocab_size
    probed = min(vocabulary, _LARGEST_PROBED_VOCABULARY)
    head_VD = torch.zeros(probed, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    targets = torch.zeros(hidden.shape[1], dtype=torch.long, device=hidden.device)
    inputs = hidden[0].detach().requires_grad_()

    def loss() -> None:
        logits = nn.functional.linear(inputs, head_VD).float()
        torch.autograd.grad(nn.functional.cross_entropy(logits, targets), inputs)

    return _median(loss, model.device) * vocabulary / probed


def _statistics(method: PerLinear, tokens: int, width: int, generator: torch.Generator, device: torch.device) -> float:
    """Seconds to add so many tokens' inputs; work grows with the tokens, so fewer of them tell where they are many."""
    probed = min(tokens, max(64, _LARGEST_PROBED_SUMS // width**2))
    inputs = torch.randn(probed, width, generator=generator).to(device)
    sums = StatsAccumulator(width, method.needs, device)
    return _median(lambda: sums.add(inputs, inputs), device) * tokens / probed


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
        for held_out in (False, True):
            inputs = torch.randn(max(64, in_features // 8), in_features, generator=generator).to(device)
            sums.add(inputs, inputs, held_out)
        wanted = sorted(GRADIENTS & method.needs)
        sizes: dict[str, Any] = {key: torch.rand(out_features, in_features, generator=generator) for key in wanted}
        sizes = {key: value.to(device) for key, value in sizes.items()}
        self._stats = replace(sums.result(), **sizes, n_grad_sequences=1)

    def solve(self) -> tuple[float, float]:
        """Seconds with fresh statistics, and with what was derived from them at hand."""
        first = _median(lambda: self._prune(replace(self._stats)), self._device)
        return first * self._scale, _median(lambda: self._prune(self._stats), self._device) * self._scale

    def _prune(self, stats: InputStats) -> Pruned:
        return self._method.prune(self._weight, stats, self._pattern)

    def measure(self) -> float:
        """Seconds to measure the output error."""
        done = LinearDone("", "", "", self._prune(self._stats), 0, 0.0)
        return _median(lambda: measured(self._weight, done, [self._stats]), self._device) * self._scale


def nearest_folder(out: Path) -> Path:
    """`out`, or the nearest folder above it that is there: on the disk that a run would be written to.

    Raises:
        InputError: the system does not say.
    """
    with asking(out):
        return next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())


def disk_seconds(folder: Path) -> tuple[float, float]:
    """Seconds per byte to write, flush, read back and check; and to read."""
    content = os.urandom(_DISK_BYTES)
    with writing(folder, len(content)), tempfile.NamedTemporaryFile(dir=folder) as file:
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
