"""The dense model that a run started from."""

from __future__ import annotations

from pathlib import Path

from nmprune.errors import InputError
from nmprune.run.find_model import find_model
from nmprune.run.folder import RunFolder


def find_base(folder: RunFolder, model: str, given: str | None = None) -> Path:
    """The folder of the dense model.

    Args:
        folder: the run.
        model: what its recipe calls the model.
        given: where the user says it is now; None = inside the run (a model that was pruned in memory), else where the
            recipe says.

    Raises:
        InputError: it is not there; the message says how to name another place.
    """
    if given is not None:
        return find_model(given)
    if folder.base.is_dir():
        return folder.base
    try:
        return find_model(model)
    except InputError as error:
        raise InputError(
            f"the dense model of {folder.path} is not where its recipe says: {error} If it was moved: --base MODEL."
        ) from error


def wrong_base(base: Path, fingerprint: str, expected: str) -> InputError:
    """The error for a dense model that is not the run's."""
    return InputError(
        f"{base} is not the model that was pruned: its fingerprint is {fingerprint[:12]}, the run's is {expected[:12]}. Name "
        "the right one with --base MODEL."
    )
