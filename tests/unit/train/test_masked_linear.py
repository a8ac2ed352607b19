"""Masks put into every layout: the model computes as with multiplied weights, and afterwards it is as it was."""

import pytest
import torch

import learners
import tiny_models
from nmprune import masks
from nmprune.methods.base import Course
from nmprune.stream.experts import observable_experts
from nmprune.train.checkpointing import checkpointed
from nmprune.train.masked_linear import MaskedModel, Phase, noise

LAYOUTS = [
    "llama_tied",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
]  # plain, fused, transposed, experts


def masked_model(model, method=learners.QUICK):
    found = learners.targets(model)
    priors = learners.magnitudes(found)
    phase = Phase(course=Course(0, 4))
    return MaskedModel(found, method, phase, priors, seed=0), phase, priors


@pytest.mark.parametrize("name", LAYOUTS)
def test_fixed_masks_are_multiplied_weights(name):
    model = tiny_models.build(name)
    with observable_experts(model.config):
        dense = learners.logits(model)
        masked, phase, priors = masked_model(model)
        with masked.installed(), phase.fixed(priors):
            found = learners.logits(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for one in masked.targets:
            place = one.view.of(one.layer.get_parameter(one.parameter))
            with torch.no_grad():
                place.mul_(masks.unpack(priors[one.name], one.shape))
        torch.testing.assert_close(found, learners.logits(model), rtol=1e-5, atol=1e-6)
        assert (found - dense).abs().max() > 1e-3
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_effective_weights_are_used_and_every_state_gets_a_gradient(name):
    model = tiny_models.build(name)
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    ids = tiny_models.windows(4)
    with observable_experts(model.config):
        masked, phase, _ = masked_model(model)
        with masked.installed():
            phase.kind = "learn"
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
            loss.backward()
            parameters = masked.parameters()
            assert set(parameters) == {f"{one.name}:logits" for one in masked.targets}
            reached = [value.grad is not None and value.grad.abs().sum() > 0 for value in parameters.values()]
            assert sum(reached) >= 0.9 * len(reached)  # an expert may see no token
            with torch.no_grad():
                soft = model(input_ids=ids, use_cache=False).logits
        for one in masked.targets:
            generator = noise(0, one, 0, torch.device("cpu"))
            weight = learners.weight(one)
            effective = learners.QUICK.effective(weight, masked.state(one.name), one.pattern, phase.course, generator)
            with torch.no_grad():
                one.view.of(one.layer.get_parameter(one.parameter)).copy_(effective)
        torch.testing.assert_close(soft, model(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-6)
    for key, value in model.state_dict().items():
        if not any(one.parameter in key for one in masked.targets):
            assert torch.equal(value, frozen[key]), key


def test_dense_is_the_model_itself_and_weights_come_back_bit_for_bit():
    model = tiny_models.build("llama")
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    dense = learners.logits(model)
    masked, phase, _ = masked_model(model)
    try:
        with masked.installed():
            phase.kind = "learn"
            with phase.dense():
                assert torch.equal(learners.logits(model), dense)
            assert not torch.equal(learners.logits(model), dense)
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(learners.logits(model), dense)
    assert all(torch.equal(value, frozen[key]) for key, value in model.state_dict().items())
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_noise_is_a_function_of_seed_linear_and_draw():
    one, two = learners.targets(tiny_models.build("llama"))[:2]

    def draw(seed, target, number):
        return torch.rand(4, generator=noise(seed, target, number, torch.device("cpu"))).tolist()

    assert draw(0, one, 3) == draw(0, one, 3)
    assert len({tuple(draw(*args)) for args in ((0, one, 3), (0, one, 4), (0, two, 3), (1, one, 3))}) == 4


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_activation_checkpointing_gives_the_same_gradients(name):
    ids = tiny_models.windows(2)
    found = []
    for on in (False, True):
        model = tiny_models.build(name)
        masked, phase, _ = masked_model(model)
        layers = [target.layer for target in masked.targets]
        layers = list(dict.fromkeys(layers))
        with observable_experts(model.config), masked.installed(), checkpointed(layers, on):
            phase.kind = "learn"
            model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
            found.append({key: value.grad for key, value in masked.parameters().items()})
        assert "forward" not in layers[0].__dict__
    plain, recomputed = found
    for key, value in plain.items():
        assert (value is None) == (recomputed[key] is None)
        if value is not None:
            torch.testing.assert_close(value, recomputed[key], rtol=1e-6, atol=1e-9)


def test_a_model_in_bfloat16_keeps_its_state_in_float32():
    model = tiny_models.build("llama", dtype=torch.bfloat16)
    masked, phase, _ = masked_model(model)
    with masked.installed():
        phase.kind = "learn"
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in masked.parameters().values())
        assert next(masked.linears())[1].dtype == torch.float32
