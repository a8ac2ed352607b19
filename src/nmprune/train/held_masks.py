"""Masks that hold while kept weights are trained: their gradients are cleared, and after every step it is checked.

Users lose masks in training: an optimiser with momentum or weight decay, a merge or a save fills the zeros in. Here a masked
weight never gets a gradient, so that AdamW's moments of it stay zero and its decay is that of zero; after each step it is
counted whether any one left +0.0, and that is an error, whoever did it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nmprune.checkpoint import MaskFile, as_integers
from nmprune.checkpoint.names import Piece


class MaskBroken(RuntimeError):
    """Training moved a weight that its mask holds."""


@dataclass(frozen=True)
class Held:
    """What may move in one parameter.

    Attributes:
        kept: bool, the parameter's shape; False = pruned, +0.0 for good.
        still: bool, the same shape: kept and not to be trained (experts or fused rows that stay dense); None for none.
    """

    kept: Tensor
    still: Tensor | None = None

    @property
    def trained(self) -> Tensor:
        """bool: what an optimiser may move."""
        return self.kept if self.still is None else self.kept & ~self.still


def held_parameters(
    shapes: Mapping[str, Sequence[int]],
    pieces: Mapping[str, tuple[Piece, ...]],
    masks: MaskFile,
) -> dict[str, Held]:
    """The masks of a file, in the shape of the parameters in memory.

    Args:
        shapes: parameter -> its shape.
        pieces: parameter -> the checkpoint tensors that it is made of (`DecoderModel.pieces`).
        masks: per tensor on disk.

    Returns:
        Only parameters of which some tensor has a mask.
    """
    held = {}
    for name, parts in pieces.items():
        if name not in shapes or not any(piece.tensor in masks.masks for piece in parts):
            continue
        kept = torch.ones(tuple(shapes[name]), dtype=torch.bool)
        still = torch.zeros_like(kept)
        for piece in parts:
            kept_here, still_here = (one if piece.region is None else piece.region.of(one) for one in (kept, still))
            if piece.tensor not in masks.masks:
                still_here.fill_(True)
                continue
            entry = masks.masks[piece.tensor]
            kept_here.copy_(entry.unpack())
            if entry.dense_rows:
                rows_RI = entry.is_dense_row()[:, None].expand(-1, entry.in_features)
                still_here.copy_(_in_shape(rows_RI, entry.shape, entry.group_axis))
        held[name] = Held(kept, still if still.any() else None)
    return held


def _in_shape(rows_RI: Tensor, shape: Sequence[int], group_axis: int) -> Tensor:
    """What `as_rows` made of a tensor, in the tensor's shape again."""
    if group_axis == -1:
        return rows_RI.reshape(tuple(shape))
    return rows_RI.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


class HeldMasks:
    """Stands between an optimiser and the weights of a pruned model.

    Args:
        model: its masked weights are zero already.
        held: parameter -> what may move in it.

    Raises:
        ValueError: a masked weight of the model is not zero.
    """

    def __init__(self, model: nn.Module, held: Mapping[str, Held]) -> None:
        self._parameters = {name: model.get_parameter(name) for name in held}
        self._pruned = {name: (~one.kept).to(self._parameters[name].device) for name, one in held.items()}
        self._trained = {name: one.trained.to(self._parameters[name].device) for name, one in held.items()}
        # Weight decay moves what it is not told to leave alone, without any gradient: what stands still is put back.
        self._still = {
            name: (one.still.to(self._parameters[name].device), self._parameters[name].detach().clone())
            for name, one in held.items()
            if one.still is not None
        }
        for name, parameter in self._parameters.items():
            if as_integers(parameter.detach())[self._pruned[name]].any():
                raise ValueError(f"{name}: masked weights that are not +0.0 before training began")

    def watch(self, optimiser: torch.optim.Optimizer) -> None:
        """Clear gradients as soon as they are there, and check after every step of the optimiser."""
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._clear_gradient, name))
        optimiser.register_step_post_hook(lambda *_: self.hold())

    def _clear_gradient(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        # a product: three times faster than masked_fill_, and what is infinite ends the training anyway
        parameter.grad.mul_(self._trained[name])

    @torch.no_grad()
    def hold(self) -> None:
        """Put back what must not move.

        Raises:
            MaskBroken: a pruned weight had left +0.0.
        """
        broken = {}
        for name, parameter in self._parameters.items():
            values, pruned = parameter.detach(), self._pruned[name]
            if name in self._still:
                still, before = self._still[name]
                values.copy_(torch.where(still, before, values))
            moved = as_integers(values).ne(0) & pruned
            if moved.any():
                broken[name] = int(moved.count_nonzero())
                values.masked_fill_(pruned, 0.0)
        if broken:
            name, count = next(iter(broken.items()))
            raise MaskBroken(
                f"an optimiser step moved weights that a mask holds, in {len(broken)} of {len(self._parameters)} tensors, such "
                f"as {count:,} of {name}. They were put back; this is a fault of the training code."
            )
