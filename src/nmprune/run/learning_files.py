"""What learning a whole model leaves in the run folder while it runs: metrics.jsonl and the newest checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from nmprune.checkpoint.durable import writing
from nmprune.methods.base import LearnStep
from nmprune.results import LearningResult
from nmprune.run.folder import RunFolder, open_tensors, write_tensors, write_text

METRICS_FILE = "metrics.jsonl"


class SavedLearning(Mapping[str, Tensor]):
    """A checkpoint of learning; a tensor is read when it is asked for, so that the whole never lies in memory.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_tensors(path) as file:
            self._names, self.metadata = frozenset(file.keys()), dict(file.metadata())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with open_tensors(self._path) as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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

    def resume(self, writes: bool = True) -> SavedLearning | None:
        """The newest checkpoint; metrics of steps that will be done again are dropped. None where there is none.

        Args:
            writes: False for the processes that leave the folder to another one.
        """
        snapshot, step = None, -1
        if self._checkpoint.is_file():
            snapshot = SavedLearning(self._checkpoint)
            step, self._seconds = int(snapshot.metadata["step"]), float(snapshot.metadata["seconds"])
        if writes:
            lines = self.metrics.read_text().splitlines() if self.metrics.is_file() else []
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in kept))
        self._since = time.monotonic()
        return snapshot

    def note(self, sign: LearnStep) -> None:
        """One line of metrics; no clock in it, so that a run that went on leaves the same file."""
        line = json.dumps({"step": sign.step, **sign.values}) + "\n"
        with writing(self.metrics, len(line)), self.metrics.open("a") as file:
            file.write(line)

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
