"""Several processes that share one run: torch.distributed, started by torchrun.

Whatever goes over the wire is tensors or JSON; nothing is unpickled. A process that dies, or ends with an error, ends the
others within seconds: torch notices that something failed, the lifeline knows who it was.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nmprune.distributed.error_file import tell_torchrun
from nmprune.distributed.lifeline import Lifeline
from nmprune.errors import InputError

TIMEOUT_VARIABLE = "NMPRUNE_TIMEOUT"
# How long a process waits for another that lives and does not answer. The longest honest wait is for another's solver.
_TIMEOUT_SECONDS = 7200.0
_GRACE_SECONDS = 5.0  # how long the main thread has to end by itself after another process was lost
_BUCKET_BYTES = 32 << 20  # tensors are summed in buckets of this size: fewer messages, and little more memory
_ENDINGS: dict[type[BaseException], str] = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ProcessLost(InputError):
    """Another process of the run has ended before its time."""

    def located(self, place: str) -> InputError:
        """The same: no decoder layer and no linear is to blame."""
        return self


@dataclass
class Processes:
    """This process among those that share the run.

    All methods but `mine` are collective: every process calls the same ones in the same order. With one process they do
    nothing and cost nothing.

    Attributes:
        rank: number of this process, from 0.
        world_size: how many there are.
        local_rank: its number on this host: which accelerator is its own.
        device: where tensors are sent from.
        resume_hint: how the message about a lost process ends.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resume_hint: str = ""
    _lifeline: Lifeline | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run folder and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    def mine(self, n: int) -> range:
        """Which of n things are this process's, dealt one by one."""
        return range(self.rank, n, self.world_size)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes: the same bits in every process.

        Args:
            tensors: of the same shapes, dtypes and order everywhere.
        """
        if self.alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([one.reshape(-1) for one in bucket])
            with self._talking():
                dist.all_reduce(flat)
            for one, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                one.copy_(part.view_as(one))

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers over all processes, in fp64 and in order of rank: the same bits in every process."""
        if self.alone:
            return list(values)
        rows = self._gathered(torch.tensor(list(values), dtype=torch.float64))
        return [sum(column) for column in zip(*(row.tolist() for row in rows), strict=True)]

    def gather_counts(self, counts: Sequence[int]) -> list[list[int]]:
        """Every process's whole numbers, by rank."""
        if self.alone:
            return [list(counts)]
        return [row.tolist() for row in self._gathered(torch.tensor(list(counts), dtype=torch.int64))]

    def _gathered(self, row: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(row) for _ in range(self.world_size)]
        with self._talking():
            dist.all_gather(rows, row)
        return rows

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Replace `tensor` by what it is in process `source`."""
        if not self.alone:
            with self._talking():
                dist.broadcast(tensor, source)

    def pass_(self, tensor: Tensor, source: int, targets: Iterable[int]) -> None:
        """Replace `tensor` in the processes `targets` by what it is in process `source`; others need not call."""
        for target in targets:
            if source != target and self.rank in (source, target):
                with self._talking():
                    if self.rank == source:
                        dist.send(tensor, target)
                    else:
                        dist.recv(tensor, source)

    def tell(self, value: Any, source: int = 0) -> Any:
        """What process `source` says; plain data that JSON can hold."""
        if self.alone:
            return value
        text = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(text)], dtype=torch.int64)
        self.broadcast_(size, source)
        letters = torch.empty(int(size.item()), dtype=torch.uint8)
        if self.rank == source:
            letters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.broadcast_(letters, source)
        return json.loads(bytes(letters.tolist()))

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather_counts([0])

    @contextmanager
    def in_a_library(self) -> Iterator[None]:
        """For collective calls of other libraries inside the body: where a process was lost, their errors in our words.

        Raises:
            ProcessLost: instead of the library's error.
        """
        try:
            yield
        except RuntimeError as error:
            lost = self._lifeline.verdict(_GRACE_SECONDS) if self._lifeline else None
            if self._lifeline is None or lost is None:
                raise
            self._lifeline.told = True
            raise ProcessLost(self._words(lost)) from error

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """torch's errors in our words."""
        try:
            yield
        except RuntimeError as error:
            if self._lifeline is None:  # not all processes are connected yet
                raise InputError(f"the processes of this run do not reach each other: {_first_line(error)}") from error
            lost = self._lifeline.verdict(_GRACE_SECONDS)
            self._lifeline.told = True
            raise ProcessLost(self._words(lost or _no_answer(error))) from error

    def _words(self, what: str) -> str:
        return f"{what}. Run the same command again: {self.resume_hint or 'it goes on where it stopped'}."


