"""The layer walker: one decoder layer after the other, observe, prune, run on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nmprune.architectures import Linear
from nmprune.errors import InputError
from nmprune.methods import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.stats import InputStats
from nmprune.stream import per_linear
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.stream.heap import give_back
from nmprune.stream.hidden_states import HiddenStates
from nmprune.stream.layer_done import LayerDone, LayerStep, LinearDone, StreamOptions
from nmprune.stream.model import DecoderModel
from nmprune.stream.observe import LayerObserver
from nmprune.stream.phases import Phases
from nmprune.stream.selection import LayerSelection, stage_of

_TOKENS_PER_BATCH = 2048

Finished = Callable[[int], Mapping[str, Pruned] | None]


def prune_layers(
    model: DecoderModel,
    windows: Tensor | None,
    method: PerLinear,
    pattern: Pattern,
    selections: Sequence[LayerSelection],
    options: StreamOptions | None = None,
    *,
    finished: Finished = lambda index: None,
    restart: tuple[int, Tensor] | None = None,
    scratch: Path | None = None,
) -> Generator[LayerStep | LayerDone, None, None]:
    """Prune a model layer by layer; yields a LayerStep at every sign of life and a LayerDone per decoder layer.

    A method that needs no statistics gets no forward at all. Otherwise each layer runs twice: dense, observed; then pruned,
    to feed the next layer (the last layer once). With `propagate="dense"` once. With `true_sequential` once per shared input
    and once more.

    Args:
        model: streamed from a folder, or in memory (then its weights change in place).
        windows: int64 (n_sequences, seq_len) calibration token ids; None for a method that needs no statistics.
        method: what prunes a linear.
        pattern: N kept of M.
        selections: from `select`, one per layer.
        options: how hidden states flow.
        finished: what an interrupted run already has for a layer, by linear name; such a layer is only run on.
        restart: (layer, its input hidden states) where an interrupted run kept them: layers before it are left out.
        scratch: folder for hidden states past the budget.

    Raises:
        InputError: a method needs calibration and there is none; a linear cannot be pruned (the message names it).
    """
    walk = _Walk(model, windows, method, pattern, selections, options or StreamOptions(), finished, restart)
    del restart  # hidden states that are copied into the walk's own; one copy is enough
    with observable_experts(model.config):
        yield from walk.run(scratch)


def default_batch_size(seq_len: int) -> int:
    """Sequences per forward where the user gives none: about 2048 tokens."""
    return max(1, _TOKENS_PER_BATCH // seq_len)


class _Walk:
    def __init__(
        self,
        model: DecoderModel,
        windows: Tensor | None,
        method: PerLinear,
        pattern: Pattern,
        selections: Sequence[LayerSelection],
        options: StreamOptions,
        finished: Finished,
        restart: tuple[int, Tensor] | None,
    ) -> None:
        if method.needs and windows is None:
            raise InputError(
                f"method {method.name} needs calibration text: it reads {', '.join(sorted(method.needs))}."
            )
        if options.true_sequential and options.propagate == "dense":
            raise InputError("--true-sequential observes pruned inputs inside a layer: it needs --propagate pruned.")
        self.model, self.method, self.pattern = model, method, pattern
        self.selections, self.options, self.finished = selections, options, finished
        self.windows = windows if method.needs else None
        self.restart = restart
        self.calls: dict[int, LayerCalls] = {}
        self.phases = Phases(model.device)

    def run(self, scratch: Path | None) -> Iterator[LayerStep | LayerDone]:
        hidden = None
        first = self.restart[0] if self.restart is not None else 0
        if self.windows is not None:
            hidden = self._embed(self.windows, scratch)
        try:
            for index in range(first, self.model.n_layers):
                if not self._has_work(index) or (hidden is None and not self.selections[index].prune):
                    yield LayerDone(index, (), self.selections[index].dense)
                else:
                    yield from self._layer(index, hidden)
        finally:
            if hidden is not None:
                hidden.close()

    def _has_work(self, index: int) -> bool:
        """Whether this layer or a later one is to be pruned: past that nobody needs its output."""
        return any(selection.prune for selection in self.selections[index:])

    def _embed(self, windows: Tensor, scratch: Path | None) -> HiddenStates:
        size = self.options.batch_size or default_batch_size(windows.shape[1])
        with self.phases("read"):
            hidden, self.calls = self.model.embed(windows, size, self.options.hidden_budget, scratch)
        if self.restart is not None:
            kept = self.restart[1]
            if kept.shape != hidden.all.shape:
                raise ValueError(f"restart from {tuple(kept.shape)}, expected {tuple(hidden.all.shape)}")
            hidden.all.copy_(kept)
            self.restart = None
        self.batches = hidden.batches(size)
        return hidden

    def _layer(self, index: int, hidden: HiddenStates | None) -> Iterator[LayerStep | LayerDone]:
        selection = self.selections[index]
        earlier = self.finished(index)
        done: list[LinearDone] = []
        if earlier is not None and hidden is None:
            yield LayerDone(index, self._reused(selection, earlier), selection.dense, reused=True)
            return
        before = dict(self.phases.seconds)
        stages = [] if earlier is not None else self._stages(selection)
        feeds = hidden is not None and self._has_work(index + 1)
        dense_feeds = feeds and self.options.propagate == "dense"
        # with propagate="dense" the observing pass feeds the next layer by the way, where there is one
        passes = len(stages) + (feeds and not (dense_feeds and stages))
        n_batches = 0 if hidden is None else len(self.batches)
        steps = _Steps(index, passes * n_batches + sum(map(len, stages)))
        with ExitStack() as stack:
            with self.phases("read"):
                layer = stack.enter_context(self.model.layer(index))
            if hidden is not None and dense_feeds and not stages:
                yield from self._forward(index, layer, hidden, steps, keep=True, phase="forward")
            if earlier is not None:
                per_linear.apply(layer, selection.prune, earlier)
                done = list(self._reused(selection, earlier))
            for stage in stages:
                yield from self._stage(index, layer, stage, hidden, steps, done, keep=dense_feeds)
            if hidden is not None and feeds and not dense_feeds:
                yield from self._forward(index, layer, hidden, steps, keep=True, phase="forward")
        seconds = {name: total - before.get(name, 0.0) for name, total in self.phases.seconds.items()}
        next_inputs = hidden.all if hidden is not None and feeds else None
        yield LayerDone(index, tuple(done), selection.dense, seconds, earlier is not None, next_inputs)

    def _reused(self, selection: LayerSelection, earlier: Mapping[str, Pruned]) -> tuple[LinearDone, ...]:
        return tuple(
            LinearDone(linear.name, linear.role, linear.tensor, earlier[linear.name], 0, 0.0)
            for linear in selection.prune
        )

    def _stages(self, selection: LayerSelection) -> list[list[Linear]]:
        """All linears at once, or with true_sequential those that execution reaches together."""
        if not self.options.true_sequential and selection.prune:
            return [list(selection.prune)]
        stages: dict[str, list[Linear]] = {}
        for linear in selection.prune:
            stages.setdefault(stage_of(linear), []).append(linear)
        return list(stages.values())

    def _stage(
        self,
        index: int,
        layer: nn.Module,
        stage: Sequence[Linear],
        hidden: HiddenStates | None,
        steps: _Steps,
        done: list[LinearDone],
        *,
        keep: bool,
    ) -> Iterator[LayerStep]:
        """Observe the inputs of some linears, prune them, put the result into the layer."""
        stats: dict[str, InputStats] = {}
        if hidden is not None:
            wanted = {linear.shared_input for linear in stage}
            observer = LayerObserver(
                layer, self.model.family, self.model.module_linears(index), wanted, self.method.needs, self.model.device
            )
            with observer.watching():
                yield from self._forward(index, layer, hidden, steps, keep=keep, phase="observe")
            self.phases.move("forward", "statistics", observer.seconds)
            with self.phases("statistics"):
                stats = observer.results()
        last_use = {linear.shared_input: linear for linear in stage}
        for linear in stage:
            done.append(self._linear(layer, linear, stats.get(linear.shared_input, InputStats(0))))
            if last_use[linear.shared_input] is linear:
                stats.pop(linear.shared_input, None)  # a Gram matrix and its factor are large
            give_back()
            yield steps.next("solve")
        per_linear.apply(layer, stage, {one.name: one.pruned for one in done})

    def _linear(self, layer: nn.Module, linear: Linear, stats: InputStats) -> LinearDone:
        weight = self.model.weight(layer, linear)
        with self.phases("solve"):
            done = per_linear.prune_linear(
                self.model, linear, weight, stats, self.method, self.pattern, self.options.min_expert_tokens
            )
        with self.phases("measure"):
            return replace(done, output_error=per_linear.output_error(weight, done, stats))

    def _forward(
        self, index: int, layer: nn.Module, hidden: HiddenStates, steps: _Steps, *, keep: bool, phase: str
    ) -> Iterator[LayerStep]:
        """Run the layer over all batches; with `keep` its output replaces its input."""
        for batch in self.batches:
            with self.phases("forward"), torch.no_grad():
                output = self.calls[batch.stop - batch.start].run(index, layer, hidden.get(batch))
                if keep:
                    hidden.put(batch, output)
            yield steps.next(phase)
        give_back()  # activations of several MiB each, kept in pieces, would lie under the solver's peak


class _Steps:
    def __init__(self, index: int, total: int) -> None:
        self._index, self._total, self._done = index, total, 0

    def next(self, phase: str) -> LayerStep:
        self._done += 1
        return LayerStep(self._index, phase, self._done, self._total)
