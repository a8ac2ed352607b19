"""Options that several commands share, each said once: its flag, its help, where it stands in --help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from nmprune.errors import InputError

_MACHINE, _OUTPUT = "Machine (never changes what is found, beyond rounding)", "Output"

Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on stdout; everything else on stderr.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Only results and errors: no progress, notes or hints.", rich_help_panel=_OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_OUTPUT)]
Device = Annotated[
    str, typer.Option(help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps.", rich_help_panel=_MACHINE)
]
HiddenBudget = Annotated[
    str,
    typer.Option(
        help="Hidden states kept in RAM; past it they live in a file in --scratch.",
        metavar="SIZE",
        rich_help_panel=_MACHINE,
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 = one per physical core.", min=0, rich_help_panel=_MACHINE)]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="Folder for that file.",
        metavar="DIR",
        show_default="the system's temporary folder",
        rich_help_panel=_MACHINE,
    ),
]
CheckpointMinutes = Annotated[
    float,
    typer.Option(
        help="Methods that learn the whole model keep a checkpoint so often.",
        min=0,
        rich_help_panel=_MACHINE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code from the model's folder. Never done without this flag."),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="Where the dense model is now, if not where the run's recipe says.", metavar="MODEL", show_default=False
    ),
]

DEVICE, HIDDEN_BUDGET, THREADS = "auto", "8GB", 0
CHECKPOINT_MINUTES = 5.0

MEASURED_TEXT = "wikitext2, c4, builtin (its held-out part), hf:DATASET or a file."

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(flag: str, text: str) -> int:
    """Bytes of "8GB", "512 MiB" or "1000".

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise InputError(f"{flag} {text!r}: expected a size such as 8GB, 512MiB or 1000000.")
    return int(float(match[1]) * _UNITS[match[2].upper()])
