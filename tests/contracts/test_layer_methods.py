"""Laws for every registered method that learns decoder layers; a registry line is all that a new one needs."""

import dataclasses
import math

import pytest
import torch

from layer_work import layer_work
from nmprune import masks, methods
from nmprune.methods.base import PerLayer
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERNS = [Pattern.parse(text) for text in ("2:4", "4:8", "1:4", "3:4", "8:16")]
NAMES = [name for name, method in methods.METHODS.items() if issubclass(method, PerLayer)]
TWO_OF_FOUR = Pattern(2, 4)
SHORT = {"steps": 5}  # a learner's own default would take minutes
CASES = [
    pytest.param(name, pattern, id=f"{name}-{pattern}")
    for name in NAMES
    for pattern in PATTERNS
    if methods.create(name).why_not(pattern) is None
]

every_case = pytest.mark.parametrize(("name", "pattern"), CASES)
every_method = pytest.mark.parametrize("name", NAMES)


def made(name, **settings):
    return methods.create(name, {**SHORT, **settings})


def work_of(method, pattern=TWO_OF_FOUR, family="llama", **kwargs):
    prior = method.prior if method.prior in methods.METHODS else "none"
    return layer_work(family, pattern=pattern, method=method, prior=prior, **kwargs)


def start(method, work, pattern=TWO_OF_FOUR, seed=0):
    roles = list(dict.fromkeys(work.roles.values()))
    return method.start(roles, work.n_layers, pattern, torch.Generator().manual_seed(seed))


def learn(method, work, state, seed=3, snapshot=None):
    """(what is returned, the signs, the snapshot after each)."""
    signs, snapshots, steps = [], [], method.learn(work, state, seed, snapshot)
    while True:
        try:
            sign = next(steps)
        except StopIteration as end:
            return end.value, signs, snapshots
        signs.append(sign)
        snapshots.append({key: value.clone() for key, value in sign.snapshot().items()})


def assert_same(one, other):
    """Bit for bit: masks, notes and state."""
    (pruned, state), (again, state_again) = one, other
    assert pruned.keys() == again.keys() and state.keys() == state_again.keys()
    for name in pruned:
        assert torch.equal(pruned[name].mask, again[name].mask), name
        assert pruned[name].notes == again[name].notes, name
    for name in state:
        assert torch.equal(state[name], state_again[name]), name


@every_case
def test_masks_are_legal_weights_frozen_and_states_plain(name, pattern):
    method = made(name)
    work = work_of(method, pattern, hidden_size=64, intermediate_size=64)
    (pruned, state), signs, snapshots = learn(method, work, start(method, work, pattern))
    assert pruned.keys() == work.weights.keys()
    for key, one in pruned.items():
        assert one.mask.dtype == torch.bool and one.mask.shape == work.weights[key].shape
        assert masks.n_wrong_groups(one.mask, pattern) == 0
        assert (one.weight is not None) == method.updates_weights
        assert all(isinstance(value, float | int | str) for value in one.notes.values())
    assert [sign.step for sign in signs] == list(range(1, len(signs) + 1)) and signs
    for sign in signs:
        assert sign.step <= sign.total
        assert all(type(value) is float and math.isfinite(value) for value in sign.values.values()), sign.values
    for plain in (state, *snapshots):
        assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in plain.values())


@pytest.mark.parametrize("family", ["phi3", "gpt2", "qwen3_moe"])
@every_method
def test_other_ways_to_store_linears(name, family):
    method = made(name)
    work = work_of(method, family=family)
    (pruned, _), _, _ = learn(method, work, start(method, work))
    assert all(masks.n_wrong_groups(one.mask, Pattern(2, 4)) == 0 for one in pruned.values())


