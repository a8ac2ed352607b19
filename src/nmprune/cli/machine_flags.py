"""The machine flags -> a `Machine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nmprune.cli.options import CHECKPOINT_MINUTES, parse_size
from nmprune.errors import InputError

if TYPE_CHECKING:
    from nmprune.run import Machine


def machine(
    device: str,
    hidden_budget: str,
    threads: int,
    scratch: Path | None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
) -> Machine:
    """What --device, --hidden-budget, --threads, --scratch and --checkpoint-minutes say.

    Raises:
        InputError: not a size, or the scratch folder is not there.
    """
    from nmprune.run import Machine

    if scratch is not None and not scratch.is_dir():
        raise InputError(f"--scratch {scratch}: no such folder. Make it first, or leave the flag out.")
    return Machine(device, parse_size("--hidden-budget", hidden_budget), threads, scratch, checkpoint_minutes)
