"""Finetuning a run: the result is a run of its own, and verify proves that its masks held, whatever the family."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nmprune
import tiny_models
import tiny_runs
from nmprune import InputError
from nmprune.results import Results
from nmprune.run import Machine, Recipe, prune_run
from nmprune.run.evaluate import Measure, evaluate
from nmprune.run.finetune import finetune_run
from nmprune.run.folder import RunFolder, write_tensors
from nmprune.run.inspect import inspect
from nmprune.run.learning_files import LearningFiles
from nmprune.run.verify import verify_run
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.held_masks import MaskBroken
from nmprune.train.masked_low_rank import MaskedLowRank
from runs import hashes, mtimes, output


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A model and a finished run of it."""
    place = tmp_path_factory.mktemp("finetune")
    base = tiny_runs.model(place / "llama")
    return base, tiny_runs.finished(base, place / "run")


@pytest.fixture
def parent(made) -> Path:
    return made[1]


def tune(parent: Path, out: Path, report=lambda _: None, **settings: Any) -> Results:
    """A short finetuning."""
    defaults = {
        "seq_len": 16,
        "max_tokens": 1600,
        "n_held_out": 4,
        "minutes": 0,
        "steps": 4,
        "evaluations": 2,
        "autocast": "no",
    }
    return finetune_run(parent, FinetuneRecipe(**{**defaults, **settings}), out, Machine("cpu"), report=report)


def assert_sound(run: Path) -> None:
    verdict = verify_run(run)
    assert verdict.faults == ()
    assert verdict.report is not None and verdict.report.findings == ()


def test_the_result_is_a_run_of_its_own(parent, tmp_path):
    before = mtimes(parent)
    out = tmp_path / "tuned"
    results = tune(parent, out, steps=8, lr=0.01)
    assert mtimes(parent) == before, "the parent stays as it is"
    assert_sound(out)
    assert (out / "masks.safetensors").read_bytes() == (parent / "masks.safetensors").read_bytes()
    found = results.finetune
    assert found is not None and found.steps == 8 and found.best_step > 0
    assert found.held_out_after["loss"] < 0.99 * found.held_out_before["loss"]
    assert found.n_tokens == 8 * 2 * 16 and found.tensors == () and found.compute == "float32 on cpu"
    assert RunFolder(out).read_results() == results and results.updates_weights
    assert all(one.output_error is None for one in results.linears)

    recipe = RunFolder(out).read_recipe()
    assert recipe.finetune is not None and recipe.finetune.parent == str(parent.resolve())
    assert recipe.finetune.parent_masks == results.mask_checksum
    assert dataclasses.replace(recipe, finetune=None) == RunFolder(parent).read_recipe()
    told = json.loads((out / "model" / "config.json").read_text())["nmprune"]["finetuned"]
    assert told["steps"] == 8 and told["beside_masked"] == []
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9)) and lines[-1]["held_out_loss"] > 0
    card = (out / "README.md").read_text()
    assert "finetuned" in card and str(parent.resolve()) in card and "KL from the dense model" in card
    assert not (out / "progress").exists()
    assert inspect(str(out)).results == results

    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    theirs = load_file(parent / "model" / "model.safetensors")
    for name, one in model.state_dict().items():
        if name.endswith("_proj.weight"):
            assert torch.equal(one == 0, theirs[name] == 0) and not torch.equal(one, theirs[name])
        else:
            assert torch.equal(one, theirs[name])


def test_evaluate_works_on_it(parent, tmp_path):
    tune(parent, tmp_path / "tuned")
    found = evaluate(str(tmp_path / "tuned"), Measure("builtin", 16, 2))
    assert [one.what for one in found.models] == ["dense", "pruned"] and found.saved.startswith(str(tmp_path))


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(parent, tmp_path):
    out = tmp_path / "tuned"
    results = tune(parent, out)
    before = mtimes(out)
    assert tune(parent, out) == results and mtimes(out) == before
    with pytest.raises(InputError, match=r"holds another run:\n.*lr: 0.001\n.*lr: 0.5"):
        tune(parent, out, lr=0.5)
    with pytest.raises(InputError, match="is the run that is to be finetuned"):
        tune(parent, parent)


