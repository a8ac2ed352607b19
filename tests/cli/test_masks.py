"""The commands on mask files: apply and diff."""

from __future__ import annotations

import pytest

import tiny_models
import tiny_runs
from nmprune.checkpoint import read_masks, write_npz


def test_apply_and_verify_by_eye(call, document, base, run, tmp_path):
    result = call("apply", run, base, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "2 kept of 4, density of the masked tensors 50.0%" in result.stdout
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    found = document(
        "apply", run / "masks.safetensors", base, "--out", tmp_path / "again", "--quiet", "--trust-remote-code"
    )
    assert (found["n_masks"], found["notices"]) == (14, [])


def test_apply_an_npz(call, base, run, tmp_path):
    npz = tmp_path / "masks.npz"
    write_npz(npz, read_masks(run / "masks.safetensors"))
    result = call("apply", npz, base, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "Add --pattern" in result.stderr
    result = call("apply", npz, base, "--out", tmp_path / "new", "--pattern", "2:4")
    assert result.exit_code == 0
    assert "notice: the mask file does not say which model" in result.stderr


def test_apply_to_a_sparse_model_or_another_one(call, run, tmp_path):
    words = ("apply", run, run / "model", "--out", tmp_path / "new")
    assert call(*words).exit_code == 2
    assert call(*words, "--allow-sparse").exit_code == 0
    other = tiny_models.save("opt", tmp_path / "opt")
    result = call("apply", run, other, "--out", tmp_path / "other")
    assert result.exit_code == 2
    assert "does not fit" in result.stderr


@pytest.fixture(scope="module")
def magnitude(made, tmp_path_factory):
    return tiny_runs.finished(made[0], tmp_path_factory.mktemp("magnitude") / "run", "magnitude")


def test_diff(call, document, run, magnitude):
    result = call("diff", run, magnitude)
    assert result.exit_code == 0, result.output
    assert "mlp.up_proj" in result.stdout
    assert "the masks differ" in result.stdout
    found = document("diff", run, magnitude, "--quiet")
    assert not found["same"]
    assert found["total"]["n_groups"] == 4608
    assert 0 < found["total"]["n_groups_differ"] < 4608
    assert len(found["tensors"]) == 14
    assert document("diff", run, run)["same"]
    assert "the same masks" in call("diff", run, run / "masks.safetensors").stdout


def test_diff_of_what_is_no_mask_file(call, run, tmp_path):
    result = call("diff", run, tmp_path / "none")
    assert result.exit_code == 2
    assert "no such file or folder" in result.stderr
