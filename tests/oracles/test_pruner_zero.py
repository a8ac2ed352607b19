"""Pruner-Zero against its authors' code and formula (../shared/oracles, sections A and B), gradients and masks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import nmprune
from nmprune import masks
from nmprune.checkpoint import read_masks
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.prepare.gradients import LayerGradients, layer_gradients
from nmprune.stats import InputStats
from nmprune.stream import DecoderModel, select
from shared_data import shared

LINEARS = {
    "A_L0_q_proj": "model.layers.0.self_attn.q_proj",
    "A_L0_o_proj": "model.layers.0.self_attn.o_proj",
    "A_L0_down_proj": "model.layers.0.mlp.down_proj",
    "A_L3_up_proj": "model.layers.3.mlp.up_proj",
}
PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)]
THEIR_SCALE = 100  # of their loss; it cancels in the score


def calibration_tokens() -> torch.Tensor:
    return load_file(shared("oracles/tokens.safetensors"))["calibration_tokens"]


def their_masks() -> dict[str, torch.Tensor]:
    shapes = json.loads(shared("oracles/B_model.json").read_text())["linears"]
    stored = load_file(shared("oracles/B_pruner_zero_2of4.safetensors"))
    bits = {key.removesuffix(".mask_bits"): value for key, value in stored.items() if key.endswith(".mask_bits")}
    return {name: masks.unpack(packed, tuple(shapes[name])) for name, packed in bits.items()}


def mask_from(weight: torch.Tensor, gradients: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    stats = InputStats(0, weight_grad_sq=gradients.float().square(), n_grad_sequences=16)
    return create("pruner_zero").prune(weight, stats, pattern).mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("linear", [*LINEARS, "A_synthetic"])
def test_masks_from_their_gradients_are_theirs(linear, pattern):
    oracle = load_file(shared(f"oracles/{linear}.safetensors"))
    prefix = f"{pattern.kept}of{pattern.group}."
    if oracle["weight"].shape[1] % pattern.group:
        assert f"{prefix}pruner_zero.mask" not in oracle
        return
    gradients = oracle["pruner_zero_grad"]
    assert torch.equal(mask_from(oracle["weight"], gradients, pattern), oracle[f"{prefix}pruner_zero.mask"])
    rounded = gradients.half()
    assert torch.equal(mask_from(oracle["weight"], rounded, pattern), oracle[f"{prefix}pruner_zero_g16.mask"])


def test_masks_of_the_whole_model_from_their_stored_gradients_are_theirs():
    gradients = load_file(shared("oracles/B_pruner_zero_grads_fp16.safetensors"))
    model = load_file(shared("oracles/model/model.safetensors"))
    for name, theirs in their_masks().items():
        layer, _, role = name.removeprefix("model.layers.").partition(".")
        ours = mask_from(model[f"{name}.weight"].float(), gradients[f"{role}_layer_{layer}"], Pattern(2, 4))
        assert torch.equal(ours, theirs), name


def test_streamed_gradients_are_theirs():
    model = DecoderModel.open(shared("oracles/model"))
    steps = layer_gradients(model, calibration_tokens(), select(model, Pattern(2, 4)), frozenset({"weight_grad_sq"}))
    found = {name: s for step in steps if isinstance(step, LayerGradients) for name, s in step.stats.items()}
    for file, name in LINEARS.items():
        theirs = load_file(shared(f"oracles/{file}.safetensors"))["pruner_zero_grad"]
        ours = THEIR_SCALE * found[name].weight_grad_sq.sqrt()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.max().item(), msg=name)
        assert found[name].n_grad_sequences == 16


def test_a_run_finds_the_masks_of_their_code(tmp_path):
    nmprune.prune(shared("oracles/model"), "pruner_zero", "2:4", calibration_tokens(), tmp_path / "run")
    ours, theirs = read_masks(tmp_path / "run" / "masks.safetensors"), their_masks()
    assert {name.removesuffix(".weight") for name in ours.masks} == theirs.keys()
    differ = torch.cat(
        [(ours.mask(f"{n}.weight") != m).unflatten(-1, (-1, 4)).any(-1).flatten() for n, m in theirs.items()]
    )
    # They keep gradients in fp16; ours are fp32.
    assert differ.float().mean().item() <= 0.001
