from __future__ import annotations

import pytest

import tiny_runs
from nmprune.checkpoint import read_masks, write_npz
from nmprune.errors import InputError
from nmprune.run.compare import compare_masks, mask_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    base = tiny_runs.model(place / "base")
    return tiny_runs.finished(base, place / "wanda"), tiny_runs.finished(base, place / "magnitude", "magnitude")


def test_runs_and_files_are_the_same_thing(runs):
    wanda, magnitude = runs
    assert compare_masks(wanda, wanda / "masks.safetensors").same
    found = compare_masks(wanda, magnitude)
    assert not found.same
    assert 0 < found.total.n_groups_differ < found.total.n_groups == 4608


def test_an_npz_takes_shapes_and_pattern_from_the_other(runs, tmp_path):
    wanda, magnitude = runs
    npz = tmp_path / "wanda.npz"
    write_npz(npz, read_masks(wanda / "masks.safetensors"))
    assert compare_masks(npz, wanda).same
    assert compare_masks(wanda, npz).same
    assert compare_masks(magnitude, npz).total.n_groups_differ == compare_masks(magnitude, wanda).total.n_groups_differ
    with pytest.raises(InputError, match="are both npz"):
        compare_masks(npz, npz)


def test_what_is_no_mask_file(tmp_path):
    with pytest.raises(InputError, match=r"no such file or folder. Give a run folder"):
        mask_path(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds no masks.safetensors: not a run folder"):
        mask_path(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match="the run is not finished"):
        mask_path(tmp_path)
