"""A method that learns a decoder layer's masks, the prior that it starts from, and what follows it, as one method."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from nmprune.errors import InputError, near_matches
from nmprune.methods import METHODS, create
from nmprune.methods.base import Method, PerLayer, PerLinear, Pruned, WholeModel
from nmprune.pattern import Pattern
from nmprune.refine.chain import declared, steps_of
from nmprune.refine.polish import Polish
from nmprune.refine.reconstruct import Reconstruct
from nmprune.stats import InputStats

NO_PRIOR = "none"
_MASK_FILES = (".safetensors", ".npz")


@dataclass(frozen=True)
class LayerChain(Method):
    """A `PerLayer` method with its prior, then polish, then reconstruct; what the parts declare, it declares together.

    Attributes:
        method: what learns.
        polish: descent from the learned mask, linear by linear.
        reconstruct: other weights on the mask, linear by linear.
        prior: the one-shot method that the prior masks come from; None where they come from a file, or there are none.

    Raises:
        InputError: the prior is neither a one-shot method nor the path of a mask file; polish without reconstruct after a
            method that moves weights.
    """

    name: ClassVar[str] = "layer_chain"
    summary: ClassVar[str] = "a method that learns decoder layers, its prior, and what follows it"
    paper: ClassVar[str] = "see its parts"

    method: PerLayer
    polish: Polish | None = None
    reconstruct: Reconstruct | None = None
    prior: PerLinear | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        prior = one_shot_prior(self.method)
        parts = declared(self.method, self.polish, self.reconstruct, prior)
        for attribute, value in {**parts, "prior": prior}.items():
            object.__setattr__(self, attribute, value)

    @property
    def steps(self) -> list[Polish | Reconstruct]:
        """What follows the method."""
        return steps_of(self.polish, self.reconstruct)

    @property
    def runs_layers(self) -> bool:
        """As what learns."""
        return self.method.runs_layers

    @property
    def follows_dense(self) -> bool:
        """As what learns, or for a step."""
        return self.method.follows_dense or "cross_gram" in self.needs

    @property
    def prior_file(self) -> Path | None:
        """The mask file (or run folder) that the prior masks come from; None where they come from a method or are none."""
        return None if self.method.prior == NO_PRIOR or self.prior is not None else Path(self.method.prior)

    def why_not(self, pattern: Pattern) -> str | None:
        """What the method says."""
        return self.method.why_not(pattern)

    def refine(self, weight: Tensor, pruned: Pruned, stats: InputStats, pattern: Pattern) -> Pruned:
        """What the steps make of one learned linear; see `Polish.refine`."""
        for step in self.steps:
            pruned = step.refine(weight, pruned, stats, pattern)
        return pruned

    def hyper_parameters(self) -> dict[str, Any]:
        """The method's, and those of each step under the step's name."""
        return {**self.method.hyper_parameters(), **{step.name: asdict(step) for step in self.steps}}


def one_shot_prior(method: PerLayer | WholeModel) -> PerLinear | None:
    """The one-shot method that a learner's `prior` names; None where it names a file or nothing.

    Raises:
        InputError: it names something else.
    """
    name = method.prior
    if name == NO_PRIOR:
        return None
    if name in METHODS:
        prior = create(name)
        if isinstance(prior, PerLinear):
            return prior
        raise InputError(
            f"{method.name}.prior is {name!r}, which is no one-shot method. Name one, such as 'wanda', or the run folder or "
            f"mask file of a finished {name} run."
        )
    if "/" in name or "\\" in name or name.endswith(_MASK_FILES) or Path(name).exists():
        return None
    known = [NO_PRIOR, *(key for key, one in METHODS.items() if issubclass(one, PerLinear))]
    raise InputError(
        f"{method.name}.prior is {name!r}: neither a one-shot method nor a mask file. {near_matches(name, known)} A mask "
        "file or run folder is given by its path, such as runs/first."
    )
