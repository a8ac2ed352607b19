"""Laws for every registered method and every pattern it supports; a registry line is all that a new method needs."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmprune import masks, methods
from nmprune.errors import InputError
from nmprune.methods.base import PerLinear
from nmprune.pattern import Pattern
from nmprune.stats import GRADIENTS, InputStats, StatsAccumulator

PATTERNS = [Pattern.parse(text) for text in ("2:4", "4:8", "1:4", "3:4", "8:16")]
NAMES = [name for name, method in methods.METHODS.items() if issubclass(method, PerLinear)]
CASES = [
    pytest.param(name, pattern, id=f"{name}-{pattern}")
    for name in NAMES
    for pattern in PATTERNS
    if methods.create(name).why_not(pattern) is None
]
WITH_STATISTICS = [name for name in NAMES if methods.METHODS[name].needs]
# Laws that some methods break on purpose.
COUPLES_ROWS = {"ria", "alps", "pruner_zero"}  # a row's mask depends on other rows
COUPLES_GROUPS = {"descent", "sparsegpt"}  # a group's mask depends on the groups that were done before it
HAS_UNITS = {"dsnot"}  # a threshold in the unit of the output

every_case = pytest.mark.parametrize(("name", "pattern"), CASES)
every_method = pytest.mark.parametrize("name", NAMES)


def statistics(name, inputs, rows=12):
    needs = methods.METHODS[name].needs
    accumulator = StatsAccumulator(inputs.shape[-1], needs)
    accumulator.add(inputs, inputs.roll(1, dims=0))  # of the dense model: any other inputs do
    return dataclasses.replace(accumulator.result(), **gradients(needs, inputs, rows))


def gradients(needs, inputs, rows):
    """Gradient sums where the method declares them, as if each token were a sequence with an output gradient of its own."""
    output_gradients = torch.randn(len(inputs), rows, generator=torch.Generator().manual_seed(1))
    each = output_gradients[:, :, None] * inputs[:, None, :]
    sums = {"weight_grad_abs": each.abs().sum(0), "weight_grad_sq": each.square().sum(0)}
    found = {key: value for key, value in sums.items() if key in needs}
    return {**found, "n_grad_sequences": len(inputs)} if found else {}


def of_rows(stats, rows):
    """The statistics of a linear that has only these output rows."""
    keys = [key for key in GRADIENTS if getattr(stats, key) is not None]
    return dataclasses.replace(stats, **{key: getattr(stats, key)[rows] for key in keys})


def problem(name, rows=12, width=48, n_tokens=80, seed=0):
    """A weight and the statistics of correlated inputs, only those that the method declares."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(n_tokens, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), statistics(name, inputs)


def prune(name, weight, stats, pattern):
    return methods.create(name).prune(weight, stats, pattern)


def assert_lawful(name, weight, pattern, pruned):
    assert pruned.mask.dtype == torch.bool
    assert pruned.mask.shape == weight.shape and pruned.mask.device == weight.device
    assert masks.n_wrong_groups(pruned.mask, pattern) == 0
    assert (pruned.weight is not None) == methods.METHODS[name].updates_weights
    if pruned.weight is not None:
        assert pruned.weight.dtype == torch.float32 and pruned.weight.shape == weight.shape
        assert torch.isfinite(pruned.weight).all()
        assert not pruned.weight.requires_grad
        bits = pruned.weight.contiguous().view(torch.int32)
        assert not bits[~pruned.mask].any(), "a masked weight is not exactly +0.0"
    assert all(isinstance(value, float | int | str) for value in pruned.notes.values())


def assert_same(one, other):
    """Bit for bit."""
    assert torch.equal(one.mask, other.mask)
    if one.weight is not None:
        assert torch.equal(one.weight.view(torch.int32), other.weight.view(torch.int32))
    assert one.notes == other.notes


@every_case
def test_result_has_the_right_form(name, pattern):
    weight, stats = problem(name)
    assert_lawful(name, weight, pattern, prune(name, weight, stats, pattern))


@every_case
def test_degenerate_weights_still_keep_exactly_n(name, pattern):
    weight, stats = problem(name)
    for same in (torch.zeros_like(weight), torch.ones_like(weight), torch.full_like(weight, -1e-30), weight.sign()):
        assert_lawful(name, same, pattern, prune(name, same, stats, pattern))
    silent = statistics(name, torch.zeros(5, weight.shape[1]))
    assert_lawful(name, weight, pattern, prune(name, weight, silent, pattern))


@every_method
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_finite_weight_and_any_inputs(name, data):
    pattern = data.draw(st.sampled_from([p.values[1] for p in CASES if p.values[0] == name]))
    width = 2 * pattern.group
    # neighbouring powers of two and zeros: ties, dead inputs and rank-deficient statistics come up all the time
    elements = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-20, 1e15])
    weight = torch.from_numpy(data.draw(hnp.arrays("float32", (3, width), elements=elements)))
    inputs = torch.from_numpy(data.draw(hnp.arrays("float32", (4, width), elements=st.sampled_from([0.0, 1.0, -2.0]))))
    assert_lawful(name, weight, pattern, prune(name, weight, statistics(name, inputs, rows=3), pattern))


