"""Run a `PerLayer` method on one decoder layer: prior masks, learning, the steps that follow, the record of it all."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from nmprune.architectures import Linear
from nmprune.errors import InputError
from nmprune.methods import Pruned
from nmprune.methods.base import LearnStep, State
from nmprune.pattern import Pattern
from nmprune.refine import LayerChain
from nmprune.results import LearnedLayerResult
from nmprune.stats import InputStats
from nmprune.stream import per_linear
from nmprune.stream.layer_done import LinearDone
from nmprune.stream.layer_run import LayerRun
from nmprune.stream.model import DecoderModel

_SEEDS_APART = 1_000_003  # between the seeds of two layers: runs with seeds 0, 1, 2 ... share none


def nothing(index: int) -> State | None:
    """The state or snapshot of a run that starts afresh."""
    return None


@dataclass(frozen=True)
class Learning:
    """What a walk needs for a method that learns layers, beside what every walk needs.

    Attributes:
        seed: all randomness is derived from it.
        prior_masks: layer -> linear name -> bool (out, in), where the prior is a mask file.
        state: layer -> the state that an interrupted run carried to it; None where it has not come so far.
        snapshot: layer -> what an interrupted run kept inside it; None where it kept nothing.
    """

    seed: int = 0
    prior_masks: Callable[[int], Mapping[str, Tensor]] | None = None
    state: Callable[[int], State | None] = nothing
    snapshot: Callable[[int], State | None] = nothing


@dataclass
class _Layer:
    """The layer in work."""

    index: int
    module: nn.Module
    stats: Mapping[str, InputStats]
    done: list[LinearDone] = field(default_factory=list)


class LayerLearner:
    """Learns layer after layer and carries the state between them.

    Args:
        model: whose layers.
        chain: the method, its prior and its steps.
        learning: seed, prior masks, what an interrupted run left.
        patterns: linear name -> its pattern, of all linears that will be learned.
        roles: every role that will be seen, in order.
        pattern: of the run; what the method starts with.
        min_expert_tokens: an expert that saw fewer is pruned by magnitude.

    Attributes:
        state: what the next layer starts from; None before the first.
        learned: what the last layer came to.
    """

    def __init__(
        self,
        model: DecoderModel,
        chain: LayerChain,
        learning: Learning,
        patterns: Mapping[str, Pattern],
        roles: Sequence[str],
        pattern: Pattern,
        min_expert_tokens: int,
    ) -> None:
        if chain.prior_file is not None and learning.prior_masks is None:
            raise ValueError(f"the prior {chain.prior_file} is a mask file, and `prior_masks` was not given")
        self._model, self._chain, self._learning = model, chain, learning
        self._patterns, self._roles, self._pattern = patterns, list(roles), pattern
        self._min_expert_tokens = min_expert_tokens
        self.state: State | None = None
        self.learned: LearnedLayerResult | None = None

    def layer(
        self,
        index: int,
        module: nn.Module,
        linears: Sequence[Linear],
        seen: Mapping[str, Sequence[InputStats]],
        run_of: Callable[..., LayerRun],
    ) -> Generator[LearnStep, None, list[LinearDone]]:
        """Learn one layer; its module is dense, and stays so but for experts without tokens.

        Args:
            index: 0-based number of the decoder layer.
            module: its weights.
            linears: to be pruned.
            seen: linear name -> statistics of its input, one for each block of its output rows; a learner reads one.
            run_of: makes the `LayerRun` of (index, n_layers, module, linears, weights=, patterns=, priors=, stats=, distance=).

        Returns:
            What became of the linears, in order, and `learned` and `state`.

        Raises:
            InputError: the weights, the statistics or the prior masks cannot be used; the message names the linear.
        """
        if self.state is None:
            self.state = self._learning.state(index) or self._start()
        stats = {name: _only(name, blocks) for name, blocks in seen.items()}
        layer = _Layer(index, module, stats)
        weights = {linear.name: self._model.weight(module, linear) for linear in linears}
        taught = [linear for linear in linears if not self._starved(linear, stats[linear.name])]
        self._prune_starved(layer, [one for one in linears if one not in taught], weights)
        weights = {linear.name: weights[linear.name] for linear in taught}
        patterns = {linear.name: self._patterns[linear.name] for linear in taught}
        run = run_of(
            index,
            self._model.n_layers,
            module,
            taught,
            weights=weights,
            patterns=patterns,
            priors=self._priors(layer, taught, weights),
            stats={name: stats[name] for name in weights},
            distance=self._chain.method.distance,
        )
        pruned, state, n_steps, seconds = yield from self._learn(run)
        self.state = {name: value.detach().cpu() for name, value in state.items()}
        self._check(pruned, weights)
        self.learned = self._outcome(run, pruned, n_steps)
        self._refine(layer, taught, run, pruned, seconds)
        order = {linear.name: at for at, linear in enumerate(linears)}
        return sorted(layer.done, key=lambda one: order[one.name])

    def _start(self) -> State:
        generator = torch.Generator().manual_seed(self._learning.seed)
        return self._chain.method.start(self._roles, self._model.n_layers, self._pattern, generator)

    def _starved(self, linear: Linear, stats: InputStats) -> bool:
        return linear.in_module.expert is not None and stats.n_tokens < self._min_expert_tokens

    def _prune_starved(self, layer: _Layer, starved: Sequence[Linear], weights: Mapping[str, Tensor]) -> None:
        """Experts that saw too few tokens: by magnitude, and at once, since the layer will run without what they lose."""
        for linear in starved:
            pattern, n_tokens = self._patterns[linear.name], layer.stats[linear.name].n_tokens
            pruned = per_linear.by_magnitude(weights[linear.name], pattern, n_tokens)
            layer.done.append(per_linear.finished(self._model, linear, pruned, pattern, n_tokens, 0.0))
        per_linear.apply(layer.module, starved, {one.name: one.pruned for one in layer.done})

    def _priors(self, layer: _Layer, linears: Sequence[Linear], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Prior masks from the one-shot method, or from the mask file."""
        prior = self._chain.prior
        if prior is not None:
            masks = {}
            for linear in linears:
                try:
                    found = prior.prune(weights[linear.name], layer.stats[linear.name], self._patterns[linear.name])
                except InputError as error:
                    raise error.located(f"{linear.name}, prior {prior.name}") from error
                masks[linear.name] = found.mask
            return masks
        if self._chain.prior_file is None or self._learning.prior_masks is None:
            return {}
        stored = self._learning.prior_masks(layer.index)
        return {linear.name: stored[linear.name].to(weights[linear.name].device) for linear in linears}

    def _learn(self, run: LayerRun) -> Generator[LearnStep, None, tuple[dict[str, Pruned], State, int, float]]:
        """What the method returns, the steps it made, and the seconds it took."""
        assert self.state is not None
        if not run.weights:
            return {}, self.state, 0, 0.0
        seed = self._learning.seed + _SEEDS_APART * (run.index + 1)
        steps = self._chain.method.learn(run, self.state, seed, self._learning.snapshot(run.index))
        n_steps, seconds = 0, 0.0
        while True:
            start = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration as end:
                pruned, state = end.value
                return pruned, state, n_steps, seconds + time.perf_counter() - start
            except InputError as error:
                raise error.located(f"decoder layer {run.index}") from error
            seconds += time.perf_counter() - start
            n_steps = step.step
            yield step

    def _check(self, pruned: Mapping[str, Pruned], weights: Mapping[str, Tensor]) -> None:
        if pruned.keys() != weights.keys():
            raise RuntimeError(f"{self._chain.method.name} returned {sorted(pruned)}, expected {sorted(weights)}")

    def _outcome(self, run: LayerRun, pruned: Mapping[str, Pruned], n_steps: int) -> LearnedLayerResult:
        """Losses and flips of what the method returned, before any step that follows."""
        flips = None
        if run.priors:
            flipped = [_changed(one.mask, run.priors[name], run.patterns[name]) for name, one in pruned.items()]
            flips = sum(int(one.sum()) for one in flipped) / sum(one.numel() for one in flipped)
        judged = len(run.held_out) and pruned
        prior = {name: Pruned(mask) for name, mask in run.priors.items()}
        accepted = [bool(one.notes["accepted"]) for one in pruned.values() if "accepted" in one.notes]
        return LearnedLayerResult(
            run.index,
            n_steps,
            prior_loss=self._held_out_loss(run, prior) if judged and prior else None,
            loss=self._held_out_loss(run, pruned) if judged else None,
            flips=flips,
            accepted=all(accepted) if accepted else None,
        )

    @staticmethod
    def _held_out_loss(run: LayerRun, pruned: Mapping[str, Pruned]) -> float:
        """The layer's loss on the held-out sequences with these masks, and these weights where they moved."""
        weights = {
            name: torch.where(one.mask, run.weights[name] if one.weight is None else one.weight.float(), 0.0)
            for name, one in pruned.items()
        }
        return run.loss(run.held_out, weights)

    def _refine(
        self, layer: _Layer, linears: Sequence[Linear], run: LayerRun, pruned: Mapping[str, Pruned], seconds: float
    ) -> None:
        """The steps that follow, linear by linear; then each linear's record, with its share of the layer's seconds."""
        n_weights = sum(weight.numel() for weight in run.weights.values())
        for linear in linears:
            start = time.perf_counter()
            weight, of_inputs, pattern = run.weights[linear.name], run.stats[linear.name], run.patterns[linear.name]
            refined = self._chain.refine(weight, self._noted(run, linear.name, pruned[linear.name]), of_inputs, pattern)
            spent = time.perf_counter() - start + seconds * weight.numel() / n_weights
            done = per_linear.finished(self._model, linear, refined, pattern, of_inputs.n_tokens, spent)
            layer.done.append(per_linear.measured(weight, done, [of_inputs]))
        if self._chain.steps and self.learned is not None and self.learned.loss is not None:
            final = {one.name: one.pruned for one in layer.done if one.name in run.weights}
            self.learned = replace(self.learned, final_loss=self._held_out_loss(run, final))

    def _noted(self, run: LayerRun, name: str, pruned: Pruned) -> Pruned:
        """With the prior that it started from, and how far it went."""
        if not run.priors:
            return pruned
        prior = self._chain.method.prior
        if self._chain.prior is not None and self._chain.prior.updates_weights:
            prior = f"{prior}'s mask without its weights"
        flips = _changed(pruned.mask, run.priors[name], run.patterns[name]).float().mean().item()
        return replace(pruned, notes={"prior": prior, **pruned.notes, "flips": flips})


def _changed(mask: Tensor, before: Tensor, pattern: Pattern) -> Tensor:
    """Which groups differ, bool (out, groups)."""
    return (mask != before).unflatten(-1, (-1, pattern.group)).any(-1)


def _only(name: str, blocks: Sequence[InputStats]) -> InputStats:
    if len(blocks) != 1:
        raise InputError(
            f"{name}: {len(blocks)} blocks of rows with statistics of their own; a learner needs loss_aware.blocks 1."
        )
    return blocks[0]
