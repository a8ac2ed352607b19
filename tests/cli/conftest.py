from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tiny_runs
from nmprune.cli import app

Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _library_settings_are_put_back():
    """The command line silences other libraries for the process; the other tests want them as they were."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    hub_bars = not are_progress_bars_disabled()
    yield
    logging.set_verbosity(before[0])
    (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
    hub_logging.set_verbosity(before[2])
    (enable_progress_bars if hub_bars else disable_progress_bars)()


@pytest.fixture
def call(monkeypatch) -> Call:
    """Run a command line in this process: `call("prune", path, "--json")`."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


@pytest.fixture
def document(call) -> Callable[..., Any]:
    """The same with --json; the document, after checking the exit code and that stdout holds nothing else."""

    def run(*words: object, exit_code: int = 0) -> Any:
        result = call(*words, "--json")
        assert result.exit_code == exit_code, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A model and a finished run of it."""
    place = tmp_path_factory.mktemp("cli")
    base = tiny_runs.model(place / "llama")
    return base, tiny_runs.finished(base, place / "run")


@pytest.fixture
def base(made) -> Path:
    return made[0]


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the finished run, to be changed freely."""
    return Path(shutil.copytree(made[1], tmp_path / "run"))


def flat(text: str) -> str:
    """Words on one line, however they were wrapped."""
    return re.sub(r"\s+", " ", text)
