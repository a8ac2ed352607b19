"""Whole runs on a CUDA device: every method and step, resume, finetuning; beside the CPU's where rounding allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import learners
import nmprune
import tiny_models
import tiny_runs
from nmprune.checkpoint import read_masks
from nmprune.methods import create
from nmprune.methods.global_descent import GlobalDescent
from nmprune.methods.maskpro import MaskPro
from nmprune.methods.proxsparse import ProxSparse
from nmprune.run import Machine
from nmprune.run.finetune import finetune_run
from nmprune.run.learning_files import metrics_of
from nmprune.run.verify import verify_run
from nmprune.train.finetune_settings import FinetuneRecipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device is seen; where there is one: make test-gpu"
    ),
]

ONE_SHOT = ("magnitude", "wanda", "ria", "gblm", "pruner_zero", "dsnot", "descent", "sparsegpt", "alps")
STEPS: dict[str, dict[str, Any]] = {
    "polish": {"method": "wanda", "polish": True},
    "reconstruct": {"method": "descent", "reconstruct": True},
    "permute": {"method": "wanda", "permute": "ffn"},
    "loss_aware": {"method": "sparsegpt", "loss_aware": True},
    "allocate": {"method": "wanda", "allocate": {"patterns": ["1:4", "2:4", "3:4"]}},
}
WHOLE = {
    "maskllm": learners.QUICK,
    "proxsparse": ProxSparse(lr=2e-3, anchor=0.25),
    "maskpro": MaskPro(flip_share=0.2, lr=20.0),
    "global_descent": GlobalDescent(prior="wanda", damping=100.0),
}
HYPERPRUNE = {"steps": 6, "check_every": 3, "prior": "wanda"}


def run(model: Any, out: Path, device: str = "cuda", **settings: Any) -> Path:
    """A run on six windows of random tokens."""
    nmprune.prune(model, calibration=tiny_models.windows(), out=out, machine=Machine(device), **settings)
    return out


def wrong_share(one: Path, other: Path) -> float:
    """Share of groups in which two runs' masks differ."""
    a, b = (read_masks(place / "masks.safetensors") for place in (one, other))
    assert a.masks.keys() == b.masks.keys() != set()
    differ = [(a.mask(n) != b.mask(n)).unflatten(-1, (-1, 4)).any(-1).flatten() for n in a.masks]
    return torch.cat(differ).float().mean().item()


def losses(place: Path, key: str = "loss") -> list[float]:
    """What was measured at each step."""
    return [line[key] for line in metrics_of(place) if key in line]


@pytest.mark.parametrize("method", ONE_SHOT)
def test_every_one_shot_method_equals_the_cpu(method, tmp_path):
    model = tiny_models.save("qwen3", tmp_path / "base")
    here, there = (run(model, tmp_path / device, device, method=method) for device in ("cuda", "cpu"))
    assert wrong_share(here, there) <= 0.01
    assert verify_run(here).ok


@pytest.mark.parametrize("step", STEPS)
def test_every_step_beside_a_method(step, tmp_path):
    model = tiny_models.save("llama", tmp_path / "base")
    here, there = (run(model, tmp_path / device, device, **STEPS[step]) for device in ("cuda", "cpu"))
    assert wrong_share(here, there) <= 0.02
    assert verify_run(here).ok


@pytest.mark.parametrize("preset", [{}, {"network": False}, {"preset": "paper"}], ids=["default", "free", "paper"])
def test_hyperprune_learns_what_the_cpu_learns(preset, tmp_path):
    model = tiny_models.save("llama", tmp_path / "base")
    settings = {key: value for key, value in HYPERPRUNE.items() if not (key == "prior" and "preset" in preset)}
    method = {"name": "hyperprune", **settings, **preset}
    here, there = (run(model, tmp_path / device, device, method=method) for device in ("cuda", "cpu"))
    ours, theirs = losses(here), losses(there)
    assert len(ours) == 2 * HYPERPRUNE["steps"] and ours[:3] == pytest.approx(theirs[:3], rel=1e-3)
    assert wrong_share(here, there) <= 0.05
    assert verify_run(here).ok


def test_a_learner_of_layers_goes_on_after_a_stop(tmp_path):
    model = tiny_models.save("llama", tmp_path / "base")
    method = {"name": "hyperprune", **HYPERPRUNE}
    whole, again = run(model, tmp_path / "whole", method=method), tmp_path / "again"

    class Stop(Exception):
        """The run ends here."""

    def stop(event: Any) -> None:
        if (again / "metrics.jsonl").is_file() and len(losses(again)) >= 4:
            raise Stop

    with pytest.raises(Stop):
        run(model, again, method=method, report=stop)
    assert not (again / "results.json").exists()
    assert wrong_share(run(model, again, method=method), whole) == 0


