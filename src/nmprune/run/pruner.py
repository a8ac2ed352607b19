"""A method of any shape and the steps that follow it, as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from nmprune.methods import Method, PerLinear, Pruned
from nmprune.methods.base import PerLayer
from nmprune.methods.magnitude import Magnitude
from nmprune.pattern import Pattern
from nmprune.refine import Chain, LayerChain, Polish, Reconstruct
from nmprune.stats import InputStats


def pruner_of(method: Method, polish: Polish | None, reconstruct: Reconstruct | None) -> Method:
    """What a run prunes with.

    Raises:
        InputError: the parts do not go together, or a learner's prior is nothing that there is.
    """
    if isinstance(method, PerLayer):
        return LayerChain(method, polish, reconstruct)
    if isinstance(method, PerLinear) and (polish is not None or reconstruct is not None):
        return Chain(method, polish, reconstruct)
    return method


@dataclass(frozen=True)
class AroundLearning(PerLinear):
    """What a learner's run does linear by linear: prior masks, then the steps. For plans; nothing is pruned with it.

    Attributes:
        chain: the learner with its prior and its steps.
    """

    name: ClassVar[str] = "prior and steps"
    summary: ClassVar[str] = "what a learner's run does linear by linear"
    paper: ClassVar[str] = "see its parts"

    chain: LayerChain

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", self.chain.needs)
        object.__setattr__(self, "updates_weights", self.chain.updates_weights)

    @property
    def runs_layers(self) -> bool:
        """As the learner."""
        return self.chain.runs_layers

    @property
    def follows_dense(self) -> bool:
        """As the learner."""
        return self.chain.follows_dense

    @property
    def _prior(self) -> PerLinear:
        return self.chain.prior or Magnitude()  # reading a mask costs about as much as finding the largest weights

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """See `PerLinear.prune`."""
        return self.chain.refine(weight, Pruned(self._prior.prune(weight, stats, pattern).mask), stats, pattern)

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """The largest of the parts."""
        return max(part.solver_bytes(out_features, in_features) for part in (self._prior, *self.chain.steps))

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """All parts together."""
        return sum(part.solver_flops(out_features, in_features) for part in (self._prior, *self.chain.steps))


def solver_of(pruner: Method) -> PerLinear:
    """What a run does linear by linear."""
    if isinstance(pruner, LayerChain):
        return AroundLearning(pruner)
    assert isinstance(pruner, PerLinear)
    return pruner


def learner_faults(pruner: Method, values: Mapping[str, Any]) -> list[str]:
    """What a method that learns layers cannot do together with the rest of a recipe."""
    if not isinstance(pruner, LayerChain):
        return []
    name, calibration, loss_aware = pruner.method.name, values["calibration"], values["loss_aware"]
    faults = []
    if values["stream"].true_sequential:
        faults.append(f"{name} learns all linears of a layer together: leave stream.true_sequential out.")
    if loss_aware is not None and loss_aware.blocks != 1:
        faults.append(f"{name} reads one set of statistics per linear: it needs loss_aware.blocks 1.")
    if calibration.n_held_out >= max(calibration.n_sequences, 2):
        faults.append(
            f"{name} judges by {calibration.n_held_out} of calibration.n_sequences {calibration.n_sequences}: nothing is left to "
            "learn from. Hold fewer out, or give more sequences."
        )
    if pruner.prior_file is not None and values["permute"]:
        faults.append(
            f"{name}.prior {pruner.method.prior} is a mask file, and permute gives the channels another order. Name a "
            "one-shot method, or leave permute out."
        )
    allocate, pattern = values["allocate"], values["pattern"]
    patterns = [] if allocate.faults(pattern) else [choice for choice in allocate.choices if choice] or [pattern]
    if pruner.prior is not None:
        faults += [
            f"{name}.prior {pruner.method.prior} cannot do {one}: {reason}"
            for one in patterns
            if one is not None and (reason := pruner.prior.why_not(one)) is not None
        ]
    return faults