@every_case
def test_nothing_given_is_modified_and_twice_is_the_same(name, pattern):
    weight, stats = problem(name)
    kept_weight = weight.clone()
    kept = {key: value.clone() for key, value in vars(stats).items() if isinstance(value, torch.Tensor)}
    assert_same(prune(name, weight, stats, pattern), prune(name, weight, stats, pattern))
    assert torch.equal(weight, kept_weight)
    assert set(kept) == set(methods.METHODS[name].needs)
    for key, value in kept.items():
        assert torch.equal(getattr(stats, key), value), key


@every_case
def test_a_power_of_two_on_the_weights_changes_no_mask(name, pattern):
    if name in HAS_UNITS:
        pytest.skip(f"{name} has a setting in the unit of the output")
    weight, stats = problem(name)
    one, other = prune(name, weight, stats, pattern), prune(name, 2 * weight, stats, pattern)
    assert torch.equal(one.mask, other.mask)
    if one.weight is not None:
        assert torch.equal(2 * one.weight, other.weight)


@every_case
def test_rows_do_not_depend_on_each_other(name, pattern):
    if name in COUPLES_ROWS:
        pytest.skip(f"{name} couples rows by its definition")
    weight, stats = problem(name)
    whole, some = prune(name, weight, stats, pattern), prune(name, weight[3:8], of_rows(stats, slice(3, 8)), pattern)
    assert torch.equal(whole.mask[3:8], some.mask)
    if whole.weight is not None:
        torch.testing.assert_close(whole.weight[3:8], some.weight, rtol=0, atol=1e-5)


@every_case
def test_permuting_groups_permutes_the_mask(name, pattern):
    if name in COUPLES_GROUPS:
        pytest.skip(f"{name} goes through the groups in order by its definition")
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(12, 48, generator=generator), torch.randn(60, 48, generator=generator)
    order = torch.randperm(48 // pattern.group, generator=generator)
    columns = torch.arange(48).view(-1, pattern.group)[order].flatten()
    straight = prune(name, weight, statistics(name, inputs), pattern)
    permuted = prune(name, weight[:, columns], statistics(name, inputs[:, columns]), pattern)
    assert torch.equal(permuted.mask, straight.mask[:, columns])


@every_case
def test_strided_weights_and_parameters(name, pattern):
    weight, stats = problem(name)
    expected = prune(name, weight, stats, pattern)
    assert_same(prune(name, weight.T.contiguous().T, stats, pattern), expected)
    parameter = prune(name, torch.nn.Parameter(weight.clone()), stats, pattern)
    assert_lawful(name, weight, pattern, parameter)
    assert_same(parameter, expected)


@every_case
def test_width_that_is_not_a_whole_number_of_groups(name, pattern):
    weight, stats = problem(name, width=3 * pattern.group + 1)
    expected = f"in_features {3 * pattern.group + 1} is not a multiple of {pattern.group}"
    with pytest.raises(InputError, match=expected):
        prune(name, weight, stats, pattern)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_method
def test_weights_that_are_not_finite(name, bad):
    weight, stats = problem(name)
    weight[4, 9] = bad
    with pytest.raises(InputError, match="NaN or infinit"):
        prune(name, weight, stats, CASES_OF[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_statistics_that_are_not_finite(name, bad):
    weight, _ = problem(name)
    inputs = torch.ones(4, 48)
    inputs[2, 7] = bad
    with pytest.raises(InputError, match="NaN or infinit"):
        prune(name, weight, statistics(name, inputs), CASES_OF[name])


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_statistics_of_no_token_or_of_another_width(name):
    weight, _ = problem(name)
    with pytest.raises(InputError, match="no calibration token"):
        prune(name, weight, statistics(name, torch.zeros(0, 48)), CASES_OF[name])
    with pytest.raises(InputError, match="belong to another linear"):
        prune(name, weight, statistics(name, torch.ones(5, 96)), CASES_OF[name])


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_statistic_that_was_not_collected_is_a_bug_and_not_an_input_error(name):
    weight, _ = problem(name)
    with pytest.raises(ValueError, match="was not collected"):
        prune(name, weight, InputStats(5), CASES_OF[name])


@every_method
def test_a_method_is_frozen_plain_data(name):
    method = methods.create(name)
    assert dataclasses.is_dataclass(method) and method == methods.create(name)
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, field.default)
    assert methods.create(name, method.hyper_parameters()) == method
    as_text = {key: str(value) for key, value in method.hyper_parameters().items()}
    assert methods.create(name, as_text) == method


CASES_OF = {name: next(p.values[1] for p in CASES if p.values[0] == name) for name in NAMES}
