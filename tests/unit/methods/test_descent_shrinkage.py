import pytest
import torch

from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.methods.descent import Descent
from nmprune.methods.descent_shrinkage import SHRINKAGES, held_out_shrinkage
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import Statistic, StatsAccumulator

NEEDS: frozenset[Statistic] = frozenset({"input_gram", "held_out_gram", "cross_gram"})
PATTERN = Pattern(2, 4)


def problem(n_train, n_held_out, rows=24, width=64, shift=0.2, seed=0):
    """A weight, statistics of correlated inputs (and other ones in the dense model), and the held-out inputs themselves."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.arange(1, width + 1).pow(-0.5).unsqueeze(1)
    sums = StatsAccumulator(width, NEEDS)
    parts = []
    for n_tokens, held_out in ((n_train, False), (n_held_out, True)):
        dense = torch.randn(n_tokens, width, generator=generator) @ mix
        own = dense + shift * torch.randn(n_tokens, width, generator=generator)
        sums.add(own, dense, held_out)
        parts.append((own, dense))
    return torch.randn(rows, width, generator=generator), sums.result(), parts


def plain(weight, parts, target):
    """Every shrinkage, from the inputs themselves: descend on the first part, the squared error on the second."""
    (own, dense), (held_own, held_dense) = parts
    errors = {}
    for shrinkage in SHRINKAGES:
        sums = StatsAccumulator(weight.shape[1], NEEDS)
        sums.add(own, dense)
        mask = Descent(shrinkage=shrinkage, target=target, sweeps=3).prune(weight, sums.result(), PATTERN).mask
        aim = target * held_dense + (1 - target) * held_own
        errors[shrinkage] = (held_own @ (weight * mask).T - aim @ weight.T).square().sum().item()
    return min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("target", [0.0, 0.4])
@pytest.mark.parametrize(("n_train", "seed", "shift"), [(20, 0, 0.2), (60, 3, 1.0), (200, 2, 1.0), (1500, 2, 0.2)])
def test_it_is_the_best_on_the_held_out_tokens(target, n_train, seed, shift):
    weight, stats, parts = problem(n_train, 400, seed=seed, shift=shift)
    # the prior mask that is descended from is the same: Wanda's on the tokens that are not held out
    sums = StatsAccumulator(weight.shape[1], NEEDS)
    sums.add(*parts[0])
    prior = Wanda().prune(weight, sums.result(), PATTERN).mask
    assert held_out_shrinkage(weight, stats, prior, PATTERN, target, 6) == plain(weight, parts, target)


def test_few_tokens_ask_for_more_of_it():
    chosen = []
    for n_train in (24, 4000):
        weight, stats, _ = problem(n_train, 2000, shift=0.0)
        prior = Wanda().prune(weight, stats, PATTERN).mask
        chosen.append(held_out_shrinkage(weight, stats, prior, PATTERN, 0.0, 6))
    assert chosen[0] > chosen[1] == SHRINKAGES[0]


def test_descent_takes_it_and_says_so():
    weight, stats, _ = problem(4000, 2000)
    chosen = Descent(choose_shrinkage=True).prune(weight, stats, PATTERN)
    value = chosen.notes["shrinkage"]
    assert value != 0.5 and torch.equal(chosen.mask, Descent(shrinkage=value).prune(weight, stats, PATTERN).mask)
    assert "shrinkage" not in Descent().prune(weight, stats, PATTERN).notes
    again = Descent(choose_shrinkage=True, shrinkage=7.0).prune(weight, stats, PATTERN)
    assert torch.equal(again.mask, chosen.mask), "what is chosen does not depend on what is given"


@pytest.mark.parametrize(("n_train", "n_held_out"), [(50, 0), (0, 50)])
def test_without_two_parts_the_given_one_holds(n_train, n_held_out):
    weight, stats, _ = problem(n_train, n_held_out)
    pruned = Descent(choose_shrinkage=True, shrinkage=0.7).prune(weight, stats, PATTERN)
    assert pruned.notes["shrinkage"] == 0.7
    assert torch.equal(pruned.mask, Descent(shrinkage=0.7).prune(weight, stats, PATTERN).mask)


def test_what_it_declares_and_costs():
    plain_one, choosing = Descent(), create("descent", {"choose_shrinkage": "true"})
    assert choosing.needs == plain_one.needs | {"held_out_gram"}
    assert choosing.solver_flops(576, 576) < 1.6 * plain_one.solver_flops(576, 576)
    assert choosing.solver_bytes(192, 1536) > plain_one.solver_bytes(192, 1536)
    with pytest.raises(InputError, match="expected a bool"):
        create("descent", {"choose_shrinkage": "maybe"})
    weight, stats, _ = problem(20, 20)
    object.__setattr__(stats, "held_out_gram", None)
    with pytest.raises(ValueError, match="does not declare it"):
        choosing.prune(weight, stats, PATTERN)
