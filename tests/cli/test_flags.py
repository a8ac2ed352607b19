"""The command line is frozen: names and flags change on purpose or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from nmprune.cli import app, recipe_flags
from nmprune.run import CalibrationRecipe, Recipe, StreamRecipe

GOLDEN = Path(__file__).with_name("golden_flags.json")


def flags() -> dict[str, Any]:
    commands: dict[str, Any] = {}
    group: Any = get_command(app)
    for name, command in group.commands.items():
        arguments = [
            one.name + ("" if one.required else "?") for one in command.params if not one.opts[0].startswith("-")
        ]
        options = {
            "/".join([*one.opts, *one.secondary_opts]): _kind(one)
            for one in command.params
            if one.opts[0].startswith("-")
        }
        commands[name] = {"arguments": arguments, "options": dict(sorted(options.items()))}
    commands["nmprune"] = {"arguments": [], "options": {"/".join(one.opts): _kind(one) for one in group.params}}
    return commands


def _kind(option: Any) -> str:
    kind = "flag" if option.is_flag else "value"
    return kind + (", repeatable" if option.multiple else "") + (", required" if option.required else "")


def test_the_flags_are_the_golden_ones():
    """To change them on purpose: `python tests/cli/test_flags.py`, and say so in CHANGELOG.md."""
    assert flags() == json.loads(GOLDEN.read_text())


def test_every_flag_is_used_by_a_test_of_the_command_line():
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for command, found in flags().items():
        for flag in found["options"]:
            for spelling in flag.split("/"):
                assert f'"{spelling}"' in tests, f"{command} {spelling}"


def test_defaults_in_the_help_are_the_recipes_own():
    shown = {
        name: _default(getattr(recipe_flags, name))
        for name in ("Calibration", "NSequences", "SeqLen", "Seed", "Propagate", "DType")
    }
    assert shown == {
        "Calibration": CalibrationRecipe.source,
        "NSequences": str(CalibrationRecipe.n_sequences),
        "SeqLen": str(CalibrationRecipe.seq_len),
        "Seed": str(Recipe.seed),
        "Propagate": StreamRecipe.propagate,
        "DType": Recipe.dtype,
    }
    assert not StreamRecipe.true_sequential
    assert _default(recipe_flags.TrueSequential) == "no"


def _default(annotated: Any) -> str:
    return annotated.__metadata__[0].show_default


def test_help_names_every_flag_and_shows_brackets_as_they_are(call):
    for command, found in flags().items():
        text = re.sub(r"\s+", " ", call(*([] if command == "nmprune" else [command]), "--help").stdout)
        for flag in found["options"]:
            assert flag.split("/")[0] in text, f"{command} {flag}"
    assert "[methods|architectures|texts]" in call("list", "--help").stdout


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(flags(), indent=1) + "\n")
