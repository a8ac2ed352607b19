"""HyperPrune's hyper-parameters: every part of the paper and every part of ours is a switch; and the two presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from nmprune.errors import InputError
from nmprune.methods.base import PerLayer, option
from nmprune.methods.group_features import SETS
from nmprune.pattern import Pattern

_CHOICES = {
    "head": ("slots", "candidates"),
    "features": SETS,
    "prior_form": ("mask", "scores"),
    "prior_decay": ("share", "step"),
    "temperature_decay": ("exponential", "linear", "step"),
    "loss": ("normalised", "relative", "sum"),
    "outlier": ("share", "sum"),
    "continual": ("kl", "squared"),
    "anchor": ("finished", "latest"),
    "schedule": ("cosine", "constant"),
}
# Table 3 as printed, and what the text around it says. The lambdas are given as ranges only; 1 is in all of them.
_LITERAL: Mapping[str, Any] = MappingProxyType(
    {
        "prior": "sparsegpt",
        "target": 0.0,
        "steps": 2000,
        "sequences": 1,
        "residual": False,
        "network_every": 1,
        "network_share": 1.0,
        "head": "candidates",
        "features": "raw",
        "hidden": 256,
        "depth": 3,
        "zero_start": False,
        "layer_width": 64,
        "warm_layer": False,
        "depth_features": False,
        "component_width": 64,
        "component_lr": 1.0,
        "embedding_norm": 0.0,
        "network_lr": 5e-4,
        "weight_decay": 0.1,
        "schedule": "constant",
        "warmup": 0.0,
        "clip": 0.0,
        "gamma": 1e-5,
        "alpha": 2.0,
        "beta": 5.0,
        "prior_decay": "step",
        "temperature": 1.0,
        "temperature_end": 0.5,
        "temperature_decay": "step",
        "temperature_rate": 1e-4,
        "noise": 1.0,
        "noise_end": 1.0,
        "hard_share": 0.0,
        "loss": "sum",
        "lambda1": 1.0,
        "outlier": "sum",
        "lambda2": 1.0,
        "continual": "squared",
        "anchor": "latest",
        "cache_size": 50,
        "guard": False,
        "keep_best": False,
    }
)
# What the printed values cannot have meant, resolved; see docs/methods/hyperprune.md.
_RESOLVED: Mapping[str, Any] = MappingProxyType(
    {
        **_LITERAL,
        "prior": "wanda",
        "steps": 200,
        "features": "scaled",
        "zero_start": True,
        "warm_layer": True,
        "depth_features": True,
        "component_lr": 0.2,
        "embedding_norm": 1e-4,
        "schedule": "cosine",
        "warmup": 0.05,
        "clip": 1.0,
        "gamma": 2.0,
        "alpha": 2.0,
        "prior_decay": "share",
        "temperature": 2.0,
        "temperature_end": 0.1,
        "temperature_decay": "exponential",
        "hard_share": 0.25,
        "loss": "normalised",
        "lambda1": 0.1,
        "outlier": "share",
        "lambda2": 0.1,
        "continual": "kl",
        "anchor": "finished",
        "cache_size": 64,
        "keep_best": True,
    }
)


@dataclass(frozen=True)
class HyperPruneSettings(PerLayer):
    """The hyper-parameters, checked, and what they are at a moment of a layer's training."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"paper": _RESOLVED, "paper-literal": _LITERAL}
    )

    prior: str = option("descent", "prior masks: none, a one-shot method, or a mask file")
    target: float = option(0.4, "0: the dense layer's output on the same input; 1: the dense model's output here")
    steps: int = option(44, "steps per decoder layer")
    sequences: int = option(2, "calibration sequences of a step")
    check_every: int = option(11, "steps between two looks at the held-out sequences")

    residual: bool = option(True, "one free score per weight for the layer in work, beside the network")
    residual_start: float = option(2.0, "where the free scores start: this times the prior")
    residual_lr: float = option(0.1, "learning rate of the free scores")
    sample_share: float = option(1.0, "share of the groups that learn in a step; the others stand at their hard mask")
    block: int = option(16384, "groups whose logits stand in memory together")

    network: bool = option(True, "the shared network; without it the free scores alone learn")
    network_every: int = option(8, "steps between two updates of the network")
    network_share: float = option(0.25, "share of the learning groups that an update of the network looks at")
    head: str = option("slots", "slots: a score per weight of a group; candidates: a logit per legal mask")
    features: str = option("first_order", "raw (the paper), scaled, activations or first_order")
    refreshes: int = option(2, "how often a layer's first-order features are taken anew")
    hidden: int = option(64, "width of the hidden layers")
    depth: int = option(2, "hidden layers")
    zero_start: bool = option(True, "the last layer starts at zero: the first mask is the prior's")
    layer_width: int = option(16, "width of the layer embedding; 0 = none")
    warm_layer: bool = option(True, "a layer's embedding starts where the layer before it ended")
    depth_features: bool = option(True, "the layer's place in the model beside its embedding")
    component_width: int = option(16, "width of the component embedding; 0 = none")
    component_noise: float = option(0.01, "noise on the one-hot start of the component embedding")
    component_lr: float = option(0.2, "learning rate of both embeddings, times network_lr")
    component_freeze: float = option(
        0.0, "share of the steps at the start in which the component embedding stands still"
    )
    embedding_norm: float = option(1e-4, "weight of the squared norm of the embeddings")
    network_lr: float = option(3e-3, "learning rate of the network")
    weight_decay: float = option(0.1, "decay of the network's matrices")
    distil: int = option(0, "steps at a layer's end in which the network learns the layer's final masks")

    schedule: str = option("cosine", "cosine to a tenth of the learning rates, or constant")
    warmup: float = option(0.05, "share of the steps in which the learning rates rise")
    clip: float = option(1.0, "largest norm of the network's gradient; 0 = no limit")
    gamma: float = option(0.0, "strength of the prior term (gamma_0)")
    alpha: float = option(0.0, "decay of the prior term")
    beta: float = option(5.0, "sharpness of the prior term")
    prior_decay: str = option("share", "time in the decay of the prior term: share of the steps (0 to 1), or step")
    prior_form: str = option(
        "mask", "mask: similarity with the prior mask; scores: Wanda's score, standardised in the group"
    )
    temperature: float = option(1.0, "temperature at the start")
    temperature_end: float = option(0.1, "temperature at the end; its lowest with temperature_decay=step")
    temperature_decay: str = option(
        "exponential", "exponential or linear in the share of the steps, or step (appendix B)"
    )
    temperature_rate: float = option(1e-4, "eta, with temperature_decay=step")
    noise: float = option(0.0, "scale of the Gumbel noise at the start")
    noise_end: float = option(0.0, "and at the end")
    hard_share: float = option(0.25, "last share of the steps, with hard masks forward (straight-through)")

    loss: str = option(
        "normalised", "normalised per token, relative to the layer's update, or the sum of squares (the paper)"
    )
    loss_floor: float = option(0.1, "added to a token's norm, times the median over the tokens, with loss=normalised")
    lambda1: float = option(0.0, "weight of the outlier term: what is kept of w^2 x^2")
    outlier: str = option("share", "share: of each linear's total, averaged; sum: as printed")
    lambda2: float = option(
        0.1, "weight of the continual term: the network's change on cached groups of earlier layers"
    )
    continual: str = option("kl", "kl: between the candidates' probabilities; squared: between the outputs")
    anchor: str = option(
        "finished", "compare with the network as it was when the cached layer was finished, or the latest"
    )
    cache_size: int = option(64, "groups of each linear that are cached")

    keep_best: bool = option(True, "of the masks looked at, take those with the lowest held-out loss, not the last")
    guard: bool = option(True, "keep the prior's masks where the learned ones have no lower held-out loss")
    descend: int = option(0, "sweeps of descent from the learned masks; taken where the held-out loss falls")
    patience: int = option(0, "looks without a better mask after which a layer is finished; 0 = all steps")

    def __post_init__(self) -> None:
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                raise InputError(f"hyperprune.{key} is {getattr(self, key)!r}; expected one of {', '.join(known)}.")
        for key in ("steps", "sequences", "check_every", "block", "network_every", "hidden", "depth"):
            if getattr(self, key) < 1:
                raise InputError(f"hyperprune.{key} is {getattr(self, key)}; expected a whole number >= 1.")
        for key in ("sample_share", "network_share", "temperature", "temperature_end", "residual_lr", "network_lr"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise InputError(f"hyperprune.{key} is {getattr(self, key)}; expected a number above 0.")
        for key in ("sample_share", "network_share", "target", "warmup", "hard_share", "component_freeze"):
            if not 0 <= getattr(self, key) <= 1:
                raise InputError(f"hyperprune.{key} is {getattr(self, key)}; expected a number from 0 to 1.")
        if not (self.network or self.residual):
            raise InputError(
                "hyperprune.network and hyperprune.residual are both off, so nothing learns. Leave one of them on."
            )
        if self.network_every > 1 and not self.residual:
            raise InputError(
                f"hyperprune.network_every is {self.network_every} and residual is off: nothing would learn in between. "
                "Set network_every=1."
            )

    def share(self, step: int) -> float:
        """s, from 0 at the first step to 1 at the last."""
        return min(1.0, step / max(1, self.steps - 1))

    def temperature_at(self, step: int) -> float:
        """Temperature of a step, counted from 0; "step" is the schedule of appendix B."""
        s, start, end = self.share(step), self.temperature, self.temperature_end
        if self.temperature_decay == "step":
            return max(end, start * math.exp(-self.temperature_rate * step))
        return start + (end - start) * s if self.temperature_decay == "linear" else start * (end / start) ** s

    def gamma_at(self, step: int) -> float:
        """Strength of the prior term, equation 39, with t a step or s."""
        time = step if self.prior_decay == "step" else self.share(step)
        return self.gamma * math.exp(-self.alpha * time)

    def noise_at(self, step: int) -> float:
        """Scale of the Gumbel noise."""
        return self.noise + (self.noise_end - self.noise) * self.share(step)

    def is_hard(self, step: int) -> bool:
        """Whether the step's masks are hard forward."""
        return step >= round(self.steps * (1 - self.hard_share))

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied with: a rise, then a cosine to 0.1."""
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        return rise if self.schedule == "constant" else rise * (0.55 + 0.45 * math.cos(math.pi * self.share(step)))

    def outputs(self, pattern: Pattern) -> int:
        """Logits that the network's head makes for a group."""
        return pattern.group if self.head == "slots" else pattern.n_candidates
