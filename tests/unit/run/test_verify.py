from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_runs
from nmprune.checkpoint import TensorMask, read_masks, write_masks
from nmprune.errors import InputError
from nmprune.run.verify import verify_run

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model, a frozen run of it and one whose weights moved; to be copied, not changed."""
    place = tmp_path_factory.mktemp("made")
    base = tiny_runs.model(place / "base")
    return base, tiny_runs.finished(base, place / "wanda"), tiny_runs.finished(base, place / "sparsegpt", "sparsegpt")


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[1], tmp_path / "run"))


def change_model(run: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_sound_runs(made):
    seen = []
    for run in made[1:]:
        verdict = verify_run(run, report=seen.append)
        assert verdict.ok, verdict
        assert verdict.report is not None
        assert (verdict.report.n_masks, verdict.report.n_groups) == (14, 4608)
    assert seen[-1].done == seen[-1].total > 0


def test_a_changed_weight_fails(run):
    def one_ulp(tensors: dict[str, Tensor]) -> None:
        kept = tensors[UP].view(torch.int32)
        place = tuple(kept.nonzero()[0])
        kept[place] += 1

    change_model(run, one_ulp)
    verdict = verify_run(run)
    assert not verdict.ok
    assert verdict.report is not None
    assert [(one.tensor, one.count) for one in verdict.report.findings] == [(UP, 1)]
    assert verdict.faults == ()


def test_a_missing_tensor_fails(run):
    change_model(run, lambda tensors: tensors.pop("lm_head.weight"))
    verdict = verify_run(run)
    assert verdict.report is not None
    assert [one.what for one in verdict.report.findings] == ["missing from the pruned checkpoint"]


def test_other_masks_fail_by_checksum_and_by_weight(run):
    file = run / "masks.safetensors"
    masks = read_masks(file)
    entry = masks.masks[UP]
    masks.masks[UP] = TensorMask.from_mask(~entry.unpack(), entry.pattern)
    write_masks(file, masks)
    verdict = verify_run(run)
    assert [fault.partition(" ")[0] for fault in verdict.faults] == ["results.json", "model/config.json"]
    assert all("mask checksum" in fault for fault in verdict.faults)
    assert verdict.report is not None
    assert {one.tensor for one in verdict.report.findings} == {UP}


def test_a_mask_that_is_not_legal_or_a_truncated_model_is_a_fault_of_the_run(run):
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    masks = run / "masks.safetensors"
    content = bytearray(masks.read_bytes())
    content[-1] ^= 1
    masks.write_bytes(content)
    verdict = verify_run(run)
    assert not verdict.ok
    assert verdict.report is None
    assert "do not keep exactly 2 kept of 4" in verdict.faults[0]
    assert "model.safetensors" in verdict.faults[1]


def test_linears_without_a_mask_and_masks_without_a_linear(run):
    def rename(results: dict) -> None:
        results["linears"][0]["tensor"] = "model.layers.9.q.weight"

    change_json(run / "results.json", rename)
    faults = " ".join(verify_run(run).faults)
    assert "model.layers.9.q.weight was pruned, and it has no mask" in faults
    assert "model.layers.0.self_attn.q_proj.weight has a mask, and results.json lists no pruned linear" in faults


def test_counts_that_do_not_add_up(run):
    def shrink(results: dict) -> None:
        results["linears"][0]["shape"] = [28, 32]

    change_json(run / "results.json", shrink)
    faults = " ".join(verify_run(run).faults)
    assert "results.json lists 28 pruned output features, its mask rules 32" in faults
    assert "results.json counts 18,432 weights in linears and lists 18,304" in faults


def test_files_that_name_different_things(run):
    change_json(run / "results.json", lambda results: results.update(pattern="1:4", method={"name": "ria"}))
    change_json(run / "model" / "config.json", lambda config: config.pop("nmprune"))
    faults = " ".join(verify_run(run).faults)
    assert (
        "the method is not the same everywhere: recipe.yaml wanda, results.json ria, masks.safetensors wanda" in faults
    )
    assert "the pattern is not the same everywhere: recipe.yaml 2:4, results.json 1:4, masks.safetensors 2:4" in faults
    assert "model/config.json holds the mask checksum (none)" in faults


def test_masks_that_name_another_dense_model(run):
    change_json(run / "results.json", lambda results: results.update(model_fingerprint="0" * 64))
    assert "results.json names the dense model 000000000000" in " ".join(verify_run(run).faults)


def test_a_moved_base_can_be_named_and_a_wrong_one_is_refused(made, run, tmp_path):
    moved = shutil.copytree(made[0], tmp_path / "moved")
    assert verify_run(run, str(moved)).base == str(moved)
    other = tiny_runs.model(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match=r"is not the model that was pruned.*--base MODEL"):
        verify_run(run, str(other))


def test_a_run_that_is_not_there_or_not_finished(run, tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        verify_run(tmp_path)
    (run / "results.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        verify_run(run)


def test_excluded_linears_and_experts(tmp_path):
    base = tiny_runs.model(tmp_path / "moe", "gpt_oss")
    run = tiny_runs.finished(base, tmp_path / "run", exclude=("*.experts.down_proj.2", "*.q_proj"))
    assert verify_run(run).ok
