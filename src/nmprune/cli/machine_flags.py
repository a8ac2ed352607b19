"""The machine flags of every command that works through a model, and the `Machine` that they mean."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from nmprune.cli import options
from nmprune.errors import InputError

if TYPE_CHECKING:
    from nmprune.run import Machine


@dataclasses.dataclass(frozen=True)
class MachineFlags:
    """The flags in the order of --help; a command has them as one parameter (`spread`), or names the few that it knows."""

    device: options.Device = options.DEVICE
    hidden_budget: options.HiddenBudget = options.HIDDEN_BUDGET
    threads: options.Threads = options.THREADS
    scratch: options.Scratch = None

    def machine(self, checkpoint_minutes: float = options.CHECKPOINT_MINUTES) -> Machine:
        """What the flags say.

        Raises:
            InputError: not a size, or the scratch folder is not there.
        """
        from nmprune.run import Machine

        if self.scratch is not None and not self.scratch.is_dir():
            raise InputError(f"--scratch {self.scratch}: no such folder. Make it first, or leave the flag out.")
        budget = options.parse_size("--hidden-budget", self.hidden_budget)
        return Machine(self.device, budget, self.threads, self.scratch, checkpoint_minutes)
