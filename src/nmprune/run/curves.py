"""The curves of a run that learns or learned: metrics.jsonl, drawn."""

from __future__ import annotations

import json
from pathlib import Path

from nmprune.errors import InputError
from nmprune.report.curves import curves_html
from nmprune.run.folder import RunFolder, write_text


def read_metrics(run: Path) -> list[dict[str, float]]:
    """What a run's learner said, step by step; a run may be at work still, so its last line may be half there.

    Raises:
        InputError: no run, or one that learns nothing.
    """
    folder = RunFolder(run)
    recipe = folder.read_recipe()
    if not folder.metrics_file.is_file():
        raise InputError(
            f"{run} has no metrics.jsonl: {recipe.method.name} does not learn step by step, or has not begun. Curves are drawn "
            "of learners' and finetuning runs."
        )
    *lines, last = folder.metrics_file.read_text().split("\n")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(
            f"{folder.metrics_file} is damaged: {error}. Give another run, or make this one again."
        ) from error
    if not rows:
        raise InputError(
            f"{folder.metrics_file} holds no step yet{f' (the first is being written: {last!r})' * bool(last)}."
        )
    return rows


def draw_curves(run: Path) -> tuple[list[dict[str, float]], Path]:
    """Draw a run's curves into its curves.html.

    Returns:
        The rows, and the file.

    Raises:
        InputError: as `read_metrics`; or the file cannot be written.
    """
    rows = read_metrics(run)
    recipe = RunFolder(run).read_recipe()
    file = run / "curves.html"
    write_text(file, curves_html(f"{recipe.model}: {recipe.pruner.name}, {recipe.pattern_words}", rows))
    return rows, file