def test_a_finetuned_run_can_be_finetuned_again(parent, tmp_path):
    tune(parent, tmp_path / "a")
    results = tune(tmp_path / "a", tmp_path / "b", lora=2)
    assert_sound(tmp_path / "b")
    assert results.finetune is not None and results.finetune.parent == str((tmp_path / "a").resolve())


def test_low_rank_deltas_are_merged_masked(parent, tmp_path):
    results = tune(parent, tmp_path / "tuned", lora=2, lr=0.02, steps=8)
    assert_sound(tmp_path / "tuned")
    assert results.finetune is not None
    assert results.finetune.held_out_after["loss"] < 0.995 * results.finetune.held_out_before["loss"]
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "tuned", parent))
    assert set(ours) == set(theirs)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(ours[name] == 0, theirs[name] == 0)
    delta = ours[name] - theirs[name]
    assert delta.any() and torch.linalg.matrix_rank(delta) > 2, "a masked delta has no low rank"


def test_a_merge_that_loses_the_masks_writes_no_model(parent, tmp_path, monkeypatch):
    def careless(self, weight):
        return weight + self.scale * self.low_out @ self.low_in

    monkeypatch.setattr(MaskedLowRank, "forward", careless)
    with pytest.raises(MaskBroken, match=r"has masked weights that are not \+0\.0 after training"):
        tune(parent, tmp_path / "tuned", lora=2)
    assert not (tmp_path / "tuned" / "model").exists()


def test_norms_and_embeddings_are_trained_where_asked_for_and_only_there(parent, tmp_path):
    results = tune(parent, tmp_path / "tuned", also=("norms",))
    assert results.finetune is not None and len(results.finetune.tensors) == 5
    assert all("norm" in name for name in results.finetune.tensors)
    verdict = verify_run(tmp_path / "tuned")
    assert verdict.ok and verdict.beside == results.finetune.tensors

    file = tmp_path / "tuned" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert verify_run(tmp_path / "tuned").report.findings[0].tensor == "model.embed_tokens.weight"


def tokens(place: Path) -> str:
    """A file of token ids: for models without a tokenizer."""
    origin = json.dumps({"source": "random", "split": "all"})
    write_tensors(place, {"token_ids": tiny_models.windows(80)}, {"format": "nmprune-tokens", "origin": origin})
    return str(place)


