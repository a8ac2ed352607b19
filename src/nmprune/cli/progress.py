"""A run's signs of life: bars where there is a terminal, plain lines where there is none. All on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from nmprune.cli.console import Output, say

if TYPE_CHECKING:
    from nmprune.run.prune import Progress as Sign

_LABELS = {
    "allocate": "measuring the dense model",
    "gradients": "gradients",
    "permute": "reordering channels",
    "layers": "decoder layers",
    "learn": "learning masks",
    "model": "writing the model",
    "analyze": "looking at linears",
    "finetune": "finetuning",
    "regenerate": "making masks again",
    "verify": "comparing tensors",
    "dense": "dense model",
    "pruned": "pruned model",
    "measure": "measuring",
}
_LIVE_SECONDS = 30.0  # between two lines of a learner where there is no terminal
_IN_BYTES = ("model", "verify")


class _Count(ProgressColumn):
    """ "12/30", or megabytes."""

    def render(self, task: Task) -> Text:
        """How much of how much."""
        if task.total is None:
            return Text("")
        if task.fields.get("in_bytes"):
            return Text(f"{task.completed / 2**20:,.0f}/{task.total / 2**20:,.0f} MiB")
        return Text("") if task.fields.get("share") else Text(f"{int(task.completed)}/{int(task.total)}")


class _Bars(Progress):
    """Bars, and below them a line that a learner keeps writing anew."""

    words = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars' table, then the line."""
        yield self.make_tasks_table(self.tasks)
        if self.words:
            yield Text(self.words, style="dim")


class ProgressView:
    """Shows a run's signs of life; pass `view.show` as `report`.

    Args:
        output: where to; nothing is shown with --quiet.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bars: _Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._layer = -1
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._output.stderr.is_terminal and not self._output.quiet:
            self._bars = _Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                _Count(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                Remaining(elapsed_when_finished=False),
                console=self._output.stderr,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, sign: Sign) -> None:
        """One sign of life."""
        if self._output.quiet:
            return
        if sign.text:
            say(self._output.stderr, sign.text)
        self._live(sign.live)
        if self._bars is None or not sign.total or sign.stage == "done":
            return
        self._bar(sign.stage, _LABELS.get(sign.stage, sign.stage), sign.done, sign.total)
        if sign.stage == "layers":
            self._layer_bar(sign.done, int(sign.total))

    def _live(self, words: str) -> None:
        """A learner's last words: below the bars, or in a log as a line once in a while."""
        if self._bars is not None:
            self._bars.words = words
        elif words and time.monotonic() - self._told >= _LIVE_SECONDS:
            say(self._output.stderr, words)
            self._told = time.monotonic()

    def _bar(self, key: str, label: str, done: float, total: float, share: bool = False) -> None:
        assert self._bars is not None
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(label, total=total, in_bytes=key in _IN_BYTES, share=share)
        self._bars.update(self._tasks[key], completed=done, description=label)

    def _layer_bar(self, done: float, total: int) -> None:
        """The layer in work, told from the fraction of `done`; a fresh bar for each, so that its ETA is its own."""
        assert self._bars is not None
        layer = int(done)
        if layer != self._layer and "layer" in self._tasks:
            self._bars.remove_task(self._tasks.pop("layer"))
        self._layer = layer
        if layer < total:
            self._bar("layer", f"layer {layer + 1}", done - layer, 1.0, share=True)
