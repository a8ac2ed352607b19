from __future__ import annotations

import os
import stat
from dataclasses import asdict

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import nmprune
import tiny_models
from nmprune.errors import InputError
from nmprune.methods import SparseGPT, Wanda
from nmprune.pattern import Pattern
from nmprune.refine import Polish, Reconstruct
from nmprune.run.machine import Machine
from nmprune.run.progress import Progress
from runs import looks_whole, output, prune


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_folder_is_pruned_into_a_run(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "base")
    result = prune(str(folder), tmp_path / "run")
    assert result.out == tmp_path / "run" and result.masks == {}
    assert result.results is not None and result.linears == result.results.linears
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_a_folder_needs_a_place_for_the_result(tmp_path):
    with pytest.raises(InputError, match=r"out is missing: .* such as out='runs/x'"):
        prune(tiny_models.save("llama", tmp_path), None)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_model_in_memory_is_pruned_in_place(method):
    model = tiny_models.build("llama")
    before = weights(model)
    result = prune(model, None, method)
    assert len(result.masks) == 14 and result.results is None and result.out is None
    after = weights(model)
    for name, dense in before.items():
        mask = result.masks.get(name.removesuffix(".weight"))
        assert torch.equal(after[name], dense if mask is None else torch.where(mask, dense, 0.0))


def test_a_method_may_move_weights():
    model = tiny_models.build("llama")
    before = weights(model)
    result = prune(model, None, SparseGPT(damping=0.1))
    assert all(one.notes["damping"] == 0.1 for one in result.linears)
    for name, mask in result.masks.items():
        after = model.get_parameter(f"{name}.weight")
        assert torch.equal(after == 0, ~mask)
        assert not torch.equal(after[mask], before[f"{name}.weight"][mask])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_memory_with_a_run_folder_ends_in_the_same_weights(name, tmp_path):
    plain, with_out = tiny_models.build(name), tiny_models.build(name)
    prune(plain, None, "sparsegpt")
    result = prune(with_out, tmp_path / "run", "sparsegpt")
    assert result.results is not None and (tmp_path / "run/base/config.json").is_file()
    for key, value in weights(plain).items():
        assert torch.equal(weights(with_out)[key], value), key
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert torch.equal(saved(tiny_models.windows(1)).logits, with_out(tiny_models.windows(1)).logits)


def test_memory_with_a_run_folder_can_be_repeated_with_the_same_model_only(tmp_path):
    prune(tiny_models.build("llama"), tmp_path / "run")
    before = output(tmp_path / "run")
    model = tiny_models.build("llama")
    prune(model, tmp_path / "run")
    assert output(tmp_path / "run") == before
    for other in (tiny_models.build("llama", seed=5), model):
        with pytest.raises(InputError, match=r"holds other weights than this model .* or this one is pruned already"):
            prune(other, tmp_path / "run")


def test_a_foreign_folder_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is not a run of nmprune"):
        prune(tiny_models.build("llama"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is not a run of nmprune"):
        prune(tiny_models.build("llama"), tmp_path / "thesis.tex")


def test_a_killed_saving_of_the_base_is_done_again(tmp_path):
    (tmp_path / "run/base.partial").mkdir(parents=True)
    (tmp_path / "run/base.partial/model-00001-of-00002.safetensors").write_text("half")
    prune(tiny_models.build("llama"), tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run/base").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_and_gradients_come_back(training):
    model = tiny_models.build("mixtral").train(training)
    experts = model.config._experts_implementation
    prune(model, None)
    assert model.training is training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled() and model.config._experts_implementation == experts


def test_an_interrupted_model_in_memory_is_given_back_in_order():
    model = tiny_models.build("mixtral").train()
    experts = model.config._experts_implementation

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, None, report=stop)
    assert model.training and model.config._experts_implementation == experts
    assert "forward" not in model.model.layers[0].__dict__


def test_excluded_linears_stay_dense():
    model = tiny_models.build("llama")
    dense = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    for exclude in ("*.down_proj", ["*.down_proj"]):
        result = prune(tiny_models.build("llama"), None, exclude=exclude)
        assert len(result.masks) == 12
    prune(model, None, exclude="*.down_proj")
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, dense)


def test_pattern_and_method_may_be_objects():
    result = prune(tiny_models.build("llama"), None, Wanda(), pattern=Pattern(1, 4))
    assert {one.density for one in result.linears} == {0.25}


def test_progress_is_told_in_memory_too():
    told: list[Progress] = []
    prune(tiny_models.build("llama"), None, report=told.append)
    assert [one.text.split(":")[0] for one in told if one.text] == [
        "decoder layer 1/2",
        "decoder layer 2/2",
        "finished",
    ]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_text_with_a_tokenizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    kwargs = {"calibration": text, "tokenizer": byte_tokenizer(), "n_sequences": 4, "seq_len": 16}
    in_memory = prune(tiny_models.build("llama", vocab_size=256), None, **kwargs)
    assert {one.n_tokens for one in in_memory.linears} == {64}
    with_out = prune(tiny_models.build("llama", vocab_size=256), tmp_path / "run", **kwargs)
    assert with_out.results.calibration["source"] == "text.txt"
    assert (tmp_path / "run/base/tokenizer.json").is_file() and (tmp_path / "run/model/tokenizer.json").is_file()


@pytest.mark.parametrize("with_out", [False, True])
def test_text_without_a_tokenizer(with_out, tmp_path):
    out = tmp_path / "run" if with_out else None
    with pytest.raises(InputError, match=r"tokenizer is missing: .* Pass tokenizer=, or token ids as calibration"):
        prune(tiny_models.build("llama"), out, calibration="builtin")
    assert not (tmp_path / "run").exists()
    assert prune(tiny_models.build("llama"), None, "magnitude", calibration="builtin").masks


@pytest.mark.parametrize("where", ["memory", "memory with out", "folder"])
@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"calibration": torch.full((2, 8), 96)}, r"token id 96 is not in the vocabulary \(0 to 95\)"),
        ({"calibration": torch.full((2, 8), -1)}, "token id -1 is not in the vocabulary"),
        ({"calibration": torch.ones(2, 8)}, r"token ids are torch.float32; expected integers"),
        (
            {"calibration": torch.ones(8, dtype=torch.long)},
            r"shape \(8,\); expected \(n_sequences, seq_len\).*ids\[None\]",
        ),
        ({"calibration": torch.ones(2, 65, dtype=torch.long)}, "seq_len 65 is more than the model's 64 positions"),
        ({"method": "wnada"}, "there is no method 'wnada'. Did you mean 'wanda'"),
        ({"pattern": "4:2"}, "pattern 4:2 is not possible"),
        ({"pattern": "8:16:2"}, "not of the form N:M"),
        ({"exclude": "*.nothing"}, r"exclude '\*\.nothing' matches no linear"),
        ({"stream": {"propagate": "sideways"}}, "stream.propagate is 'sideways'"),
        ({"stream": {"batchsize": 3}}, "unknown key stream.batchsize. Did you mean 'batch_size'"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
    ],
)
def test_bad_arguments_are_input_errors_and_change_nothing(where, kwargs, expected, tmp_path):
    model = tiny_models.build("llama")
    before = weights(model)
    given = tiny_models.save("llama", tmp_path / "base") if where == "folder" else model
    out = None if where == "memory" else tmp_path / "run"
    with pytest.raises(InputError, match=expected):
        prune(given, out, **kwargs)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert not looks_whole(tmp_path / "run")


