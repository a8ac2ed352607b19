from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_models
import tiny_runs
from nmprune.calibration import consecutive_windows, load_text
from nmprune.errors import InputError
from nmprune.evaluate.perplexity import perplexity
from nmprune.run.evaluate import Measure, evaluate
from nmprune.run.tokens import load_tokenizer

MEASURE = Measure("builtin", seq_len=16, max_windows=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    base = tiny_runs.model(place / "base")
    return base, tiny_runs.finished(base, place / "run")


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[1], tmp_path / "run"))


def whole_model_value(folder: Path) -> float:
    windows = consecutive_windows(load_text("builtin", "evaluation"), load_tokenizer(folder), 16, 3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return math.exp(perplexity(model, windows).mean().item())


def test_dense_beside_pruned_as_the_whole_models_say(made, run):
    found = evaluate(str(run), MEASURE)
    dense, pruned = found.models
    assert (dense.what, pruned.what) == ("dense", "pruned")
    assert dense.perplexity.value == pytest.approx(whole_model_value(made[0]), rel=1e-5)
    assert pruned.perplexity.value == pytest.approx(whole_model_value(run / "model"), rel=1e-5)
    assert dense.perplexity.value != pruned.perplexity.value
    assert (found.seq_len, found.n_windows, found.split) == (16, 3, "held-out part")
    assert pruned.perplexity.standard_error is not None
    saved = json.loads(Path(found.saved).read_text())
    assert saved["models"][1]["perplexity"]["value"] == pruned.perplexity.value
    assert Path(found.saved).parent == run / "evaluations"
    assert found.saved.endswith("help-topics_held-out-part_16x3.json")


def test_a_saved_dense_number_is_taken_only_for_the_same_weights_windows_and_dtype(run):
    first = evaluate(str(run), MEASURE)
    again = evaluate(str(run), MEASURE)
    assert again.models[0].seconds is None
    assert again.models[1].seconds is not None
    assert [one.perplexity for one in again.models] == [one.perplexity for one in first.models]
    other_dtype = evaluate(str(run), Measure("builtin", 16, 3, dtype="bfloat16"))
    assert other_dtype.models[0].seconds is not None
    file = Path(other_dtype.saved)
    saved = json.loads(file.read_text())
    for key, value in (("windows_checksum", "0"), ("device", "cuda")):
        file.write_text(json.dumps({**saved, "dtype": "float32", key: value}))
        assert evaluate(str(run), MEASURE).models[0].seconds is not None, key
    saved["models"][0]["fingerprint"] = "0"
    file.write_text(json.dumps({**saved, "dtype": "float32"}))
    assert evaluate(str(run), MEASURE).models[0].seconds is not None


def test_the_dtype_is_the_one_that_was_used_and_not_auto(made, run):
    found = evaluate(str(run), MEASURE)
    assert found.dtype == json.loads(Path(found.saved).read_text())["dtype"] == "float32"
    assert evaluate(str(run), Measure("builtin", 16, 3, dtype="float32")).models[0].seconds is None
    assert evaluate(str(made[0]), Measure("builtin", 16, 3, dtype="bfloat16")).dtype == "bfloat16"


def test_what_is_not_tied_after_all_is_said(tmp_path):
    folder = tiny_runs.model(tmp_path / "base", name="llama_tied")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, file, metadata={"format": "pt"})
    seen = []
    found = evaluate(str(folder), MEASURE, report=seen.append)
    assert any(one.text.startswith("config.json ties lm_head.weight to the embedding, but") for one in seen)
    assert found.models[0].perplexity.value == pytest.approx(whole_model_value(folder), rel=1e-5)


def test_a_damaged_saved_number_is_replaced_and_said(run):
    file = Path(evaluate(str(run), MEASURE).saved)
    file.write_text("{")
    seen = []
    assert evaluate(str(run), MEASURE, report=seen.append).models[0].seconds is not None
    assert any("is damaged" in one.text for one in seen)
    assert json.loads(file.read_text())["n_windows"] == 3


def test_a_plain_model_alone_and_a_pruned_one(made, tmp_path):
    for folder in (made[0], made[1] / "model"):
        seen = []
        found = evaluate(str(folder), MEASURE, report=seen.append)
        assert {one.stage for one in seen} == {"open", "measure"}
        assert [one.what for one in found.models] == ["model"]
        assert found.saved == ""
        assert found.models[0].perplexity.value == pytest.approx(whole_model_value(folder), rel=1e-5)
    with pytest.raises(InputError, match="--base has no meaning"):
        evaluate(str(made[0]), MEASURE, base="x")


def test_without_a_text_wikitext2_where_it_is_found_else_builtin(made, tmp_path, monkeypatch):
    monkeypatch.setattr("nmprune.calibration.hub.fetch", _not_here)
    monkeypatch.delenv("NMPRUNE_DATA", raising=False)
    seen = []
    found = evaluate(str(made[0]), Measure(seq_len=16, max_windows=1), report=seen.append)
    assert found.text.endswith("help topics")
    assert any("wikitext2 is not here" in one.text for one in seen)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(" = A title = \n\n Some words of an article . \n" * 4)
    monkeypatch.setenv("NMPRUNE_DATA", str(tmp_path))
    assert evaluate(str(made[0]), Measure(seq_len=16, max_windows=1)).text == "wikitext2"


def _not_here(*args: object, **kwargs: object) -> None:
    raise InputError("not here")


def test_a_base_that_moved_or_is_another_model(made, run, tmp_path):
    moved = shutil.copytree(made[0], tmp_path / "moved")
    assert evaluate(str(run), MEASURE, base=str(moved)).models[0].model == str(moved)
    with pytest.raises(InputError, match="is not the model that was pruned"):
        evaluate(str(run), MEASURE, base=str(tiny_models.save("llama", tmp_path / "other", seed=4)))


def test_windows_longer_than_the_model_has_positions(made):
    with pytest.raises(InputError, match="seq_len 65 is more than the model's 64 positions"):
        evaluate(str(made[0]), Measure("builtin", 65, 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seq_len": 1}, "seq_len is 1; expected at least 2"),
        ({"max_windows": 0}, "max_windows is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"dtype": "float31"}, "Did you mean 'float32'"),
    ],
)
def test_numbers_that_make_no_sense(wrong, words):
    with pytest.raises(InputError, match=words):
        Measure(**wrong)
