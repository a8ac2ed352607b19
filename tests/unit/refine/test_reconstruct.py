from __future__ import annotations

import dataclasses

import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import Magnitude
from nmprune.pattern import Pattern
from nmprune.refine import Reconstruct
from nmprune.refine.reconstruct import RIDGES
from nmprune.stats import InputStats, StatsAccumulator

PATTERN = Pattern(2, 4)
WIDTH = 16
NEEDS = Reconstruct().needs


def tokens(n=120, seed=0, drift=0.4):
    """Own inputs X and the dense model's D of the same tokens, (n, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(WIDTH) + 0.7 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / WIDTH**0.5
    dense = torch.randn(n, WIDTH, generator=generator) @ mix
    return dense + drift * torch.randn(n, WIDTH, generator=generator), dense


def statistics(train, held_out, needs=NEEDS):
    sums = StatsAccumulator(WIDTH, needs)
    for (own, dense), held in ((train, False), (held_out, True)):
        sums.add(own, dense, held)
    return sums.result()


def linear(rows=8, seed=5):
    weight = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return weight, Magnitude().prune(weight, InputStats(0), PATTERN)


def best(weight, mask, own, dense, target, ridge):
    """Row by row, fp64: least squares with the ridge as more tokens, whose outputs are the dense ones."""
    own, dense, weight = own.double(), dense.double(), weight.double()
    extra = torch.diag((ridge * own.square().sum(0)).sqrt())
    rows = torch.cat([own, extra])
    goals = torch.cat([target * dense + (1 - target) * own, extra]) @ weight.T
    found = torch.zeros_like(weight)
    for row, keep in enumerate(mask):
        found[row, keep] = torch.linalg.lstsq(rows[:, keep], goals[:, row]).solution
    return found


def output_error(weight, new, own, dense, target):
    """||X w - T w0||^2."""
    goal = (target * dense + (1 - target) * own).double() @ weight.double().T
    return (own.double() @ new.double().T - goal).square().sum().item()


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ridge", [0.05, 1.0])
def test_it_is_ridge_regression_on_the_tokens_that_are_not_held_out(target, ridge):
    train, held_out = tokens(), tokens(40, seed=1)
    weight, pruned = linear()
    step = Reconstruct(ridge=ridge, target=target, iterations=200)
    done = step.refine(weight, pruned, statistics(train, held_out, step.needs), PATTERN)
    expected = best(weight, pruned.mask, *train, target, ridge)
    torch.testing.assert_close(done.weight.double(), expected, rtol=0, atol=2e-3)
    for other in (0.0, 0.5, 1.0):
        if other != target:
            far = best(weight, pruned.mask, *train, other, ridge)
            assert (done.weight - far).abs().max() > 0.02, "the test does not tell the targets apart"
    assert done.notes["reconstruct_taken"] == 1 and done.notes["ridge"] == ridge
    was, now = (output_error(weight, new, *held_out, target) for new in (weight * pruned.mask, done.weight))
    output = (held_out[0].double() @ weight.double().T).square().sum().item()
    assert done.notes["reconstruct_held_out_change"] == pytest.approx((now - was) / output, rel=1e-3)
    assert now < was


def test_the_mask_stays_and_what_is_off_it_is_plus_zero():
    weight, pruned = linear()
    weight[0, :4] = -0.0  # a kept -0.0, and dropped ones
    stats, before = statistics(tokens(), tokens(40, seed=1)), (weight.clone(), pruned.mask.clone())
    done = Reconstruct().refine(weight, pruned, stats, PATTERN)
    assert torch.equal(done.mask, before[1]) and masks.n_wrong_groups(done.mask, PATTERN) == 0
    assert not done.weight.view(torch.int32)[~done.mask].any()
    assert torch.equal(weight, before[0]) and torch.equal(pruned.mask, before[1])


def test_what_the_method_noted_is_kept():
    weight, pruned = linear()
    pruned = dataclasses.replace(pruned, notes={"damping_steps": 1})
    done = Reconstruct().refine(weight, pruned, statistics(tokens(), tokens(40, seed=1)), PATTERN)
    assert done.notes["damping_steps"] == 1
    assert set(done.notes) == {
        *("damping_steps", "ridge", "reconstruct_iterations"),
        *("reconstruct_held_out_change", "reconstruct_taken"),
    }


def contradicting():
    """Statistics whose held-out tokens hold what the others never do: pairs of inputs with the opposite sign."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(80, WIDTH // 2, generator=generator)

    def pairs(sign):
        x = torch.stack([half, sign * half], dim=2).reshape(80, WIDTH) + 0.1 * torch.randn(
            80, WIDTH, generator=generator
        )
        return x, x

    return statistics(pairs(1), pairs(-1))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.03])
