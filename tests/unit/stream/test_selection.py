from __future__ import annotations

import pytest

import tiny_models
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, select
from nmprune.stream.selection import with_patterns


def decoder(name: str = "llama", **changes) -> DecoderModel:
    return DecoderModel.from_model(tiny_models.build(name, **changes))


def test_everything_is_pruned_in_order_of_execution():
    selections = select(decoder(), Pattern(2, 4))
    roles = [linear.role for linear in selections[1].prune]
    assert roles == [
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert [one.dense for one in selections] == [(), ()]


@pytest.mark.parametrize(
    ("glob", "n_dense"),
    [
        ("*.down_proj", 2),
        ("model.layers.0.*", 7),
        ("self_attn.*", 8),
        ("mlp.up_proj", 2),
        ("model.layers.1.mlp.up_proj", 1),
    ],
)
def test_exclude_matches_full_names_and_roles(glob, n_dense):
    dense = [one for selection in select(decoder(), Pattern(2, 4), [glob]) for one in selection.dense]
    assert len(dense) == n_dense
    assert {one.reason for one in dense} == {f"excluded by {glob!r}"}


def test_an_expert_can_be_excluded_alone():
    selections = select(decoder("gpt_oss"), Pattern(2, 4), ["*.0.mlp.experts.down_proj.2"])
    reasons = {one.name: one.reason for one in selections[0].dense}
    assert reasons["model.layers.0.mlp.experts.down_proj.2"].startswith("excluded by")
    assert reasons["model.layers.0.mlp.router"].startswith("router")
    assert "model.layers.0.mlp.experts.down_proj.1" in {one.name for one in selections[0].prune}


def test_an_exclude_that_matches_nothing_is_an_error():
    with pytest.raises(InputError) as error:
        select(decoder(), Pattern(2, 4), ["*.down_porj", "*.up_proj", "*.w9"])
    assert str(error.value).startswith("exclude '*.down_porj', '*.w9' matches no linear. Roles here: mlp.down_proj, ")
    assert "full names look like model.layers.0.self_attn.q_proj." in str(error.value)


def test_in_features_that_do_not_divide_name_place_and_way_out():
    with pytest.raises(InputError) as error:
        select(decoder(intermediate_size=52), Pattern(4, 8))
    assert str(error.value) == (
        "decoder layer 0, mlp.down_proj: in_features 52 is not a multiple of 8, the group of pattern 4:8. Leave it dense "
        "with --exclude '*.down_proj', or choose a group that divides 52, such as 2:4. (weight shape (32, 52), "
        "model.layers.0.mlp.down_proj)"
    )
    selections = select(decoder(intermediate_size=52), Pattern(4, 8), ["*.down_proj"])
    assert len(selections[0].prune) == 6


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="nothing is left to prune: every linear is excluded"):
        select(decoder(), Pattern(2, 4), ["*"])


def test_a_pattern_of_its_own_for_every_linear():
    selections = select(decoder(), Pattern(2, 4), ["*.down_proj"])
    names = [linear.name for one in selections for linear in one.prune]
    chosen = {name: None if "k_proj" in name else Pattern(1 + name.endswith("q_proj"), 4) for name in names}
    own = with_patterns(selections, chosen, "stays so")
    for before, after in zip(selections, own, strict=True):
        assert [linear.role for linear in after.prune] == [
            linear.role for linear in before.prune if linear.role != "self_attn.k_proj"
        ]
        assert [(one.name.rpartition(".")[2], one.reason) for one in after.dense] == [
            ("down_proj", "excluded by '*.down_proj'"),
            ("k_proj", "stays so"),
        ]
        assert after.patterns == {name: chosen[name] for name in after.patterns}
        assert list(after.patterns) == [linear.name for linear in after.prune]
    assert own[0].patterns["model.layers.0.self_attn.q_proj"] == Pattern(2, 4)
    assert not selections[0].patterns
