"""The walk with the dense model beside the pruned one, and with sequences held out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tiny_models
from nmprune import Pattern
from nmprune.errors import InputError
from nmprune.methods import Magnitude, PerLinear, Pruned, Wanda
from nmprune.refine import Chain, Polish, Reconstruct
from nmprune.stats import InputStats
from nmprune.stream import DecoderModel, LayerStep, Restart
from walks import counted_forwards, layers_done, pruned, walk

SEQ_LEN = 16
CHAIN = Chain(Wanda(), Polish(target=0.5), Reconstruct(target=0.5))
HELD_OUT = {"n_held_out": 1}


@dataclass(frozen=True)
class Watched(PerLinear):
    """Magnitude's masks; keeps the statistics that it was given."""

    name = "watched"
    needs = Reconstruct().needs

    def prune(self, weight: torch.Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
        Watched.seen.append(stats)
        return Magnitude().prune(weight, stats, pattern)


@pytest.fixture(autouse=True)
def _fresh():
    Watched.seen = []


def build(name: str = "llama", n_layers: int = 2, **changes: Any) -> PreTrainedModel:
    return tiny_models.build(name, num_hidden_layers=n_layers, **changes)


def inputs_of(model: PreTrainedModel, index: int, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Role -> what its linear in decoder layer `index` meets, fp64 (n_sequences, seq_len, in)."""
    found: dict[str, torch.Tensor] = {}
    layer = model.model.layers[index]
    handles = [
        module.register_forward_pre_hook(lambda _, args, role=role: found.update({role: args[0].double()}))
        for role, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def partly(dense: PreTrainedModel, done: dict[str, Pruned], below: int) -> PreTrainedModel:
    """The model with all layers before `below` pruned."""
    model = copy.deepcopy(dense)
    for name, one in done.items():
        if int(name.split(".")[2]) < below:
            model.get_parameter(f"{name}.weight").data.masked_fill_(~one.mask, 0.0)
    return model


def sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).T @ y.flatten(0, 1)


def check_statistics(model, windows, n_held_out, **kwargs) -> None:
    """Every linear's statistics against the dense and the partly pruned model, run by hand."""
    dense = copy.deepcopy(model)
    done = layers_done(walk(model, windows, Watched(), options={"n_held_out": n_held_out}, **kwargs))
    linears = [(layer.index, one) for layer in done for one in layer.linears]
    assert len(linears) == len(Watched.seen) > 7
    masks = {one.name: one.pruned for _, one in linears}
    first = len(windows) - n_held_out
    differ = 0
    for (index, one), stats in zip(linears, Watched.seen, strict=True):
        own = inputs_of(partly(dense, masks, index), index, windows)[one.role]
        beside = inputs_of(dense, index, windows)[one.role]
        assert (stats.n_tokens, stats.held_out_tokens) == (len(windows) * SEQ_LEN, n_held_out * SEQ_LEN)
        for found, expected in (
            (stats.gram(), sums(own, own)),
            (stats.cross_gram, sums(own, beside)),
            (stats.held_out_gram, sums(own[first:], own[first:])),
            (stats.held_out_cross, sums(own[first:], beside[first:])),
        ):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
        differ += not torch.allclose(own, beside, atol=1e-2)
    assert differ >= 7, "the two models do not differ where they should"


def test_the_cross_gram_is_that_of_the_pruned_and_the_dense_model_run_by_hand():
    check_statistics(build(), tiny_models.windows(6), 2)


@pytest.mark.parametrize("n_held_out", [1, 2, 3, 4])
def test_held_out_sequences_never_mix_with_others_whatever_is_left_over(n_held_out):
    check_statistics(build(), tiny_models.windows(5), n_held_out)  # 2 sequences a batch


def test_a_layer_without_anything_to_prune_still_runs_the_dense_model_on():
    check_statistics(build(n_layers=3), tiny_models.windows(4), 1, exclude=("model.layers.1.*",))


def test_what_is_given_on_is_the_inputs_of_the_next_layer_in_both_models():
    windows, dense, model = tiny_models.windows(4), build(n_layers=3), build(n_layers=3)
    done = layers_done(walk(model, windows, CHAIN, options=HELD_OUT))
    seen = []
    for one in (model, dense):
        hook = one.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        with torch.no_grad():
            one(input_ids=windows, use_cache=False)
        hook.remove()
    torch.testing.assert_close(done[1].hidden, seen[0])
    torch.testing.assert_close(done[1].dense_hidden, seen[1])
    assert not torch.allclose(*seen, atol=1e-2)
    assert done[2].hidden is None and done[2].dense_hidden is None


def same_bits(one: dict[str, Pruned], other: dict[str, Pruned]) -> None:
    assert one.keys() == other.keys()
    for name, first in one.items():
        assert torch.equal(first.mask, other[name].mask), name
        assert (first.weight is None) == (other[name].weight is None), name
        assert first.weight is None or torch.equal(first.weight, other[name].weight), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_streamed_and_in_memory_are_the_same_bits(name, tmp_path):
    model, windows = tiny_models.build(name), tiny_models.windows()
    model.save_pretrained(tmp_path)
    streamed = pruned(walk(DecoderModel.open(tmp_path), windows, CHAIN, options=HELD_OUT))
    same_bits(streamed, pruned(walk(model, windows, CHAIN, options=HELD_OUT)))
    assert sum(one.weight is not None for one in streamed.values()) >= 5


def until(index: int, done: dict[str, Pruned]):
    """What a run that stopped before layer `index` can give back."""
    return lambda i: {n: p for n, p in done.items() if n.startswith(f"model.layers.{i}.")} if i < index else None


@pytest.mark.parametrize("exclude", [(), ("model.layers.1.*",)])
@pytest.mark.parametrize("keep_hidden", [False, True])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_walk_ends_in_the_same_bits(stop, keep_hidden, exclude, tmp_path):
    build(n_layers=4).save_pretrained(tmp_path)
    windows = tiny_models.windows(5)
    whole = walk(DecoderModel.open(tmp_path), windows, CHAIN, options=HELD_OUT, exclude=exclude)
    before = layers_done(whole)[stop - 1]
    kept = Restart(stop, before.hidden, before.dense_hidden) if keep_hidden else None
    rest = walk(
        DecoderModel.open(tmp_path),
        windows,
        CHAIN,
        options=HELD_OUT,
        exclude=exclude,
        finished=until(stop, pruned(whole)),
        restart=kept,
    )
    redone = layers_done(rest)
    assert [(one.index, one.reused) for one in redone] == [(i, i < stop) for i in range(stop if keep_hidden else 0, 4)]
    again = pruned(rest)
    same_bits(again, {name: one for name, one in pruned(whole).items() if name in again})
    assert any(one.weight is not None for one in again.values())
    for one, other in zip(redone, layers_done(whole)[-len(redone) :], strict=True):
        for key in ("hidden", "dense_hidden"):
            mine, theirs = getattr(one, key), getattr(other, key)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("exclude", [(), ("model.layers.1.*",), ("model.layers.2.*",)])
def test_the_steps_of_a_layer_add_up(exclude):
    windows = tiny_models.windows(5)
    first = walk(build(n_layers=3), windows, CHAIN, options=HELD_OUT, exclude=exclude)
    again = walk(
        *(build(n_layers=3), windows, CHAIN), options=HELD_OUT, exclude=exclude, finished=until(1, pruned(first))
    )
    for steps in (first, again):
        assert [one.index for one in layers_done(steps)] == [0, 1, 2]
        for index in range(3):
            mine = [step for step in steps if isinstance(step, LayerStep) and step.index == index]
            assert [step.done for step in mine] == list(range(1, len(mine) + 1))
            assert all(step.total == len(mine) for step in mine)


def passes(method: PerLinear, **kwargs: Any) -> list[int]:
    decoder = DecoderModel.from_model(build(n_layers=3))
    with counted_forwards(decoder.layers) as counts:
        walk(decoder, tiny_models.windows(6), method, **kwargs)  # 3 or, with 2 held out, 2 + 1 batches
        return [count // 3 for count in counts()]


def test_following_the_dense_model_takes_one_more_pass_of_each_layer():
    two = {"n_held_out": 2}
    assert passes(CHAIN, options=two) == [3, 3, 2]
    assert passes(Chain(Wanda(), None, Reconstruct(target=0)), options=two) == [2, 2, 1]
    assert passes(Wanda(), options=two) == [2, 2, 1]
    assert passes(CHAIN, options=two, exclude=("model.layers.1.*",)) == [3, 2, 2]
    assert passes(CHAIN, options=two, exclude=("model.layers.2.*",)) == [3, 2, 0]


def test_without_a_need_for_it_nothing_is_followed():
    done = layers_done(walk(build(), tiny_models.windows(), Wanda()))
    assert done[0].hidden is not None and done[0].dense_hidden is None
    own = layers_done(
        walk(build(), tiny_models.windows(), Chain(Wanda(), None, Reconstruct(target=0)), options=HELD_OUT)
    )
    assert own[0].dense_hidden is None and own[0].linears[0].held_out_error is not None


def test_hidden_states_past_the_budget_change_nothing_and_share_it(tmp_path, monkeypatch):
    windows = tiny_models.windows(4)
    in_memory = pruned(walk(build(), windows, CHAIN, options=HELD_OUT))
    of_one = windows.numel() * 32 * 4
    made, original = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, *a, **k: (made.append(name), original(name, *a, **k))[1])
    for budget, n_files in ((2 * of_one, 0), (2 * of_one - 4, 2), (0, 2)):
        made.clear()
        options = {**HELD_OUT, "hidden_budget": budget}
        same_bits(in_memory, pruned(walk(build(), windows, CHAIN, options=options, scratch=tmp_path)))
        assert len(made) == n_files


def test_experts_have_no_dense_tokens_of_their_own_and_their_notes_say_so():
    done = layers_done(walk(tiny_models.build("qwen2_moe"), tiny_models.windows(), CHAIN, options=HELD_OUT))
    seen = {True: 0, False: 0}
    for one in (one for layer in done for one in layer.linears):
        if "fallback" in one.pruned.notes:
            continue
        expert = ".experts." in one.name
        seen[expert] += 1
        for note in ("reconstruct_target", "polish_target"):
            assert (one.pruned.notes.get(note) == "own inputs") == expert, one.name
    assert seen[True] >= 4 and seen[False] >= 7


def test_experts_with_too_few_tokens_are_pruned_by_magnitude_and_their_weights_stay():
    options = {**HELD_OUT, "min_expert_tokens": 10**6}
    done = layers_done(walk(tiny_models.build("mixtral"), tiny_models.windows(), CHAIN, options=options))
    experts = [one for layer in done for one in layer.linears if ".experts." in one.name]
    assert experts and all(one.pruned.notes["fallback"] == "magnitude" for one in experts)
    assert all(one.pruned.weight is None for one in experts)


def test_the_held_out_error_is_that_of_the_held_out_outputs():
    windows, model = tiny_models.windows(6), build()
    dense, inputs = copy.deepcopy(model), inputs_of(model, 0, windows)
    one = layers_done(walk(model, windows, CHAIN, options={"n_held_out": 2}))[0].linears[0]
    weight = dense.model.layers[0].self_attn.q_proj.weight.detach().double()
    for x, found in ((inputs[one.role], one.output_error), (inputs[one.role][4:], one.held_out_error)):
        lost = x @ (one.pruned.weight.double() - weight).T
        assert found == pytest.approx((lost.square().sum() / (x @ weight.T).square().sum()).item(), rel=1e-3)
    assert one.output_error != pytest.approx(one.held_out_error, rel=1e-3)
    record = layers_done(walk(build(), windows, CHAIN, options={"n_held_out": 2}))[0].records()[0]
    assert record.held_out_error == one.held_out_error


@pytest.mark.parametrize("options", [{"propagate": "dense"}, {"true_sequential": True}])
def test_what_does_not_go_with_it(options):
    expected = "needs --propagate pruned, and no --true-sequential"
    with pytest.raises(InputError, match=expected):
        walk(build(), tiny_models.windows(), CHAIN, options={**HELD_OUT, **options})
    own = Chain(Wanda(), Polish(target=0), Reconstruct(target=0))
    assert pruned(walk(build(), tiny_models.windows(), own, options={**HELD_OUT, **options}))


@pytest.mark.parametrize("n_held_out", [0, 6, 7])
def test_a_number_that_cannot_be_held_out(n_held_out):
    with pytest.raises(
        InputError, match=rf"of 6, {n_held_out} is no number to hold out\. Give --n-sequences 2 or more"
    ):
        walk(build(), tiny_models.windows(6), CHAIN, options={"n_held_out": n_held_out})
    assert pruned(walk(build(), tiny_models.windows(6), Wanda(), options={"n_held_out": n_held_out}))


def test_a_restart_that_does_not_fit_is_our_bug():
    windows = tiny_models.windows()
    done = layers_done(walk(build(), windows, CHAIN, options=HELD_OUT))[0]
    with pytest.raises(ValueError, match="restart from None"):
        walk(build(), windows, CHAIN, options=HELD_OUT, restart=Restart(1, done.hidden))
    with pytest.raises(ValueError, match=r"restart from \(5, 16, 32\), expected \(6, 16, 32\)"):
        walk(build(), windows, CHAIN, options=HELD_OUT, restart=Restart(1, done.hidden, done.dense_hidden[:5]))