def test_held_out_tokens_that_contradict_keep_the_old_weights(moved, ridge):
    weight, pruned = linear()
    pruned = dataclasses.replace(pruned, mask=torch.tensor([True, False] * (WIDTH // 2)).expand(8, WIDTH).contiguous())
    if moved:
        pruned = dataclasses.replace(pruned, weight=weight * pruned.mask * 0.9)
    done = Reconstruct(ridge=ridge).refine(weight, pruned, contradicting(), PATTERN)
    assert done.notes["reconstruct_taken"] == 0
    assert done.notes["reconstruct_held_out_change"] > 0
    assert done.weight is pruned.weight, "frozen stays frozen, moved stays as it came"
    assert torch.equal(done.mask, pruned.mask)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_ridge_0_takes_the_ridge_of_least_held_out_error(target):
    weight, pruned = linear()
    found = set()
    for n_train, drift in ((16, 2.0), (24, 1.0), (400, 0.3), (4000, 0.1)):
        train, held_out = tokens(n_train, drift=drift), tokens(300, seed=1, drift=drift)
        stats = statistics(train, held_out)
        errors = {
            ridge: output_error(weight, best(weight, pruned.mask, *train, target, ridge), *held_out, target)
            for ridge in RIDGES
        }
        done = Reconstruct(target=target).refine(weight, pruned, stats, PATTERN)
        assert errors[done.notes["ridge"]] <= min(errors.values()) * 1.001
        given = Reconstruct(target=target, ridge=done.notes["ridge"]).refine(weight, pruned, stats, PATTERN)
        assert done.notes["reconstruct_taken"] == given.notes["reconstruct_taken"]
        if given.weight is not None:
            assert torch.equal(done.weight, given.weight)
        found.add(done.notes["ridge"])
    assert len(found) >= 3, "the test does not tell the ridges apart"


def test_the_ridge_is_chosen_on_a_sample_of_rows(monkeypatch):
    weight, pruned = linear(rows=300)
    seen, solve = [], Reconstruct._solve

    def watched(train, share, ridge, weight_OI, *rest):
        seen.append((ridge, weight_OI.clone()))
        return solve(train, share, ridge, weight_OI, *rest)

    monkeypatch.setattr(Reconstruct, "_solve", staticmethod(watched))
    Reconstruct().refine(weight, pruned, statistics(tokens(), tokens(40, seed=1)), PATTERN)
    assert [ridge for ridge, _ in seen[:-1]] == list(RIDGES)
    assert all(torch.equal(rows, weight[::4]) for _, rows in seen[:-1])
    assert torch.equal(seen[-1][1], weight)


def test_without_the_dense_models_inputs_the_target_is_the_own_output_and_the_notes_say_so():
    train, held_out = tokens(), tokens(40, seed=1)
    weight, pruned = linear()
    own_only = statistics(train, held_out, Reconstruct(target=0).needs)
    assert own_only.cross_gram is None
    done = Reconstruct(target=1.0, ridge=0.1).refine(weight, pruned, own_only, PATTERN)
    plain = Reconstruct(target=0.0, ridge=0.1).refine(weight, pruned, own_only, PATTERN)
    assert torch.equal(done.weight, plain.weight)
    assert done.notes == {**plain.notes, "reconstruct_target": "own inputs"}


def test_no_held_out_token_is_no_reason_to_move_a_weight():
    weight, pruned = linear()
    stats = statistics(tokens(), tuple(x[:0] for x in tokens()))
    done = Reconstruct().refine(weight, pruned, stats, PATTERN)
    assert done.weight is None and done.notes["reconstruct_taken"] == 0
    assert done.notes["reconstruct_held_out_change"] == 0.0


def test_it_starts_from_moved_weights():
    weight, pruned = linear()
    stats = statistics(tokens(), tokens(40, seed=1))
    first = Reconstruct(ridge=0.1).refine(weight, pruned, stats, PATTERN)
    again = Reconstruct(ridge=0.1).refine(weight, dataclasses.replace(pruned, weight=first.weight), stats, PATTERN)
    assert first.notes["reconstruct_iterations"] > 5 and again.notes["reconstruct_iterations"] <= 1


def test_linears_of_one_input_share_the_sums_of_the_training_tokens():
    weight, pruned = linear()
    stats = statistics(tokens(), tokens(40, seed=1))
    Reconstruct().refine(weight, pruned, stats, PATTERN)
    made = stats.derived("objectives", lambda: pytest.fail("computed again"))
    torch.testing.assert_close(made[0].gram, tokens()[0].T @ tokens()[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("ridge", -0.1, r"reconstruct\.ridge is -0\.1; expected a number >= 0\."),
        ("ridge", float("nan"), r"reconstruct\.ridge is nan"),
        ("target", 1.5, r"reconstruct\.target is 1\.5; expected a number >= 0 and <= 1\."),
        ("iterations", 0, r"reconstruct\.iterations is 0; expected a whole number >= 1"),
    ],
)
def test_settings_out_of_range(key, value, expected):
    with pytest.raises(InputError, match=expected):
        Reconstruct(**{key: value})


def test_what_it_needs():
    assert Reconstruct().needs == {"input_gram", "held_out_gram", "cross_gram"}
    assert Reconstruct(target=0).needs == {"input_gram", "held_out_gram"}
    weight, pruned = linear()
    stats = dataclasses.replace(statistics(tokens(), tokens(40, seed=1)), held_out_gram=None)
    with pytest.raises(ValueError, match="held_out_gram was not collected: the method does not declare it"):
        Reconstruct().refine(weight, pruned, stats, PATTERN)


def test_inputs_of_the_dense_model_that_are_not_finite_are_refused():
    weight, pruned = linear()
    own, dense = tokens()
    dense[3, 2] = float("inf")
    with pytest.raises(InputError, match="holds NaN or infinity"):
        Reconstruct().refine(weight, pruned, statistics((own, dense), tokens(40, seed=1)), PATTERN)
