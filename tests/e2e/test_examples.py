"""The examples are executed, on a tiny model."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import nmprune
import tiny_models
from nmprune.run.compare import compare_masks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXECUTED_HERE = {"prune_a_folder.py", "bring_your_own_loop.py", "prune_in_memory.py"}


def main_of(name):
    """The example's main, as `python examples/NAME` would call it."""
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A 2-layer Llama with random weights and one token per byte."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tiny_models.save("llama", folder, vocab_size=len(alphabet), max_position_embeddings=512)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_every_example_is_executed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == EXECUTED_HERE


def test_prune_a_folder(model_folder, tmp_path, capsys):
    out = tmp_path / "run"
    done = main_of("prune_a_folder.py")(str(model_folder), str(out))
    assert len(done.linears) == 2 * 6
    assert {one.name.rpartition(".")[2] for one in done.results.dense} >= {"down_proj", "lm_head"}
    weight = AutoModelForCausalLM.from_pretrained(out / "model").model.layers[0].mlp.up_proj.weight
    assert torch.equal((weight.view(-1, 4) != 0).sum(1), torch.full((weight.numel() // 4,), 2))
    printed = capsys.readouterr().out
    assert "12 linears pruned" in printed and f"{out}/model" in printed


def test_masks_are_written_as_an_npz_as_the_page_says(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    windows = torch.arange(32).reshape(2, 16)
    nmprune.prune(str(model_folder), "wanda", "2:4", windows, Path("runs/x"))
    page = (EXAMPLES.parent / "docs" / "formats.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(example, {})
    found = compare_masks(Path("masks.npz"), Path("runs/x"))
    assert len(found.tensors) == 14 and found.total.n_groups_differ == 0
    assert not found.only_in_a and not found.only_in_b


def test_bring_your_own_loop(capsys):
    errors = main_of("bring_your_own_loop.py")()
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] < 1
    assert capsys.readouterr().out.count("keeps 50%") == len(errors)


def test_prune_in_memory(model_folder, capsys):
    dense, pruned = main_of("prune_in_memory.py")(str(model_folder))
    assert math.isfinite(dense) and math.isfinite(pruned) and dense != pruned
    printed = capsys.readouterr().out
    assert printed.startswith("14 masks; token perplexity on Python") and "held-out part" in printed