@pytest.mark.parametrize("name", WHOLE)
def test_learners_of_the_whole_model_on_cuda(name, tmp_path):
    model = tiny_models.save("llama", tmp_path / "base")
    train = {"steps": 6, "batch_size": 2, "eval_every": 2, "guard": False, "autocast": False}
    here, there = (
        run(model, tmp_path / device, device, method=WHOLE[name], train=train, n_held_out=2)
        for device in ("cuda", "cpu")
    )
    key = "held_out_prior_loss"
    assert losses(here, key) == pytest.approx(losses(there, key), rel=1e-4) and len(losses(here)) == 6
    if name == "proxsparse":  # the others draw their noise where the model lives: other numbers
        assert losses(here) == pytest.approx(losses(there), rel=1e-3) and wrong_share(here, there) <= 0.05
    assert verify_run(here).ok


@pytest.mark.parametrize("method", ["sparsegpt", "hyperprune", "maskllm"])
def test_a_model_in_memory_on_cuda_is_pruned_there(method):
    model = tiny_models.build("llama").cuda()
    settings: dict[str, Any] = {"method": method}
    if method == "hyperprune":
        settings = {"method": {"name": method, **HYPERPRUNE}}
    elif method in WHOLE:
        settings = {"method": WHOLE[method], "train": {"steps": 3, "batch_size": 2, "eval_every": 1}}
    found = nmprune.prune(model, calibration=tiny_models.windows(), **settings)
    parameters = dict(model.named_parameters())
    assert len(found.masks) == 14
    for name, mask in found.masks.items():
        pruned = parameters[f"{name}.weight"]
        assert pruned.device.type == "cuda" and not pruned[~mask.to(pruned.device)].any()


@pytest.mark.parametrize("name", WHOLE)
def test_learning_goes_on_from_a_snapshot_on_cuda(name):
    settings = {"method": WHOLE[name], "autocast": True, "activation_checkpointing": True, "loss": "kl"}
    _, straight = learners.run(tiny_models.build("llama").cuda(), **settings)
    _, kept = learners.run(tiny_models.build("llama").cuda(), stop_after=3, **settings)
    _, resumed = learners.run(tiny_models.build("llama").cuda(), snapshot=kept, **settings)
    assert straight.bits.keys() == resumed.bits.keys() != set()
    assert all(torch.equal(straight.bits[key].cpu(), resumed.bits[key].cpu()) for key in straight.bits)


@pytest.mark.parametrize("low_rank", [0, 2])
def test_masks_hold_through_finetuning(low_rank, tmp_path):
    base = tiny_runs.model(tmp_path / "llama")
    parent = tiny_runs.finished(base, tmp_path / "run")
    settings = FinetuneRecipe(
        seq_len=16, max_tokens=1600, n_held_out=4, minutes=0, steps=4, evaluations=2, autocast="yes", lora=low_rank
    )
    results = finetune_run(parent, settings, tmp_path / "tuned", Machine("cuda"), report=lambda _: None)
    assert results.finetune is not None and results.finetune.steps == 4
    assert verify_run(tmp_path / "tuned").ok
    before, after = (load_file(next((place / "model").glob("*.safetensors"))) for place in (parent, tmp_path / "tuned"))
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_what_a_run_says_of_the_device(tmp_path):
    place = run(tiny_models.save("llama", tmp_path / "base"), tmp_path / "run", method="sparsegpt")
    results = json.loads((place / "results.json").read_text())
    assert results["machine"]["device"] == torch.cuda.get_device_name() and results["device_peak_memory"] > 0


def test_input_statistics_and_solvers_take_tensors_on_cuda():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(32, 64, generator=generator), torch.randn(256, 64, generator=generator)
    found: list[Tensor] = []
    for device in ("cpu", "cuda"):
        method = create("sparsegpt")
        statistics = nmprune.StatsAccumulator(64, method.needs, device)
        statistics.add(inputs.to(device))
        pruned = method.prune(weight.to(device), statistics.result(), learners.PATTERN)
        assert pruned.mask.device.type == device
        found.append(pruned.mask.cpu())
    assert (found[0] != found[1]).float().mean() < 0.01
