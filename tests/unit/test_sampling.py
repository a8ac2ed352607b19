import itertools
import math

import pytest
import torch

from nmprune import masks, ranking, sampling
from nmprune.pattern import Pattern

PATTERNS = [Pattern.parse(text) for text in ("1:2", "2:4", "1:4", "3:4", "4:8", "3:16")]
F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64) * scale


def chance_of_order(logits, order):
    """The definition: a product of chances, each among the slots that are left."""
    weights = [math.exp(x) for x in logits]
    chance = 1.0
    for slot in order:
        chance *= weights[slot] / sum(weights)
        weights[slot] = 0.0
    return chance


def orders_of(m, n):
    return list(itertools.permutations(range(m), n))


def test_gumbel_is_finite_even_where_the_uniform_number_is_zero(monkeypatch):
    extremes = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    monkeypatch.setattr(torch, "rand", lambda *shape, **where: extremes.clone())
    noise = sampling.gumbel((4,), generator())
    assert torch.isfinite(noise).all()
    assert (noise.diff() > 0).all()
    torch.testing.assert_close(noise[2].item(), -math.log(math.log(2)))
    assert noise.min() > -2.9 and noise.max() < 16.7


def test_gumbel_has_the_mean_and_variance_of_its_law_and_follows_the_generator():
    noise = sampling.gumbel((200, 500), generator(1))
    assert noise.dtype == torch.float32 and noise.shape == (200, 500)
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.015)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.04)
    assert torch.equal(noise, sampling.gumbel((200, 500), generator(1)))
    assert not torch.equal(noise, sampling.gumbel((200, 500), generator(2)))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("temperature", [4.0, 0.05])
def test_soft_masks_lie_between_0_and_1_and_sum_to_n(pattern, temperature):
    candidates = masks.candidates(pattern)
    logits = normal(2, 5, len(candidates), scale=3).float()
    noise = sampling.gumbel(logits.shape, generator())
    soft = sampling.soft_mask(logits, candidates, temperature, noise)
    assert soft.shape == (2, 5, pattern.group)
    assert soft.min() >= 0 and soft.max() <= 1 + 1e-6
    torch.testing.assert_close(soft.sum(-1), torch.full((2, 5), float(pattern.kept)))


def test_a_soft_mask_is_the_mean_of_the_candidates_under_the_softmax_and_differentiable():
    candidates = masks.candidates(Pattern(2, 4))
    logits, noise = normal(3, 6).requires_grad_(), normal(3, 6, seed=1)
    soft = sampling.soft_mask(logits, candidates, 0.7, noise)
    weights = torch.exp((logits + noise) / 0.7)
    expected = (weights / weights.sum(-1, keepdim=True)) @ candidates.to(F64)
    torch.testing.assert_close(soft, expected)
    assert torch.autograd.gradcheck(lambda x: sampling.soft_mask(x, candidates, 0.7, noise), logits)


def test_a_cold_soft_mask_is_the_best_candidate():
    candidates = masks.candidates(Pattern(2, 4))
    logits = normal(50, 6)
    cold = sampling.soft_mask(logits, candidates, 1e-4)
    torch.testing.assert_close(cold, candidates[logits.argmax(-1)].to(F64))


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=str)
@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_soft_top_is_the_soft_mask_of_additive_logits(pattern, temperature):
    candidates = masks.candidates(pattern)
    slots = normal(2, 7, pattern.group, scale=2)
    soft = sampling.soft_top(slots, pattern.kept, temperature)
    expected = sampling.soft_mask(slots @ candidates.to(F64).T, candidates, temperature)
    torch.testing.assert_close(soft, expected)


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(8, 16), Pattern(16, 32)], ids=str)
@pytest.mark.parametrize("temperature", [8.0, 1.0, 0.05, 1e-4])
def test_soft_top_sums_to_n_with_entries_up_to_1_at_every_temperature(pattern, temperature):
    slots = normal(3, 40, pattern.group, scale=5).float()
    soft = sampling.soft_top(slots, pattern.kept, temperature, sampling.gumbel(slots.shape, generator()))
    assert soft.dtype == torch.float32 and soft.shape == slots.shape
    assert soft.min() >= 0 and soft.max() <= 1 + 1e-4
    torch.testing.assert_close(soft.sum(-1), torch.full((3, 40), float(pattern.kept)), rtol=1e-4, atol=0)


def test_soft_top_has_the_gradient_of_its_value(monkeypatch):
    monkeypatch.setattr(sampling, "_CHUNK", 2)  # more than one piece
    slots = normal(5, 6).requires_grad_()
    noise = normal(5, 6, seed=1)
    assert torch.autograd.gradcheck(lambda x: sampling.soft_top(x, 3, 0.6, noise), slots)


