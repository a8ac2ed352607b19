"""The three shapes that a method can have. A method is a frozen dataclass; its fields are its hyper-parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from nmprune.pattern import Pattern
from nmprune.stats import GRADIENTS, InputStats, Statistic


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
        presets: name -> the hyper-parameters that it sets; the others keep their defaults.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    updates_weights: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    def why_not(self, pattern: Pattern) -> str | None:
        """None where the method can do `pattern`, else the reason in words. Every pattern, unless overridden."""
        return None

    def hyper_parameters(self) -> dict[str, Any]:
        """Field name -> value, in order."""
        return dataclasses.asdict(self)

    @property
    def runs_layers(self) -> bool:
        """Whether the stream has to run decoder layers on calibration text for it; gradients come from a pass before."""
        return bool(self.needs - GRADIENTS)

    @property
    def follows_dense(self) -> bool:
        """Whether the stream has to carry what the dense model would have, beside what the pruned one has."""
        return "cross_gram" in self.needs


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


State = dict[str, Tensor]  # plain data on the CPU: saved, loaded and compared as it is


class LayerWork(Protocol):
    """One decoder layer as a `PerLayer` method sees it: tensors, and two callables that run the layer.

    Linears go by name, in order of execution. The learner builds masked weights; the layer, its inputs, its targets, the
    device, the batching and (in a distributed run) the other processes are the runner's. An expert that saw too few tokens
    is not among them.

    Attributes:
        index: 0-based number of the decoder layer.
        n_layers: of the model.
        weights: fp32 (out, in), dense.
        roles: such as "mlp.up_proj".
        patterns: N kept of M.
        priors: bool (out, in) prior masks; empty where the method's prior is "none".
        stats: statistics of each linear's input, as the method declared in `needs`.
        train: int64, the sequences to learn from.
        held_out: int64, the sequences that judge; they take no part in learning. Empty where there is but one sequence.
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
        """Mean over the sequences of the method's `distance`, with `weights` in place of the linears' own. No gradients.

        A linear that is not in `weights` stays dense.
        """

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

    Class attributes:
        published: (hidden size, decoder layers) of a model -> what the method's paper says it takes, for plans.

    Attributes that every such method has as a field:
        prior: "none", the name of a `PerLinear` method run just before, or a mask file.
        target: t of the layer's targets Y = t f(W, dense model's input) + (1 - t) f(W, own input); 0..1.
    """

    published: ClassVar[Mapping[tuple[int, int], str]] = MappingProxyType({})

    prior: str = option("none", "prior masks: none, a one-shot method, or a mask file")
    target: float = option(0.0, "0: the dense layer's output on the same input; 1: the dense model's output here")

    @property
    def runs_layers(self) -> bool:
        """Always: it learns from what the layer makes of its inputs."""
        return True

    @property
    def follows_dense(self) -> bool:
        """Also where the target is the dense model's output."""
        return "cross_gram" in self.needs or self.target > 0

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
        """Peak bytes inside `learn`, masked weights and their gradients included; not the layer, nor its forward and backward.

        Args:
            n_weights: of the layer's linears together.
            pattern: N kept of M.
        """


@dataclass(frozen=True)
class Course:
    """Where a whole-model run is.

    Attributes:
        step: optimiser steps done, from 0; `total` after the last one.
        total: optimiser steps of the run.
    """

    step: int
    total: int

    @property
    def share(self) -> float:
        """0 at the start, 1 at the end."""
        return self.step / self.total


