"""The machine flags: *how* a run is done. They never change what it finds beyond rounding, so no recipe holds them."""

from __future__ import annotations

import platform
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from nmprune.errors import InputError, near_matches

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Machine:
    """Where and with how much a run works.

    Attributes:
        device: "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:N" or "mps".
        hidden_budget: bytes of hidden states kept in RAM; past it they live in a file.
        threads: CPU threads for forwards; 0 = torch's own choice (one per physical core).
        scratch: folder for hidden states past the budget; None = the system's temporary folder.
        checkpoint_minutes: how often learning a whole model keeps a checkpoint.
    """

    device: str = "auto"
    hidden_budget: int = 8 << 30
    threads: int = 0
    scratch: Path | None = None
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("hidden_budget", "threads", "checkpoint_minutes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more.")

    def resolve(self) -> torch.device:
        """The torch device.

        Raises:
            InputError: unknown, or not available in this process.
        """
        kind = self.device.partition(":")[0]
        if kind not in DEVICES:
            raise InputError(f"device {self.device!r}. {near_matches(kind, DEVICES)}")
        if kind == "auto" and self.device == kind:
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
            return torch.device(kind)
        available = {
            "auto": True,
            "cpu": True,
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        if not available[kind]:
            raise InputError(
                f"device {self.device!r} is not available: torch {torch.__version__} sees no {kind} device. "
                "Use --device cpu, or install a torch build for your accelerator."
            )
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise InputError(f"device {self.device!r} cannot be read. Known: {', '.join(DEVICES)}, cuda:N.") from error
        if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"device {self.device!r} is not available: there are {torch.cuda.device_count()} cuda devices, from cuda:0 on."
            )
        return device

    def set_threads(self) -> None:
        """Apply `threads`."""
        if self.threads:
            torch.set_num_threads(self.threads)


def compute_words(dtype: torch.dtype, device: torch.device) -> str:
    """What forward passes compute in and on which kind of device: "float32 on cpu"."""
    return f"{str(dtype).removeprefix('torch.')} on {device.type}"


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What results.json records about the machine.

    Args:
        device: where the run worked.
        dtype: what forward passes computed in.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class PeakMemory:
    """Peak memory of what happens after it was made, in bytes: peak RSS less the RSS then (mapped pages included)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with suppress(OSError):
            # Linux: forget the highest mark so far, of this process or of the one that started it
            Path("/proc/self/clear_refs").write_text("5")
        self._start = psutil.Process().memory_info().rss
        self._peak_before = _peak_rss()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def host(self) -> int | None:
        """None where the process had used more before and the system remembers only that."""
        peak = _peak_rss()
        return peak - self._start if peak > self._peak_before else None

    def device(self) -> int | None:
        """Peak bytes allocated on the accelerator; None on a CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def _peak_rss() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
