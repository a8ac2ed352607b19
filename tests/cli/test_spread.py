from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer

from nmprune.cli.recipe_flags import RecipeFlags
from nmprune.cli.spread import spread


@dataclass(frozen=True)
class Colours:
    paint: Annotated[str | None, typer.Option(help="Of the wall.")] = None
    floor: Annotated[list[int] | None, typer.Option()] = None


def test_the_fields_stand_in_the_dataclasss_place_and_the_call_puts_them_together():
    def command(name: str, colours: Colours, loud: bool = False) -> int:
        """What it does."""
        seen.append((name, colours, loud))
        return 3

    seen: list[object] = []
    spread_out = spread(command)
    assert list(inspect.signature(spread_out).parameters) == ["name", "paint", "floor", "loud"]
    assert spread_out.__doc__ == "What it does."
    assert spread_out(name="a", paint="red", floor=[1], loud=True) == 3
    assert seen == [("a", Colours("red", [1]), True)]


def test_typer_takes_it():
    def command(name: str, colours: Colours) -> int:
        typer.echo(f"{name} {colours}")
        return 0

    app = typer.Typer()
    app.command()(spread(command))
    result = typer.testing.CliRunner().invoke(app, ["a", "--floor", "1", "--floor", "2"])
    assert result.stdout.strip() == "a Colours(paint=None, floor=[1, 2])"


def test_every_recipe_flag_reaches_the_recipe():
    """A field that `as_settings` forgets would be a flag that does nothing."""
    given = RecipeFlags(**{name: "x" for name in inspect.signature(RecipeFlags).parameters if name != "settings"})
    n_fields = len(inspect.signature(RecipeFlags).parameters)
    assert len(given.as_settings()) == n_fields - 3  # --exclude, --set and --effort go their own ways
    assert RecipeFlags(settings=["a=b"]).as_settings() == ["a=b"]
