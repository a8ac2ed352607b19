"""Where a command's words go: the result to stdout, everything said on the way to stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from nmprune.pattern import Pattern

if TYPE_CHECKING:
    from nmprune.report import Table

_WIDTH_OF_A_FILE = 160  # a pipe or log has no width: wide enough that tables are not squeezed
BROKEN_PIPE = 141  # what a shell reports for a program that a closed pipe stopped (128 + SIGPIPE)


class _Stream(Console):
    def __init__(self, stderr: bool) -> None:
        in_terminal = (sys.stderr if stderr else sys.stdout).isatty()
        width = None if in_terminal or "COLUMNS" in os.environ else _WIDTH_OF_A_FILE
        super().__init__(stderr=stderr, width=width, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """The reader has gone away (`| head`): stop quietly."""
        raise BrokenPipeError


class Output:
    """One command's output.

    Args:
        json: stdout gets one JSON document and nothing else.
        quiet: no progress, notes or hints.
    """

    def __init__(self, json: bool = False, quiet: bool = False) -> None:
        self.json, self.quiet = json, quiet
        self.stdout, self.stderr = _Stream(stderr=False), _Stream(stderr=True)

    def note(self, text: str) -> None:
        """A line for people, on stderr; not with --quiet."""
        if not self.quiet:
            say(self.stderr, text)

    def hints(self, lines: Mapping[str, str]) -> None:
        """What to do next: command -> what it does."""
        if self.json or self.quiet:
            return
        say(self.stderr, "what next:")
        for command, what in lines.items():
            say(self.stderr, f"  {command}  # {what}")

    def result(self, document: Any, tables: Iterable[Table] = ()) -> None:
        """The command's result: with --json the document, else the tables; on stdout."""
        if self.json:
            say(self.stdout, json.dumps(plain(document), indent=1))
            return
        for table in tables:
            self.stdout.print(table.rich())


def say(console: Console, text: str, style: str = "") -> None:
    """One line as it is: no markup, no wrapping."""
    console.print(Text(text, style=style), soft_wrap=True)


def plain(value: Any) -> Any:
    """Dataclasses, paths and patterns as JSON holds them; infinity and NaN, which JSON lacks, as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Pattern):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path | Pattern):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
