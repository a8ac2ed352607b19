"""Cross-entropies of the stories260K model, dense and under the masks of the authors' own code."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from nmprune.calibration import Text
from nmprune.evaluate.perplexity import perplexity, summarise
from nmprune.masks import unpack
from shared_data import shared

RUNS = ["magnitude_2of4", "wanda_2of4", "wanda_4of8", "wanda_1of4", "sparsegpt_2of4", "ria_2of4"]


@pytest.fixture(scope="module")
def dense() -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(shared("oracles/model"), dtype=torch.float32).state_dict()


def _nlls(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(shared("oracles/model"), dtype=torch.float32)
    model.load_state_dict(weights)
    return perplexity(model, load_file(shared("oracles/tokens.safetensors"))["eval_tokens"], batch_size=4)


def _expected() -> dict:
    return json.loads(shared("oracles/B_model.json").read_text(encoding="utf-8"))


def test_dense(dense):
    expected = _expected()["dense"]
    nlls = _nlls(dense)
    assert nlls.tolist() == pytest.approx(expected["per_sequence_cross_entropy"], abs=1e-5)
    found = summarise(nlls, Text("stories260k samples", "eval_tokens", ("",)), 128)
    assert found.mean_nll == pytest.approx(1.0273323, abs=1e-5)
    assert found.value == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found.n_tokens == 8 * 127


@pytest.mark.parametrize("run", RUNS)
def test_pruned(dense, run):
    stored = load_file(shared(f"oracles/B_{run}.safetensors"))
    weights = dict(dense)
    for key, bits in stored.items():
        name, _, kind = key.rpartition(".")
        if kind == "mask_bits":
            dense_weight = dense[f"{name}.weight"]
            moved = stored.get(f"{name}.weight", dense_weight)
            weights[f"{name}.weight"] = moved * unpack(bits, tuple(dense_weight.shape))
    expected = _expected()["runs"][run]["eval"]
    nlls = _nlls(weights)
    assert nlls.mean().item() == pytest.approx(expected["cross_entropy_fp64"], abs=1e-5)
    assert nlls.tolist() == pytest.approx(expected["per_sequence_cross_entropy"], abs=1e-5)
