"""From what the user typed to a model folder, with near matches where there is none."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from nmprune.checkpoint import DEMO_MODEL, locate, locate_config
from nmprune.errors import InputError

_CONFIG_FILE = "config.json"


def find_model(model: str) -> Path:
    """`checkpoint.locate`, whose error also names what is spelt like it here.

    A bare word that is spelt nearly like the demo model or like a model in the working folder is an error at once, and is
    not looked for on the hub: ids of the hub have an owner.

    Raises:
        InputError: no such folder, file or hub model.
    """
    return _find(model, locate)


def find_config(model: str) -> Path:
    """The same for `checkpoint.locate_config`: no weights are fetched or dequantised."""
    return _find(model, locate_config)


def _find(model: str, how: Callable[[str], Path]) -> Path:
    path = Path(model).expanduser()
    if model == DEMO_MODEL or path.exists():
        return how(model)
    close = near_models(model)
    did_you_mean = f"Did you mean {' or '.join(map(repr, close))}?" if close else ""
    if close and len(path.parts) == 1:
        raise InputError(
            f"{model}: no such folder or file. {did_you_mean} A model of the hub is written OWNER/NAME, and the demo model "
            f"{DEMO_MODEL}."
        )
    try:
        return how(model)
    except InputError as error:
        raise InputError(f"{error} {did_you_mean}".rstrip()) from error


def near_models(model: str) -> list[str]:
    """Up to three names spelt like `model`: the demo model, and models that lie where `model` would lie."""
    path = Path(model).expanduser()
    found = near_paths(path, lambda entry: (entry / _CONFIG_FILE).is_file() or entry.suffix == ".gguf")
    return difflib.get_close_matches(model, [*found, DEMO_MODEL], n=3, cutoff=0.7)


def near_paths(path: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Entries of `path`'s folder that are `wanted` and spelt like it, as the user would write them."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if wanted(entry)]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)]
