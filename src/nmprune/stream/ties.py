"""Weights that config.json ties and the checkpoint holds apart."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from nmprune.checkpoint.names import NameMap
from nmprune.checkpoint.reader import Checkpoint
from nmprune.stream.weights import entry, put


def untie_different(
    model: PreTrainedModel, names: NameMap, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[str, ...]:
    """Untie what the config ties although the checkpoint holds two tensors of different values, as transformers does.

    Two tensors are read from disk only where the checkpoint holds both. config.json stays as it is.

    Args:
        model: weights on the meta device, tied by its config; changed in place.
        names: where its weights are.
        checkpoint: the folder's tensors.
        dtype: compute dtype, in which tensors of two dtypes are compared.

    Returns:
        The parameters that are no longer tied, such as "lm_head.weight".
    """
    untied = []
    for target, source in list(model.all_tied_weights_keys.items()):
        one, other = (tuple(piece.tensor for piece in names.pieces.get(key, ())) for key in (target, source))
        if one and other and one != other and not _equal(checkpoint, one[0], other[0], dtype):
            del model.all_tied_weights_keys[target]
            put(model, target, entry(model, target).detach())
            untied.append(target)
    return tuple(untied)


def _equal(checkpoint: Checkpoint, one: str, other: str, dtype: torch.dtype) -> bool:
    if checkpoint.info(one).dtype != checkpoint.info(other).dtype:
        return torch.equal(checkpoint.read(one).to(dtype), checkpoint.read(other).to(dtype))
    pieces = zip(checkpoint.chunks(one), checkpoint.chunks(other), strict=True)
    return all(bytes(a) == bytes(b) for a, b in pieces)
