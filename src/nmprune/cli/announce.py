"""What a run will do, how long and how much memory: said to whoever left the choice of the method to `--effort`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nmprune.cli.console import Output

if TYPE_CHECKING:
    from nmprune.run import Machine, Recipe


def announce(output: Output, effort: str, recipe: Recipe, machine: Machine, out: Path) -> None:
    """Plan the run and say it in a few lines; nothing with --quiet. A run that does not fit is said, and not refused.

    Args:
        output: where to.
        effort: that picked the recipe.
        recipe: what will be done.
        machine: how.
        out: the run folder: its disk is timed.
    """
    if output.quiet:
        return
    from nmprune.report.quantities import duration, size
    from nmprune.run.effort import EFFORTS
    from nmprune.run.plan import plan

    calibration = recipe.calibration
    text = f", calibrated on {calibration.n_sequences} x {calibration.seq_len} tokens of {calibration.source}"
    output.note(
        f"effort {effort}: {EFFORTS[effort].words} ({recipe.pruner.name}, {recipe.pattern_words}{text}). "
        f"Others: {', '.join(f'--effort {name}' for name in EFFORTS if name != effort)}, or --method."
    )
    output.note("timing this machine")
    made = plan(recipe, machine, out=out)
    time = "" if made.total_seconds is None else f"about {duration(made.total_seconds)}, "
    fits = "" if made.fits else f" (DOES NOT FIT: {size(made.limit)} may be used)"
    output.note(f"{time}{size(made.peak_memory)} of memory{fits}, {size(sum(made.disk.values()))} of disk")
    for note in made.notes:
        output.note(note)
