"""The three shapes that a method can have. A method is a frozen dataclass; its fields are its hyper-parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic


def option(default: Any, help: str) -> Any:
    """A hyper-parameter: its default and its one description, which the CLI help, the docs and the reports show."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Pruned:
    """What a method made of one linear.

    Attributes:
        mask: bool (out, in), True = kept, exactly N of every M along `in`.
        weight: fp32 (out, in), the moved weights with zeros where the mask is False; None for frozen weights (then the
            pruned weight is the dense one where the mask is True and +0.0 elsewhere).
        notes: small facts worth recording with the linear, e.g. {"damping_steps": 1}.
    """

    mask: Tensor
    weight: Tensor | None = None
    notes: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """What every method has, whatever it sees.

    Class attributes:
        name: the paper's short name, as the CLI spells it.
        summary: one sentence for `nmprune list`.
        paper: where the formula comes from.
        needs: the statistics it reads; empty = none.
        updates_weights: whether kept weights may move.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    updates_weights: ClassVar[bool] = False

    def why_not(self, pattern: Pattern) -> str | None:
        """None where the method can do `pattern`, else the reason in words. Every pattern, unless overridden."""
        return None

    def hyper_parameters(self) -> dict[str, Any]:
        """Field name -> value, in order."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PerLinear(Method):
    """A method that sees one linear and its input statistics."""

    @abstractmethod
    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """Prune one linear.

        Args:
            weight: fp32 (out, in), dense; not modified.
            stats: what the method declared in `needs`.
            pattern: N kept of M.

        Raises:
            InputError: the statistics or the weight cannot be used (wrong width, not finite, singular).
        """

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """Peak bytes of temporaries inside `prune`, for plans: fp32 scores and the comparisons on the way to a mask."""
        return 12 * out_features * in_features

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """Floating-point operations of `prune`, for plans: only the ratio between two shapes is used."""
        return 10.0 * out_features * in_features


State = dict[str, Tensor]  # plain data: saved, loaded and compared as it is


class LayerWork(Protocol):
    """One decoder layer as a `PerLayer` method sees it: tensors, and two callables that run the layer.

    Linears go by name, in order of execution. The learner builds masked weights; the layer, its inputs, its targets, the
    device, the batching and (in a distributed run) the other processes are the runner's.

    Attributes:
        index: 0-based number of the decoder layer.
        n_layers: of the model.
        weights: fp32 (out, in), dense.
        roles: such as "mlp.up_proj".
        patterns: N kept of M.
        priors: bool (out, in) prior masks; empty where the method's prior is "none".
        stats: statistics of each linear's input, as the method declared in `needs`.
        train: int64, the sequences to learn from.
        held_out: int64, the sequences that judge; they take no part in learning.
    """

    index: int
    n_layers: int
    weights: Mapping[str, Tensor]
    roles: Mapping[str, str]
    patterns: Mapping[str, Pattern]
    priors: Mapping[str, Tensor]
    stats: Mapping[str, InputStats]
    train: Tensor
    held_out: Tensor

    def loss(self, sequences: Tensor, weights: Mapping[str, Tensor]) -> float:
        """Mean over the sequences of the method's `distance`, with `weights` in place of the linears' own. No gradients."""

    def gradients(self, sequences: Tensor, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """`loss`, and its gradient with respect to each of the weights, fp32 (out, in)."""


@dataclass(frozen=True)
class LearnStep:
    """A sign of life of a learner.

    Attributes:
        step: steps done in this layer (or in the run), from 1.
        total: steps that are planned.
        values: what metrics.jsonl keeps: loss, hard_loss, temperature, flips and so on.
        snapshot: makes what `learn` needs to go on from here; only called where it is to be kept.
    """

    step: int
    total: int
    values: dict[str, float]
    snapshot: Callable[[], State]


@dataclass(frozen=True)
class PerLayer(Method):
    """A method that learns the masks of one decoder layer at a time and carries a state from layer to layer.

    Attributes that every such method has as a field:
        prior: "none", the name of a `PerLinear` method run just before, or a mask file.
        target: t of the layer's targets Y = t f(W, dense model's input) + (1 - t) f(W, own input); 0..1.
    """

    prior: str = option("none", "prior masks: none, a one-shot method, or a mask file")
    target: float = option(0.0, "0: the dense layer's output on the same input; 1: the dense model's output here")

    @abstractmethod
    def start(self, roles: list[str], n_layers: int, pattern: Pattern, generator: torch.Generator) -> State:
        """The state before the first layer.

        Args:
            roles: every role that will be seen, in order.
            n_layers: decoder layers of the model.
            pattern: N kept of M.
            generator: the only source of randomness.
        """

    @abstractmethod
    def distance(self, output_BTD: Tensor, target_BTD: Tensor, input_BTD: Tensor) -> Tensor:
        """(B,): how far each sequence's layer outputs are from their targets; differentiable in `output_BTD`."""

    @abstractmethod
    def learn(
        self, work: LayerWork, state: State, seed: int, snapshot: State | None = None
    ) -> Generator[LearnStep, None, tuple[dict[str, Pruned], State]]:
        """Learn one layer's masks; returns them by linear name, with the state for the next layer.

        Args:
            work: the layer.
            state: as `start` or the layer before left it; not modified.
            seed: of this layer; all randomness is derived from it.
            snapshot: what an earlier `LearnStep.snapshot` of this layer made: go on from there, to the same result.

        Raises:
            InputError: the weights or statistics cannot be used.
        """

    @abstractmethod
    def state_bytes(self, roles: list[str], n_layers: int, pattern: Pattern) -> int:
        """Bytes of the carried state, for plans."""

    @abstractmethod
    def learner_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """Peak bytes inside `learn` beside the layer, its forward and backward, for plans.

        Args:
            n_weights: of the layer's linears together.
            pattern: N kept of M.
        """
