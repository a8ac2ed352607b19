"""`nmprune verify`: prove what a run did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output
from nmprune.cli.progress import ProgressView
from nmprune.cli.quiet_libraries import quiet_libraries

FAILED = 3


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run folder.", show_default=False)],
    base: options.Base = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Verify a run: every tensor on disk, bit by bit, against the dense model and the masks.

    Each mask keeps exactly N of every M; masked weights are +0.0; kept weights are the dense model's (or, where the method
    or finetuning moves weights, finite); all other tensors are untouched, none is missing or extra; the run's files agree with
    each other. A finetuned run's masks are its parent's, byte for byte.

    Examples:

      nmprune verify runs/first

      # the dense model was moved
      nmprune verify runs/first --base /models/smollm2

    Exit codes: 0 the run is sound, 3 something is wrong with it, 2 it could not be checked, 1 a bug of ours.
    """
    from nmprune.report import FindingRow, verdict_tables
    from nmprune.run.verify import verify_run

    if not debug:
        quiet_libraries()
    output = Output(json, quiet)
    with ProgressView(output) as view:
        verdict = verify_run(run, base, view.show)
    found = verdict.report
    checked = {"run": verdict.run, "dense model": verdict.base}
    if found is not None:
        checked |= {
            "tensors compared": f"{found.n_tensors:,}",
            "masks": f"{found.n_masks:,}, {found.n_groups:,} groups",
            "masked weights": f"{found.n_masked:,}",
            "equal to": verdict.parent,
            "dense on purpose": f"{len(verdict.dense):,} linears and embeddings (--json lists them)",
            "finetuned beside the masks": ", ".join(verdict.beside[:3]) + (", ..." if len(verdict.beside) > 3 else ""),
        }
    rows = [FindingRow(one.tensor, one.what, one.count, one.detail) for one in (found.findings if found else ())]
    output.result({"ok": verdict.ok, **vars(verdict)}, verdict_tables(verdict.ok, checked, verdict.faults, rows))
    return 0 if verdict.ok else FAILED
