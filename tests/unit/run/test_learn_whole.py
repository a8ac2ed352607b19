"""Whole-model methods in runs: prior, learning, outputs, resume, models in memory."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nmprune
import runs
import tiny_models
from nmprune import masks
from nmprune.checkpoint import read_masks
from nmprune.errors import InputError
from nmprune.methods.global_descent import GlobalDescent
from nmprune.methods.maskllm import MaskLLM
from nmprune.results import Results
from nmprune.run import CalibrationRecipe, Machine, Recipe, RunFolder
from nmprune.run.learning_files import LearningFiles, metrics_of
from nmprune.run.plan import plan
from nmprune.run.progress import Progress
from nmprune.run.verify import verify_run
from nmprune.train.settings import TrainRecipe

# Large steps: a few of them change masks of a random model.
QUICK = MaskLLM(gate_std=0.0, prior_strength=1.0, kappa_first=3.0, kappa_last=6.0, lr=0.3, lr_last=0.1, sparse_reg=1e-3)
TRAIN = {"steps": 4, "eval_every": 2, "guard": False}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("llama_tied", tmp_path / "dense")


def learn(model: Any, out: Path | None, method: Any = QUICK, **kwargs: Any) -> nmprune.PruneResult:
    return runs.prune(model, out, method, **{"train": TRAIN, **kwargs})


def test_a_run_learns_and_leaves_what_every_run_leaves(model: Path, tmp_path: Path) -> None:
    said: list[Progress] = []
    result = learn(model, tmp_path / "run", report=said.append)
    folder = RunFolder(tmp_path / "run")
    assert verify_run(folder.path).ok
    assert not folder.progress.exists()
    learning = folder.read_results().learning
    assert learning is not None and learning == Results.read(folder.results_file).learning
    assert (learning.steps, learning.n_tokens, learning.held_out_tokens, learning.loss) == (4, 64, 16, "lm")
    assert learning.epochs == pytest.approx(4 / 5) and learning.held_out_loss == learning.best_loss
    assert "learn" in result.results.seconds and "solve" in result.results.seconds  # the prior's phases, too
    assert [int(line["step"]) for line in metrics_of(folder.path)] == [0, 1, 2, 3, 4]
    assert {one.notes["prior"] for one in result.linears} == {"wanda"}
    flips = sum(one.notes["flips"] * one.shape[0] * one.shape[1] for one in result.linears)
    assert flips / result.results.weights_in_linears == pytest.approx(learning.best_flips, abs=1e-6) and flips > 0
    texts = " ".join(one.text for one in said)
    assert "prior masks by wanda" in texts and "learning from 64 tokens, judged by 16 held-out ones" in texts
    assert "step 4/4: held-out loss" in texts
    assert folder.read_recipe().train == TrainRecipe(**TRAIN) and folder.read_recipe().method == QUICK
    kept = tmp_path / "again"
    assert runs.output(learn(model, kept).out or kept) == runs.output(folder.path)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("how", ["ctrl-c", "crash"])
def test_a_run_goes_on_to_the_same_masks(how: str, model: Path, tmp_path: Path) -> None:
    whole = learn(model, tmp_path / "whole")

    def stop(sign: Progress) -> None:
        if sign.stage == "learn" and sign.done == 2 and "interrupted" not in sign.text:
            if how == "crash":
                raise _Stop
            os.kill(os.getpid(), signal.SIGINT)

    minutes = 0.0 if how == "crash" else 60.0  # Ctrl-C keeps a checkpoint by itself
    with pytest.raises(_Stop if how == "crash" else KeyboardInterrupt):
        learn(model, tmp_path / "run", report=stop, machine=Machine(checkpoint_minutes=minutes))
    assert not runs.looks_whole(tmp_path / "run")
    assert (tmp_path / "run/progress/learning.safetensors").is_file()
    said: list[str] = []
    again = learn(model, tmp_path / "run", report=lambda sign: said.append(sign.text))
    assert any(text.startswith("resuming: learning goes on after step") for text in said)
    assert not any("linears" in text for text in said), "the prior was made again"
    assert runs.output(tmp_path / "run") == runs.output(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert again.results.learning == whole.results.learning and again.results.sessions == 2


def test_a_prior_from_a_file_is_where_it_starts(model: Path, tmp_path: Path) -> None:
    first = runs.prune(model, tmp_path / "first", "ria")
    still = dataclasses.replace(QUICK, prior=str(tmp_path / "first"), lr=0.0, lr_last=0.0, weight_decay=0.0)
    learn(model, tmp_path / "run", still)
    theirs, ours = (read_masks(tmp_path / name / "masks.safetensors") for name in ("first", "run"))
    assert all(torch.equal(theirs.mask(name), ours.mask(name)) for name in theirs.masks)
    assert first.linears[0].notes == {}


def test_priors_that_do_not_fit_say_why(model: Path, tmp_path: Path) -> None:
    runs.prune(model, tmp_path / "first", "magnitude", exclude="*.up_proj")
    for method, pattern, text in (
        (dataclasses.replace(QUICK, prior=str(tmp_path / "first")), "2:4", r"has no mask for .*up_proj.*Exclude"),
        (dataclasses.replace(QUICK, prior=str(tmp_path / "first")), "1:4", r"is 2:4, and 1:4 is wanted here"),
        (dataclasses.replace(QUICK, prior="wnada"), "2:4", r"maskllm\.prior is 'wnada'.*Did you mean 'wanda'"),
        (dataclasses.replace(QUICK, prior="none"), "2:4", r"starts from prior masks, and method\.prior is none"),
    ):
        with pytest.raises(InputError, match=text):
            learn(model, tmp_path / "run", method, pattern=pattern, exclude=())
        assert not (tmp_path / "run").exists()
    other = tiny_models.save("llama_tied", tmp_path / "other", seed=5)
    runs.prune(other, tmp_path / "of_other", "magnitude")
    with pytest.raises(InputError, match=r"belongs to other weights"):
        learn(model, tmp_path / "run", dataclasses.replace(QUICK, prior=str(tmp_path / "of_other")))


def test_a_model_in_memory_keeps_its_weights_but_for_the_masks() -> None:
    model = tiny_models.build("mixtral")
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    result = learn(model, None)
    assert result.masks and result.results is None
    for one in result.linears:
        assert masks.n_wrong_groups(result.masks[one.name], nmprune.Pattern(2, 4)) == 0
    changed = zeros = 0
    for key, value in model.state_dict().items():
        same = value == dense[key]
        assert ((value == 0) | same).all(), key
        changed += int((~same).sum())
        zeros += int((value == 0).sum())
    assert changed == zeros == sum(int((~mask).sum()) for mask in result.masks.values())


def test_the_same_masks_in_memory_and_from_a_folder(model: Path, tmp_path: Path) -> None:
    learn(model, tmp_path / "run")
    in_memory = learn(tiny_models.build("llama_tied"), None)
    stored = read_masks(tmp_path / "run/masks.safetensors")
    assert all(torch.equal(stored.mask(f"{name}.weight"), mask) for name, mask in in_memory.masks.items())


def test_mixed_patterns_and_reordered_channels(model: Path, tmp_path: Path) -> None:
    learn(model, tmp_path / "run", allocate={"patterns": ["1:4", "2:4", "3:4"]}, permute="ffn")
    assert verify_run(tmp_path / "run").ok
    assert len(read_masks(tmp_path / "run/masks.safetensors").patterns()) > 1


def test_held_out_sequences_are_not_learned_from(model: Path, tmp_path: Path) -> None:
    windows = tiny_models.windows()
    other = windows.clone()
    other[-1] = windows[0].flip(0)
    found = [learn(model, tmp_path / f"{i}", calibration=one) for i, one in enumerate((windows, other))]
    losses = [[line["loss"] for line in metrics_of(tmp_path / f"{i}")[1:]] for i in range(2)]
    assert losses[0] == losses[1]
    assert found[0].results.learning.prior_loss != found[1].results.learning.prior_loss


def recipe(**kwargs: Any) -> Recipe:
    return Recipe.from_dict({"model": "m", "method": "maskllm", **kwargs})


def test_the_train_section() -> None:
    assert recipe().train == TrainRecipe()
    assert recipe(method={"name": "maskllm", "preset": "best"}).train.loss == "kl"
    assert recipe(
        method={"name": "maskllm", "preset": "best"}, train={"loss": "lm", "steps": "7"}
    ).train == TrainRecipe(steps=7)
    written = recipe(method={"name": "maskllm", "preset": "best"}).to_dict()
    assert written["method"]["form"] == "slot" and "preset" not in written["method"]
    assert Recipe.from_dict(written) == recipe(method={"name": "maskllm", "preset": "best"})
    assert "train" not in Recipe.from_dict({"model": "m", "method": "wanda"}).to_dict()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"train": {"stesp": 1}}, r"unknown key train\.stesp\. Did you mean 'steps'"),
        ({"train": {"steps": 0}}, r"train\.steps is 0; expected at least 1"),
        ({"train": {"loss": "mse"}}, r"train\.loss is 'mse'. *Known: kl, lm"),
        ({"train": 3}, r"train is 3; expected keys under it: steps"),
        ({"method": "wanda", "train": {"steps": 3}}, r"train is read by methods that learn the whole model, and wanda"),
        ({"polish": "true"}, r"polish works on one linear at a time and cannot follow maskllm"),
        ({"loss_aware": "true"}, r"loss_aware weights tokens in the statistics of inputs, and maskllm reads none"),
        ({"calibration": {"n_sequences": 1}}, r"maskllm judges masks on 1 of calibration\.n_sequences 1"),
        ({"method": {"name": "maskllm", "preset": "bset"}}, r"maskllm has no preset 'bset'\. Did you mean 'best'"),
        (
            {"method": {"name": "maskllm", "prior": "runs/a"}, "permute": "ffn"},
            r"prior runs/a is a mask file, and permute",
        ),
    ],
)
def test_faults_of_a_recipe(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        recipe(**given)


def test_a_plan_says_memory_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmprune.run.rehearsal.layer_peak", lambda *args: None)  # a process of its own: slow
    model = tiny_models.save("llama", tmp_path / "dense")
    given = {
        "calibration": CalibrationRecipe("builtin", 8, 16),
        "train": TrainRecipe(steps=10, batch_size=2, loss="kl"),
    }
    found = plan(Recipe(str(model), MaskLLM(), nmprune.Pattern(2, 4), **given), out=tmp_path)
    assert found.method == "maskllm"
    parts = found.memory["learning"]
    n_weights = sum(one.weights for one in found.linears)
    assert parts["learned state, gradients, moments"] == 16 * n_weights // 4 * 6
    assert parts["model"] == 4 * found.parameters
    assert found.seconds is not None and 0 < found.seconds["learn"] < 60
    assert any("10 steps, 320 tokens, loss kl" in note for note in found.notes)
    device = plan(Recipe(str(model), MaskLLM(), nmprune.Pattern(2, 4), **given), device_memory=1 << 30)
    assert device.seconds is None and "libraries" not in device.memory["learning"]
    saved = dataclasses.replace(given["train"], activation_checkpointing=True, shard=True)
    recomputing = plan(
        Recipe(str(model), MaskLLM(), nmprune.Pattern(2, 4), **{**given, "train": saved}), timed=False, out=tmp_path
    )
    key = "masked weights and activations"
    assert recomputing.memory["learning"][key] < parts[key]
    assert any("counted as in one process that holds all: train.shard spreads it" in note for note in recomputing.notes)


def test_a_plan_of_descent_counts_gram_matrices_and_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmprune.run.rehearsal.layer_peak", lambda *args: None)
    model = tiny_models.save("llama", tmp_path / "dense")
    found = {}
    for steps in (4, 40):
        train = TrainRecipe(steps=steps, accumulation=4, loss="kl")
        given = {"calibration": CalibrationRecipe("builtin", 8, 16), "train": train}
        found[steps] = plan(Recipe(str(model), GlobalDescent(), nmprune.Pattern(2, 4), **given), out=tmp_path)
    parts = found[4].memory["learning"]
    n_weights = sum(one.weights for one in found[4].linears)
    assert parts["learned state, gradients, moments"] == 12 * n_weights
    inputs = (32, 32, 32, 64)  # of q, k, v; o; gate and up; down
    assert parts["Gram matrices of the inputs"] == 2 * 8 * sum(width**2 for width in inputs)
    times = [one.seconds["learn"] for one in found.values() if one.seconds is not None]
    assert 0 < 2 * times[0] < times[1]


def test_metrics_after_a_checkpoint_and_a_cut_off_line_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.progress.mkdir()
    files = LearningFiles(folder)
    step: Any = nmprune.run.learning_files.LearnStep

    def snapshot() -> dict[str, Tensor]:
        return {"step": torch.tensor(1)}

    for number in range(4):
        sign = step(number, 5, {"loss": 1.0}, snapshot)
        files.note(sign)
        if number == 1:
            files.save(sign)
    with files.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    again = LearningFiles(folder).resume()
    assert again is not None and int(again["step"]) == 1
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1]