@pytest.mark.parametrize(
    ("family", "exclude", "dtype"),
    [
        ("llama_tied", (), torch.bfloat16),
        ("gpt2", ("*.c_proj",), torch.float32),
        ("phi3", (), torch.float16),
        ("mixtral", ("*.experts.1.*",), torch.float32),
        ("gpt_oss", ("*.experts.down_proj.1",), torch.float32),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_every_way_to_store_linears(family, exclude, dtype, tmp_path):
    base = tiny_models.save(family, tmp_path / "base", dtype=dtype)
    nmprune.prune(base, "magnitude", "2:4", tiny_models.windows(), tmp_path / "run", exclude=exclude)
    text = tokens(tmp_path / "text.safetensors")
    settings = {"text": text, "also": ("norms", "embeddings"), "weight_decay": 0.1, "lr": 0.01, "steps": 8}
    results = tune(tmp_path / "run", tmp_path / "tuned", **settings)
    assert_sound(tmp_path / "tuned")
    assert results.finetune is not None
    assert results.finetune.held_out_after["loss"] < results.finetune.held_out_before["loss"]
    ours, theirs = (
        load_file(place / "model" / "model.safetensors") for place in (tmp_path / "tuned", tmp_path / "run")
    )
    for name in results.finetune.tensors:
        assert not torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_low_rank_deltas_of_experts_are_refused(family, tmp_path):
    base = tiny_models.save(family, tmp_path / "base")
    nmprune.prune(base, "magnitude", "2:4", tiny_models.windows(), tmp_path / "run")
    with pytest.raises(InputError, match=r"holds 4 experts in one tensor.*Leave --lora out"):
        tune(tmp_path / "run", tmp_path / "tuned", text=tokens(tmp_path / "text.safetensors"), lora=2)
    assert not (tmp_path / "tuned").exists()


def test_reordered_channels_and_mixed_patterns(tmp_path):
    base = tiny_runs.model(tmp_path / "base")
    for name, settings in {
        "permuted": {"permute": ["all"]},
        "mixed": {"allocate": {"patterns": ["1:4", "2:4", "dense"]}},
    }.items():
        raw = {"model": str(base), "method": "wanda", "pattern": "2:4", **settings}
        raw["calibration"] = {"source": "builtin", "n_sequences": 4, "seq_len": 16}
        prune_run(Recipe.from_dict(raw), tmp_path / name)
        out = tmp_path / f"{name}_tuned"
        results = tune(tmp_path / name, out, also=("norms",), lr=0.01)
        assert_sound(out)
        assert results.finetune is not None
        assert results.finetune.held_out_after["loss"] < results.finetune.held_out_before["loss"]
    assert (tmp_path / "permuted_tuned" / "permutation.safetensors").is_file()


@pytest.mark.parametrize("lora", [0, 2])
def test_ctrl_c_and_on_again_is_as_if_nothing_had_happened(parent, tmp_path, lora):
    expected = tune(parent, tmp_path / "whole", steps=6, lora=lora)

    def interrupting(sign) -> None:
        if sign.stage == "finetune" and sign.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        tune(parent, out, steps=6, lora=lora, report=interrupting)
    assert not (out / "results.json").exists() and not (out / "model").exists()
    assert (out / "progress" / "learning.safetensors").is_file()
    seen: list[str] = []
    results = tune(parent, out, steps=6, lora=lora, report=lambda sign: seen.append(sign.text))
    assert "resuming after step 3" in seen
    mine, other = output(out), output(tmp_path / "whole")
    assert mine == other
    assert results.sessions == 2 and results.finetune.best_step == expected.finetune.best_step
    metrics = [(run / "metrics.jsonl").read_text() for run in (out, tmp_path / "whole")]
    assert metrics[0] == metrics[1] and metrics[0].count("\n") == 7
    assert_sound(out)


def test_a_kill_between_two_checkpoints(parent, tmp_path):
    class Killed(Exception):
        pass

    def killed(sign) -> None:
        if sign.stage == "finetune" and sign.done == 4:  # its metrics are written, its checkpoint is not
            raise Killed

    settings = FinetuneRecipe(seq_len=16, max_tokens=1600, n_held_out=4, minutes=0, steps=6, autocast="no")
    often = Machine("cpu", checkpoint_minutes=0.0)
    with pytest.raises(Killed):
        finetune_run(parent, settings, tmp_path / "killed", often, report=killed)
    for out in (tmp_path / "killed", tmp_path / "whole"):
        finetune_run(parent, settings, out, often)
    assert output(tmp_path / "killed") == output(tmp_path / "whole")
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_kill_before_the_first_checkpoint_and_after_the_model(parent, tmp_path, monkeypatch):
    out = tmp_path / "tuned"
    with monkeypatch.context() as broken:
        broken.setattr("nmprune.run.finetune.finetune_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(parent, out)
    assert (out / "model").is_dir() and not (out / "results.json").exists()
    shutil.rmtree(out / "model")
    (out / "model").mkdir()  # another session's would be replaced, too
    tune(parent, out)
    assert_sound(out)


def test_a_checkpoint_of_other_text_is_refused(parent, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words to learn from " * 60)
    out = tmp_path / "tuned"

    def stop(sign) -> None:
        if sign.stage == "finetune" and sign.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(parent, out, text=str(text), report=stop)
    text.write_text("other words to learn from " * 60)
    with pytest.raises(InputError, match="was made on other text"):
        tune(parent, out, text=str(text))


def test_what_cannot_be_finetuned(made, parent, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        tune(made[0], tmp_path / "a")
    broken = Path(shutil.copytree(parent, tmp_path / "broken"))
    (broken / "results.json").write_text(
        (broken / "results.json").read_text().replace('"mask_checksum": "', '"mask_checksum": "0')
    )
    with pytest.raises(InputError, match=r"is not the file that the run's results\.json names"):
        tune(broken, tmp_path / "b")
    text = tmp_path / "short.txt"
    text.write_text("a few words of text, " * 3 + "and no more")
    with pytest.raises(InputError, match=r"gives 4 windows of 16 tokens, of which 4 are held out: nothing is left"):
        tune(parent, tmp_path / "c", text=str(text))
    with pytest.raises(InputError, match=r"finetune\.minutes and steps are both 0"):
        tune(parent, tmp_path / "d", steps=0)
    with pytest.raises(InputError, match=r"seq_len 65 is more than the model's 64 positions"):
        tune(parent, tmp_path / "e", seq_len=65)
    assert not any((tmp_path / name).exists() for name in "abcde")


def test_pruning_does_not_take_its_recipe(parent, tmp_path):
    tune(parent, tmp_path / "tuned")
    with pytest.raises(InputError, match="is of a finetuning of"):
        prune_run(RunFolder(tmp_path / "tuned").read_recipe(), tmp_path / "again")


def test_a_default_text_that_was_given_from_python_is_the_runs_own_tokens(tmp_path):
    base = tiny_models.save("llama", tmp_path / "base")
    nmprune.prune(base, "wanda", "2:4", tiny_models.windows(), tmp_path / "run")
    results = tune(tmp_path / "run", tmp_path / "tuned", n_held_out=2)
    assert results.finetune is not None and results.finetune.text.startswith("token-ids")


class TestVerify:
    """What verify must find out about a finetuned run."""

    @pytest.fixture
    def tuned(self, parent, tmp_path) -> Path:
        tune(parent, tmp_path / "tuned")
        return tmp_path / "tuned"

    def test_a_filled_zero(self, tuned):
        file = tuned / "model" / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name][tensors[name] == 0] = 1e-6
        save_file(tensors, file, metadata={"format": "pt"})
        found = verify_run(tuned).report.findings
        assert [one.what for one in found] == ["masked weights that are not +0.0"]
        assert found[0].count == tensors[name].numel() // 2

    def test_other_masks_than_the_parents(self, tuned, parent, tmp_path, made):
        other = tiny_runs.finished(made[0], tmp_path / "other", "magnitude")
        shutil.copy(other / "masks.safetensors", tuned / "masks.safetensors")
        faults = " ".join(verify_run(tuned).faults)
        assert (
            "the masks are not the parent's" in faults
            and f"{parent.resolve()}/masks.safetensors holds other masks" in faults
        )

    def test_a_parent_that_is_gone(self, made, tmp_path):
        parent = Path(shutil.copytree(made[1], tmp_path / "parent"))
        tune(parent, tmp_path / "tuned")
        shutil.rmtree(parent)
        verdict = verify_run(tmp_path / "tuned")
        assert verdict.ok and "not there any more" in verdict.parent and "checksum" in verdict.parent

    def test_files_that_do_not_say_the_same(self, tuned):
        recipe = tuned / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("also: []", "also: [norms]"))
        faults = " ".join(verify_run(tuned).faults)
        assert "do not name the same tensors" in faults and "model/config.json does not say the same" in faults
        recipe.write_text(recipe.read_text().partition("finetune:")[0])
        assert "say that the run was finetuned; recipe.yaml does not" in " ".join(verify_run(tuned).faults)

    def test_a_run_that_was_not_finetuned_says_nothing_of_it(self, parent):
        verdict = verify_run(parent)
        assert verdict.ok and verdict.parent == "" and verdict.beside == () and "lm_head" in verdict.dense


def test_bfloat16_forwards_where_the_processor_is_fast_at_them(monkeypatch):
    from nmprune.run.finetune_parent import uses_autocast

    cpu = torch.device("cpu")
    for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    assert not uses_autocast("auto", cpu) and uses_autocast("yes", cpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert (
        uses_autocast("auto", cpu) and not uses_autocast("no", cpu) and not uses_autocast("auto", torch.device("mps"))
    )


def test_checkpoints_are_kept_so_often(parent, tmp_path, monkeypatch):
    saved = []
    real = LearningFiles.save
    monkeypatch.setattr(LearningFiles, "save", lambda self, sign: (saved.append(sign.step), real(self, sign)))
    settings = FinetuneRecipe(seq_len=16, max_tokens=1600, n_held_out=4, minutes=0, steps=3, autocast="no")
    finetune_run(parent, settings, tmp_path / "often", Machine("cpu", checkpoint_minutes=0.0))
    assert saved == [0, 1, 2, 3]
    saved.clear()
    finetune_run(parent, settings, tmp_path / "never", Machine("cpu", checkpoint_minutes=60.0))
    assert saved == []
    assert output(tmp_path / "often") == output(tmp_path / "never") and hashes(tmp_path / "never")
