"""Reconstruct: on a given mask, the weights that change the linear's output least; kept only where held-out tokens agree.

For one row, with X the input that the linear meets in the pruned model, D the one in the dense model, w0 the dense row and
T = t D + (1 - t) X:

    minimise  ||X w - T w0||^2  +  ridge * sum_j (X^T X)_jj (w_j - w0_j)^2     over the w that are zero off the mask.

t = 0 keeps what the linear makes of its own input; t > 0 makes up for some of what the layers before it lost. Solved by
conjugate gradients (least_squares.on_mask) on the tokens that are not held out; the held-out ones choose the ridge on a
sample of rows, and at the end whether the new weights are taken at all.

Legend: O out_features, I in_features, R sampled rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nmprune import least_squares
from nmprune.errors import InputError
from nmprune.methods import hessian
from nmprune.methods.base import Pruned, option
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic

RIDGES = (0.03, 0.1, 0.3, 1.0)
_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Reconstruct:
    """Weights on the mask that bring the linear's output back, with a held-out guard."""

    name: ClassVar[str] = "reconstruct"

    ridge: float = option(0.0, "pull towards the dense weights; 0 = chosen for each linear by held-out error")
    target: float = option(0.5, "0: the output on the linear's own inputs; 1: the dense model's output")
    iterations: int = option(15, "most conjugate gradient steps")

    def __post_init__(self) -> None:
        for name, most in (("ridge", math.inf), ("target", 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most):
                upper = "" if most == math.inf else f" and <= {most:g}"
                raise InputError(f"reconstruct.{name} is {value!r}; expected a number >= 0{upper}.")
        if self.iterations < 1:
            raise InputError(
                f"reconstruct.iterations is {self.iterations!r}; expected a whole number >= 1, such as 15."
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        """The dense model's inputs only where its output is the target."""
        return frozenset({"input_gram", "held_out_gram", *(("cross_gram",) if self.target else ())})

    @torch.no_grad()
    def refine(self, weight: Tensor, pruned: Pruned, stats: InputStats, pattern: Pattern) -> Pruned:
        """The mask as it is, with the weights solved for, or as they came where the held-out error did not fall.

        Args:
            weight: fp32 (out, in), dense; not modified.
            pruned: what came before.
            stats: with `input_gram` and `held_out_gram`; without `cross_gram` (experts) the target is the output on the
                linear's own inputs, and the notes say so.
            pattern: N kept of M; the mask does not change.

        Raises:
            InputError: the statistics cannot be used.
        """
        hessian.checked_gram(stats, weight.shape[1])
        train, held_out = stats.derived("objectives", lambda: _split(stats))
        start_OI = pruned.mask * (weight if pruned.weight is None else pruned.weight)
        ridge = self.ridge or self._choose(train, held_out, weight, pruned.mask, start_OI)
        pull_OI = train.pull(self.target, weight)
        solved = self._solve(train, pull_OI, ridge, weight, pruned.mask, start_OI, self.iterations)
        pull_OI = held_out.pull(self.target, weight)
        before, after = (held_out.value(pull_OI, weight, one) for one in (start_OI, solved.weight))
        output = held_out.output(weight)
        taken = after < before
        notes: dict[str, float | int | str] = {
            "ridge": ridge,
            "reconstruct_iterations": solved.iterations,
            "reconstruct_held_out_change": (after - before) / output if output > 0 else 0.0,
            "reconstruct_taken": int(taken),
        }
        if self.target and stats.cross_gram is None:
            notes["reconstruct_target"] = "own inputs"
        return Pruned(pruned.mask, solved.weight if taken else pruned.weight, {**pruned.notes, **notes})

    def _choose(
        self,
        train: _Objective,
        held_out: _Objective,
        weight_OI: Tensor,
        mask_OI: Tensor,
        start_OI: Tensor,
    ) -> float:
        """The ridge of least held-out error on rows at equal distances."""
        rows_R = torch.arange(0, len(weight_OI), max(1, len(weight_OI) // _SAMPLED_ROWS), device=weight_OI.device)
        weight_RI, mask_RI, start_RI = weight_OI[rows_R], mask_OI[rows_R], start_OI[rows_R]
        pull_RI, held_pull_RI = (one.pull(self.target, weight_RI) for one in (train, held_out))
        errors = {
            ridge: held_out.value(
                held_pull_RI,
                weight_RI,
                self._solve(train, pull_RI, ridge, weight_RI, mask_RI, start_RI, self.iterations).weight,
            )
            for ridge in RIDGES
        }
        return min(errors, key=lambda ridge: errors[ridge])

    @staticmethod
    def _solve(
        train: _Objective,
        pull_OI: Tensor | None,
        ridge: float,
        weight_OI: Tensor,
        mask_OI: Tensor,
        start_OI: Tensor,
        iterations: int,
    ) -> least_squares.Solved:
        loading_I = ridge * train.gram.diagonal()
        return least_squares.on_mask(train.gram, loading_I, weight_OI, mask_OI, start_OI, iterations, pull_OI=pull_OI)

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """Gram matrices of the tokens that are not held out; the solver's five arrays of the weight's shape."""
        return 8 * in_features**2 + 28 * out_features * in_features

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """A product with the Gram matrix for each step, also on the sampled rows."""
        rows = out_features + (0 if self.ridge else len(RIDGES) * min(out_features, _SAMPLED_ROWS))
        return 2.0 * (self.iterations + 4) * rows * in_features**2


@dataclass(frozen=True)
class _Objective:
    """||X w - T w0||^2 on some tokens, up to a constant, from X^T X and X^T D."""

    gram: Tensor
    cross: Tensor | None

    def pull(self, share: float, weight_OI: Tensor) -> Tensor | None:
        """W0 (T - X)^T X = share * W0 (D^T X - X^T X); None where that is nothing."""
        if self.cross is None or not share:
            return None
        return (weight_OI @ self.cross.T).sub_(weight_OI @ self.gram).mul_(share)

    def value(self, pull_OI: Tensor | None, weight_OI: Tensor, new_OI: Tensor) -> float:
        """||X w - T w0||^2 - ||X w0 - T w0||^2, summed over rows; `pull_OI` is these rows' own."""
        change_OI = new_OI - weight_OI
        product_OI = change_OI @ self.gram
        if pull_OI is not None:
            product_OI.sub_(pull_OI, alpha=2.0)
        return product_OI.mul_(change_OI).sum(dtype=torch.float64 if change_OI.device.type != "mps" else None).item()

    def output(self, weight_OI: Tensor) -> float:
        """||X w0||^2, summed over rows."""
        return (weight_OI @ self.gram).mul_(weight_OI).sum().item()


def _split(stats: InputStats) -> tuple[_Objective, _Objective]:
    """The objective on the tokens that are not held out, and on those that are."""
    if stats.held_out_gram is None:
        raise ValueError("held_out_gram was not collected: the method does not declare it in `needs`")
    cross_II, held_cross_II = stats.cross_gram, stats.held_out_cross
    train_cross_II = None if cross_II is None or held_cross_II is None else cross_II - held_cross_II
    return _Objective(stats.gram() - stats.held_out_gram, train_cross_II), _Objective(
        stats.held_out_gram, held_cross_II
    )
