"""Functions run in several processes at once, as torchrun would start them.

The processes are forked from a server that has imported everything once, so each starts in milliseconds.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from layer_work import layer_work
from nmprune import InputError
from nmprune.distributed import Processes, started
from nmprune.run import api, folder
from nmprune.stream import walker
from nmprune.stream.shares import share_of
from slow_runs import context


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(n_processes: int, function: Callable[..., None], *args: Any) -> list[BaseProcess]:
    """`function(*args)` in every process, with torchrun's variables in its environment."""
    port = free_port()
    found = []
    for rank in range(n_processes):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        found.append(context().Process(target=_child, args=(variables, function, args)))
        found[-1].start()
    return found


def _child(variables: Mapping[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    function(*args)


def end(processes: list[BaseProcess], seconds: float = 60.0) -> list[int | None]:
    """Exit codes, once all have ended; those that did not in time are killed and have None."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return codes


def in_each(name: str, place: Path) -> None:
    """Call one of the functions below with this process's group; an InputError's text goes to `error_RANK`."""
    try:
        with started(torch.device("cpu")) as processes:
            {one.__name__: one for one in (talk, one_dies, one_fails, learner_gradients)}[name](processes, place)
    except InputError as error:
        (place / f"error_{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(2)


def prune(jobs: list[tuple[str, str, Any, dict[str, Any]]], dies: tuple[int, str] | None) -> None:
    """One `nmprune.prune` after the other, exiting 2 with the text in `<out>.error_RANK` on an InputError.

    Args:
        jobs: (model, out, method, other arguments of `nmprune.prune`).
        dies: (rank, file in the run folder): that process kills itself once the file is there; None = nobody does.
    """
    rank = os.environ["RANK"]
    for model, out, method, settings in jobs:
        if dies is not None:
            folder.HIDDEN_INTERVAL_SECONDS = 0.0
            if rank == str(dies[0]):
                _die_when(Path(out) / dies[1])
        try:
            api.prune(model, method, "2:4", out=out, **settings)
        except InputError as error:
            Path(f"{out}.error_{rank}").write_text(str(error))
            sys.exit(2)


def _die_when(file: Path) -> None:
    real = walker.told

    def told(*args: Any) -> Any:
        if file.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    walker.told = told  # type: ignore[assignment]


def talk(processes: Processes, place: Path) -> None:
    """Every method once; what comes out goes to `found_RANK`."""
    rank = processes.rank
    summed = [torch.full((3,), 0.1 * (rank + 1)), torch.full((2, 2), rank, dtype=torch.float64), torch.tensor(rank)]
    processes.sum_(summed)
    broadcast = torch.full((2,), float(rank))
    processes.broadcast_(broadcast, 1)
    passed = torch.full((2,), float(rank))
    processes.pass_(passed, 2, (0, 2))
    found = {
        "sums": [one.tolist() for one in summed],
        "values": processes.sum_values([0.1 * (rank + 1), math.inf if rank == 1 else 0.0]),
        "counts": processes.gather_counts([rank, 7]),
        "broadcast": broadcast.tolist(),
        "passed": passed.tolist(),
        "told": processes.tell({"from": rank, "text": "é"} if rank == 1 else None, 1),
        "mine": list(processes.mine(7)),
    }
    with started(torch.device("cpu")) as again:
        assert again is processes
    (place / f"found_{rank}").write_text(json.dumps(found))


def one_dies(processes: Processes, place: Path) -> None:
    """Process 1 is killed; 0 waits for it in a collective, and 2 is busy with something else."""
    processes.resume_hint = "it goes on after decoder layer 3 of 8"
    processes.barrier()
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if processes.rank == 0:
        processes.sum_values([1.0])
    time.sleep(60)


def one_fails(processes: Processes, place: Path) -> None:
    """Process 1 finds something that the user must put right."""
    if processes.rank == 1:
        raise InputError("layer 3: not finite.")
    processes.barrier()


def learner_gradients(processes: Processes, place: Path) -> None:
    """Loss and gradients of a decoder layer, of some sequences, to `gradients_RANK.pt`; every process holds its own sequences."""
    run = layer_work(n_sequences=7)
    share = share_of(7, 2, 2, 4, processes)
    for states in (run._inputs, run._targets):
        states.all = states.all[share.sequences]
    run._processes, run._local = processes, share.local
    halves = {name: weight * 0.5 for name, weight in run.weights.items()}
    asked = torch.tensor([5, 0, 3, 1])
    loss, gradients = run.gradients(asked, halves)
    found = {**gradients, "loss": torch.tensor([loss, run.loss(asked, halves)], dtype=torch.float64)}
    save_file(found, place / f"gradients_{processes.rank}.safetensors")
