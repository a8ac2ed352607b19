from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from nmprune.architectures import FAMILIES, find_family
from nmprune.architectures.channels import KINDS, Carrier, find_channels, take
from nmprune.errors import InputError


def shapes(name, **changes):
    model = tiny_models.build(name, **changes)
    return {key: tuple(one.shape) for key, one in model.named_parameters(remove_duplicate=False)}


def channels(name, extra=None, **changes):
    found = shapes(name, **changes) | (extra or {})
    return find_channels(found, find_family(tiny_models.CONFIGS[name][0]), 4, 32)


def test_the_spaces_of_a_llama():
    spaces = {name: (one.kind, one.layer, one.shape) for name, one in channels("llama").spaces.items()}
    assert spaces == {
        "residual": ("residual", None, (1, 32)),
        "model.layers.0.self_attn.o_proj": ("heads", 0, (2, 8)),
        "model.layers.0.mlp.down_proj": ("ffn", 0, (1, 64)),
        "model.layers.1.self_attn.o_proj": ("heads", 1, (2, 8)),
        "model.layers.1.mlp.down_proj": ("ffn", 1, (1, 64)),
    }


def test_what_carries_them():
    found = channels("llama").carriers
    prefix = "model.layers.0."
    heads, ffn = f"{prefix}self_attn.o_proj", f"{prefix}mlp.down_proj"
    assert found[f"{prefix}self_attn.q_proj.weight"] == (Carrier("residual", -1),)
    assert found[f"{prefix}self_attn.v_proj.weight"] == (Carrier("residual", -1), Carrier(heads, -2))
    assert found[f"{heads}.weight"] == (Carrier(heads, -1), Carrier("residual", -2))
    assert found[f"{prefix}mlp.up_proj.weight"] == (Carrier("residual", -1), Carrier(ffn, -2))
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (Carrier("residual", -1),)


def test_query_heads_that_share_a_key_value_head_share_its_permutation():
    found = channels("llama")
    name = "model.layers.0.self_attn.o_proj"
    permutation = torch.stack([torch.tensor([1, 0, *range(2, 8)]), torch.arange(8).flip(0)])
    ((_, into),) = found.gathers(f"{name}.weight", {name: permutation})
    first, second = [1, 0, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]
    heads = [first, first, second, second]
    assert into.tolist() == [8 * head + one for head, order in enumerate(heads) for one in order]
    ((_, out),) = found.gathers("model.layers.0.self_attn.v_proj.weight", {name: permutation})
    assert out.tolist() == [8 * head + one for head, order in enumerate((first, second)) for one in order]


def test_experts_have_a_permutation_each():
    found = channels("gpt_oss")
    name = "model.layers.0.mlp.experts.down_proj"
    assert found.spaces[name].shape == (4, 64)
    moved = torch.stack([torch.arange(64).roll(expert) for expert in range(4)])
    ((axis, index),) = found.gathers("model.layers.0.mlp.experts.gate_up_proj", {name: moved})
    assert (axis, tuple(index.shape)) == (-1, (4, 128))
    assert index[1, :4].tolist() == [126, 127, 0, 1]  # gate and up of a channel stay side by side


@pytest.mark.parametrize(("axis", "index"), [(-1, [2, 0, 1]), (-2, [1, 0])])
def test_take(axis, index):
    tensor = torch.arange(12).view(2, 2, 3)
    expected = tensor[..., index] if axis == -1 else tensor[:, index]
    assert torch.equal(take(tensor, axis, torch.tensor(index)), expected)
    one_each = torch.tensor([index, sorted(index)])
    assert torch.equal(take(tensor, axis, one_each), torch.stack([expected[0], tensor[1]]))


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.v_norm.weight", "model.layers.0.mlp.scales", "model.per_layer_norm.weight", "gate"],
)
def test_a_parameter_that_nobody_knows_is_refused(name):
    with pytest.raises(
        InputError, match=rf"{name} of shape \(32,\) is not known .* might change what the model computes"
    ):
        channels("llama", {name: (32,)})


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"64 channels of .*down_proj do not lie along axis -2"):
        channels("llama", {"model.layers.0.mlp.up_proj.weight": (60, 32)})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tables_list_roles_in_pairs(model_type):
    family = find_family(model_type)
    assert len(family.shared_inputs) % 2 == 0
    assert all(len(consumers) == 1 for consumers in family.shared_inputs[1::2])


def test_every_activation_of_the_library_is_elementwise():
    """What makes `ffn` exact: an activation that looked at other channels would forbid it."""
    from transformers.activations import ACT2FN

    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    for name in ACT2FN:
        activation = ACT2FN[name]
        assert isinstance(activation, nn.Module)
        if name == "xielu":  # wants bf16 and cuda kernels; its formula is elementwise
            continue
        with torch.no_grad():
            torch.testing.assert_close(activation(inputs[:, order]), activation(inputs)[:, order], msg=name)


def test_kinds_are_what_the_spaces_have():
    assert {space.kind for space in channels("mixtral").spaces.values()} == set(KINDS)