@dataclass(frozen=True)
class AdamStep:
    """AdamW's settings for one step; `clip` is the largest norm of all gradients together, 0 = no limit."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0


@dataclass(frozen=True)
class WholeModel(Method):
    """A method that learns the masks of all linears together, from the loss of the model. The loop is `nmprune.train`'s.

    The method sees one linear at a time. Its state is learnt in place: every entry is fp32 and has the linear's output rows
    along dim 0; rows do not depend on each other (but for `begin`), so that a state can be sharded by rows as its weight is.
    A generator that is passed in was seeded for this linear and this moment: the same moment gives the same numbers, however
    often it is asked, which is what activation checkpointing and resume rest on.

    Class attributes:
        learns_by: "gradient": AdamW on the state, through `effective`; "score": forwards only, and no graph ever exists;
            "descent": rounds of `revise`, of which held-out text takes the best or none.
        noise: how long one draw holds: "none" is drawn, one for a whole "step", or a new one per "micro_batch".
        train_defaults: settings of the recipe's `train` section that this method starts from.
        preset_train: preset -> such settings, on top.

    Attributes that every such method has as a field:
        prior: the name of a `PerLinear` method run just before, or a mask file.
    """

    learns_by: ClassVar[Literal["gradient", "score", "descent"]] = "gradient"
    noise: ClassVar[Literal["none", "step", "micro_batch"]] = "none"
    train_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    preset_train: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    prior: str = option("wanda", "prior masks: a one-shot method run just before, or a mask file")

    @property
    def trains_rest(self) -> bool:
        """Whether embeddings, norms and head learn, too; masks are judged and used with the original ones."""
        return False

    @abstractmethod
    def begin(self, weight_OI: Tensor, prior_OI: Tensor, pattern: Pattern, generator: torch.Generator) -> State:
        """The state before the first step.

        Args:
            weight_OI: fp32 (out, in), dense; not modified.
            prior_OI: bool (out, in).
            pattern: N kept of M.
            generator: the only source of randomness.
        """

    def effective(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor:
        """The weight that the forward uses, (out, in); differentiable in the state where the method learns by gradient.

        Unless a method says otherwise, the weights under the mask that it draws.

        Args:
            weight_OI: fp32 (out, in), dense and frozen.
            state: as `begin` made it and the steps so far left it.
            pattern: N kept of M.
            course: where the run is.
            generator: seeded as `noise` says.
        """
        return weight_OI * self.draw(state, pattern, generator)

    @abstractmethod
    def hard_mask(self, weight_OI: Tensor, state: State, pattern: Pattern) -> Tensor:
        """bool (out, in): the mask that the state stands for. It is put on the original weights."""

    @abstractmethod
    def state_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """Bytes of the state of so many weights with its gradients and the optimiser's moments, for plans."""

    def forward_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """Bytes that one forward keeps of `effective` until the backward, or makes on the way, for plans."""
        return 8 * n_weights

    def penalty(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor | None:
        """What this linear adds to the loss, a differentiable scalar; None where no linear adds anything now.

        It is asked once per step, with the generator of the step's first forward.
        """
        return None

    def optimiser(self, course: Course) -> AdamStep:
        """AdamW's settings for the coming step; schedules are the method's."""
        return AdamStep(lr=1e-3)

    def after_step(self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course) -> None:
        """What follows an optimiser step, such as a proximal step: changes the state in place, without gradients."""
        return None

    def values(self, course: Course) -> dict[str, float]:
        """What metrics.jsonl should say of the schedules, such as a temperature."""
        return {}

    def carried(self) -> State:
        """What is carried from step to step, before the first; 0-dimensional tensors. By descent: "damping"."""
        return {}

    # -- for methods that learn by descent only -------------------------------------------------------------------------

    def revise(
        self,
        weight_OI: Tensor,
        mask_OI: Tensor,
        slope_OI: Tensor,
        curvature_O: Tensor,
        gram_II: Tensor,
        pattern: Pattern,
        damping: float,
    ) -> Tensor:
        """bool (out, in): the next mask of a linear. The state's one entry is "mask", 1 = kept.

        Args:
            weight_OI: fp32 (out, in), dense; not modified.
            mask_OI: bool (out, in), the mask of now.
            slope_OI: fp32 (out, in), dL/dW at the masked weight, mean over the round's text; 0 where the weight is 0.
            curvature_O: fp32 (out,), s: D changes the loss by 1/2 sum_i s_i D_i A D_i^T more than its slope says.
            gram_II: fp32 (in, in), A, the mean of x x^T over the tokens that the linear saw.
            pattern: N kept of M.
            damping: what the curvature is multiplied by: the larger, the fewer groups change.
        """
        raise NotImplementedError(f"{self.name} does not learn by descent")

    # -- for methods that learn by score only ---------------------------------------------------------------------------

    def draw(self, state: State, pattern: Pattern, generator: torch.Generator) -> Tensor:
        """bool (out, in): the random mask of a step; the same generator gives the same one again for `score_step`."""
        raise NotImplementedError(f"{self.name} draws no masks")

    def advantage(self, loss: float, prior_loss: float, carried: State) -> tuple[float, State]:
        """What weights the score of the masks that were drawn, and what is carried on.

        Args:
            loss: mean over the step's sequences with the masks that were drawn.
            prior_loss: the same sequences with the prior masks.
            carried: as `carried` or the step before left it; not modified.
        """
        raise NotImplementedError(f"{self.name} has no score")

    def score_step(
        self, state: State, pattern: Pattern, advantage: float, course: Course, generator: torch.Generator
    ) -> None:
        """Move the state along the score of what was drawn in this step, in place.

        Args:
            state: of the linear, as it was when the mask was drawn.
            pattern: N kept of M.
            advantage: from `advantage`.
            course: where the run is.
            generator: seeded as for `draw` in this step: what it draws again is what the forwards saw.
        """
        raise NotImplementedError(f"{self.name} has no score")
