from __future__ import annotations

from collections import Counter

import pytest
import torch

import tiny_models
from nmprune.architectures import find_family
from nmprune.stream.experts import IMPLEMENTATION, observable_experts, observed

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]


def experts_of(model) -> torch.nn.Module:
    family = find_family(model.config.model_type)
    return model.get_submodule(f"{family.layers}.0.{family.experts.module}")


def routed(model, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n_tokens, model.config.hidden_size, generator=generator)
    # expert 3 sees no token
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(n_tokens)])
    return hidden, index, torch.rand(n_tokens, 2, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_equals_transformers_own(name):
    model = tiny_models.build(name)
    experts, inputs = experts_of(model), routed(model, 20)
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = experts(*inputs)
        with observable_experts(model.config):
            assert model.config._experts_implementation == IMPLEMENTATION
            got = experts(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pair_of_token_and_expert_is_observed_once(name):
    model = tiny_models.build(name)
    experts, (hidden, index, weights) = experts_of(model), routed(model, 20)
    seen: Counter[tuple[str, int]] = Counter()
    first: list[tuple[int, torch.Tensor]] = []

    def observer(parameter: str, expert: int, inputs: torch.Tensor) -> None:
        seen[parameter, expert] += inputs.shape[0]
        if parameter == "gate_up_proj":
            first.append((expert, inputs))

    with torch.no_grad(), observable_experts(model.config), observed(experts, observer):
        experts(hidden, index, weights)
    expected = {(p, e): int((index == e).sum()) for p in ("gate_up_proj", "down_proj") for e in range(3)}
    assert seen == expected
    for expert, inputs in first:
        assert torch.equal(inputs, hidden[(index == expert).any(1)])


def test_outside_the_body_nothing_is_observed():
    model = tiny_models.build("mixtral")
    experts, calls = experts_of(model), []
    with observed(experts, lambda *call: calls.append(call)):
        pass
    with torch.no_grad(), observable_experts(model.config):
        experts(*routed(model, 4))
    assert calls == []
