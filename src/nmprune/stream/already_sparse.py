"""Tell a model whose linears are full of zeros already, whatever its config says."""

from __future__ import annotations

import torch
from torch import Tensor

from nmprune.errors import InputError
from nmprune.stream.model import DecoderModel

_GROUPS = (4, 8, 16, 32)
_LEAST_ZEROS = 0.4
_LEAST_GROUPS = 0.9


def refuse_sparse(model: DecoderModel, where: str) -> None:
    """Look at the first decoder layer; real dense checkpoints hold some exact zeros, but not in every group.

    Raises:
        InputError: at least half of its linears are sparse already (see `looks_sparse`).
    """
    linears, _ = model.linears(0)
    with model.layer(0) as layer:
        sparse = [one for one in linears if looks_sparse(one.in_module.of(layer.get_parameter(one.parameter)))]
    if sparse and 2 * len(sparse) >= len(linears):
        raise InputError(
            f"{where} is sparse already: {len(sparse)} of {len(linears)} linears of its first decoder layer have half of "
            f"every group at exactly zero, such as {sparse[0].name}. Pruning it again would choose among what is left: "
            "start from the dense checkpoint, or say --allow-sparse."
        )


def looks_sparse(weight: Tensor) -> bool:
    """Whether an (out, in) matrix is 40 % exact zeros or more, with half a group zero in 90 % of the groups.

    Groups of 4, 8, 16 and 32 are tried. Zeros at random (unstructured pruning at one half) fill only two thirds of the
    groups so far and do not count.
    """
    zero = weight == 0
    if zero.sum(dtype=torch.int64).item() < _LEAST_ZEROS * zero.numel():
        return False
    return any(_share_of_half_empty(zero, group) >= _LEAST_GROUPS for group in _GROUPS if weight.shape[-1] % group == 0)


def _share_of_half_empty(zero: Tensor, group: int) -> float:
    return (zero.unflatten(-1, (-1, group)).sum(-1) >= group / 2).float().mean().item()
