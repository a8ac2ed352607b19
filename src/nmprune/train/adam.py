"""The moments of a torch optimiser as plain tensors by name, and back: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nmprune.train.sharding import sharded_as

_MARK = "adam:"
_ENTRIES = ("exp_avg", "exp_avg_sq", "step")


def optimiser_state(optimiser: torch.optim.AdamW, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ "adam:<name>:<entry>" -> tensor, for every parameter that has been stepped; not copied."""
    return {
        f"{_MARK}{name}:{entry}": optimiser.state[parameter][entry]
        for name, parameter in parameters.items()
        if parameter in optimiser.state
        for entry in _ENTRIES
    }


def load_optimiser_state(
    optimiser: torch.optim.AdamW, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    """Put back what `optimiser_state` gave; other entries of `saved` are left alone."""
    for name, parameter in parameters.items():
        if f"{_MARK}{name}:step" not in saved:
            continue
        moments = {entry: saved[f"{_MARK}{name}:{entry}"] for entry in _ENTRIES}
        optimiser.state[parameter] = {
            key: sharded_as(value, parameter) if key != "step" else value.clone() for key, value in moments.items()
        }
