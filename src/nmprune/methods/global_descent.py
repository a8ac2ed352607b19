"""Global descent: `descent`, aimed at the loss of the whole model instead of each linear's own output. No weight moves.

Around the masks of now, the change D of one linear's masked weight changes the loss L by about

    <G, D> + 1/2 sum over rows i of s_i D_i A D_i^T,        G = dL/dW,  A = E[x x^T],

with A and s_i the two factors of the Kronecker-factored curvature (Martens and Grosse 2015, section 3; s the diagonal of the
output's factor). With e = w * (1 - mask) the dropped weights of a row and e0 those of now, D = e0 - e, and that is, times 2 / s,

    e A e^T + 2 e p^T + a constant,        p = -e0 A - G / s:

what `descent` lowers group by group, with another pull. All linears change at once, which no term of this says: the curvature is
multiplied by a damping c, as in Levenberg-Marquardt, and the runner finds c on held-out text.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nmprune.errors import InputError
from nmprune.methods.base import Course, State, WholeModel, option
from nmprune.methods.descent_sweep import descend, load_diagonal
from nmprune.pattern import Pattern

_LEAST = 1e-3  # of the mean curvature: a row that the loss hardly sees is not free to be anything


@dataclass(frozen=True)
class GlobalDescent(WholeModel):
    """Rounds of exact coordinate descent on a quadratic model of the loss, from prior masks; see the top of the file.

    A step is a round: gradient and curvature over all of its micro-batches, then new masks for all linears together, under
    the damping that held-out text likes best, and only if it likes them better than the masks before.

    Source: ours; the curvature is K-FAC's (Martens and Grosse 2015, arXiv 1503.05671), the damping Levenberg-Marquardt's.

    Raises:
        InputError: a hyper-parameter is out of range.
    """

    name: ClassVar[str] = "global_descent"
    summary: ClassVar[str] = "Descent on the whole model's loss, round by round from prior masks; no weight moves."
    paper: ClassVar[str] = "ours: coordinate descent on a Kronecker-factored model of the loss"
    learns_by = "descent"
    train_defaults: ClassVar[dict[str, Any]] = {"loss": "kl", "steps": 8, "accumulation": 32, "eval_every": 1}

    prior: str = option("descent", "prior masks: a one-shot method run just before, or a mask file")
    damping: float = option(1000.0, "what the curvature is multiplied by in the first round; then what served last")
    shrinkage: float = option(0.5, "share of the Gram matrix's diagonal that is added to it")
    sweeps: int = option(3, "most passes over all groups of a linear in a round")

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise InputError(f"global_descent.damping is {self.damping}; expected more than 0, such as 1000.")
        if not 0 <= self.shrinkage < math.inf:
            raise InputError(f"global_descent.shrinkage is {self.shrinkage}; expected 0 or more, such as 0.5.")
        if self.sweeps < 1:
            raise InputError(f"global_descent.sweeps is {self.sweeps}; expected at least 1.")

    def begin(self, weight_OI: Tensor, prior_OI: Tensor, pattern: Pattern, generator: torch.Generator) -> State:
        """The prior mask, as numbers: its gradient is that of the masked weight times the weight."""
        return {"mask": prior_OI.float()}

    def effective(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor:
        """The weights under the masks of now."""
        return weight_OI * state["mask"]

    def hard_mask(self, weight_OI: Tensor, state: State, pattern: Pattern) -> Tensor:
        """The mask of now."""
        return state["mask"] > 0.5

    def carried(self) -> State:
        """The damping."""
        return {"damping": torch.tensor(self.damping, dtype=torch.float64)}

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
        """The mask that lowers the quadratic model; see the top of the file. The same where the loss does not see the linear."""
        mean = curvature_O.mean()
        if not mean > 0:
            return mask_OI
        loaded_II, factor = load_diagonal(gram_II, self.shrinkage)
        steepness_O = damping * curvature_O.clamp(min=_LEAST * mean)
        pull_OI = (weight_OI * ~mask_OI @ loaded_II).neg_().sub_(slope_OI * (factor / steepness_O)[:, None])
        return descend(weight_OI, loaded_II, mask_OI, pattern, self.sweeps, pull_OI=pull_OI).mask

    def state_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """The mask, its gradient and the sum of slopes, fp32."""
        return 12 * n_weights
