"""How hidden states flow in a run: what the recipe says of it, and what the machine has for it."""

from __future__ import annotations

from dataclasses import asdict

from nmprune.run.machine import Machine
from nmprune.run.recipe import Recipe
from nmprune.stream import StreamOptions


def stream_options(recipe: Recipe, machine: Machine) -> StreamOptions:
    """The options of a run's walk, and of the passes before it."""
    return StreamOptions(**asdict(recipe.stream), hidden_budget=machine.hidden_budget, n_held_out=recipe.n_held_out)
