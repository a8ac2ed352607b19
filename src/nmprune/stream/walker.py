"""The layer walker: one decoder layer after the other, observe, prune, run on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from nmprune.architectures import Linear
from nmprune.errors import InputError
from nmprune.methods import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.stats import GRADIENTS, InputStats
from nmprune.stream import per_linear
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.stream.heap import give_back
from nmprune.stream.hidden_states import HiddenStates
from nmprune.stream.layer_done import LayerDone, LayerStep, LinearDone, Restart, StreamOptions
from nmprune.stream.model import DecoderModel
from nmprune.stream.observe import LayerObserver
from nmprune.stream.phases import Phases
from nmprune.stream.selection import LayerSelection, stage_of

_TOKENS_PER_BATCH = 2048

Finished = Callable[[int], Mapping[str, Pruned] | None]
Gradients = Callable[[int, str], InputStats]
TokenWeights = Callable[[int], Mapping[str, Tensor]]


def prune_layers(
    model: DecoderModel,
    windows: Tensor | None,
    method: PerLinear,
    pattern: Pattern,
    selections: Sequence[LayerSelection],
    options: StreamOptions | None = None,
    *,
    finished: Finished = lambda index: None,
    restart: Restart | None = None,
    scratch: Path | None = None,
    gradients: Gradients | None = None,
    token_weights: TokenWeights | None = None,
) -> Generator[LayerStep | LayerDone, None, None]:
    """Prune a model layer by layer; yields a LayerStep at every sign of life and a LayerDone per decoder layer.

    A method that needs no statistics gets no forward at all. Otherwise each layer runs twice: dense, observed; then pruned,
    to feed the next layer (the last layer once). With `propagate="dense"` once. With `true_sequential` once per shared input
    and once more. A method that needs `cross_gram` makes the walk follow the dense model beside the pruned one: one more
    pass of each layer, and twice the hidden states.

    Args:
        model: streamed from a folder, or in memory (then its weights change in place).
        windows: int64 (n_sequences, seq_len) calibration token ids; None for a method that needs no statistics.
        method: what prunes a linear.
        pattern: N kept of M, of every linear that has no pattern of its own in its selection.
        selections: from `select`, one per layer.
        options: how hidden states flow.
        finished: what an interrupted run already has for a layer, by linear name; such a layer is only run on.
        restart: a layer's inputs, where an interrupted run kept them: layers before it are left out.
        scratch: folder for hidden states past the budget.
        gradients: (layer, linear name) -> the linear's gradient sums, for a method that needs them; a method that needs
            nothing else gets no forward either.
        token_weights: layer -> linear name -> (n_sequences, seq_len, n_blocks), what each token counts in the statistics of
            each block of the linear's output rows; a linear that is not named has tokens of equal weight.

    Raises:
        InputError: a method needs calibration and there is none; a linear cannot be pruned (the message names it).
    """
    walk = _Walk(
        model,
        windows,
        method,
        pattern,
        selections,
        options or StreamOptions(),
        finished,
        restart,
        gradients,
        token_weights,
    )
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
        restart: Restart | None,
        gradients: Gradients | None,
        token_weights: TokenWeights | None,
    ) -> None:
        if method.needs & GRADIENTS and gradients is None:
            raise InputError(
                f"method {method.name} needs gradients of the loss: pass `gradients`, such as nmprune.prepare.gradients makes."
            )
        streamed = method.needs - GRADIENTS  # what the forwards of the stream have to tell
        if streamed and windows is None:
            raise InputError(
                f"method {method.name} needs calibration text: it reads {', '.join(sorted(method.needs))}."
            )
        if options.true_sequential and options.propagate == "dense":
            raise InputError("--true-sequential observes pruned inputs inside a layer: it needs --propagate pruned.")
        self.follows_dense = "cross_gram" in method.needs
        if self.follows_dense and (options.true_sequential or options.propagate == "dense"):
            raise InputError(
                "comparing with the dense model's outputs needs --propagate pruned, and no --true-sequential: a layer's dense "
                "weights are there only until its first linear is pruned."
            )
        if "held_out_gram" in method.needs and windows is not None and not 0 < options.n_held_out < len(windows):
            raise InputError(
                f"method {method.name} holds sequences out; of {len(windows)}, {options.n_held_out} is no number to hold out. "
                "Give --n-sequences 2 or more, and hold out fewer than all."
            )
        self.n_held_out = options.n_held_out if "held_out_gram" in method.needs else 0
        self.model, self.method, self.pattern = model, method, pattern
        self.own_patterns = {name: own for selection in selections for name, own in selection.patterns.items()}
        self.selections, self.options, self.finished = selections, options, finished
        self.windows = windows if streamed else None
        self.gradients = gradients if method.needs & GRADIENTS else None
        self.restart = restart
        self.dense: HiddenStates | None = None  # what the dense model would have here, where the walk follows it
        self.token_weights = token_weights
        self.calls: dict[int, LayerCalls] = {}
        self.phases = Phases(model.device)

    def run(self, scratch: Path | None) -> Iterator[LayerStep | LayerDone]:
        hidden = None
        first = self.restart.index if self.restart is not None else 0
        if self.windows is not None:
            hidden = self._embed(self.windows, scratch)
        try:
            for index in range(first, self.model.n_layers):
                if not self._has_work(index) or (hidden is None and not self.selections[index].prune):
                    yield LayerDone(index, (), self.selections[index].dense)
                else:
                    yield from self._layer(index, hidden)
        finally:
            for states in (hidden, self.dense):
                if states is not None:
                    states.close()

    def _has_work(self, index: int) -> bool:
        """Whether this layer or a later one is to be pruned: past that nobody needs its output."""
        return any(selection.prune for selection in self.selections[index:])

    def _embed(self, windows: Tensor, scratch: Path | None) -> HiddenStates:
        size = self.options.batch_size or default_batch_size(windows.shape[1])
        budget = self.options.hidden_budget // (2 if self.follows_dense else 1)
        with self.phases("read"):
            hidden, self.calls = self.model.embed(windows, size, budget, scratch, self.n_held_out)
        if self.follows_dense:
            shape = (*windows.shape, hidden.all.shape[-1])
            self.dense = HiddenStates(shape, hidden.all.dtype, self.model.device, budget, scratch)
            self.dense.all.copy_(hidden.all)
        if self.restart is not None:
            _copy(self.restart.hidden, hidden)
            if self.dense is not None:
                _copy(self.restart.dense, self.dense)
            self.restart = None
        self.batches = hidden.batches(size, self.n_held_out)
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
        passes += feeds and not stages and self.dense is not None
        n_batches = 0 if hidden is None else len(self.batches)
        steps = _Steps(index, passes * n_batches + sum(map(len, stages)))
        with ExitStack() as stack:
            with self.phases("read"):
                layer = stack.enter_context(self.model.layer(index))
            if hidden is not None and dense_feeds and not stages:
                yield from self._forward(index, layer, hidden, steps, keep=True, phase="forward")
            if feeds and not stages and self.dense is not None:
                yield from self._forward(index, layer, self.dense, steps, keep=True, phase="forward")
            if earlier is not None:
                per_linear.apply(layer, selection.prune, earlier)
                done = list(self._reused(selection, earlier))
            for stage in stages:
                yield from self._stage(index, layer, stage, hidden, steps, done, keep=dense_feeds)
            if hidden is not None and feeds and not dense_feeds:
                yield from self._forward(index, layer, hidden, steps, keep=True, phase="forward")
        seconds = {name: total - before.get(name, 0.0) for name, total in self.phases.seconds.items()}
        next_inputs = hidden.all if hidden is not None and feeds else None
        next_dense = self.dense.all if self.dense is not None and feeds else None
        yield LayerDone(index, tuple(done), selection.dense, seconds, earlier is not None, next_inputs, next_dense)

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
        weights = self.token_weights(index) if self.token_weights is not None and hidden is not None else {}
        if hidden is not None:
            wanted = {linear.shared_input for linear in stage}
            observer = LayerObserver(
                layer,
                self.model.family,
                self.model.module_linears(index),
                wanted,
                self.method.needs,
                self.model.device,
                per_linear.weightings(stage, weights),
            )
            with observer.watching():
                yield from self._forward(index, layer, hidden, steps, keep=keep, phase="observe", observer=observer)
            self.phases.move("forward", "statistics", observer.seconds)
            with self.phases("statistics"):
                stats = observer.results()
        keys = {linear.name: per_linear.statistics_keys(linear, weights) for linear in stage}
        last_use = {key: linear for linear in stage for key in keys[linear.name]}
        for linear in stage:
            seen = [stats.get(key, InputStats(0)) for key in keys[linear.name]]
            if self.gradients is not None:
                seen = per_linear.with_gradients(seen, self.gradients(index, linear.name), self.model.device)
            done.append(self._linear(layer, linear, seen))
            del seen
            for key in keys[linear.name]:
                if last_use[key] is linear:
                    stats.pop(key, None)  # a Gram matrix and its factor are large
            give_back()
            yield steps.next("solve")
        per_linear.apply(layer, stage, {one.name: one.pruned for one in done})

    def _linear(self, layer: nn.Module, linear: Linear, stats: Sequence[InputStats]) -> LinearDone:
        weight = self.model.weight(layer, linear)
        pattern = self.own_patterns.get(linear.name, self.pattern)
        with self.phases("solve"):
            done = per_linear.prune_linear(
                self.model, linear, weight, stats, self.method, pattern, self.options.min_expert_tokens
            )
        with self.phases("measure"):
            return per_linear.measured(weight, done, stats)

    def _forward(
        self,
        index: int,
        layer: nn.Module,
        hidden: HiddenStates,
        steps: _Steps,
        *,
        keep: bool,
        phase: str,
        observer: LayerObserver | None = None,
    ) -> Iterator[LayerStep]:
        """Run the layer over all batches; with `keep` its output replaces its input."""
        for batch in self.batches:
            if observer is not None:
                observer.batch = batch
                observer.held_out = batch.start >= len(hidden.all) - self.n_held_out
                self._record_dense(index, layer, batch, observer)
            with self.phases("forward"), torch.no_grad():
                output = self.calls[batch.stop - batch.start].run(index, layer, hidden.get(batch))
                if keep:
                    hidden.put(batch, output)
            yield steps.next(phase)
        give_back()  # activations of several MiB each, kept in pieces, would lie under the solver's peak

    def _record_dense(self, index: int, layer: nn.Module, batch: slice, observer: LayerObserver) -> None:
        """Run the layer, still dense, on what the dense model has here: its inputs are kept for the next forward."""
        if self.dense is None:
            return
        with self.phases("forward"), torch.no_grad(), observer.recording():
            output = self.calls[batch.stop - batch.start].run(index, layer, self.dense.get(batch))
            self.dense.put(batch, output)


def _copy(kept: Tensor | None, hidden: HiddenStates) -> None:
    """Put what an interrupted run kept into the walk's own hidden states."""
    if kept is None or kept.shape != hidden.all.shape:
        raise ValueError(
            f"restart from {None if kept is None else tuple(kept.shape)}, expected {tuple(hidden.all.shape)}"
        )
    hidden.all.copy_(kept)


class _Steps:
    def __init__(self, index: int, total: int) -> None:
        self._index, self._total, self._done = index, total, 0

    def next(self, phase: str) -> LayerStep:
        self._done += 1
        return LayerStep(self._index, phase, self._done, self._total)