def test_soft_top_of_equal_slots_is_even_and_a_cold_one_is_the_top():
    torch.testing.assert_close(sampling.soft_top(torch.full((2, 8), 3.0), 2, 0.1), torch.full((2, 8), 0.25))
    slots = normal(60, 8)
    torch.testing.assert_close(sampling.soft_top(slots, 3, 1e-4), ranking.top(slots, 3).to(F64))
    ties = torch.tensor([[1e4, 1e4, 1e4, -1e4]])
    torch.testing.assert_close(sampling.soft_top(ties, 2, 0.05), torch.tensor([[2 / 3, 2 / 3, 2 / 3, 0.0]]))


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    soft = torch.rand(6, generator=generator()).requires_grad_()
    hard = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    mixed = sampling.straight_through(soft, hard)
    assert torch.equal(mixed, hard.float())
    cotangent = torch.arange(6.0)
    mixed.backward(cotangent)
    assert torch.equal(soft.grad, cotangent)


@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 1), (4, 3), (5, 3)])
def test_draws_follow_plackett_luce(m, n):
    logits = torch.linspace(-1, 1.2, m)
    draws = 40_000
    drawn = sampling.draw_without_replacement(logits.expand(draws, m), n, generator(3))
    assert drawn.dtype == torch.int64 and drawn.shape == (draws, n)
    counts = dict.fromkeys(orders_of(m, n), 0)
    for order in map(tuple, drawn.tolist()):
        counts[order] += 1
    for order, count in counts.items():
        chance = chance_of_order(logits.tolist(), order)
        assert abs(count / draws - chance) < 4.5 * math.sqrt(chance * (1 - chance) / draws)


def test_draws_take_leading_axes_leave_the_logits_alone_and_make_the_same_set_as_draw_mask():
    logits = normal(3, 4, 8).float()
    before = logits.clone()
    drawn = sampling.draw_without_replacement(logits, 3, generator(5))
    mask = sampling.draw_mask(logits, 3, generator(5))
    assert torch.equal(logits, before)
    assert drawn.shape == (3, 4, 3)
    assert torch.equal(torch.zeros(3, 4, 8, dtype=torch.bool).scatter_(-1, drawn, True), mask)
    assert (mask.sum(-1) == 3).all()


@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 1), (4, 3), (5, 3)])
def test_scores_are_the_enumerated_log_probabilities(m, n):
    logits = normal(m)
    orders = orders_of(m, n)
    drawn = torch.tensor(orders)
    scores = sampling.ordered_log_score(logits.expand(len(orders), m), drawn)
    chances = [chance_of_order(logits.tolist(), order) for order in orders]
    torch.testing.assert_close(scores.exp(), torch.tensor(chances, dtype=F64))
    sets = sampling.set_log_score(logits.expand(len(orders), m), drawn).exp()
    for order, chance in zip(orders, sets.tolist(), strict=True):
        same_set = [c for other, c in zip(orders, chances, strict=True) if set(other) == set(order)]
        assert chance == pytest.approx(sum(same_set), rel=1e-12)


def by_autograd(logits, drawn, unordered):
    """Log-probability written with autograd's own operations."""
    orders = list(itertools.permutations(range(drawn.shape[-1]))) if unordered else [tuple(range(drawn.shape[-1]))]
    scores = []
    for order in orders:
        remaining, score = logits, 0
        for k in order:
            slot = drawn[..., k : k + 1]
            score = score + remaining.log_softmax(-1).gather(-1, slot).squeeze(-1)
            remaining = remaining.scatter(-1, slot, -torch.inf)
        scores.append(score)
    return torch.stack(scores).logsumexp(0).sum()


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=str)
def test_score_gradients_are_those_of_autograd(pattern, unordered):
    logits = normal(2, 6, pattern.group, scale=2).requires_grad_()
    drawn = sampling.draw_without_replacement(logits, pattern.kept, generator())
    (expected,) = torch.autograd.grad(by_autograd(logits, drawn, unordered), logits)
    gradient = sampling.set_score_gradient if unordered else sampling.ordered_score_gradient
    actual = gradient(logits, drawn)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("m", "n"), [(4, 2), (4, 3), (5, 3)])
def test_scores_have_mean_zero_and_make_an_unbiased_gradient(m, n):
    """E[score] = 0 and E[loss(set) * score] = gradient of E[loss(set)], summed over every order with its chance."""
    logits = normal(m).requires_grad_()
    orders = torch.tensor(orders_of(m, n))
    chances = sampling.ordered_log_score(logits.expand(len(orders), m), orders).exp()
    loss = (normal(m, m, seed=7) @ torch.zeros(m, len(orders), dtype=F64).scatter_(0, orders.T, 1.0)).square().sum(0)
    chance = torch.stack([by_autograd(logits, order, False) for order in orders]).exp()
    (expected,) = torch.autograd.grad((chance * loss).sum(), logits)
    for gradient in (sampling.ordered_score_gradient, sampling.set_score_gradient):
        score = gradient(logits.expand(len(orders), m), orders)
        torch.testing.assert_close(chances @ score, torch.zeros(m, dtype=F64))
        torch.testing.assert_close((chances * loss) @ score, expected)


def test_the_score_of_the_set_varies_less_than_that_of_the_order():
    logits = normal(5)
    orders = torch.tensor(orders_of(5, 3))
    many = logits.expand(len(orders), 5)
    chances = sampling.ordered_log_score(many, orders).exp()
    variance = {
        name: (chances @ gradient(many, orders).square()).sum().item()
        for name, gradient in (("order", sampling.ordered_score_gradient), ("set", sampling.set_score_gradient))
    }
    assert variance["set"] < 0.9 * variance["order"]
