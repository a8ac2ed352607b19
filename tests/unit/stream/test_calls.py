from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import tiny_models
from nmprune.architectures import find_family
from nmprune.stream.calls import last_logits, record_layer_calls


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.get_submodule("model.layers")


def test_what_is_recorded_is_what_the_model_gives_its_layers():
    model, windows = tiny_models.build("gemma2"), tiny_models.windows(2)
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        for layer in layers_of(model)
    ]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    calls = record_layer_calls(model, layers_of(model), windows)
    assert torch.equal(calls.hidden, seen[0][0][0])
    for (args, kwargs), (real_args, real_kwargs) in zip(calls.arguments, seen, strict=True):
        assert len(args) == len(real_args) - 1
        assert kwargs.keys() == real_kwargs.keys()
        for key, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, real_kwargs[key]), key
    # a sliding and a full layer are told apart
    assert not torch.equal(calls.arguments[0][1]["attention_mask"], calls.arguments[1][1]["attention_mask"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_running_a_layer_leaves_its_input_alone(name):
    model, windows = tiny_models.build(name), tiny_models.windows(2)
    layers = model.get_submodule(find_family(model.config.model_type).layers)
    calls = record_layer_calls(model, layers, windows)
    before = calls.hidden.clone()
    with torch.no_grad():
        output = calls.run(0, layers[0], calls.hidden)
    assert torch.equal(calls.hidden, before)
    assert output.shape == before.shape
    assert not torch.equal(output, before)


def test_last_logits_use_the_models_own_soft_capping():
    model, windows = tiny_models.build("gemma2", final_logit_softcapping=0.5), tiny_models.windows(2)
    with torch.no_grad():
        expected = model(input_ids=windows).logits
        calls = record_layer_calls(model, layers_of(model), windows)
        hidden = calls.hidden
        for index, layer in enumerate(layers_of(model)):
            hidden = calls.run(index, layer, hidden)
    logits = last_logits(model, layers_of(model), hidden, windows)
    assert logits.abs().max() <= 0.5
    torch.testing.assert_close(logits, expected)


def test_a_forward_of_a_layers_own_comes_back():
    model, windows = tiny_models.build("llama"), tiny_models.windows(1)
    layer = layers_of(model)[0]
    own = layer.forward
    layer.forward = own  # as accelerate's dispatch does
    record_layer_calls(model, layers_of(model), windows)
    assert layer.__dict__["forward"] is own
    assert "forward" not in layers_of(model)[1].__dict__


def test_an_error_inside_the_model_leaves_the_layers_as_they_were():
    model = tiny_models.build("llama")
    with pytest.raises(IndexError):
        record_layer_calls(model, layers_of(model), torch.full((1, 4), 10_000))
    assert all("forward" not in layer.__dict__ for layer in layers_of(model))


def test_a_model_that_does_not_call_all_its_layers_is_an_error():
    model = tiny_models.build("llama")
    more = torch.nn.ModuleList([*layers_of(model), torch.nn.Identity()])
    with pytest.raises(RuntimeError, match="LlamaForCausalLM called 2 of its 3 decoder layers"):
        record_layer_calls(model, more, tiny_models.windows(1))
