"""Laws for every model family: what is streamed from disk equals what is done in memory, and nothing is missed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from nmprune import masks
from nmprune.architectures import FAMILIES
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, LayerDone, StreamOptions, prune_layers, select

PATTERN = Pattern(2, 4)


def run(model: DecoderModel, method: str, windows: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """(decoder layer, parameter) -> mask and moved weight as the module holds them."""
    selections = select(model, PATTERN)
    found: dict[str, torch.Tensor] = {}
    steps = prune_layers(model, windows, create(method), PATTERN, selections, StreamOptions(batch_size=4, **options))
    for done in steps:
        if not isinstance(done, LayerDone):
            continue
        by_name = {linear.name: linear for linear in selections[done.index].prune}
        shapes = dict(model.model.get_submodule(f"{model.family.layers}.{done.index}").named_parameters())
        for one in done.linears:
            linear = by_name[one.name]
            for kind, value in (("mask", one.pruned.mask), ("weight", one.pruned.weight)):
                if value is None:
                    continue
                key = f"{done.index}.{linear.parameter}.{kind}"
                whole = found.setdefault(key, torch.zeros(shapes[linear.parameter].shape, dtype=value.dtype))
                linear.in_module.of(whole).copy_(value)
    return found


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_streamed_equals_in_memory(name, method, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model", max_shard_size="40KB")
    windows = tiny_models.windows()
    streamed = run(DecoderModel.open(folder), method, windows)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    in_memory = run(DecoderModel.from_model(whole), method, windows)
    assert streamed.keys() == in_memory.keys()
    for key, value in in_memory.items():
        torch.testing.assert_close(streamed[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_matrix_of_a_layer_is_pruned_or_listed(name, tmp_path):
    model = DecoderModel.from_model(tiny_models.build(name))
    for index, selection in enumerate(select(model, PATTERN)):
        layer = model.model.get_submodule(f"{model.family.layers}.{index}")
        covered = {linear.parameter: 0 for linear in selection.prune}
        for linear in selection.prune:
            covered[linear.parameter] += linear.shape[0] * linear.shape[1]
        dense = {one.name.removeprefix(f"{model.family.layers}.{index}.") + ".weight" for one in selection.dense}
        assert all(one.reason for one in selection.dense)
        for parameter, tensor in layer.named_parameters():
            if tensor.dim() >= 2 and not parameter.endswith("bias") and parameter not in dense:
                assert covered[parameter] == tensor.numel(), parameter


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_linears_that_share_an_input_get_the_same_tensor(name):
    model = tiny_models.build(name)
    decoder = DecoderModel.from_model(model)
    for index in range(decoder.n_layers):
        layer = model.get_submodule(f"{decoder.family.layers}.{index}")
        seen: dict[str, list[torch.Tensor]] = {}
        handles = [
            layer.get_submodule(linear.module).register_forward_pre_hook(
                lambda module, args, key=linear.shared_input, seen=seen: seen.setdefault(key, []).append(args[0])
            )
            for linear in decoder.module_linears(index)
            if linear.view.expert is None
        ]
        with torch.no_grad():
            model(input_ids=tiny_models.windows(2))
        for handle in handles:
            handle.remove()
        assert seen
        for inputs in seen.values():
            assert all(one is inputs[0] for one in inputs)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_hidden_states_through_the_walker_give_the_models_own_logits(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model")
    windows = tiny_models.windows(3)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = whole(input_ids=windows).logits
    streamed = DecoderModel.open(folder)
    with torch.no_grad():
        with streamed.embedding():
            calls = streamed.calls(windows)
        hidden = calls.hidden
        for index in range(streamed.n_layers):
            with streamed.layer(index) as layer:
                hidden = calls.run(index, layer, hidden)
        with streamed.head():
            logits = streamed.logits(hidden, windows)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_every_family_has_a_tiny_model():
    covered = {tiny_models.CONFIGS[name][0] for name in tiny_models.CONFIGS}
    assert covered == set(FAMILIES)


def test_a_mask_keeps_exactly_two_of_four_along_the_inputs():
    model = DecoderModel.from_model(tiny_models.build("gpt_oss"))
    found = run(model, "wanda", tiny_models.windows())
    mask = found["0.mlp.experts.gate_up_proj.mask"]
    assert mask.shape == (4, 32, 128)
    assert masks.n_wrong_groups(mask.transpose(1, 2), PATTERN) == 0
    weight = model.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(weight == 0, ~mask)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_a_plan_from_the_config_names_what_the_checkpoint_holds(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model")
    planned, streamed = DecoderModel.from_config(folder), DecoderModel.open(folder)
    for index in range(streamed.n_layers):
        assert planned.linears(index) == streamed.linears(index)
