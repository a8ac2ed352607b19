"""Which parameters of a pruned model are trained: the masked linears always, norms and embeddings where that is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:  # a recipe is checked without transformers
    from nmprune.checkpoint import MaskFile
    from nmprune.checkpoint.names import Piece

PARTS = {
    "norms": "norm weights and biases",
    "embeddings": "embeddings and head",
}


def masked_parameters(pieces: Mapping[str, tuple[Piece, ...]], masks: MaskFile) -> set[str]:
    """The parameters of which some tensor on disk has a mask."""
    return {name for name, parts in pieces.items() if any(piece.tensor in masks.masks for piece in parts)}


def trained_parameters(
    model: nn.Module, layers: str, masked: Collection[str], also: Collection[str]
) -> dict[str, nn.Parameter]:
    """Name -> parameter of what is trained; a tied weight stands under its first name.

    Linears of a decoder layer without a mask (excluded ones, routers) are never trained: they stay what the dense model has.

    Args:
        model: a `...ForCausalLM`.
        layers: where its decoder layers are, such as "model.layers".
        masked: parameters with masks.
        also: of `PARTS`.
    """
    return {name: one for name, one in model.named_parameters() if name in masked or _part(name, one, layers) in also}


def _part(name: str, parameter: nn.Parameter, layers: str) -> str:
    if parameter.dim() < 2 or name.endswith("bias"):
        return "norms"
    return "linears" if name.startswith(f"{layers}.") else "embeddings"


def unmasked_tensors(
    model: nn.Module, pieces: Mapping[str, tuple[Piece, ...]], trained: Mapping[str, nn.Parameter], masks: MaskFile
) -> set[str]:
    """The checkpoint tensors without a mask that training changes; a tied weight's under each of its names."""
    changed = {id(one) for one in trained.values()}
    masked = masked_parameters(pieces, masks)
    entries = dict(model.named_parameters(remove_duplicate=False))
    return {
        piece.tensor
        for name, parts in pieces.items()
        if name not in masked and name in entries and id(entries[name]) in changed
        for piece in parts
    }
