"""`nmprune diff`: two mask files or runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output

_WHAT = "A run folder, a masks.safetensors, or MaskLLM's .npz (one of the two at most)."


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=_WHAT, show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same.", show_default=False)],
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Compare the masks of two files or runs: groups that differ, and what is kept by both, per role.

    Example:

      nmprune diff runs/wanda runs/sparsegpt

    Exit code 0 whether they differ or not; --json says "same": true or false.
    """
    from nmprune.report import diff_tables, facts
    from nmprune.run.compare import compare_masks

    output = Output(json, quiet)
    found = compare_masks(a, b)
    verdict = facts("", {"verdict": "the same masks" if found.same else "the masks differ"})
    document = {"a": a, "b": b, "same": found.same, "total": found.total if found.tensors else None, **vars(found)}
    output.result(document, [*diff_tables(str(a), str(b), found), verdict])
    return 0
