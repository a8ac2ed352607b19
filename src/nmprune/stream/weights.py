"""Weights put into and taken out of a model that lies on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmprune.checkpoint.names import NameMap
from nmprune.checkpoint.reader import Checkpoint
from nmprune.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def entry(module: nn.Module, name: str) -> Tensor:
    """The entry `name` of a module's state dict itself, not a detached copy."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the entry `name` of a module's state dict."""
    owner, _, leaf = name.rpartition(".")
    place: Any = module.get_submodule(owner)
    if leaf in place._parameters:
        place._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        place._buffers[leaf] = tensor


def random_weights(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Random weights inside the body for whatever of `layer` is on the meta device."""
    generator = torch.Generator().manual_seed(0)
    return _in_place_of_meta(
        layer, lambda meta: torch.randn(meta.shape, generator=generator).mul_(0.02).to(device, dtype)
    )


def zeros(
    model: nn.Module, dtype: torch.dtype, device: torch.device, skip: frozenset[str]
) -> AbstractContextManager[None]:
    """Zeros that take no memory inside the body for whatever of `model` is on the meta device and not in `skip`."""
    zero = torch.zeros((), dtype=dtype, device=device)
    return _in_place_of_meta(model, lambda meta: zero.expand(meta.shape), skip)


@contextmanager
def _in_place_of_meta(
    module: nn.Module, make: Callable[[Tensor], Tensor], skip: frozenset[str] = frozenset()
) -> Iterator[None]:
    entries = {name: tensor for name, tensor in module.state_dict().items() if name not in skip and tensor.is_meta}
    for name, tensor in entries.items():
        put(module, name, make(tensor))
    try:
        yield
    finally:
        for name, tensor in entries.items():
            put(module, name, tensor)


def move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Bring the buffers that no checkpoint holds (rotary tables) to the compute device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def check_dtypes(model: PreTrainedModel, names: NameMap, checkpoint: Checkpoint) -> None:
    """Raise InputError where a floating-point parameter is stored as something else, such as packed integers or fp8."""
    state = model.state_dict()
    for key, pieces in names.pieces.items():
        for piece in pieces:
            stored = checkpoint.info(piece.tensor).dtype
            if state[key].is_floating_point() and stored not in FLOATS:
                raise InputError(
                    f"{checkpoint.folder}: tensor {piece.tensor} is {stored}; expected float32, bfloat16, float16 or float64. "
                    "It looks quantised: start from the unquantised checkpoint."
                )


def commonest_float(checkpoint: Checkpoint) -> torch.dtype | None:
    """The floating-point dtype that most of a checkpoint's bytes are in; None where there is none."""
    n_bytes = dict.fromkeys(FLOATS, 0)
    for info in checkpoint.tensors.values():
        if info.dtype in n_bytes:
            n_bytes[info.dtype] += info.nbytes
    most = max(FLOATS, key=lambda dtype: n_bytes[dtype])
    return most if n_bytes[most] else None
