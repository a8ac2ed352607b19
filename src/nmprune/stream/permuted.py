"""A decoder model with its channels reordered: read so from the disk, or changed in place in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nmprune.architectures.channels import Channels, find_channels, take
from nmprune.checkpoint.permuted import PermutedCheckpoint
from nmprune.stream.model import DecoderModel


def channels_of(model: DecoderModel) -> Channels:
    """The channel spaces of a model; no weights are read.

    Raises:
        InputError: a parameter of this variant is unknown: a permutation might not be exact.
    """
    config = model.config.get_text_config()
    # a tied weight stands under each of its names: any of them may be the one on disk
    shapes = {name: tuple(one.shape) for name, one in model.model.named_parameters(remove_duplicate=False)}
    return find_channels(shapes, model.family, config.num_attention_heads, config.hidden_size)


@torch.no_grad()
def permute(model: DecoderModel, channels: Channels, permutations: Mapping[str, Tensor]) -> None:
    """Reorder the channels of some spaces; the model computes the same, up to the order of its sums.

    A streamed model reads its weights through the permutations from here on. One in memory is changed.

    Args:
        model: not permuted yet.
        channels: its spaces.
        permutations: space -> int64 (blocks, channels); every row is a permutation.
    """
    if model.checkpoint is not None:
        model.checkpoint = PermutedCheckpoint.of(model.checkpoint, channels, model.pieces, permutations)
        return
    for name, parameter in model.model.named_parameters():  # a tied weight once
        moved = parameter
        for axis, index in channels.gathers(name, permutations):
            moved = take(moved, axis, index)
        if moved is not parameter:
            parameter.copy_(moved)
