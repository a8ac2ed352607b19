"""ProxSparse: train the weights under a penalty that pulls every group of 4 to 2 non-zeros, keep only the mask (2:4).

Legend: O out_features, I in_features; z a group's magnitudes in falling order; e2, e3 elementary symmetric polynomials.
Groups lie along the last axis of a (slots, G) tensor, one plane per slot: every operation runs over contiguous numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nmprune import masks, ranking
from nmprune.errors import InputError
from nmprune.methods.base import AdamStep, Course, State, WholeModel, option
from nmprune.pattern import Pattern

TWO_OF_FOUR = Pattern(2, 4)
_SWEEPS = 100  # as the authors' code; few groups need more than 8
_CHUNK = 1 << 17  # weights that are worked on together: their planes fit into the cache
_WARM_UP = 0.1  # share of the steps, as the authors' scripts


@dataclass(frozen=True)
class ProxSparse(WholeModel):
    """AdamW on a copy of the weights, and after each step the proximal operator of lambda R on every group.

    R(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2| is 0 exactly where a group has at most 2 non-zeros. Without a
    gradient the operator alone leads to the magnitude mask: what is learned is the race between AdamW's steps and the
    shrinking. The final mask keeps the two largest |w| of each group; it is put on the original weights, and the trained
    ones are thrown away.

    Source: Liu et al. 2025; constants of the authors' scripts.

    Raises:
        InputError: a hyper-parameter is out of range.
    """

    name: ClassVar[str] = "proxsparse"
    summary: ClassVar[str] = "Train a copy of the weights under a 2:4 penalty, keep its mask; frozen weights, 2:4 only."
    paper: ClassVar[str] = "Liu et al. 2025, ProxSparse, arXiv 2502.00258"
    train_defaults: ClassVar[dict[str, Any]] = {"steps": 400, "loss": "lm"}

    lambda_rel: float = option(
        1.0, "c: each row's lambda is c * lr / mean(w^2), the same at every scale; 0: lambda_abs"
    )
    lambda_abs: float = option(0.25, "the paper's literal lambda, read where lambda_rel is 0")
    anchor: float = option(0.0, "lambda2: pulls kept weights back to the original ones; the paper's 13B run: 0.25")
    anchor_eps: float = option(0.1, "what original magnitudes are raised by where the anchor divides by them")
    train_rest: bool = option(True, "also train (and then forget) embeddings, norms and head, as the authors do")
    lr: float = option(1e-4, "AdamW step size at its highest: 10 % warm-up, then linear to 0")
    clip: float = option(1.0, "largest norm of all gradients together; 0 = no limit")

    def __post_init__(self) -> None:
        for key in ("lambda_rel", "lambda_abs", "anchor", "clip"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise InputError(f"proxsparse.{key} is {getattr(self, key)}; expected 0 or more.")
        for key in ("anchor_eps", "lr"):
            if not 0 < getattr(self, key) < float("inf"):
                raise InputError(f"proxsparse.{key} is {getattr(self, key)}; expected more than 0.")

    def why_not(self, pattern: Pattern) -> str | None:
        """Anything but 2:4: the penalty is made of products of three of four weights."""
        if pattern == TWO_OF_FOUR:
            return None
        return f"its penalty is that of 2:4, and {pattern} has none in the paper. maskllm and maskpro learn any N:M."

    @property
    def trains_rest(self) -> bool:
        """As `train_rest` says."""
        return self.train_rest

    def begin(self, weight_OI: Tensor, prior_OI: Tensor, pattern: Pattern, generator: torch.Generator) -> State:
        """A copy of the weights. The prior mask is only what the result is judged against."""
        return {"weight": weight_OI.detach().float().clone()}

    def effective(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor:
        """The trained copy."""
        return state["weight"]

    def hard_mask(self, weight_OI: Tensor, state: State, pattern: Pattern) -> Tensor:
        """The two largest magnitudes of each group of the trained copy; equal ones keep the lower index."""
        return masks.from_scores(state["weight"].abs(), pattern)

    def penalty(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor | None:
        """The anchor: lambda2 ||W / (W0 + eps sgn(W0)) * (W - W0)||^2, with sgn(0) = 1."""
        if not self.anchor:
            return None
        raised = weight_OI + torch.where(weight_OI < 0, -self.anchor_eps, self.anchor_eps)
        return self.anchor * (state["weight"] / raised * (state["weight"] - weight_OI)).square().sum()

    def optimiser(self, course: Course) -> AdamStep:
        """Linear warm-up and linear decay to 0; no weight decay."""
        rising = _WARM_UP * course.total
        step = course.step + 1
        share = step / rising if step < rising else (course.total - course.step) / (course.total - rising)
        return AdamStep(lr=self.lr * min(1.0, share), clip=self.clip)

    def after_step(self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course) -> None:
        """The proximal step, in place. Its strength does not follow the step size's schedule: the authors' does not."""
        rows = max(1, _CHUNK // weight_OI.shape[1])
        for original, trained in zip(weight_OI.split(rows), state["weight"].split(rows), strict=True):
            trained.copy_(prox(trained, self._strength(original)))

    def _strength(self, weight_OI: Tensor) -> Tensor:
        """(O, 1): lambda of each row. A row of zeros has none: there is nothing to shrink."""
        if not self.lambda_rel:
            return weight_OI.new_full((len(weight_OI), 1), self.lambda_abs)
        mean_square_O1 = weight_OI.square().mean(1, keepdim=True)
        return torch.where(mean_square_O1 > 0, self.lambda_rel * self.lr / mean_square_O1, 0.0)

    def state_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """The copy, its gradient and two moments, fp32."""
        return 16 * n_weights

    def forward_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """The copy is used as it is."""
        return 0


def regulariser(weight_OI: Tensor) -> Tensor:
    """R of each group of 4, (..., I / 4): the sum of |product| over its triples; 0 where at most 2 are not zero."""
    return _e3(weight_OI.unflatten(-1, (-1, 4)).abs().unbind(-1))


def prox(weight_OI: Tensor, strength: Tensor | float) -> Tensor:
    """argmin over w of 1/2 ||w - y||^2 + lambda R(w), group of 4 by group of 4.

    The minimiser has the signs of y and its order of magnitudes. Three supports are tried: the two largest as they are;
    the three largest; all four; the last two by cyclic coordinate descent from 0, whose steps have a closed form. The
    lowest objective wins, and among equals the fewer non-zeros. A group with at most 2 non-zeros is its own answer.

    Source: ProxSparse, the efficient proximal operator. As there: coordinate descent finds a local minimum, the global one
    in all but a few groups near ties.

    Args:
        weight_OI: y, fp32 or fp64 (..., I), I a multiple of 4. bf16 would round away most of a step's shrinking.
        strength: lambda, a number or a tensor that broadcasts against (..., I / 4).
    """
    groups_GM = weight_OI.detach().reshape(-1, 4)
    shape_G = (*weight_OI.shape[:-1], weight_OI.shape[-1] // 4)
    strength_G = torch.as_tensor(strength, dtype=weight_OI.dtype, device=weight_OI.device).expand(shape_G).reshape(-1)
    at_work = (groups_GM.count_nonzero(-1) > 2).nonzero().squeeze(-1)
    result_GM = groups_GM.clone()
    for at in at_work.split(_CHUNK // 4):
        result_GM[at] = _prox_planes(groups_GM[at].T.contiguous(), strength_G[at]).T
    return result_GM.reshape(weight_OI.shape)


def _prox_planes(y_MG: Tensor, strength_G: Tensor) -> Tensor:
    """`prox` of planes; see there."""
    size_MG = y_MG.abs()
    rank_MG = torch.stack(ranking.ranks(size_MG.unbind())).long()
    z_MG = torch.empty_like(size_MG).scatter_(0, rank_MG, size_MG)
    best_MG = z_MG.clone()
    best_MG[2:] = 0
    lowest_G = z_MG[2:].square().sum(0) / 2
    for support in (3, 4):
        w_MG = torch.zeros_like(z_MG)
        w_MG[:support] = _descend(z_MG[:support], strength_G)
        objective_G = (w_MG - z_MG).square_().sum(0).div_(2).addcmul_(strength_G, _e3(w_MG.unbind()))
        better_G = objective_G < lowest_G
        lowest_G = torch.where(better_G, objective_G, lowest_G)
        best_MG = torch.where(better_G, w_MG, best_MG)
    return best_MG.gather(0, rank_MG).copysign_(y_MG)


def _descend(z_KG: Tensor, strength_G: Tensor) -> Tensor:
    """Coordinate descent from 0 on the K largest: w_i = max(z_i - lambda e2(the others), 0), the smallest z first.

    Every group stops by itself, once a sweep moves it by no more than rounding; those that go on are gathered.
    """
    result_KG = torch.zeros_like(z_KG)
    w_KG, at = result_KG.clone(), None
    rest = 2 * torch.finfo(z_KG.dtype).eps
    for _ in range(_SWEEPS):
        before_KG = w_KG.clone()
        for i in reversed(range(len(z_KG))):
            others = [w_G for j, w_G in enumerate(w_KG) if j != i]
            torch.clamp(z_KG[i] - strength_G * _e2(others), min=0, out=w_KG[i])
        moving_G = (w_KG - before_KG).abs_().amax(0) > rest * z_KG[0]
        n_moving = int(moving_G.sum())
        if 2 * n_moving > len(moving_G):
            continue
        if at is None:
            result_KG = w_KG.clone()
        else:
            result_KG[:, at] = w_KG
        if not n_moving:
            return result_KG
        still = moving_G.nonzero().squeeze(-1)
        at = still if at is None else at[still]
        z_KG, w_KG, strength_G = z_KG[:, still], w_KG[:, still], strength_G[still]
    if at is None:
        return w_KG
    result_KG[:, at] = w_KG
    return result_KG


def _e2(w: list[Tensor]) -> Tensor:
    """Sum of the products of two, of two or three."""
    return w[0] * w[1] if len(w) == 2 else w[0] * (w[1] + w[2]) + w[1] * w[2]


def _e3(w: tuple[Tensor, ...]) -> Tensor:
    """Sum of the products of three of four."""
    return w[0] * w[1] * (w[2] + w[3]) + (w[0] + w[1]) * w[2] * w[3]