def test_what_a_model_in_memory_cannot_have():
    for kwargs, expected in (
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; a model in memory keeps its own"),
        ({"machine": Machine(device="mps")}, "device"),
    ):
        with pytest.raises(InputError, match=expected):
            prune(tiny_models.build("llama"), None, **kwargs)


def test_a_pruned_model_in_memory_is_not_pruned_again():
    model = tiny_models.build("llama")
    prune(model, None)
    with pytest.raises(InputError, match="the model is sparse already: 7 of 7 linears"):
        prune(model, None)
    prune(model, None, allow_sparse=True)


def test_the_public_names_are_there():
    assert nmprune.prune is prune.__globals__["nmprune"].prune
    assert all(hasattr(nmprune, name) for name in nmprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        nmprune.prun  # noqa: B018


@pytest.mark.parametrize("kwargs", [{"exclude": "*.nothing"}, {"calibration": torch.full((2, 8), 96)}])
def test_a_failed_prune_in_memory_gives_training_mode_back(kwargs):
    model = tiny_models.build("llama").train()
    with pytest.raises(InputError):
        prune(model, None, **kwargs)
    assert model.training and model.model.layers[0].mlp.training


def test_the_saved_base_has_files_of_ordinary_mode(tmp_path):
    before = os.umask(0o027)
    try:
        prune(tiny_models.build("llama"), tmp_path / "run")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "run/base").iterdir()} == {0o640}


def test_steps_after_the_method_in_memory_and_in_a_folder(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "base")
    steps = {"polish": Polish(sweeps=2), "reconstruct": True}
    streamed = prune(folder, tmp_path / "run", **steps)
    assert streamed.results.method == {
        "name": "wanda+polish+reconstruct",
        "polish": asdict(Polish(sweeps=2)),
        "reconstruct": asdict(Reconstruct()),
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    in_memory = prune(model, None, **steps)
    assert [one.notes for one in in_memory.linears] == [one.notes for one in streamed.linears]
    assert all(one.held_out_error is not None for one in in_memory.linears)
    finished = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run/model"))
    assert all(torch.equal(value, finished[name]) for name, value in weights(model).items())
    dense = weights(AutoModelForCausalLM.from_pretrained(folder))
    name = "model.layers.0.self_attn.q_proj"
    mask = in_memory.masks[name]
    assert (finished[f"{name}.weight"][mask] != dense[f"{name}.weight"][mask]).any()


def test_false_and_nothing_are_no_step():
    for none in ({}, {"polish": False, "reconstruct": False}):
        result = prune(tiny_models.build("llama"), None, **none)
        assert all(one.held_out_error is None and not one.notes for one in result.linears)


def test_how_many_windows_are_held_out_can_be_said():
    def notes(**kwargs):
        done = prune(tiny_models.build("llama"), None, reconstruct=Reconstruct(ridge=0.1), **kwargs)
        return [one.notes for one in done.linears]

    assert notes() == notes(n_held_out=1) != notes(n_held_out=3)
    with pytest.raises(InputError, match=r"holds 6 of calibration\.n_sequences 6 out: nothing is left to solve on"):
        notes(n_held_out=6)
    with pytest.raises(InputError, match=r"calibration\.n_held_out is -1; expected at least 0"):
        notes(n_held_out=-1)
