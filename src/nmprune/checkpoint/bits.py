"""Tensors as bits: masking and comparing that leave NaN payloads, -0.0 and every dtype's bits alone."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same width: equal integers are equal bits, and 0 is +0.0 and nothing else."""
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, sharing its memory.

    Raises:
        ValueError: the tensor is not contiguous or not on the CPU.
    """
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"bytes of a contiguous CPU tensor only, given strides {tensor.stride()} on {tensor.device}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """A copy of `weight` with exact +0.0 where the mask is False and the very bits of `weight` where it is True.

    A choice between two values and never a product: -1.0 times 0 would be -0.0, and NaN or infinity times 0 is NaN.

    Args:
        weight: any shape and dtype.
        mask: bool of the same shape, True = kept.

    Raises:
        ValueError: the shapes differ or the mask is not bool.
    """
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask {tuple(mask.shape)} {mask.dtype} for a weight {tuple(weight.shape)}: expected bool, equal shapes"
        )
    integers = as_integers(weight)
    return torch.where(mask, integers, torch.zeros((), dtype=integers.dtype, device=integers.device)).view(weight.dtype)
