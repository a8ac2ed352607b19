from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from nmprune.errors import InputError
from nmprune.run.base import find_base
from nmprune.run.folder import RunFolder


def test_the_given_place_then_the_run_then_the_recipe(tmp_path):
    folder = RunFolder(tmp_path / "run")
    there, moved = tiny_models.save("llama", tmp_path / "there"), tiny_models.save("llama", tmp_path / "moved")
    assert find_base(folder, str(there)) == there
    assert find_base(folder, str(there), str(moved)) == moved
    folder.base.mkdir(parents=True)
    assert find_base(folder, str(there)) == folder.base
    assert find_base(folder, str(there), str(moved)) == moved


def test_a_base_that_is_gone_says_how_to_name_it(tmp_path):
    with pytest.raises(InputError, match=r"the dense model of .*run is not where its recipe says.*--base MODEL"):
        find_base(RunFolder(Path(tmp_path, "run")), str(tmp_path / "gone"))
