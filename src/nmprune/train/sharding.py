"""Parameters and learned state spread over the processes of a run (FSDP2), for models that do not fit into one of them.

Between forwards a process holds its rows of every parameter, of what is learned for it, of its gradient and moments. A forward
or backward gathers one decoder layer at a time. What a method does beside them (penalty, proximal step, score, hard masks)
sees one linear at a time, whole and alike in every process, so that no layout needs to be known here.

`whole`, `in_one_piece` and `clip_gradients` are collective: every process calls them for the same tensors in the same order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from nmprune.distributed import Processes
from nmprune.methods.base import State

BringIn = Callable[[int | None], None]


class Sharding:
    """Loads a model piece by piece and leaves each process its share of every piece.

    Args:
        bring_in: loads the weights of a decoder layer by its number, or (None) all that lies outside of them, for good.
        processes: that share the run, two or more.
    """

    def __init__(self, bring_in: BringIn, processes: Processes) -> None:
        self.device = processes.device
        self._bring_in = bring_in
        self._mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        self._root: FSDPModule | None = None

    def spread(self, model: nn.Module, layers: Sequence[nn.Module], loaded: Callable[[nn.Module], None]) -> None:
        """Load and shard a whole model; a process never holds more than its share and one decoder layer, or the rest.

        Args:
            model: its weights are on the meta device.
            layers: its decoder layers.
            loaded: called with each layer, and at last with the model, before it is sharded.
        """
        for index, layer in enumerate(layers):
            self._bring_in(index)
            loaded(layer)
            self._shard(layer)
        self._bring_in(None)
        loaded(model)
        self._root = self._shard(model)

    def _shard(self, module: nn.Module) -> FSDPModule:
        # resharded after the root's forward, too: what a forward without a backward left gathered would be used again after
        # the parameters have moved
        found: Any = fully_shard(
            module, mesh=self._mesh, reshard_after_forward=True, ignored_params=_of_other_dtypes(module) or None
        )
        sharded: FSDPModule = found
        # gradients are added up, as without sharding; gloo knows no other reduction
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)
        # what this process's micro-batch did not reach (an expert) has no gradient, and the others still send theirs
        sharded.set_reduce_scatter_unused_params(True)
        return sharded

    def forget_forward(self) -> None:
        """After a forward without a backward: torch notes every forward for the backward that it expects."""
        assert self._root is not None
        self._root.reset_iter_state()


def _of_other_dtypes(module: nn.Module) -> set[nn.Parameter]:
    """Trained parameters that are not of the dtype of most: torch reduces the gradients of one dtype.

    They are the norms and biases of a bfloat16 model beside fp32 state: small, and left whole in every process.
    """
    trained = [one for one in module.parameters() if one.requires_grad and not is_sharded(one)]
    n_bytes: Counter[torch.dtype] = Counter()
    for one in trained:
        n_bytes[one.dtype] += one.nbytes
    return {one for one in trained if one.dtype != max(n_bytes, key=lambda dtype: n_bytes[dtype])}


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only some rows of a tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without a graph: writing to it writes to the tensor."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without a graph; the tensor's own memory where it is not sharded."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def sharded_as(values: Tensor, like: Tensor) -> Tensor:
    """A copy of whole values, placed as another tensor of their shape is."""
    found = torch.zeros_like(like.detach())
    local(found).copy_(own_rows(values, like))
    return found


def own_rows(values: Tensor, like: Tensor) -> Tensor:
    """The rows of whole values that this process holds of a tensor of their shape (or as many rows); a view."""
    if not isinstance(like, DTensor):
        return values
    mesh = like.device_mesh
    rows = math.ceil(like.shape[0] / mesh.size())
    first = min(mesh.get_local_rank() * rows, like.shape[0])
    return values[first : first + rows]


def own_share(weight_OI: Tensor, state: State) -> tuple[Tensor, State]:
    """The rows of a linear whose state this process holds: (rows, in), and the state's own memory. None, it may be."""
    one = next(iter(state.values()))
    return own_rows(weight_OI, one), {key: local(value) for key, value in state.items()}


@contextmanager
def in_one_piece(state: State) -> Iterator[State]:
    """A linear's state whole inside the body, the same in every process.

    The values that the body leaves, and gradients that it makes, go back to where the state lies.
    """
    if not any(map(is_sharded, state.values())):
        yield state
        return
    pieces = {key: whole(value).requires_grad_(value.requires_grad) for key, value in state.items()}
    yield pieces
    with torch.no_grad():
        for key, piece in pieces.items():
            local(state[key]).copy_(own_rows(piece, state[key]))
            if piece.grad is not None:
                made = sharded_as(piece.grad, state[key])
                before = state[key].grad
                state[key].grad = made if before is None else before.add_(made)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float, processes: Processes) -> float:
    """Scale gradients so that their norm is at most `most`, in place; returns the norm before, the same in every process.

    Args:
        parameters: sharded ones and others; those have the same gradients in every process.
        most: may be infinite.
        processes: that hold the shards.
    """
    gradients = [one.grad for one in parameters if one.grad is not None]
    squares = {True: 0.0, False: 0.0}
    for gradient in gradients:
        squares[is_sharded(gradient)] += torch.linalg.vector_norm(local(gradient), dtype=torch.float32).item() ** 2
    (of_shards,) = processes.sum_values([squares[True]])
    norm = math.sqrt(of_shards + squares[False])
    if norm > most:
        for gradient in gradients:
            local(gradient).mul_(most / (norm + 1e-6))
    return norm
