"""ALPS: mask and weights together by ADMM, then the best weights on that mask by conjugate gradients.

ADMM splits the weight in two: B is close to the dense weight W in output, D is N:M, and a dual V pulls them together with
a growing penalty rho. With K = rho (H + rho I)^-1 and U = V / rho one iteration of the paper reads

    B = W + (D - U - W) K        D = N:M part of B + U        U = B + U - D

so D is B + U on the mask and U is B + U off it: one matrix holds both. The eigenvectors of H are found once; after that
a new rho costs one product of two (in, in) matrices.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nmprune import least_squares, masks
from nmprune.errors import InputError
from nmprune.methods import hessian
from nmprune.methods.base import PerLinear, Pruned, option
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic
from nmprune.threads import one_thread

_CHECK_EVERY = 3  # iterations between two looks at how much of the mask has changed
_EARLIEST_STOP = 30
_SETTLED = 0.0003  # share of the kept weights: so little change ends the search


@dataclass(frozen=True)
class Alps(PerLinear):
    """Algorithms 1 and 2 of the paper for N:M, with the schedule of rho that the authors' code runs."""

    name: ClassVar[str] = "alps"
    summary: ClassVar[str] = "Search mask and weights together by ADMM, then solve for the weights on the mask."
    paper: ClassVar[str] = "Meng et al. 2024, ALPS, arXiv 2406.07831"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_gram"})
    updates_weights: ClassVar[bool] = True

    damping: float = option(0.01, "share of the Hessian's mean diagonal that is added to the diagonal")
    rho: float = option(0.1, "penalty at the start, relative to a Hessian with unit diagonal")
    max_iterations: int = option(300, "most ADMM iterations; 30 to 40 are usual")
    cg_iterations: int = option(10, "most conjugate-gradient iterations on the final mask")

    def __post_init__(self) -> None:
        for name, default in (("damping", 0.01), ("rho", 0.1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"alps.{name} is {value!r}; expected a number > 0, such as {default}.")
        if self.max_iterations < 1:
            raise InputError(f"alps.max_iterations is {self.max_iterations!r}; expected a whole number >= 1.")
        if self.cg_iterations < 0:
            raise InputError(f"alps.cg_iterations is {self.cg_iterations!r}; expected a whole number >= 0.")

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """Mask and solved weights of one linear.

        Raises:
            InputError: the width is not a whole number of groups, or weight or statistics are not finite or do not fit.
        """
        in_features = weight.shape[-1]
        pattern.check_divides(in_features)
        if not masks.all_finite(weight):
            raise InputError(f"weight {tuple(weight.shape)} holds NaN or infinity: check the checkpoint.")
        gram_II, dense_OI = hessian.checked_gram(stats, in_features), weight.detach().contiguous()
        spectrum = stats.derived(("alps spectrum", self.damping), lambda: _spectrum(gram_II, self.damping))
        found = _search(dense_OI * spectrum.norm, spectrum, pattern, self.rho, self.max_iterations)
        loading_I = torch.full_like(spectrum.norm, spectrum.ridge)
        start_OI = found.weight.div_(spectrum.norm)
        solved = least_squares.on_mask(gram_II, loading_I, dense_OI, found.mask, start_OI, self.cg_iterations)
        if not masks.all_finite(solved.weight):
            raise InputError(
                f"the solved weights are not finite. Use a higher damping (it is {self.damping:g}) "
                "or more calibration tokens."
            )
        notes: dict[str, float | int | str] = {
            "iterations": found.iterations,
            "rho": found.rho,
            "cg_iterations": solved.iterations,
            "dead_inputs": int((gram_II.diagonal() == 0).sum()),
            "relative_output_error": _relative_output_error(gram_II, dense_OI, solved.weight),
        }
        return Pruned(found.mask, solved.weight, notes)

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """Four fp64 (in, in) for the eigenvectors; later two fp32 (in, in), seven fp32 (out, in) and masks."""
        factoring = 34 * in_features**2
        searching = 8 * in_features**2 + 30 * out_features * in_features
        return max(factoring, searching)

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """The eigenvectors and a dozen values of rho; some fifty products with the weight; passes over it, as measured."""
        return 45.0 * in_features**3 + (100.0 * in_features + 5e4) * out_features * in_features


@dataclass(frozen=True)
class _Spectrum:
    """H = X^T X + ridge, scaled to a unit diagonal, as Q diag(values) Q^T.

    Attributes:
        norm: fp32 (in,), the square roots of the diagonal before the scaling.
        values: fp64 (in,) (fp32 on MPS), >= 0.
        vectors: fp32 (in, in), Q.
        ridge: what was added to the diagonal of X^T X.
    """

    norm: Tensor
    values: Tensor
    vectors: Tensor
    ridge: float

    def smoother(self, rho: float) -> Tensor:
        """K = rho (H + rho I)^-1, fp32 (in, in); its eigenvalues lie in 0..1."""
        return (self.vectors * (rho / (self.values + rho)).float()) @ self.vectors.T


def _spectrum(gram_II: Tensor, damping: float) -> _Spectrum:
    """Eigenvectors in fp64 on one thread. A dead input is left with the ridge alone, decoupled from the rest."""
    ridge = damping * (gram_II.diagonal().mean().item() or 1.0)
    # MPS has no fp64
    hessian_II = (gram_II.cpu() if gram_II.device.type == "mps" else gram_II).double()
    hessian_II.diagonal().add_(ridge)
    norm_I = hessian_II.diagonal().sqrt()
    hessian_II.div_(norm_I).div_(norm_I.unsqueeze(1))
    with one_thread():
        values_I, vectors_II = torch.linalg.eigh(hessian_II)
    del hessian_II
    values_I = values_I.clamp_min(0.0)
    if gram_II.device.type == "mps":
        values_I = values_I.float()
    device = gram_II.device
    return _Spectrum(norm_I.float().to(device), values_I.to(device), vectors_II.float().to(device), ridge)


@dataclass(frozen=True)
class _Found:
    """Where ADMM ended: mask, D (zero off the mask), iterations done, last rho."""

    mask: Tensor
    weight: Tensor
    iterations: int
    rho: float


@torch.no_grad()
def _search(dense_OI: Tensor, spectrum: _Spectrum, pattern: Pattern, rho: float, max_iterations: int) -> _Found:
    """ADMM on the scaled weight. Stops when the mask has settled, or at once where the dense weight is N:M already."""
    first_OI = mask_OI = seen_OI = masks.from_scores(dense_OI.abs(), pattern)
    state_OI = dense_OI * first_OI  # D on the mask, U off it
    if torch.equal(state_OI, dense_OI):
        return _Found(first_OI, state_OI, 0, rho)
    n_kept = int(first_OI.sum())
    smoother_II, has_grown = spectrum.smoother(rho), False
    for iteration in range(1, max_iterations + 1):
        kept_OI = state_OI * mask_OI.float()  # D; products and differences here are exact and faster than torch.where
        state_OI -= kept_OI  # U
        pull_OI = kept_OI.sub_(state_OI).sub_(dense_OI)  # D - U - W
        state_OI.add_(dense_OI).addmm_(pull_OI, smoother_II)
        mask_OI = masks.from_scores(state_OI.abs(), pattern)
        if iteration % _CHECK_EVERY:
            continue
        changed = int((mask_OI ^ seen_OI).sum()) / n_kept
        seen_OI = mask_OI
        if (changed == 0 and has_grown) or (iteration >= _EARLIEST_STOP and changed < _SETTLED):
            break
        factor = _rho_factor(changed, has_grown)
        rho *= factor
        smoother_II = spectrum.smoother(rho)
        if factor > 1:
            has_grown = True
            state_OI = torch.where(mask_OI, state_OI, state_OI / factor)  # V = rho U stays
        else:
            mask_OI = seen_OI = first_OI
            state_OI = dense_OI * first_OI
    return _Found(mask_OI, torch.where(mask_OI, state_OI, 0.0), iteration, rho)


def _rho_factor(changed: float, has_grown: bool) -> float:
    """What rho is multiplied by, from the share of the mask that changed; below 1 the search starts again."""
    if changed > 0.1:
        return 1.3
    if changed > 0.005:
        return 1.2
    return 1.1 if has_grown else 0.2


def _relative_output_error(gram_II: Tensor, dense_OI: Tensor, weight_OI: Tensor) -> float:
    """||X (W' - W)^T||^2 / ||X W^T||^2 on the calibration tokens; 0 where the dense output is zero."""
    total = least_squares.output_sq_error(gram_II, dense_OI).sum().item()
    error = least_squares.output_sq_error(gram_II, weight_OI - dense_OI).sum().item()
    return error / total if total > 0 else 0.0
