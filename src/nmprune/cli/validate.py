"""`nmprune validate`: recipes checked before they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmprune.cli import options
from nmprune.cli.console import Output, say
from nmprune.cli.guard import INPUT
from nmprune.cli.recipe_flags import check_recipe_file
from nmprune.errors import InputError


def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE.yaml...", help="Recipes.", show_default=False)],
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Check recipes without running them: every fault at once, with near matches for misspelt names.

    What a recipe names (its model, its text) is not looked for: it may lie on another machine.

    Example:

      nmprune validate recipes/*.yaml

    Exit codes: 0 all are sound, 2 at least one has faults.
    """
    from nmprune.report import Table
    from nmprune.run.recipe import Recipe

    output = Output(json, quiet)
    faults: dict[str, str | None] = {}
    for path in recipes:
        try:
            check_recipe_file(path)
            Recipe.from_yaml(path)
            faults[str(path)] = None
        except InputError as error:
            faults[str(path)] = str(error)
    rows = tuple((path, "ok" if fault is None else "has faults") for path, fault in faults.items())
    output.result(
        {
            "ok": not any(faults.values()),
            "recipes": [{"recipe": path, "fault": fault} for path, fault in faults.items()],
        },
        [Table("", ("recipe", ""), rows)],
    )
    for fault in filter(None, faults.values()):
        say(output.stderr, f"error: {fault}", "red")
    return INPUT if any(faults.values()) else 0
