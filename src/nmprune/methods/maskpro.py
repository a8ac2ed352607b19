"""MaskPro: one logit per weight, masks drawn without replacement, policy gradient from the loss alone: forwards only.

Legend: O out_features, I in_features, G groups per row, M group, N kept of M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nmprune import ranking, sampling
from nmprune.errors import InputError, near_matches
from nmprune.methods.base import Course, State, WholeModel, option
from nmprune.pattern import Pattern

SCORES = ("auto", "set", "ordered")
MOST_ORDERED = 4  # N up to which the N! orders of a set can be summed: 24
_CHUNK = 1 << 18  # weights whose scores are made together


@dataclass(frozen=True)
class MaskPro(WholeModel):
    """Policy gradient on the logits of N-way draws without replacement; the weights stay frozen.

    A step draws the mask of every group (slot after slot, softmax of the logits that remain), measures the loss of the
    whole model with these masks and with the prior's on the same sequences, and moves

        r = loss - loss of the prior masks;  d <- tracker * d + (1 - tracker) * r;  logits <- logits - lr * (r - d) * score

    where the score is the gradient of the log-probability of what was drawn. No gradient of the model is ever taken: memory
    is a forward's. The final mask keeps the N largest logits of each group.

    Source: Sun et al. 2025 and the authors' code: constants, the order of the updates.

    Raises:
        InputError: a hyper-parameter is out of range.
    """

    name: ClassVar[str] = "maskpro"
    summary: ClassVar[str] = "Policy gradient on masks drawn without replacement: forwards only; frozen weights."
    paper: ClassVar[str] = "Sun et al. 2025, MaskPro, arXiv 2506.12876"
    learns_by = "score"
    noise = "step"
    train_defaults: ClassVar[dict[str, Any]] = {"steps": 10_000, "batch_size": 32, "loss": "lm", "eval_every": 500}

    prior_logit: float = option(
        10.0, "C: logit of the slots that the prior keeps, read where flip_share is 0; others 0"
    )
    flip_share: float = option(
        0.0, "share of groups that the first draw takes off the prior; sets C. C = 10 is 0.00014"
    )
    lr: float = option(50.0, "step on the logits per nat of loss; constant")
    tracker: float = option(
        0.99, "memory of the moving average that is taken off the residual; 1: nothing is taken off"
    )
    score: str = option(
        "auto", "set: exact, up to N = 4; ordered: of the draws in their order, any N; auto: set up to 2"
    )

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise InputError(f"maskpro.score is {self.score!r}. {near_matches(self.score, SCORES)}")
        for key in ("prior_logit", "lr"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"maskpro.{key} is {getattr(self, key)}; expected more than 0.")
        if not 0 <= self.flip_share < 1:
            raise InputError(f"maskpro.flip_share is {self.flip_share}; expected 0 or more and less than 1.")
        if not 0 <= self.tracker <= 1:
            raise InputError(f"maskpro.tracker is {self.tracker}; expected 0 to 1, such as 0.99.")

    def why_not(self, pattern: Pattern) -> str | None:
        """The exact score of a set sums N! orders."""
        if self.score == "set" and pattern.kept > MOST_ORDERED:
            return (
                f"the exact score of a set of {pattern.kept} sums {math.factorial(pattern.kept):,} orders, and "
                f"{math.factorial(MOST_ORDERED)} is the most. Say score ordered or auto."
            )
        return None

    def start(self, pattern: Pattern) -> float:
        """C: the prior's logit. With `flip_share` it follows from it: a draw leaves the prior mask with a probability of
        (M - N) (1 + 1/2 + ... + 1/N) e^-C, to first order (2:4: 3 e^-C)."""
        if not self.flip_share:
            return self.prior_logit
        ways = (pattern.group - pattern.kept) * sum(1 / k for k in range(1, pattern.kept + 1))
        return max(0.0, math.log(ways / self.flip_share))

    def begin(self, weight_OI: Tensor, prior_OI: Tensor, pattern: Pattern, generator: torch.Generator) -> State:
        """C where the prior keeps a weight, 0 elsewhere."""
        return {"logits": prior_OI.to(weight_OI.device, torch.float32) * self.start(pattern)}

    def effective(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor:
        """The weights under the masks of one draw."""
        return weight_OI * self.draw(state, pattern, generator)

    def hard_mask(self, weight_OI: Tensor, state: State, pattern: Pattern) -> Tensor:
        """The N largest logits of each group; among equals the lower index."""
        return ranking.top(_groups(state["logits"], pattern), pattern.kept).flatten(-2)

    def draw(self, state: State, pattern: Pattern, generator: torch.Generator) -> Tensor:
        """bool (out, in): a Plackett-Luce draw of N slots of every group."""
        return sampling.draw_mask(_groups(state["logits"], pattern), pattern.kept, generator).flatten(-2)

    def carried(self) -> State:
        """The tracker d."""
        return {"tracker": torch.zeros((), dtype=torch.float64)}

    def advantage(self, loss: float, prior_loss: float, carried: State) -> tuple[float, State]:
        """r - d, with d updated before it is used, as the authors' code."""
        residual = loss - prior_loss
        tracker = self.tracker * carried["tracker"].item() + (1 - self.tracker) * residual
        return residual - tracker, {"tracker": torch.tensor(tracker, dtype=torch.float64)}

    def score_step(
        self, state: State, pattern: Pattern, advantage: float, course: Course, generator: torch.Generator
    ) -> None:
        """Draw again, and `move`."""
        drawn_OGN = sampling.draw_without_replacement(_groups(state["logits"], pattern), pattern.kept, generator)
        self.move(state, drawn_OGN, pattern, advantage)

    def move(self, state: State, drawn_OGN: Tensor, pattern: Pattern, advantage: float) -> None:
        """Plain gradient descent on the expected loss, in place: logits -= lr * advantage * score.

        Args:
            state: of the linear, as it was when the slots were drawn.
            drawn_OGN: slots of each group in the order drawn.
            pattern: N kept of M.
            advantage: of the masks that were drawn.
        """
        rows = max(1, _CHUNK // state["logits"].shape[1])
        logits_OGM = _groups(state["logits"], pattern)
        for logits, drawn in zip(logits_OGM.split(rows), drawn_OGN.split(rows), strict=True):
            logits.sub_(self.score_of(logits, drawn, pattern), alpha=self.lr * advantage)

    def score_of(self, logits_OGM: Tensor, drawn_OGN: Tensor, pattern: Pattern) -> Tensor:
        """(out, G, M): gradient of the log-probability of the draws, of their set or of their order as `score` says."""
        if self.score == "set" or (self.score == "auto" and pattern.kept <= 2):
            return sampling.set_score_gradient(logits_OGM, drawn_OGN)
        return sampling.ordered_score_gradient(logits_OGM, drawn_OGN)

    def state_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """One fp32 logit a weight; no gradients, no moments."""
        return 4 * n_weights

    def forward_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """Noise, mask and masked weight of the linear at work; nothing waits for a backward."""
        return 9 * n_weights


def _groups(values_OI: Tensor, pattern: Pattern) -> Tensor:
    """(O, G, M): a view."""
    return values_OI.unflatten(-1, (-1, pattern.group))
