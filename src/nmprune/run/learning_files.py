"""What learning a whole model leaves in the run folder while it runs: metrics.jsonl and the newest checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from nmprune.methods.base import LearnStep, State
from nmprune.results import LearningResult
from nmprune.run.folder import RunFolder, open_tensors, write_tensors, write_text

METRICS_FILE = "metrics.jsonl"


class LearningFiles:
    """Metrics and checkpoints of one run.

    Args:
        folder: the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.metrics = folder.path / METRICS_FILE
        self._checkpoint = folder.progress / "learning.safetensors"
        self._result = folder.progress / "learning.json"
        self._since = time.monotonic()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Of learning, in all sessions; what was lost between a checkpoint and a kill is not counted."""
        return self._seconds + time.monotonic() - self._since

    def resume(self, writes: bool = True) -> State | None:
        """The newest checkpoint; metrics of steps that will be done again are dropped. None where there is none.

        Args:
            writes: False for the processes that leave the folder to another one.
        """
        snapshot, step = None, -1
        if self._checkpoint.is_file():
            with open_tensors(self._checkpoint) as file:
                snapshot = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  no mapping
                step, self._seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        if writes:
            lines = self.metrics.read_text().splitlines() if self.metrics.is_file() else []
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in kept))
        self._since = time.monotonic()
        return snapshot

    def note(self, sign: LearnStep) -> None:
        """One line of metrics; no clock in it, so that a run that went on leaves the same file."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": sign.step, **sign.values}) + "\n")

    def save(self, sign: LearnStep) -> None:
        """Keep a checkpoint in place of the one before."""
        tensors: dict[str, Tensor] = {name: value.contiguous() for name, value in sign.snapshot().items()}
        write_tensors(self._checkpoint, tensors, {"step": str(sign.step), "seconds": str(self.seconds)})

    def finish(self, result: LearningResult) -> None:
        """Keep what learning came to, before the layers' masks are."""
        write_text(self._result, json.dumps(asdict(result)))

    def result(self) -> LearningResult | None:
        """What learning came to; None where nothing was learned."""
        return LearningResult(**json.loads(self._result.read_text())) if self._result.is_file() else None

    def drop_checkpoint(self) -> None:
        """Give its space back."""
        self._checkpoint.unlink(missing_ok=True)


def _step_of(line: str) -> float:
    """Of a line of metrics; one that a kill cut off belongs to no step that counts."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return torch.inf


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl, for reports and tests."""
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
