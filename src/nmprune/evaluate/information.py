"""What a pruned linear's output still tells of the dense one's, were its inputs Gaussian; and the terms of HyperPrune's eq. 11.

x ~ N(mean, C) goes into the dense weights W, Z = W x, and into the pruned ones, Z' = W' x. Without noise I(Z; Z') is infinite
wherever the two share a direction, so Z' is seen through noise N of variance s^2 = c tr(cov Z') / out in each output:

    I(Z; Z' + N) = 1/2 log |cov(Z') + s^2| - 1/2 log |cov(Z' | Z) + s^2|        in nats

With C = S S^T, S (in, rank), x is S u with u ~ N(0, 1) up to its mean, Z tells u's part in the row space of W S and nothing of
the rest, so with A = W S and B = W' S

    cov(Z') = B B^T,    cov(Z' | Z) = B (1 - P) B^T,    P the projection on the rows of A.

No covariance is inverted, and both determinants are of matrices 1 + (something >= 0). All in fp64.

Where A has full column rank (`determines_input`: out >= rank, as for most up projections) Z determines x: P = 1, the second
term is 0, and the information is what W' and the noise let through, whatever the output error is.

Legend: O out_features, I in_features, R rank of the covariance, K rank of W S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmprune.stats import InputStats

NOISE_SHARES = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class InputSpread:
    """Mean and covariance of a linear's input.

    Attributes:
        mean: fp64 (in,).
        second_moment: fp64 (in,), E[x_j^2].
        root: fp64 (in, rank), S with S S^T = cov(x).
    """

    mean: Tensor
    second_moment: Tensor
    root: Tensor


def spread_of(stats: InputStats) -> InputSpread:
    """The input's mean and covariance from its sums.

    The sums of products are fp32, each right to about its last bit relative to sqrt(G_ii G_jj). Directions of the covariance
    that are smaller than that, with every input scaled to a second moment of 1, are rounding and are left out: with fewer
    tokens than inputs, all beyond the tokens.

    Args:
        stats: with `input_gram` and `input_sum`, of at least one token.
    """
    gram_II = _wide(stats.gram()) / stats.n_tokens
    mean_I = _wide(stats.sums()) / stats.n_tokens
    second_I = gram_II.diagonal().clamp_min(0.0).clone()
    scale_I = second_I.sqrt()
    inverse_I = torch.where(scale_I > 0, 1 / scale_I, 0.0)
    scaled_II = gram_II.addr_(mean_I, mean_I, alpha=-1).mul_(inverse_I).mul_(inverse_I.unsqueeze(1))
    values_I, vectors_II = torch.linalg.eigh(scaled_II)
    there_I = values_I > len(scale_I) * torch.finfo(torch.float32).eps
    root_IR = vectors_II[:, there_I].mul_(values_I[there_I].sqrt()).mul_(scale_I.unsqueeze(1))
    return InputSpread(mean_I, second_I, root_IR)


class DenseOutput:
    """What the output Z of one dense linear tells of its input; `nats` asks it about any pruned weights.

    Args:
        spread: of the input.
        weight_OI: (out, in), W.

    Attributes:
        rank: K, how many directions of the input Z tells.
        determines_input: Z tells all of the input.
    """

    def __init__(self, spread: InputSpread, weight_OI: Tensor) -> None:
        self._spread = spread
        seen_OR = _wide(weight_OI) @ spread.root
        _, sizes_K, rows_KR = torch.linalg.svd(seen_OR, full_matrices=False)
        smallest = sizes_K.max().item() * max(seen_OR.shape) * torch.finfo(sizes_K.dtype).eps if len(sizes_K) else 0.0
        self._rows_KR = rows_KR[sizes_K > smallest]
        self.rank = len(self._rows_KR)
        self.determines_input = self.rank == spread.root.shape[1]

    def nats(self, pruned_OI: Tensor, noise_shares: Sequence[float] = NOISE_SHARES) -> tuple[float, ...]:
        """I(Z; Z' + N(0, s^2)) for each c of `noise_shares`, s^2 = c tr(cov Z') / out; 0 where Z' does not vary.

        Args:
            pruned_OI: (out, in), W'; masked weights are zeros.
            noise_shares: each > 0.
        """
        pruned_OR = _wide(pruned_OI) @ self._spread.root
        mean_variance = pruned_OR.square().sum().item() / len(pruned_OR)
        if mean_variance == 0:
            return (0.0,) * len(noise_shares)
        pruned_OR /= mean_variance**0.5
        whole = _half_log_determinants(pruned_OR, noise_shares)
        if self.determines_input:
            return whole
        pruned_OR -= (pruned_OR @ self._rows_KR.T) @ self._rows_KR
        unknown = _half_log_determinants(pruned_OR, noise_shares)
        return tuple(max(0.0, one - other) for one, other in zip(whole, unknown, strict=True))


def _half_log_determinants(matrix_OR: Tensor, shares: Sequence[float]) -> tuple[float, ...]:
    """1/2 log |1 + B B^T / c| for each c; B^T B has the same determinant and may be smaller."""
    wide = matrix_OR.shape[0] <= matrix_OR.shape[1]
    product = matrix_OR @ matrix_OR.T if wide else matrix_OR.T @ matrix_OR
    found = []
    for share in shares:
        sized = product / share
        sized.diagonal().add_(1.0)
        found.append(torch.linalg.cholesky(sized).diagonal().log().sum().item())
    return tuple(found)


@dataclass(frozen=True)
class ActivationTerms:
    """Eq. 11 of the paper: E ||W' Diag(x)||^2 = mean term + variance term. Per token, summed over the weights.

    Attributes:
        mean_term: sum_ij (W'_ij E[x_j])^2.
        variance_term: sum_ij W'_ij^2 Var[x_j].
        dense: E ||W Diag(x)||^2 of the dense weights, both terms together.
    """

    mean_term: float
    variance_term: float
    dense: float

    @property
    def kept(self) -> float:
        """Both terms as a share of the dense weights'; 1 where those are 0."""
        return (self.mean_term + self.variance_term) / self.dense if self.dense else 1.0


def activation_terms(spread: InputSpread, weight_OI: Tensor, pruned_OI: Tensor) -> ActivationTerms:
    """The two terms of eq. 11. The paper says that the first one is Wanda's score; its square is the sum of both.

    Args:
        spread: of the input.
        weight_OI: (out, in), dense.
        pruned_OI: (out, in), W'; masked weights are zeros.
    """
    square_I = _wide(pruned_OI).square().sum(0)
    variance_I = (spread.second_moment - spread.mean.square()).clamp_min(0.0)
    return ActivationTerms(
        mean_term=(square_I @ spread.mean.square()).item(),
        variance_term=(square_I @ variance_I).item(),
        dense=(_wide(weight_OI).square().sum(0) @ spread.second_moment).item(),
    )


def _wide(tensor: Tensor) -> Tensor:
    """A copy in fp64; on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64, copy=True)
