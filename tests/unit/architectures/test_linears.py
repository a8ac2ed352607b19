from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from nmprune.architectures import View, find_family, linears_of_layer, starred
from nmprune.errors import InputError


@pytest.mark.parametrize(
    ("view", "stored", "place"),
    [
        (View(), (6, 8), lambda t: t),
        (View(rows=(2, 5)), (6, 8), lambda t: t[2:5]),
        (View(transposed=True), (8, 6), lambda t: t.T),
        (View(rows=(1, 3), transposed=True), (8, 6), lambda t: t.T[1:3]),
        (View(expert=2), (3, 6, 8), lambda t: t[2]),
        (View(expert=1, rows=(0, 4)), (3, 6, 8), lambda t: t[1, :4]),
        (View(expert=0, transposed=True), (3, 8, 6), lambda t: t[0].T),
        (View(expert=0, rows=(4, 6), transposed=True), (3, 8, 6), lambda t: t[0].T[4:6]),
    ],
)
def test_a_view_reads_and_writes_its_place_and_nothing_else(view, stored, place):
    tensor = torch.randn(stored)
    before = tensor.clone()
    matrix = view.of(tensor)
    assert matrix.shape[1] == 8
    assert torch.equal(matrix, place(before))
    new = torch.randn(matrix.shape)
    matrix.copy_(new)
    place(before).copy_(new)
    assert torch.equal(tensor, before)
    assert tensor.shape[view.group_axis] == 8


def layer(name: str, index: int = 0):
    model = tiny_models.build(name)
    family = find_family(model.config.model_type)
    return model.get_submodule(f"{family.layers}.{index}"), family


def test_a_matrix_that_the_table_does_not_know_is_an_error():
    module, family = layer("llama")
    module.mlp.adapter = nn.Linear(32, 4)
    with pytest.raises(InputError) as error:
        linears_of_layer(module, family)
    assert str(error.value).startswith(
        "mlp.adapter.weight of shape (4, 32) is not in the table of model_type llama/mistral/"
    )
    assert "`shared_inputs`, or to `dense` with a reason" in str(error.value)


def test_an_unknown_parameter_without_weight_in_its_name_is_an_error_as_well():
    module, family = layer("mixtral")
    module.mlp.experts.extra_proj = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(InputError, match=r"mlp\.experts\.extra_proj of shape \(4, 8, 8\)"):
        linears_of_layer(module, family)


def test_vectors_and_biases_are_no_linears():
    module, family = layer("gpt_oss")
    names = {one.parameter for one in linears_of_layer(module, family)[0]}
    assert not any("bias" in name or "norm" in name or "sinks" in name for name in names)


def test_shapes_are_out_by_in_however_they_are_stored():
    def shapes(name: str, index: int = 0) -> dict[str, tuple[int, int]]:
        return {one.role: one.shape for one in linears_of_layer(*layer(name, index))[0]}

    assert shapes("gpt2")["attn.c_attn"] == (96, 32)
    assert shapes("phi3")["mlp.gate_up_proj"] == (128, 32)
    assert shapes("mixtral")["mlp.experts.gate_up_proj"] == (128, 32)
    assert shapes("gpt_oss")["mlp.experts.gate_up_proj"] == (128, 32)
    assert shapes("gpt_oss")["mlp.experts.down_proj"] == (32, 64)


def test_a_plain_layer_among_expert_layers():
    experts, plain = (linears_of_layer(*layer("qwen2_moe", index)) for index in (0, 1))
    assert {one.role for one in plain[0]} == {
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    assert plain[1] == {}
    assert set(experts[1]) == {"mlp.gate", "mlp.shared_expert_gate"}
    assert sum(one.view.expert is not None for one in experts[0]) == 2 * 4


def test_shared_inputs():
    shared = {one.role: one.shared_input for one in linears_of_layer(*layer("llama"))[0]}
    assert shared["self_attn.v_proj"] == shared["self_attn.q_proj"] == "self_attn.q_proj"
    assert shared["mlp.up_proj"] == "mlp.gate_proj"
    assert len(set(shared.values())) == 4


def test_numbers_in_a_name_become_stars():
    assert starred("model.layers.3.mlp.experts.12.w1.weight") == "model.layers.*.mlp.experts.*.w1.weight"
    assert starred("lm_head") == "lm_head"


def test_a_norm_in_the_shape_of_a_matrix_stays_dense_and_a_vector_is_not_listed():
    linears, dense = linears_of_layer(*layer("cohere_command_r_plus"))
    assert dense == {"self_attn.q_norm": "norm, not a linear", "self_attn.k_norm": "norm, not a linear"}
    assert not any("norm" in one.role for one in linears)
    assert linears_of_layer(*layer("qwen3"))[1] == {}
