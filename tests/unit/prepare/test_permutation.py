from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.prepare import permutation
from nmprune.prepare.permutation import SpaceFound, find_permutations, searched_scores
from nmprune.stream import DecoderModel, LayerStep, StreamOptions, select
from nmprune.stream.permuted import channels_of, permute
from walks import counted_forwards, layers_done, walk

PATTERN = Pattern(2, 4)
ALL = ("ffn", "heads", "residual")
OPTIONS = StreamOptions(batch_size=2)


def steps(model, kinds=ALL, *, windows="calibrated", pattern=PATTERN, exclude=(), options=OPTIONS):
    decoder = model if isinstance(model, DecoderModel) else DecoderModel.from_model(model)
    given = tiny_models.windows() if windows == "calibrated" else windows
    selections = select(decoder, pattern, exclude)
    return list(find_permutations(decoder, channels_of(decoder), given, selections, pattern, kinds, options))


def spaces(found):
    return {one.result.name: one for one in found if isinstance(one, SpaceFound)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "mixtral", "qwen2_moe"])
def test_what_is_found_are_permutations_that_help(name):
    model = tiny_models.build(name)
    channels = channels_of(DecoderModel.from_model(model))
    found = spaces(steps(model))
    assert {key: one.kind for key, one in channels.spaces.items()} == {
        key: one.result.kind for key, one in found.items()
    }
    for key, one in found.items():
        n_blocks, size = channels.spaces[key].shape
        assert 0 < one.result.before <= one.result.after < 1
        assert (one.result.taken, one.result.blocks) == (one.result.taken, n_blocks)
        assert (one.result.after > one.result.before) == (one.permutation is not None) == (one.result.taken > 0)
        if one.permutation is not None:
            assert torch.equal(one.permutation.sort(1).values, torch.arange(size).expand(n_blocks, size))
            moved = (one.permutation != torch.arange(size)).any(1).sum()
            assert one.result.taken >= moved


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_numbers_are_what_wanda_keeps_of_the_permuted_model(name):
    """The objective, computed another way: from Wanda's own masks of the model before and after."""
    found = spaces(steps(tiny_models.build(name)))
    moved = {key: one.permutation for key, one in found.items() if one.permutation is not None}
    for when in ("before", "after"):
        decoder = DecoderModel.from_model(tiny_models.build(name))
        channels = channels_of(decoder)
        if when == "after":
            permute(decoder, channels, moved)
        kept = kept_shares(decoder)
        for key, one in found.items():
            readers = [linear for linear in kept if reads(channels, decoder, linear, key)]
            assert len(readers) == one.result.linears
            mean = sum(kept[linear] for linear in readers) / len(readers)
            assert mean == pytest.approx(getattr(one.result, when), rel=1e-4), key


def kept_shares(decoder):
    """Linear -> the share of its squared scores that Wanda's mask keeps, observed with the dense model."""
    shares = {}

    class Spy(type(create("wanda"))):
        def prune(self, weight, stats, pattern):
            done = super().prune(weight, stats, pattern)
            few = stats.n_tokens < OPTIONS.min_expert_tokens
            squares = weight.square() * (1 if few else stats.squared_norms().float())
            mask = masks.from_scores(squares, pattern)
            shares[len(shares)] = ((squares * mask).sum() / squares.sum()).item()
            return done

    options = {"propagate": "dense", "min_expert_tokens": 0}
    done = layers_done(walk(decoder, tiny_models.windows(), Spy(), options=options))
    names = [one.name for layer in done for one in layer.linears]
    return dict(zip(names, shares.values(), strict=True))


def reads(channels, decoder, name, space):
    for index in range(decoder.n_layers):
        for linear in decoder.linears(index)[0]:
            if linear.name == name:
                carriers = channels.carriers[channels.layer_prefix(index) + linear.parameter]
                return any(c.space == space and c.axis == linear.in_module.group_axis for c in carriers)
    raise AssertionError(name)


def test_streamed_equals_in_memory(tmp_path):
    for name in ("llama", "gpt_oss", "gpt2"):
        streamed = spaces(steps(DecoderModel.open(tiny_models.save(name, tmp_path / name))))
        in_memory = spaces(steps(tiny_models.build(name)))
        assert streamed.keys() == in_memory.keys()
        for key, one in streamed.items():
            assert one.result == in_memory[key].result
            assert torch.equal(one.permutation, in_memory[key].permutation)


