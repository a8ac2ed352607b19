"""A run that several processes share: process 0 alone writes its folder, and all of them see it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmprune.distributed import Processes
from nmprune.errors import InputError
from nmprune.run.find_model import find_model
from nmprune.run.folder import RunFolder
from nmprune.run.machine import Machine
from nmprune.run.recipe import Recipe

_SEEN_SECONDS = 30.0  # network file systems show a new file late


def own_machine(machine: Machine, processes: Processes) -> Machine:
    """The machine as this process uses it: with several, each has an accelerator of its own."""
    return machine if processes.alone else replace(machine, device=str(processes.device))


def find_model_once(name: str, processes: Processes) -> Path:
    """The model's folder; a GGUF file is dequantised by process 0, and found by the others.

    Raises:
        InputError: there is no such model.
    """
    found = find_model(name) if processes.is_main else None
    processes.barrier()
    return found or find_model(name)


def tell_tokens(
    windows: Tensor | None, origin: dict[str, Any] | None, processes: Processes
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Process 0's calibration windows and where they came from, in every process."""
    shape = processes.tell(None if windows is None else list(windows.shape))
    if shape is None:
        return None, None
    ids = torch.empty(shape, dtype=torch.int64) if windows is None else windows
    processes.broadcast_(ids)
    return ids, processes.tell(origin)


@contextmanager
def working(folder: RunFolder, recipe: Recipe, processes: Processes) -> Iterator[None]:
    """Hold the run's folder for all processes inside the body.

    Raises:
        InputError: as `RunFolder.working`, or a process does not see the folder.
    """
    if processes.is_main:
        with folder.working(recipe):
            processes.barrier()
            yield
            processes.barrier()
        return
    processes.barrier()
    wait_for(folder.recipe_file, processes)
    yield
    processes.barrier()


def wait_for(file: Path, processes: Processes) -> None:
    """Wait until a file that process 0 has written is seen here.

    Raises:
        InputError: it is not.
    """
    end = time.monotonic() + _SEEN_SECONDS
    while not file.is_file():
        if time.monotonic() > end:
            raise InputError(
                f"process {processes.rank} of {processes.world_size} does not see {file}, which process 0 has written. The "
                "run folder must lie on a file system that all hosts share, under the same path."
            )
        time.sleep(0.1)