@every_method
def test_the_same_seed_gives_the_same_bits_and_nothing_given_is_modified(name):
    method = made(name)
    work = work_of(method)
    state = start(method, work)
    kept = [{key: value.clone() for key, value in one.items()} for one in (state, work.weights, work.priors)]
    assert_same(learn(method, work, state)[0], learn(method, work, state)[0])
    for given, before in zip((state, work.weights, work.priors), kept, strict=True):
        assert all(torch.equal(given[key], value) for key, value in before.items())
    again = start(method, work)
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize("cut", [0, 2, -1])
@every_method
def test_a_snapshot_goes_on_to_the_same_bits(name, cut):
    method = made(name)
    work = work_of(method)
    state = start(method, work)
    expected, signs, snapshots = learn(method, work, state)
    found, rest, _ = learn(method, work_of(method), state, snapshot=snapshots[cut])
    assert_same(expected, found)
    assert [one.step for one in rest] == [one.step for one in signs][len(signs) - len(rest) :]
    assert [one.values for one in rest] == [one.values for one in signs][len(signs) - len(rest) :]
    assert len(rest) == len(signs) - signs[cut].step


@every_method
def test_the_state_goes_from_layer_to_layer(name):
    method = made(name)
    first, second = work_of(method), work_of(method, index=1)
    (_, state), _, _ = learn(method, first, start(method, first))
    (pruned, after), _, _ = learn(method, second, state)
    assert pruned.keys() == second.weights.keys() and after.keys() >= set()
    roles = list(dict.fromkeys(first.roles.values()))
    held = sum(value.nbytes for value in after.values())
    assert held <= 1.1 * method.state_bytes(roles, first.n_layers, Pattern(2, 4)) + 4096


@every_method
def test_held_out_sequences_teach_nothing(name):
    method = made(name)
    work = work_of(method)
    gradients, asked = work.gradients, []

    def watched(sequences, weights):
        asked.extend(sequences.tolist())
        return gradients(sequences, weights)

    work.gradients = watched
    learn(method, work, start(method, work))
    assert asked and not set(asked) & set(work.held_out.tolist())


@every_method
def test_nothing_held_out_and_one_sequence(name):
    method = made(name)
    work = work_of(method, n_sequences=1, n_held_out=0)
    (pruned, _), signs, _ = learn(method, work, start(method, work))
    assert pruned.keys() == work.weights.keys()
    assert all(math.isfinite(value) for sign in signs for value in sign.values.values())


@every_method
def test_no_prior(name):
    method = made(name, prior="none")
    work = work_of(method)
    assert not work.priors
    (pruned, _), _, _ = learn(method, work, start(method, work))
    assert all(masks.n_wrong_groups(one.mask, Pattern(2, 4)) == 0 for one in pruned.values())


@every_method
def test_the_distance_is_one_number_a_sequence(name):
    generator = torch.Generator().manual_seed(0)
    inputs, targets, update = (torch.randn(3, 8, 16, generator=generator) for _ in range(3))
    output = (inputs + update).requires_grad_()
    found = methods.create(name).distance(output, targets, inputs)
    assert found.shape == (3,) and (found > 0).all()
    found.sum().backward()
    assert output.grad.isfinite().all() and output.grad.abs().sum() > 0
    exact = methods.create(name).distance(targets, targets, inputs)
    assert torch.equal(exact, torch.zeros(3))


@every_method
def test_statistics_are_declared(name):
    method = made(name)
    work = work_of(method)
    without = {key: InputStats(stats.n_tokens) for key, stats in work.stats.items()}
    work.stats = without
    if method.needs:
        with pytest.raises(ValueError, match="was not collected"):
            learn(method, work, start(method, work))
    else:
        learn(method, work, start(method, work))


@every_method
def test_bytes_for_plans_are_above_zero_and_grow(name):
    method = methods.create(name)
    small, large = (method.learner_bytes(n, Pattern(2, 4)) for n in (10_000, 10_000_000))
    assert 0 < small < large
    few, many = (method.state_bytes(["a", "b"], n, Pattern(2, 4)) for n in (2, 80))
    assert few <= many


@every_method
def test_a_method_is_frozen_plain_data(name):
    method = methods.create(name)
    assert dataclasses.is_dataclass(method) and method == methods.create(name, method.hyper_parameters())
    as_text = {key: str(value) for key, value in method.hyper_parameters().items()}
    assert methods.create(name, as_text) == method
    fields = {field.name for field in dataclasses.fields(method)}
    assert {"prior", "target", "steps"} <= fields
    assert not fields & {"loss_aware", "name"}, "results.json has these beside the fields"
    for preset in method.presets:
        assert methods.create(name, {"preset": preset, "steps": 5}).steps == 5