def test_one_forward_per_layer_and_none_without_calibration():
    decoder = DecoderModel.from_model(tiny_models.build("llama"))
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    with counted_forwards(decoder.layers) as counts:
        with_calibration = steps(decoder)
        assert counts() == [3, 3]
        alone = spaces(steps(decoder, windows=None))
        assert counts() == [3, 3]
    signs = [(one.index, one.phase) for one in with_calibration if isinstance(one, LayerStep)]
    assert signs == [
        *[(layer, phase) for layer in (0, 1) for phase in ["observe"] * 3 + ["search"]],
        (0, "judge"),
        (1, "judge"),
    ]
    assert all(torch.equal(before[key], value) for key, value in decoder.model.state_dict().items())
    weight = decoder.model.model.layers[0].mlp.down_proj.weight.square()
    expected = (weight * masks.from_scores(weight, PATTERN)).sum() / weight.sum()
    assert alone["model.layers.0.mlp.down_proj"].result.before == pytest.approx(expected.item(), rel=1e-5)


def test_what_one_kind_finds_does_not_depend_on_the_others():
    everything = spaces(steps(tiny_models.build("llama")))
    for kind in ALL:
        alone = spaces(steps(tiny_models.build("llama"), (kind,)))
        assert {one.result.kind for one in alone.values()} == {kind}
        for key, one in alone.items():
            assert one.result == everything[key].result
            assert torch.equal(one.permutation, everything[key].permutation)


def test_an_expert_without_tokens_counts_by_its_weights():
    few = StreamOptions(batch_size=2, min_expert_tokens=10**6)
    found = spaces(steps(tiny_models.build("mixtral"), ("ffn",), options=few))
    alone = spaces(steps(tiny_models.build("mixtral"), ("ffn",), windows=None))
    assert [one.result for one in found.values()] == [one.result for one in alone.values()]


def test_linears_that_stay_dense_have_no_say():
    found = spaces(steps(tiny_models.build("llama"), exclude=("*.layers.1.*", "*.q_proj", "*.k_proj")))
    assert set(found) == {"residual", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}
    assert found["residual"].result.linears == 3  # v, gate, up


def test_a_permutation_that_does_not_help_is_not_taken():
    model = tiny_models.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(torch.tensor([2.0, 2.0, 0.0, 0.0]).repeat(16).expand(32, 64))
    found = spaces(steps(model, ("ffn",), windows=None))
    for one in found.values():
        assert (one.result.before, one.result.after, one.result.taken, one.permutation) == (1.0, 1.0, 0, None)


def test_many_rows_are_sampled_and_all_of_them_judged(monkeypatch):
    exact = spaces(steps(tiny_models.build("llama")))
    monkeypatch.setattr(permutation, "_SEARCHED", 640)
    monkeypatch.setattr(permutation, "_LEAST_ROWS", 8)
    sampled = spaces(steps(tiny_models.build("llama")))
    for key, one in sampled.items():
        assert one.result.before == exact[key].result.before
        assert one.result.after >= one.result.before
    assert sampled["residual"].result.after != exact["residual"].result.after
    assert sampled["residual"].result.after > sampled["residual"].result.before


def test_a_plan_knows_what_will_be_searched():
    decoder = DecoderModel.from_model(tiny_models.build("llama"))
    found = searched_scores(channels_of(decoder), select(decoder, PATTERN), ALL)
    assert found == {"ffn": 2 * 32 * 64, "heads": 2 * 32 * 32, "residual": 2 * (32 + 16 + 16 + 64 + 64) * 32}


@pytest.mark.parametrize(
    ("kinds", "pattern", "exclude", "message"),
    [
        (
            ("heads",),
            Pattern(8, 16),
            (),
            "o_proj has 8 channels a head, not a whole number of groups of 16. Leave heads out",
        ),
        (("ffn",), PATTERN, ("*.down_proj",), "permute ffn: every linear that reads these channels stays dense"),
        (("heads",), PATTERN, ("*.o_proj",), "permute heads: every linear"),
    ],
)
def test_kinds_that_cannot_help_are_refused(kinds, pattern, exclude, message):
    with pytest.raises(InputError, match=message):
        steps(tiny_models.build("llama"), kinds, pattern=pattern, exclude=exclude)


def test_weights_that_are_not_finite_are_named():
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj: weights or calibration activations are NaN"):
        steps(model, ("ffn",), windows=None)
