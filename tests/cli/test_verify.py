from __future__ import annotations

import shutil

from safetensors.torch import load_file, save_file


def damage(run) -> None:
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_sound_run(call, document, run):
    result = call("verify", run)
    assert result.exit_code == 0, result.output
    assert "verdict OK" in " ".join(result.stdout.split())
    assert "14, 4,608 groups" in result.stdout
    assert call("verify", run, "--quiet").stderr == ""
    found = document("verify", run)
    assert found["ok"]
    assert found["report"]["findings"] == []


def test_a_failed_verification_is_exit_code_3(call, document, run):
    damage(run)
    result = call("verify", run)
    assert result.exit_code == 3
    assert "FAILED: 1 finding" in result.stdout
    assert "model.norm.weight" in result.stdout
    found = document("verify", run, exit_code=3)
    assert not found["ok"]
    assert found["report"]["findings"][0]["tensor"] == "model.norm.weight"
    assert found["faults"] == []


def test_files_that_contradict_each_other_and_unreadable_ones(call, document, run):
    (run / "results.json").write_text(
        (run / "results.json").read_text().replace('"pattern": "2:4"', '"pattern": "1:4"')
    )
    assert "the pattern is not the same everywhere" in call("verify", run).stdout
    (run / "masks.safetensors").write_bytes(b"")
    found = document("verify", run, exit_code=3)
    assert found["report"] is None
    assert "masks.safetensors" in found["faults"][0]


def test_base(call, base, run, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    assert call("verify", run, "--base", moved).exit_code == 0
    result = call("verify", run, "--base", tmp_path / "none")
    assert result.exit_code == 2
    assert "no such folder" in result.stderr


def test_no_run(call, tmp_path):
    result = call("verify", tmp_path)
    assert result.exit_code == 2
    assert "is not a run folder" in result.stderr
