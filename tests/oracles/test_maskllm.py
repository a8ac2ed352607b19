"""MaskLLM's soft masks, outputs and gradients as its own code makes them; see section E of the oracles' README."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nmprune import masks
from nmprune.methods.base import Course
from nmprune.methods.maskllm import MaskLLM
from nmprune.pattern import Pattern
from shared_data import shared

STEPS = (0, 500, 1000, 1500, 1900, 2000)


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = shared("oracles/E_maskllm.safetensors")
    return load_file(path), json.loads(path.with_suffix(".json").read_text())["cases"]


@pytest.fixture(params=["2:4", "1:4"])
def case(request: pytest.FixtureRequest, golden: tuple[dict[str, Tensor], dict[str, Any]]) -> Any:
    prefix = request.param.replace(":", "of") + "."
    tensors = {key.removeprefix(prefix): value for key, value in golden[0].items() if key.startswith(prefix)}
    facts = {key.split()[1]: value for key, value in golden[1].items() if key.startswith(request.param)}
    return Pattern.parse(request.param), tensors, facts


def grouped(logits: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    """Gates as the peer keeps them, one row per group, in the shape of ours."""
    return logits.reshape(weight.shape[0], weight.shape[1] // pattern.group, pattern.n_candidates)


def test_candidates_prior_and_final_mask(case: Any) -> None:
    pattern, tensors, _ = case
    assert torch.equal(masks.candidates(pattern), tensors["candidates"])
    method, weight = MaskLLM(prior_strength=3.0), tensors["weight"]
    prior = tensors["prior_mask"].reshape(weight.shape)
    started = method.with_prior(grouped(tensors["gate_random"], weight, pattern), prior, pattern)
    torch.testing.assert_close(started, grouped(tensors["gate_prior_strength3"], weight, pattern), rtol=1e-5, atol=1e-7)
    state = {"logits": grouped(tensors["gate"], weight, pattern)}
    assert torch.equal(method.hard_mask(weight, state, pattern), tensors["final_mask"].reshape(weight.shape))


@pytest.mark.parametrize("hard", [False, True])
def test_masks_outputs_and_gradients(case: Any, hard: bool) -> None:
    pattern, tensors, facts = case
    weight = tensors["weight"]
    method = MaskLLM(hard=hard)
    checked = 0
    for step in STEPS:
        name = f"{'hard' if hard else 'soft'}_it{step}"
        if name not in facts:
            continue
        checked += 1
        found = {key.removeprefix(name + "."): one for key, one in tensors.items() if key.startswith(name + ".")}
        course = Course(step, 2000)
        assert method.tau(course) == pytest.approx(facts[name]["tau"])
        assert method.kappa(course) == pytest.approx(facts[name]["kappa"])
        gumbel = grouped(found["gumbel"], weight, pattern)
        logits = grouped(tensors["gate"], weight, pattern).clone().requires_grad_()
        mask = method.mask_of(logits, pattern, course, gumbel)
        torch.testing.assert_close(mask, found["mask"].reshape(weight.shape), rtol=0, atol=1e-5)
        output = tensors["input"] @ (weight * mask).T
        torch.testing.assert_close(output, found["output"], rtol=0, atol=1e-5)
        energy = (weight * mask).square().sum()
        torch.testing.assert_close(energy, found["sparse_weight_norm"].reshape(()), rtol=1e-5, atol=1e-5)
        for value, key in (
            ((mask * tensors["mask_cotangent"].reshape(weight.shape)).sum(), "grad_gate_mask_cotangent"),
            (energy, "grad_gate_sparse_weight_norm"),
        ):
            (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
            wanted = grouped(found[key], weight, pattern)
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=max(1e-4 * wanted.abs().max().item(), 1e-12))
        reward = method.sparse_reg * (1 - course.share) * energy
        total = output.square().mean() - reward
        torch.testing.assert_close(total, found["total_loss"].reshape(()), rtol=1e-5, atol=1e-6)
    assert checked
