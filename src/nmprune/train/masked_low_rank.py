"""LoRA that keeps N:M (Hu et al. 2022, arXiv 2106.09685, with the delta masked): W' = W + M * (s B A).

The usual adapter adds B (A x) to a linear's output and is merged as W + s B A, which fills every pruned weight in. A masked
delta has no low rank, so it cannot be added to outputs: here it is part of the weight, in training as in the merge, and
what was trained is what is merged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmprune.errors import InputError
from nmprune.train.held_masks import Held


class MaskedLowRank(nn.Module):
    """The parametrisation of one matrix: weight -> weight + trained * (scale B A).

    Attributes:
        low_in: A, fp32 (rank, columns), normal with standard deviation 1 / sqrt(rank).
        low_out: B, fp32 (rows, rank), zero at the start: the delta begins at 0.
    """

    trained: Tensor

    def __init__(self, trained: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = trained.shape
        self.scale = scale
        self.register_buffer("trained", trained, persistent=False)
        start = torch.randn(rank, columns, generator=generator) / rank**0.5
        self.low_in = nn.Parameter(start.to(trained.device))
        self.low_out = nn.Parameter(torch.zeros(rows, rank, device=trained.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is used, and that will be merged; +0.0 stays +0.0 where the mask is False."""
        delta = (self.low_out @ self.low_in) * self.scale
        return weight + delta.masked_fill(~self.trained, 0.0).to(weight.dtype)


def check_rank(shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
    """Raise InputError where a delta of that rank is not for these tensors: experts in one tensor, or too high a rank."""
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise InputError(
                f"{name} holds {shape[0]} experts in one tensor; low-rank deltas are of single matrices. Leave --lora out: all "
                "kept weights are then trained."
            )
    least = min(shapes, key=lambda name: min(shapes[name]))
    if not 0 < rank <= min(shapes[least]):
        raise InputError(
            f"lora is {rank}; expected 1 to {min(shapes[least])}, the smaller side of {least} {shapes[least]}."
        )


def add_low_rank(model: nn.Module, held: Mapping[str, Held], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Give every masked matrix of a model a low-rank delta, and freeze the matrix itself.

    The delta is scaled by the root mean square of the weights that it moves: a learning rate then means the same share of a
    weight for a matrix of any scale, as in full finetuning.

    Args:
        model: its masked weights are zero.
        held: parameter -> what may move in it.
        rank: of B A.
        seed: of A.

    Returns:
        The new parameters by name.

    Raises:
        InputError: a masked tensor is not a matrix (experts), or the rank makes no sense for it.
    """
    check_rank({name: tuple(one.kept.shape) for name, one in held.items()}, rank)
    generator = torch.Generator().manual_seed(seed)
    for name, one in held.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = model.get_parameter(name)
        trained = one.trained.to(weight.device)
        scale = root_mean_square(weight.detach()[trained])
        parametrize.register_parametrization(module, leaf, MaskedLowRank(trained, rank, scale, generator))
        module.get_parameter(f"parametrizations.{leaf}.original").requires_grad_(False)
    return {name: one for name, one in model.named_parameters() if is_low_rank(name)}


def is_low_rank(name: str) -> bool:
    """Whether a parameter of that name is a factor of a delta."""
    return name.endswith((".low_in", ".low_out"))


@torch.no_grad()
def merge_low_rank(model: nn.Module) -> None:
    """Put every delta into its weight and take the parametrisation off; the model is a plain one again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for leaf in list(module.parametrizations):  # type: ignore[arg-type]
                if isinstance(module.parametrizations[leaf][0], MaskedLowRank):  # type: ignore[index]
                    parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)


def root_mean_square(values: Tensor) -> float:
    """sqrt(mean(x^2)) in fp64; 0 for no values."""
    return values.double().square().mean().sqrt().item() if values.numel() else 0.0
