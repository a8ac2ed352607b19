"""The linears of a decoder layer divided among the processes of a run, and what became of them told to all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.distributed import Processes
from nmprune.methods import PerLinear, Pruned
from nmprune.pattern import Pattern
from nmprune.stream.layer_done import LinearDone


def deal(
    linears: Sequence[Linear], keys: Mapping[str, Sequence[str]], method: PerLinear, n_processes: int
) -> dict[str, int]:
    """Which process prunes which linear: the costliest first, each to the process with the least to do.

    Linears that read the same statistics stay together, since a solver factorises those once, unless there are more
    processes than statistics.

    Args:
        linears: of a layer, or of one stage of it.
        keys: linear name -> the statistics that it reads.
        method: says what a linear costs.
        n_processes: how many share the work.
    """
    together: defaultdict[tuple[str, ...], list[Linear]] = defaultdict(list)
    for linear in linears:
        together[tuple(keys[linear.name])].append(linear)
    units = list(together.values()) if len(together) >= n_processes else [[linear] for linear in linears]

    def cost(unit: Sequence[Linear]) -> float:
        return sum(method.solver_flops(*linear.shape) for linear in unit)

    load = [0.0] * n_processes
    owner: dict[str, int] = {}
    for unit in sorted(units, key=cost, reverse=True):
        process = min(range(n_processes), key=load.__getitem__)
        load[process] += cost(unit)
        owner |= {linear.name: process for linear in unit}
    return owner


def readers(keys: Mapping[str, Sequence[str]], owner: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Statistics key -> the processes whose linears read it."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for name, process in owner.items():
        for key in keys[name]:
            found[key].add(process)
    return {key: tuple(sorted(processes)) for key, processes in found.items()}


def told(
    linear: Linear, done: LinearDone | None, pattern: Pattern, source: int, processes: Processes, device: torch.device
) -> LinearDone:
    """One linear's result, in every process.

    Args:
        linear: which.
        done: what became of it; None where another process has pruned it.
        pattern: what it was pruned to.
        source: the process that has pruned it.
        processes: those of the run.
        device: where the result lies.
    """
    facts: dict[str, Any] | None = None
    if done is not None:
        weight = done.pruned.weight
        facts = {
            "n_tokens": done.n_tokens,
            "seconds": done.seconds,
            "output_error": done.output_error,
            "held_out_error": done.held_out_error,
            "notes": done.pruned.notes,
            "dtype": None if weight is None else str(weight.dtype).removeprefix("torch."),
        }
    facts = processes.tell(facts, source)
    assert facts is not None
    packed = torch.empty((math.prod(linear.shape) + 7) // 8, dtype=torch.uint8)
    if done is not None:
        packed.copy_(masks.pack(done.pruned.mask.cpu()))
    processes.broadcast_(packed, source)
    new_weight = None
    if facts["dtype"] is not None:
        moved = None if done is None else done.pruned.weight
        new_weight = _weight(linear, moved, getattr(torch, facts["dtype"]), source, processes, device)
    if done is not None:
        return done
    return LinearDone(
        name=linear.name,
        role=linear.role,
        tensor=linear.tensor,
        pruned=Pruned(masks.unpack(packed, linear.shape).to(device), new_weight, facts["notes"]),
        n_tokens=facts["n_tokens"],
        seconds=facts["seconds"],
        output_error=facts["output_error"],
        held_out_error=facts["held_out_error"],
        pattern=pattern,
    )


def _weight(
    linear: Linear,
    moved: Tensor | None,
    dtype: torch.dtype,
    source: int,
    processes: Processes,
    device: torch.device,
) -> Tensor:
    """Moved weights as bytes: not every backend sends every dtype."""
    weight = torch.empty(linear.shape, dtype=dtype, device=device) if moved is None else moved.contiguous()
    processes.broadcast_(weight.view(torch.uint8), source)
    return weight
