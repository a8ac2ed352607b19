"""The layer walker: one decoder layer after the other, observe, prune, run on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nmprune.architectures import Linear
from nmprune.distributed import ALONE, Processes
from nmprune.heap import give_back
from nmprune.methods import Method, PerLinear, Pruned
from nmprune.methods.base import PerLayer
from nmprune.pattern import Pattern
from nmprune.refine import LayerChain
from nmprune.stats import GRADIENTS, InputStats
from nmprune.stream import per_linear
from nmprune.stream.calls import LayerCalls
from nmprune.stream.dealt import deal, readers, told
from nmprune.stream.experts import observable_experts
from nmprune.stream.hidden_states import HiddenStates
from nmprune.stream.layer_done import LayerDone, LayerStep, LinearDone, Restart, StreamOptions
from nmprune.stream.layer_run import LayerRun
from nmprune.stream.model import DecoderModel
from nmprune.stream.observe import LayerObserver
from nmprune.stream.per_layer import LayerLearner, Learning
from nmprune.stream.phases import Phases
from nmprune.stream.selection import LayerSelection, stage_of
from nmprune.stream.shares import Share, share_of
from nmprune.stream.steps import LayerSteps
from nmprune.stream.walk_checks import check_walk, n_held_out

_TOKENS_PER_BATCH = 2048

Finished = Callable[[int], Mapping[str, Pruned] | None]
Gradients = Callable[[int, str], InputStats]
TokenWeights = Callable[[int], Mapping[str, Tensor]]


def prune_layers(
    model: DecoderModel,
    windows: Tensor | None,
    method: Method,
    pattern: Pattern,
    selections: Sequence[LayerSelection],
    options: StreamOptions | None = None,
    *,
    finished: Finished = lambda index: None,
    restart: Restart | None = None,
    scratch: Path | None = None,
    gradients: Gradients | None = None,
    token_weights: TokenWeights | None = None,
    learning: Learning | None = None,
    processes: Processes = ALONE,
) -> Generator[LayerStep | LayerDone, None, None]:
    """Prune a model layer by layer; yields a LayerStep at every sign of life and a LayerDone per decoder layer.

    A method that needs no statistics gets no forward at all. Otherwise each layer runs twice: dense, observed; then pruned,
    to feed the next layer (the last layer once). With `propagate="dense"` once. With `true_sequential` once per shared input
    and once more. A method that needs `cross_gram` makes the walk follow the dense model beside the pruned one: one more
    pass of each layer, and twice the hidden states. A method that learns layers has its targets beside them: the hidden
    states once more.

    Args:
        model: streamed from a folder, or in memory (then its weights change in place).
        windows: int64 (n_sequences, seq_len) calibration token ids; None for a method that needs no statistics.
        method: what prunes a linear (`PerLinear`), or learns a decoder layer (`PerLayer`, or a `LayerChain` of one).
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
        learning: seed, prior masks and what an interrupted run left, for a method that learns layers.
        processes: those that share the run. Each has the hidden states of its own sequences, runs those, and prunes its
            share of a layer's linears; what became of a layer is yielded in all of them.

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
        learning or Learning(),
        processes,
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
        method: Method,
        pattern: Pattern,
        selections: Sequence[LayerSelection],
        options: StreamOptions,
        finished: Finished,
        restart: Restart | None,
        gradients: Gradients | None,
        token_weights: TokenWeights | None,
        learning: Learning,
        processes: Processes,
    ) -> None:
        if isinstance(method, PerLayer):
            method = LayerChain(method)
        check_walk(method, windows, options, gradients is not None)
        self.n_held_out = 0 if windows is None else n_held_out(method, len(windows), options)
        self.model, self.method, self.pattern = model, method, pattern
        self.own_patterns = {name: own for selection in selections for name, own in selection.patterns.items()}
        self.selections, self.options, self.finished = selections, options, finished
        self.windows = windows if method.runs_layers else None
        self.gradients = gradients if method.needs & GRADIENTS else None
        self.restart = restart
        self.dense: HiddenStates | None = None  # what the dense model would have here, where the walk follows it
        self.targets: HiddenStates | None = None  # what the layer's outputs should be, where it is learned
        self.token_weights = token_weights
        self.calls: dict[int, LayerCalls] = {}
        self.phases = Phases(model.device)
        self.processes = processes
        self.learner: LayerLearner | None = None
        if isinstance(method, LayerChain):
            linears = [linear for selection in selections for linear in selection.prune]
            patterns = {linear.name: self.own_patterns.get(linear.name, pattern) for linear in linears}
            roles = list(dict.fromkeys(linear.role for linear in linears))
            self.learner = LayerLearner(model, method, learning, patterns, roles, pattern, options.min_expert_tokens)

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
            for states in (hidden, self.dense, self.targets):
                if states is not None:
                    states.close()

    def _has_work(self, index: int) -> bool:
        """Whether this layer or a later one is to be pruned: past that nobody needs its output."""
        return any(selection.prune for selection in self.selections[index:])

    def _embed(self, windows: Tensor, scratch: Path | None) -> HiddenStates:
        self.batch_size = size = self.options.batch_size or default_batch_size(windows.shape[1])
        learns = self.learner is not None
        budget = self.options.hidden_budget // (1 + self.method.follows_dense + learns)
        self.share: Share = share_of(len(windows), size, self.n_held_out, self.options.sum_segments, self.processes)
        windows = windows[self.share.sequences]
        with self.phases("read"):
            hidden, self.calls = self.model.embed(windows, size, budget, scratch, self.share.n_held_out)
        shape = (*windows.shape, hidden.all.shape[-1])
        if self.method.follows_dense:
            self.dense = HiddenStates(shape, hidden.all.dtype, self.model.device, budget, scratch)
            self.dense.all.copy_(hidden.all)
        if learns:
            self.targets = HiddenStates(shape, hidden.all.dtype, self.model.device, budget, scratch)
        if self.restart is not None:
            _copy(self.restart.hidden, hidden)
            if self.dense is not None:
                _copy(self.restart.dense, self.dense)
            self.restart = None
        self.batches = self.share.batches
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
        steps = LayerSteps(
            index, passes * n_batches + sum(map(len, stages)), learns=self.learner is not None and bool(stages)
        )
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
        learned, state = None, None
        if self.learner is not None and stages:
            learned, state = self.learner.learned, self.learner.state
        next_inputs = hidden.all if hidden is not None and feeds else None
        next_dense = self.dense.all if self.dense is not None and feeds else None
        yield LayerDone(
            index, tuple(done), selection.dense, seconds, earlier is not None, next_inputs, next_dense, learned, state
        )

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
        steps: LayerSteps,
        done: list[LinearDone],
        *,
        keep: bool,
    ) -> Iterator[LayerStep]:
        """Observe the inputs of some linears, prune them, put the result into the layer."""
        weights: Mapping[str, Tensor] = {}
        if self.token_weights is not None and hidden is not None:
            weights = {name: every[self.share.sequences] for name, every in self.token_weights(index).items()}
        keys = {linear.name: per_linear.statistics_keys(linear, weights) for linear in stage}
        owner = self._owners(stage, keys)
        stats: dict[str, InputStats] = {}
        if hidden is not None:
            # a learner still needs the layer's inputs, so what the dense layer makes of them is its targets
            keep_now = keep and self.targets is None
            goes_to = self._readers(keys, owner)
            stats = yield from self._observe(index, layer, stage, weights, hidden, steps, goes_to, keep=keep_now)
        if self.learner is not None and hidden is not None and self.targets is not None:
            seen = {one.name: self._seen(index, one, keys[one.name], stats) for one in stage}
            done += yield from self._learn(self.learner, index, layer, stage, seen, hidden, steps)
            if keep:
                hidden.all.copy_(self.targets.all)
        else:
            own = [linear for linear in stage if owner[linear.name] == self.processes.rank]
            solved: list[LinearDone] = []
            yield from self._solve(index, layer, own, keys, stats, steps, solved)
            done += solved if self.processes.alone else (yield from self._told(stage, owner, solved, steps))
        per_linear.apply(layer, stage, {one.name: one.pruned for one in done})

    def _owners(self, stage: Sequence[Linear], keys: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Which process prunes which linear; all of them learn a layer together."""
        if self.processes.alone or not isinstance(self.method, PerLinear):
            return {linear.name: 0 for linear in stage}
        return deal(stage, keys, self.method, self.processes.world_size)

    def _readers(self, keys: Mapping[str, Sequence[str]], owner: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Which processes get the totals of which statistics."""
        if self.learner is None:
            return readers(keys, owner)
        return dict.fromkeys((key for one in keys.values() for key in one), tuple(range(self.processes.world_size)))

    def _told(
        self, stage: Sequence[Linear], owner: Mapping[str, int], solved: Sequence[LinearDone], steps: LayerSteps
    ) -> Generator[LayerStep, None, list[LinearDone]]:
        """What became of every linear, from the process that pruned it."""
        own = {one.name: one for one in solved}
        found = []
        for linear in stage:
            pattern = self.own_patterns.get(linear.name, self.pattern)
            with self.phases("exchange"):
                one = told(linear, own.get(linear.name), pattern, owner[linear.name], self.processes, self.model.device)
            found.append(one)
            if linear.name not in own:
                yield steps.next("solve")
        return found

    def _observe(
        self,
        index: int,
        layer: nn.Module,
        stage: Sequence[Linear],
        weights: Mapping[str, Tensor],
        hidden: HiddenStates,
        steps: LayerSteps,
        goes_to: Mapping[str, Sequence[int]],
        *,
        keep: bool,
    ) -> Generator[LayerStep, None, dict[str, InputStats]]:
        observer = LayerObserver(
            layer,
            self.model.family,
            self.model.module_linears(index),
            {linear.shared_input for linear in stage},
            self.method.needs,
            self.model.device,
            per_linear.weightings(stage, weights),
            goes_to,
            self.processes,
        )
        with observer.watching():
            yield from self._forward(index, layer, hidden, steps, keep=keep, phase="observe", observer=observer)
        self.phases.move("forward", "statistics", observer.seconds)
        with self.phases("statistics"):
            return observer.results()

    def _seen(
        self, index: int, linear: Linear, keys: Sequence[str], stats: Mapping[str, InputStats]
    ) -> list[InputStats]:
        """The statistics of a linear's blocks of rows, with its gradients where the method needs them."""
        seen = [stats.get(key, InputStats(0)) for key in keys]
        if self.gradients is None:
            return seen
        return per_linear.with_gradients(seen, self.gradients(index, linear.name), self.model.device)

    def _solve(
        self,
        index: int,
        layer: nn.Module,
        stage: Sequence[Linear],
        keys: Mapping[str, Sequence[str]],
        stats: dict[str, InputStats],
        steps: LayerSteps,
        done: list[LinearDone],
    ) -> Iterator[LayerStep]:
        """Linear by linear; what no later one reads is dropped on the way."""
        last_use = {key: linear for linear in stage for key in keys[linear.name]}
        for linear in stage:
            done.append(self._linear(layer, linear, self._seen(index, linear, keys[linear.name], stats)))
            for key in keys[linear.name]:
                if last_use[key] is linear:
                    stats.pop(key, None)  # a Gram matrix and its factor are large
            give_back()
            yield steps.next("solve")

    def _learn(
        self,
        learner: LayerLearner,
        index: int,
        layer: nn.Module,
        stage: Sequence[Linear],
        seen: Mapping[str, Sequence[InputStats]],
        hidden: HiddenStates,
        steps: LayerSteps,
    ) -> Generator[LayerStep, None, list[LinearDone]]:
        """All linears of the layer together."""
        assert self.targets is not None
        run_of = partial(
            LayerRun,
            inputs=hidden,
            targets=self.targets,
            calls_of=self._calls_of,
            batch_size=self.batch_size,
            n_sequences=self.share.n_sequences,
            n_held_out=self.n_held_out,
            processes=self.processes,
            local=self.share.local,
        )
        learning = learner.layer(index, layer, stage, seen, run_of)
        while True:
            with self.phases("learn"):
                try:
                    step = next(learning)
                except StopIteration as end:
                    found: list[LinearDone] = end.value
                    break
            yield steps.learned(step)
        give_back()
        return found

    def _calls_of(self, size: int) -> LayerCalls:
        """How the model calls its layers for that many sequences; asked without its weights where no batch had that size."""
        if size not in self.calls:
            assert self.windows is not None
            with self.model.stand_in():
                calls = self.model.calls(self.windows[torch.arange(size) % len(self.windows)])
            self.calls[size] = replace(calls, hidden=calls.hidden.new_empty(0))
        return self.calls[size]

    def _linear(self, layer: nn.Module, linear: Linear, stats: Sequence[InputStats]) -> LinearDone:
        assert isinstance(self.method, PerLinear)
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
        steps: LayerSteps,
        *,
        keep: bool,
        phase: str,
        observer: LayerObserver | None = None,
    ) -> Iterator[LayerStep]:
        """Run the layer over all batches; with `keep` its output replaces its input."""
        for turn in self.share.turns:
            for batch in turn.batches:
                if observer is not None:
                    observer.batch = batch
                    observer.held_out = batch.start >= len(hidden.all) - self.share.n_held_out
                    self._record_dense(index, layer, batch, observer)
                with self.phases("forward"), torch.no_grad():
                    output = self.calls[batch.stop - batch.start].run(index, layer, hidden.get(batch))
                    if observer is not None and self.targets is not None:
                        self.targets.put(batch, self._target(batch, output))
                    if keep:
                        hidden.put(batch, output)
                    del output
                yield steps.next(phase)
            if observer is not None:
                with self.phases("statistics" if self.processes.alone else "exchange"):
                    observer.close_turn(turn)
        give_back()  # activations of several MiB each, kept in pieces, would lie under the solver's peak

    def _target(self, batch: slice, output: Tensor) -> Tensor:
        """Between what the dense layer makes of its own input, and what the dense model has here."""
        assert isinstance(self.method, LayerChain)
        target = self.method.method.target
        return output if self.dense is None or not target else torch.lerp(output, self.dense.get(batch), target)

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
