"""SparseGPT: choose a group's mask, zero it, and let the later columns make up for the error.

The paper works with U, the upper Cholesky factor of H^-1: column j, once pruned to q_j, leaves the scaled error
E_j = (w_j - q_j) / U_jj, and every later column moves by -E_j U_j,:. Inside a block this is what happens here. Between
blocks the same sum is written with R = U^-1 (H = R R^T) and the total change D = W - Q of the finished columns: since
E = D R, a block B starts from  W_B + (D R_:,B) U_BB  with U_BB = (R_BB)^-1, a small inverse. So the large inverse of H
is never formed, and the large products read many columns and write few.

Legend: O out_features, I in_features, M group, B columns of a block. Columns are stored as rows (I, O), so that one
column of all output rows is contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import hessian
from nmprune.methods.base import PerLinear, Pruned, option
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic
from nmprune.threads import one_thread


@dataclass(frozen=True)
class SparseGPT(PerLinear):
    """Algorithm 1 of the paper for N:M: masks chosen group by group, from weights already compensated."""

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "Prune group by group; the weights to the right make up for the error."
    paper: ClassVar[str] = "Frantar and Alistarh 2023, SparseGPT, arXiv 2301.00774"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_gram"})
    updates_weights: ClassVar[bool] = True

    damping: float = option(0.01, "share of the Hessian's mean diagonal that is added to the diagonal")
    block_size: int = option(
        128, "columns between two large updates; speed only, rounded up to a whole number of groups"
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise InputError(f"sparsegpt.damping is {self.damping!r}; expected a number >= 0, such as 0.01.")
        if self.block_size < 1:
            raise InputError(f"sparsegpt.block_size is {self.block_size!r}; expected a whole number >= 1, such as 128.")

    def prune(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        """Mask and compensated weights of one linear.

        Raises:
            InputError: the width is not a whole number of groups, weight or statistics are not finite or do not fit, or
                the Hessian stays singular after more damping.
        """
        in_features = weight.shape[-1]
        pattern.check_divides(in_features)
        if not masks.all_finite(weight):
            raise InputError(f"weight {tuple(weight.shape)} holds NaN or infinity: check the checkpoint.")
        gram = hessian.checked_gram(stats, in_features)
        factor = stats.derived(("hessian factor", self.damping), lambda: hessian.factorise(gram, self.damping))
        mask_OI, moved_OI = _sweep(weight.detach(), factor, pattern, self.block_size)
        if not masks.all_finite(moved_OI):
            raise InputError(
                "the compensated weights are not finite: the Hessian is close to singular. Use a higher damping "
                f"(it is {factor.damping:g}) or more calibration tokens."
            )
        notes: dict[str, float | int | str] = {
            "damping": factor.damping,
            "damping_steps": factor.damping_steps,
            "dead_inputs": int(factor.dead.sum()),
        }
        return Pruned(mask_OI, moved_OI, notes)

    def solver_bytes(self, out_features: int, in_features: int) -> int:
        """Two fp64 matrices (in, in) while factoring; after it R, the change D and the result (in, out), the mask."""
        factoring = 16 * in_features**2
        sweeping = 4 * in_features**2 + 9 * out_features * in_features
        return max(factoring, sweeping)

    def solver_flops(self, out_features: int, in_features: int) -> float:
        """A Cholesky factorisation and one pass of the columns over each other."""
        return in_features**3 / 3 + out_features * in_features**2


def _sweep(
    weight_OI: Tensor, factor: hessian.HessianFactor, pattern: Pattern, block_size: int
) -> tuple[Tensor, Tensor]:
    """Mask and pruned weights, block by block from left to right."""
    block = -(-block_size // pattern.group) * pattern.group
    pruned_OI = torch.empty(weight_OI.shape, device=weight_OI.device)
    mask_OI = torch.empty_like(pruned_OI, dtype=torch.bool)
    change_IO = torch.empty(weight_OI.shape[::-1], device=weight_OI.device)  # D = W - Q of the finished columns
    for start in range(0, weight_OI.shape[1], block):
        here = slice(start, start + block)
        with one_thread():
            inverse_BB = _inverse_of_upper(factor.upper[here, here])
            dense_BO = change_IO[here].copy_(weight_OI[:, here].contiguous().T)
            dense_BO[factor.dead[here]] = 0.0
        owed_BO = factor.upper[:start, here].T @ change_IO[:start]  # the one large product: all threads
        with one_thread():
            moved_BO = torch.addmm(dense_BO, inverse_BB.T, owed_BO)
            dropped_BO = _sweep_block(moved_BO, inverse_BB, pattern)
            dense_BO -= moved_BO
            pruned_OI[:, here] = moved_BO.T
            mask_OI[:, here] = (dropped_BO == 0).T
    return mask_OI, pruned_OI


def _inverse_of_upper(upper_BB: Tensor) -> Tensor:
    """U_BB = (R_BB)^-1, computed in fp64 where the device has it."""
    wide_BB = upper_BB if upper_BB.device.type == "mps" else upper_BB.double()
    eye_BB = torch.eye(len(wide_BB), dtype=wide_BB.dtype, device=wide_BB.device)
    return torch.linalg.solve_triangular(wide_BB, eye_BB, upper=True).float()


def _sweep_block(moved_BO: Tensor, inverse_BB: Tensor, pattern: Pattern) -> Tensor:
    """Prune the columns of one block in place.

    Args:
        moved_BO: in, the weights as all columns before the block left them; out, the pruned weights.
        inverse_BB: U_BB.
        pattern: N kept of M.

    Returns:
        fp32 (B, O), 1 = dropped, 0 = kept.
    """
    scale_B1 = inverse_BB.diagonal().unsqueeze(1)  # U_jj
    push_BB = inverse_BB / scale_B1  # U_ij / U_ii
    removed_BO = torch.empty_like(moved_BO)  # E_j U_jj: what was removed of a column, as it was then
    dropped_BO = torch.empty_like(moved_BO)
    for start in range(0, moved_BO.shape[0], pattern.group):
        group = slice(start, start + pattern.group)
        moved_MO = moved_BO[group].addmm_(push_BB[:start, group].T, removed_BO[:start], alpha=-1)
        mask_OM = masks.from_scores((moved_MO.abs() / scale_B1[group]).T, pattern)
        dropped_MO = dropped_BO[group].copy_(~mask_OM.T)
        removed_MO, push_MM = removed_BO[group], push_BB[group, group]
        moved, removed, dropped = moved_MO.unbind(), removed_MO.unbind(), dropped_MO.unbind()
        torch.mul(moved[0], dropped[0], out=removed[0])
        for j in range(1, pattern.group):
            moved[j].addmv_(removed_MO[:j].T, push_MM[:j, j], alpha=-1)
            torch.mul(moved[j], dropped[j], out=removed[j])
        moved_MO -= removed_MO  # x - x is +0.0, x - 0 is x: exact
    return dropped_BO
