from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.prepare.gradients import LayerGradients
from nmprune.run import folder
from nmprune.run.gradients import GradientFiles, collect_gradients
from nmprune.run.machine import Machine
from nmprune.run.progress import Progress
from nmprune.stats import GRADIENTS, InputStats
from nmprune.stream import DecoderModel, select
from runs import output, prune


@pytest.fixture
def base(tmp_path):
    return tiny_models.save("llama", tmp_path / "base", num_hidden_layers=3)


def layer(index: int, seed: int = 0) -> LayerGradients:
    generator = torch.Generator().manual_seed(seed)
    stats = {
        "a": InputStats(5, weight_grad_abs=torch.rand(2, 4, generator=generator), n_grad_sequences=2),
        "b": InputStats(
            0,
            weight_grad_abs=torch.rand(3, 4, generator=generator),
            weight_grad_sq=torch.rand(3, 4, generator=generator),
            n_grad_sequences=2,
        ),
    }
    return LayerGradients(index, stats, torch.rand(2, 8, 4, generator=generator), seconds=1.5)


def test_what_is_kept_is_read_back(tmp_path):
    files, saved = GradientFiles(tmp_path / "gradients"), layer(7)
    assert not files.has(7) and files.seconds() == 0
    files.save(saved)
    assert files.has(7) and [file.name for file in files.path.iterdir()] == ["layer_00007.safetensors"]
    for name, expected in saved.stats.items():
        found = files.of_linear(7, name)
        assert (found.n_tokens, found.n_grad_sequences) == (expected.n_tokens, 2)
        for key in GRADIENTS:
            one, other = getattr(found, key), getattr(expected, key)
            assert (one is None and other is None) or torch.equal(one, other)
    files.save(layer(6))
    assert files.seconds() == 3.0


def test_the_gradient_to_go_on_from_is_kept_once_in_a_while(tmp_path, monkeypatch):
    files = GradientFiles(tmp_path / "gradients")
    files.save(layer(7))
    assert files.restart([5]) is None
    monkeypatch.setattr(folder, "HIDDEN_INTERVAL_SECONDS", 0.0)
    files.save(layer(6, seed=1))
    index, gradient = files.restart([1, 5])
    assert index == 6 and torch.equal(gradient, layer(6, seed=1).input_gradient)
    assert files.restart([1, 6]) is None, "a file after it was lost"


def test_a_damaged_file_is_named(tmp_path):
    files = GradientFiles(tmp_path / "gradients")
    files.save(layer(7))
    files.file(7).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"layer_00007.safetensors is damaged"):
        files.of_linear(7, "a")


def test_nothing_is_done_where_nothing_is_needed(base, tmp_path):
    model = DecoderModel.open(base)
    files = GradientFiles(tmp_path / "gradients")
    signs: list[Progress] = []
    selections = select(model, Pattern(2, 4))
    windows = tiny_models.windows(2)
    collect_gradients(files, model, windows, selections, frozenset({"input_gram"}), Machine(), signs.append)
    assert signs == [] and not files.path.exists()
    collect_gradients(files, model, windows, selections, frozenset({"weight_grad_sq"}), Machine(), signs.append)
    counted = [(one.done, one.total) for one in signs if not one.text]
    assert counted[-1] == (2 * (3 + 1 + 9), 2 * (3 + 1 + 9)) and counted == sorted(counted)
    assert {one.stage for one in signs} == {"gradients"}
    texts = [one.text for one in signs if one.text]
    assert texts[0] == "gradients of 2 sequences through 3 decoder layers, last to first"
    assert [text.partition(":")[0] for text in texts[1:]] == [f"gradients of decoder layer {n}" for n in (3, 2, 1)]
    signs.clear()
    collect_gradients(files, model, windows, selections, frozenset({"weight_grad_sq"}), Machine(), signs.append)
    assert signs == []
    files.file(0).unlink()
    collect_gradients(files, model, windows, selections, frozenset({"weight_grad_sq"}), Machine(), signs.append)
    assert signs[0].text == "resuming: gradients of 2 of 3 decoder layers are there"
    assert files.has(0)


@pytest.mark.parametrize("method", ["pruner_zero", "gblm"])
def test_a_run_counts_the_phase_and_leaves_nothing_behind(method, base, tmp_path):
    out = tmp_path / "run"
    signs: list[Progress] = []
    results = prune(base, out, method, report=signs.append).results
    assert results.seconds["gradients"] > 0
    assert ("forward" in results.seconds) == (method == "gblm")
    assert not (out / "progress").exists()
    assert results.calibration["n_sequences"] == 6
    stages = list(dict.fromkeys(one.stage for one in signs))
    assert stages.index("gradients") < stages.index("layers")


@pytest.mark.parametrize("method", ["pruner_zero", "gblm"])
def test_a_model_in_memory_is_pruned_alike(method, base, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    model = AutoModelForCausalLM.from_pretrained(base)
    prune(model, None, method, machine=Machine(scratch=scratch))
    prune(base, tmp_path / "run", method)
    finished = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for name, value in finished.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert list(scratch.iterdir()) == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hidden_states_in_files_change_no_mask(base, tmp_path):
    prune(base, tmp_path / "a", "pruner_zero")
    prune(base, tmp_path / "b", "pruner_zero", machine=Machine(hidden_budget=0, scratch=tmp_path))
    assert output(tmp_path / "a") == output(tmp_path / "b")
