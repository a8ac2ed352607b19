"""The run folder's README.md: what it tells the reader to type."""

from __future__ import annotations

import shlex

import pytest

import nmprune
import tiny_models
import tiny_runs


@pytest.mark.parametrize("given", ["token ids", "text"])
def test_the_command_that_makes_a_run_again_does(given, call, base, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    if given == "text":
        tiny_runs.finished(base, run)
    else:
        nmprune.prune(str(base), "wanda", "2:4", tiny_models.windows(), run)
    card = (run / "README.md").read_text()
    (command,) = [line.strip() for line in card.splitlines() if line.startswith("    nmprune prune ")]
    assert ("--set calibration.source=RUN/calibration.safetensors" in command) == (given == "token ids")
    result = call(*shlex.split(command.replace("RUN", str(run)).replace("AGAIN", str(again)))[1:])
    assert result.exit_code == 0, result.output
    assert (again / "masks.safetensors").read_bytes() == (run / "masks.safetensors").read_bytes()
