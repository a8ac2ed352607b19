"""The weights on a given mask that change a linear's output least: conjugate gradients, all rows at once.

For each row: minimise (w - w0)^T H (w - w0) over the w that are zero off the mask, with H = X^T X + diag(loading). Each
row has its own mask and so its own system, the rows and columns of H that it keeps. Conjugate gradients need only
products with H, and those are one matrix product for all rows.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solved:
    """Weights that were solved for.

    Attributes:
        weight: fp32 (out, in), +0.0 where the mask is False.
        iterations: how many were done; fewer than allowed where every row had arrived.
    """

    weight: Tensor
    iterations: int


@torch.no_grad()
def on_mask(
    gram_II: Tensor,
    loading_I: Tensor,
    dense_OI: Tensor,
    mask_OI: Tensor,
    start_OI: Tensor,
    iterations: int,
    tolerance: float = 1e-4,
    pull_OI: Tensor | None = None,
) -> Solved:
    """Minimise the change of the output over the kept weights. The objective does not rise, whatever the iterations.

    With `pull_OI` = P the objective is (w - w0)^T H (w - w0) - 2 p^T w for each row: P = W0 (D - X)^T X turns the target
    X w0 into D w0, the output on other inputs D.

    Preconditioned with diag(H). Stops when every row's residual, in the norm of the preconditioner, is at most
    `tolerance` times that of its right-hand side H w0; rows that arrived earlier go on until then (it costs nothing), and
    a row in which rounding leaves no curvature stays where it is. An input with a zero diagonal in H has no say: its
    weights stay as they start.

    Args:
        gram_II: fp32 (in, in), X^T X; not modified.
        loading_I: fp32 (in,), >= 0, what is added to its diagonal: pulls the weights towards the dense ones.
        dense_OI: fp32 (out, in), w0.
        mask_OI: bool (out, in), True = kept; any mask, also without groups.
        start_OI: fp32 (out, in), where to start; entries off the mask are ignored.
        iterations: at most so many.
        tolerance: see above.
        pull_OI: fp32 (out, in), what the gradient gets besides; None = nothing.
    """
    diagonal_I = gram_II.diagonal() + loading_I
    inverse_I = torch.where(diagonal_I > 0, 1 / diagonal_I, 0.0)
    scale_O1 = _power_of_two(dense_OI)
    kept_OI = mask_OI.contiguous().float()  # one layout for all: the rounding of a product depends on it
    product_OI = torch.empty_like(kept_OI)

    def multiply(direction_OI: Tensor) -> Tensor:
        """The kept part of a product with H, in the one buffer."""
        torch.mm(direction_OI, gram_II, out=product_OI)
        return product_OI.addcmul_(direction_OI, loading_I).mul_(kept_OI)

    weight_OI = start_OI.contiguous() * scale_O1 * kept_OI
    direction_OI = dense_OI.contiguous() * scale_O1
    goal_O1 = tolerance**2 * _squared(multiply(direction_OI), inverse_I)
    residual_OI = multiply(direction_OI.sub_(weight_OI)).clone()
    if pull_OI is not None:
        residual_OI.addcmul_(pull_OI.contiguous() * scale_O1, kept_OI)
    torch.mul(residual_OI, inverse_I, out=direction_OI)
    left_O1 = _squared(residual_OI, inverse_I)
    going_O1 = torch.ones_like(left_O1, dtype=torch.bool)
    done = 0
    while done < iterations and (going_O1 & (left_O1 > goal_O1)).any():
        multiply(direction_OI)
        curvature_O1 = torch.linalg.vecdot(direction_OI, product_OI).unsqueeze(1)
        going_O1 &= (curvature_O1 > 0) & (left_O1 > 0)
        step_O1 = torch.where(going_O1, left_O1 / curvature_O1, 0.0)
        weight_OI.addcmul_(direction_OI, step_O1)
        residual_OI.addcmul_(product_OI, step_O1, value=-1)
        before_O1, left_O1 = left_O1, _squared(residual_OI, inverse_I)
        ratio_O1 = torch.where(going_O1, left_O1 / before_O1, 0.0)
        direction_OI.mul_(ratio_O1).addcmul_(residual_OI, inverse_I)
        done += 1
    return Solved(torch.where(mask_OI, weight_OI.div_(scale_O1), 0.0), done)  # +0.0, where a product may leave -0.0


@torch.no_grad()
def output_sq_error(gram_II: Tensor, change_OI: Tensor) -> Tensor:
    """||X d||^2 of each row d of a change of the weights, fp64 (out,) (fp32 on MPS), >= 0.

    Args:
        gram_II: fp32 (in, in), X^T X.
        change_OI: fp32 (out, in).
    """
    wide = torch.float32 if change_OI.device.type == "mps" else torch.float64
    scale_O1 = _power_of_two(change_OI)
    scaled_OI = change_OI * scale_O1
    scaled_O = (scaled_OI @ gram_II).mul_(scaled_OI).sum(1, dtype=wide).clamp_min(0.0)
    return scaled_O / scale_O1.squeeze(1).to(wide).square()


def _squared(residual_OI: Tensor, inverse_I: Tensor) -> Tensor:
    """r^T diag(H)^-1 r of each row, (O, 1)."""
    return (residual_OI.square() @ inverse_I).unsqueeze(1)


def _power_of_two(values_OI: Tensor) -> Tensor:
    """fp32 (O, 1): powers of two that bring each row's largest entry to 0.5..1, so that no square over- or underflows.

    A multiplication by them rounds nothing. A row of zeros gets 1.
    """
    largest_O1 = values_OI.abs().amax(1, keepdim=True)
    _, exponent_O1 = torch.frexp(largest_O1.cpu())  # a few numbers; MPS has no frexp
    exponent_O1 = exponent_O1.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(largest_O1, device="cpu"), -exponent_O1).to(values_OI.device)
