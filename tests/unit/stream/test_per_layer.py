"""A learner in the layer walker: what it is given, what becomes of what it returns."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import tiny_models
from layer_methods import Toy
from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.methods.base import LearnStep, Pruned
from nmprune.pattern import Pattern
from nmprune.refine import LayerChain, Polish, Reconstruct
from nmprune.stream import DecoderModel, LayerStep
from nmprune.stream.per_layer import Learning
from walks import layers_done, pruned, walk

FAMILIES = ["llama", "gemma2", "phi3", "opt", "gpt_neox", "gpt2", "mixtral", "qwen2_moe", "gpt_oss"]
N_HELD_OUT = {"n_held_out": 2}


@dataclass(frozen=True)
class Watching(Toy):
    """Keeps what it is given."""

    name: ClassVar[str] = "watching"
    seen: ClassVar[list] = []

    def learn(self, work, state, seed, snapshot=None):
        self.seen.append(
            {
                "index": work.index,
                "n_layers": work.n_layers,
                "roles": dict(work.roles),
                "seed": seed,
                "state": {name: value.clone() for name, value in state.items()},
                "snapshot": snapshot,
                "priors": {name: mask.clone() for name, mask in work.priors.items()},
                "stats": dict(work.stats),
                "weights": {name: weight.clone() for name, weight in work.weights.items()},
                "train": work.train,
                "held_out": work.held_out,
                "dense_loss": work.loss(work.train, work.weights),
                "targets": work._targets.all.clone(),
                "inputs": work._inputs.all.clone(),
            }
        )
        return (yield from super().learn(work, state, seed, snapshot))


@pytest.fixture
def seen():
    Watching.seen.clear()
    return Watching.seen


def dense_hidden(model, index, windows):
    """What the dense model has before decoder layer `index`."""
    return model(windows, output_hidden_states=True).hidden_states[index].detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_legal_and_kept_weights_frozen(name):
    model = tiny_models.build(name)
    decoder = DecoderModel.from_model(model)
    before = {
        linear.name: linear.in_module.of(decoder.layers[index].get_parameter(linear.parameter)).detach().clone()
        for index in range(decoder.n_layers)
        for linear in decoder.linears(index)[0]
    }
    rest = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = layers_done(walk(decoder, tiny_models.windows(), Toy(prior="wanda"), options=N_HELD_OUT))
    found = {one.name: one.pruned for layer in done for one in layer.linears}
    assert found.keys() == before.keys()
    pruned_parameters = set()
    for index in range(decoder.n_layers):
        for linear in decoder.linears(index)[0]:
            mask = found[linear.name].mask
            assert masks.n_wrong_groups(mask, Pattern(2, 4)) == 0 and found[linear.name].weight is None
            now = linear.in_module.of(decoder.layers[index].get_parameter(linear.parameter)).detach()
            assert torch.equal(now, torch.where(mask, before[linear.name], 0.0)), linear.name
            pruned_parameters.add(f"{decoder.family.layers}.{index}.{linear.parameter}")
    for parameter, value in model.named_parameters():
        if parameter not in pruned_parameters:
            assert torch.equal(value, rest[parameter]), parameter
        assert value.grad is None


def test_inputs_are_the_pruned_streams_and_targets_the_dense_layers(seen):
    model, windows = tiny_models.build("llama"), tiny_models.windows()
    first_inputs, first_outputs = (dense_hidden(model, index, windows) for index in (0, 1))
    walk(model, windows, Watching(), options=N_HELD_OUT)
    torch.testing.assert_close(seen[0]["inputs"], first_inputs)
    torch.testing.assert_close(seen[0]["targets"], first_outputs)
    assert seen[0]["dense_loss"] == pytest.approx(0, abs=1e-10) and seen[1]["dense_loss"] == pytest.approx(0, abs=1e-10)
    assert not torch.allclose(seen[1]["inputs"], first_outputs, atol=1e-3), "the second layer must meet what is pruned"


@pytest.mark.parametrize("target", [0.25, 1.0])
def test_targets_lie_between_the_layers_own_and_the_dense_models(seen, target):
    model, windows = tiny_models.build("llama", num_hidden_layers=3), tiny_models.windows()
    dense = dense_hidden(model, 2, windows)  # after the second layer; the last hidden state would be normalised
    walk(tiny_models.build("llama", num_hidden_layers=3), windows, Watching(), options=N_HELD_OUT)
    own = seen[1]["targets"]
    first_masks = seen[1]["inputs"]
    seen.clear()
    # the first layer's own output and the dense model's are one: its masks do not depend on the target
    walk(model, windows, Watching(target=target), options=N_HELD_OUT)
    torch.testing.assert_close(seen[1]["inputs"], first_masks)
    torch.testing.assert_close(seen[1]["targets"], target * dense + (1 - target) * own, rtol=1e-4, atol=1e-5)
    assert seen[1]["dense_loss"] > 1e-8


def test_propagating_the_dense_layers_gives_every_layer_the_dense_models_inputs(seen):
    model, windows = tiny_models.build("llama"), tiny_models.windows()
    expected = dense_hidden(model, 1, windows)
    walk(model, windows, Watching(), options={**N_HELD_OUT, "propagate": "dense"})
    torch.testing.assert_close(seen[1]["inputs"], expected)


def test_what_a_learner_is_given(seen):
    windows = tiny_models.windows(7)
    walk(tiny_models.build("llama"), windows, Watching(prior="wanda"), options={"n_held_out": 3})
    one, two = seen
    assert (one["index"], two["index"], one["n_layers"]) == (0, 1, 2)
    assert list(one["roles"].values())[:3] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert one["train"].tolist() == [0, 1, 2, 3] and one["held_out"].tolist() == [4, 5, 6]
    assert one["seed"] != two["seed"] and one["snapshot"] is None
    assert one["state"]["layers"] == 0 and two["state"]["layers"] == 1
    for name, weight in one["weights"].items():
        stats = one["stats"][name]
        assert weight.dtype == torch.float32 and stats.n_tokens == 7 * 16
        assert torch.equal(one["priors"][name], create("wanda").prune(weight, stats, Pattern(2, 4)).mask)


def test_prior_masks_from_elsewhere(seen):
    given = {}

    def of_layer(index):
        generator = torch.Generator().manual_seed(index)
        shapes = {one.name: one.shape for one in decoder.linears(index)[0]}
        given.update(
            {n: masks.from_scores(torch.rand(s, generator=generator), Pattern(2, 4)) for n, s in shapes.items()}
        )
        return given

    decoder = DecoderModel.from_model(tiny_models.build("llama"))
    method = Watching(prior="runs/some/masks.safetensors", steps=0)
    found = walk(decoder, tiny_models.windows(), method, options=N_HELD_OUT, learning=Learning(prior_masks=of_layer))
    assert all(torch.equal(mask, given[name]) for layer in seen for name, mask in layer["priors"].items())
    assert all(torch.equal(one.mask, given[name]) for name, one in pruned(found).items()), "no step: the prior's masks"
    with pytest.raises(ValueError, match="was not given"):
        walk(tiny_models.build("llama"), tiny_models.windows(), method)


def test_seeds_decide():
    def found(seed):
        return pruned(walk(tiny_models.build("llama"), tiny_models.windows(), Toy(), learning=Learning(seed=seed)))

    one, same, other = found(0), found(0), found(1)
    assert all(torch.equal(one[name].mask, same[name].mask) for name in one)
    assert not all(torch.equal(one[name].mask, other[name].mask) for name in one)


@pytest.mark.parametrize("target", [0.0, 0.5])
@pytest.mark.parametrize("cut", [(0, 2), (1, 1), (1, 3)])
def test_a_walk_goes_on_inside_a_layer_to_the_same_bits(cut, target):
    windows, method = tiny_models.windows(), Toy(prior="wanda", target=target)

    def whole(**kwargs):
        return walk(tiny_models.build("llama"), windows, method, options=N_HELD_OUT, **kwargs)

    expected = whole()
    kept, state, snapshot = {}, None, None
    for sign in expected:
        if isinstance(sign, LayerStep):
            if sign.learned is not None and (sign.index, sign.learned.step) == cut:
                break
        else:
            kept[sign.index], state = {one.name: one.pruned for one in sign.linears}, sign.state
    # signs are kept here after the walk went on, so the snapshot is taken anew while it is valid
    steps = iter(_until(cut, windows, method))
    snapshot = next(steps)
    learning = Learning(0, state=lambda index: state, snapshot=lambda index: snapshot if index == cut[0] else None)
    found = pruned(whole(finished=kept.get, learning=learning))
    for name, one in pruned(expected).items():
        assert torch.equal(one.mask, found[name].mask), name


def _until(cut, windows, method):
    from nmprune.stream import StreamOptions, prune_layers, select

    decoder = DecoderModel.from_model(tiny_models.build("llama"))
    selections = select(decoder, Pattern(2, 4))
    options = StreamOptions(batch_size=2, n_held_out=2)
    for sign in prune_layers(decoder, windows, method, Pattern(2, 4), selections, options):
        if isinstance(sign, LayerStep) and sign.learned and (sign.index, sign.learned.step) == cut:
            yield {name: value.clone() for name, value in sign.learned.snapshot().items()}


def test_signs_of_life_count_up_to_the_whole_layer():
    steps = walk(tiny_models.build("llama"), tiny_models.windows(), Toy(steps=7), options=N_HELD_OUT)
    for index in range(2):
        signs = [one for one in steps if isinstance(one, LayerStep) and one.index == index]
        shares = [one.done / one.total for one in signs]
        assert shares == sorted(shares) and shares[-1] <= 1
        assert [one.learned.step for one in signs if one.learned] == list(range(1, 8))
        assert {one.phase for one in signs} >= {"observe", "learn"}
    done = layers_done(steps)[0]
    assert done.seconds["learn"] > 0
    assert done.learned.steps == 7 and done.state["layers"] == 1


def test_the_record_is_measured_and_not_believed():
    model, windows = tiny_models.build("llama"), tiny_models.windows()
    done = layers_done(walk(model, windows, Toy(prior="wanda", steps=30), options=N_HELD_OUT))
    for layer in done:
        learned = layer.learned
        assert learned.loss != learned.prior_loss and learned.accepted is None
        weights = {one.name: one.pruned.mask[0].numel() * len(one.pruned.mask) for one in layer.linears}
        mean = sum(one.pruned.notes["flips"] * weights[one.name] for one in layer.linears) / sum(weights.values())
        assert 0 < learned.flips == pytest.approx(mean)
    guarded = layers_done(walk(tiny_models.build("llama"), windows, Toy(prior="wanda", guard=True), options=N_HELD_OUT))
    assert all(one.learned.accepted == (one.learned.flips > 0) for one in guarded)
    assert all(one.learned.loss <= one.learned.prior_loss for one in guarded)


def test_polish_and_reconstruct_take_the_learned_masks():
    model, windows = tiny_models.build("llama"), tiny_models.windows()
    chain = LayerChain(Toy(prior="wanda"), Polish(), Reconstruct())
    assert chain.name == "toy+polish+reconstruct" and chain.updates_weights and chain.follows_dense
    done = layers_done(walk(model, windows, chain, options=N_HELD_OUT))
    for layer in done:
        assert layer.learned.final_loss < layer.learned.loss
        for one in layer.linears:
            assert {"polish_sweeps", "ridge"} <= one.pruned.notes.keys() and one.output_error is not None


def test_linears_with_patterns_of_their_own_are_learned_in_them():
    from nmprune.stream import StreamOptions, prune_layers, select
    from nmprune.stream.selection import with_patterns

    decoder = DecoderModel.from_model(tiny_models.build("llama"))
    chosen = {
        linear.name: {"mlp.up_proj": Pattern(1, 4), "mlp.down_proj": None}.get(linear.role, Pattern(2, 4))
        for selection in select(decoder, Pattern(2, 4))
        for linear in selection.prune
    }
    selections = with_patterns(select(decoder, Pattern(2, 4)), chosen, "allocated: dense")
    steps = prune_layers(decoder, tiny_models.windows(), Toy(prior="wanda"), Pattern(2, 4), selections, StreamOptions())
    found = {one.name: one for layer in layers_done(list(steps)) for one in layer.linears}
    assert {name: one.pattern for name, one in found.items()} == {n: p for n, p in chosen.items() if p is not None}
    assert all(masks.n_wrong_groups(one.pruned.mask, one.pattern) == 0 for one in found.values())


def test_layers_without_anything_to_prune_are_passed_over():
    done = layers_done(
        walk(
            tiny_models.build("llama"), tiny_models.windows(), Toy(), exclude=("model.layers.0.*",), options=N_HELD_OUT
        )
    )
    assert done[0].linears == () and done[0].learned is None and done[0].state is None
    assert done[1].learned.layer == 1 and done[1].state["layers"] == 1


def test_what_a_walk_refuses():
    windows = tiny_models.windows()
    for method, given, options, words in (
        (Toy(), None, {}, "needs calibration text"),
        (Toy(), windows, {"true_sequential": True}, "learns all linears of a layer together"),
        (Toy(target=0.5), windows, {"propagate": "dense"}, "comparing with the dense model's outputs"),
    ):
        with pytest.raises(InputError, match=words):
            walk(tiny_models.build("llama"), given, method, options=options)


class _Broken(Toy):
    def learn(self, work, state, seed, snapshot=None):
        yield LearnStep(1, 1, {}, dict)
        first = next(iter(work.weights))
        return {first: Pruned(torch.ones_like(work.weights[first], dtype=torch.bool))}, state


def test_a_method_that_forgets_a_linear_is_our_bug():
    with pytest.raises(RuntimeError, match="returned"):
        walk(tiny_models.build("llama"), tiny_models.windows(), _Broken())