ALONE = Processes()
"""One process: the usual case."""

_running: list[Processes] = []  # torch has one process group per process, and so have we


def is_main_process() -> bool:
    """Whether this process is the one that prints, told from the environment alone."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def started(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started; `ALONE` where it did not.

    An exception that leaves the body ends the other processes, too. Used again, it goes on with the same processes.

    Args:
        device: what the run works on; "cuda" without a number is the process's own there.

    Raises:
        InputError: the environment is incomplete, or the processes do not find each other.
    """
    rank, world_size, local_rank = _environment(os.environ)
    if world_size == 1:
        yield ALONE
        return
    processes = _running[0] if _running else _start(rank, world_size, local_rank, device)
    lifeline = processes._lifeline
    assert lifeline is not None
    lifeline.working = True
    try:
        yield processes
        processes.barrier()
    except ProcessLost:
        raise
    except BaseException as error:
        lifeline.told = True  # it ends by itself
        lifeline.say({"stopped": _ENDINGS.get(type(error)) or str(error) or type(error).__name__})
        raise
    finally:
        lifeline.working = False


def _environment(variables: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun says them; (0, 1, 0) without it."""
    if variables.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0
    missing = [name for name in _NEEDED if name not in variables]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']}, and {', '.join(missing)} is not set. Start several processes with "
            "torchrun, such as: torchrun --nproc-per-node 2 -m nmprune prune MODEL."
        )
    try:
        return int(variables["RANK"]), int(variables["WORLD_SIZE"]), int(variables["LOCAL_RANK"])
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}.") from error


def _start(rank: int, world_size: int, local_rank: int, device: torch.device) -> Processes:
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"several processes work on cpu or cuda, not on {device.type}: say --device cpu.")
    own = torch.device("cuda", local_rank) if device.type == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {rank} is number {local_rank} of its host, which has {torch.cuda.device_count()} cuda devices. Start "
                "one process per device: torchrun --nproc-per-node."
            )
        torch.cuda.set_device(own)
    timeout = float(os.environ.get(TIMEOUT_VARIABLE, _TIMEOUT_SECONDS))
    backend = "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {rank} of {world_size} does not find the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {_first_line(error)}"
        ) from error
    processes = Processes(rank, world_size, local_rank, own)
    try:
        lifeline = Lifeline.open(rank, world_size, os.environ["MASTER_ADDR"], processes.tell)
    except OSError as error:
        raise InputError(
            f"process {rank} of {world_size} does not reach process 0 at {os.environ['MASTER_ADDR']}: {error}. All ports "
            "between the hosts of a run must be open."
        ) from error
    processes._lifeline = lifeline
    _end_when_lost(processes, lifeline)
    _running.append(processes)
    atexit.register(_finish, processes)
    return processes


def _finish(processes: Processes) -> None:
    """Leave quietly; with another process lost, a group cannot be closed in order and is left to the system."""
    assert processes._lifeline is not None
    lost = processes._lifeline.lost is not None
    processes._lifeline.close()
    if not lost and dist.is_initialized():
        dist.destroy_process_group()


def _end_when_lost(processes: Processes, lifeline: Lifeline) -> None:
    """Let a lost process interrupt the main thread, and end this process where that does not come to an end by itself."""

    def terminated(number: int, frame: FrameType | None) -> None:
        # torchrun terminates all its processes when one is gone: whoever it was is about to be known
        if lifeline.told:
            return
        # another process may fail before this one has begun to work
        lost = lifeline.verdict(1.0) if lifeline.working else lifeline.lost
        if lost is None:
            raise SystemExit(128 + number)
        lifeline.told = True
        raise ProcessLost(processes._words(lost))

    def end() -> None:
        assert lifeline.lost is not None
        if in_main:
            os.kill(os.getpid(), signal.SIGTERM)  # runs `terminated` in the main thread
        time.sleep(_GRACE_SECONDS)
        if lifeline.working:  # it waits inside a library
            words = f"error: {processes._words(lifeline.lost)}"
            print(words, file=sys.stderr, flush=True)
            tell_torchrun(words)
            os._exit(2)

    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        signal.signal(signal.SIGTERM, terminated)
    lifeline.watch(end)


def _no_answer(error: Exception) -> str:
    return f"another process was lost or did not answer ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype and device, some MiB at a time."""
    bucket: list[Tensor] = []
    for one in tensors:
        full = sum(kept.nbytes for kept in bucket) >= _BUCKET_BYTES
        if bucket and (full or (bucket[0].dtype, bucket[0].device) != (one.dtype, one.device)):
            yield bucket
            bucket = []
        bucket.append(one)
    if bucket:
        yield bucket
