"""`nmprune curves`: what a learner said, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output


def curves(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A learner's run, finished or at work.", show_default=False)
    ],
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Draw a run's metrics.jsonl: loss, flips of groups, temperature and whatever else its learner says.

    Writes RUN_DIR/curves.html, one page that needs nothing else, and prints each quantity's first, least, largest and last
    value.

    Example:

      nmprune curves runs/smollm2_hyperprune_2x4
    """
    from nmprune.report.curves import curves_table
    from nmprune.run.curves import draw_curves

    output = Output(json, quiet)
    rows, file = draw_curves(run)
    output.result({"file": file, "metrics": rows}, [curves_table(rows)])
    output.note(f"drawn: {file}")
    return 0
