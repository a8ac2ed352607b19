"""Global descent on losses that are exactly what it takes them for."""

import pytest
import torch

from nmprune import masks
from nmprune.methods.global_descent import GlobalDescent
from nmprune.pattern import Pattern

OUT, IN, TOKENS = 6, 16, 40
PATTERN = Pattern(2, 4)
EXACT = GlobalDescent(shrinkage=0.0, sweeps=20)


@pytest.fixture
def problem():
    """A quadratic loss of a linear, sum over rows of s_i ||(w_i - target_i) X^T||^2 / (2 TOKENS), another target."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(TOKENS, IN) @ (torch.eye(IN) + 0.3 * normal(IN, IN))
    weight = normal(OUT, IN)
    return (
        weight,
        weight + 0.5 * normal(OUT, IN),
        inputs.T @ inputs / TOKENS,
        torch.rand(OUT, generator=generator) + 0.1,
    )


def loss_of(problem, mask):
    weight, target, gram, curvature = problem
    off = weight * mask - target
    return (curvature * ((off @ gram) * off).sum(1)).sum() / 2


def slope_at(problem, mask):
    weight, target, gram, curvature = problem
    return curvature[:, None] * ((weight * mask - target) @ gram)


def revised(problem, mask, damping=1.0, method=EXACT):
    weight, _, gram, curvature = problem
    return method.revise(weight, mask, slope_at(problem, mask), curvature, gram, PATTERN, damping)


def test_it_ends_where_no_group_alone_can_lower_the_loss(problem):
    before = masks.from_scores(problem[0].abs(), PATTERN)
    after = revised(problem, before)
    assert masks.n_wrong_groups(after, PATTERN) == 0
    assert loss_of(problem, after) < 0.9 * loss_of(problem, before)
    for row in range(OUT):
        for group in range(IN // 4):
            for candidate in masks.candidates(PATTERN):
                other = after.clone()
                other[row, 4 * group : 4 * group + 4] = candidate.bool()
                assert loss_of(problem, other) >= loss_of(problem, after) * (1 - 1e-5)


def test_a_mask_that_it_ended_in_stays(problem):
    after = revised(problem, masks.from_scores(problem[0].abs(), PATTERN))
    assert torch.equal(revised(problem, after), after)


def test_the_more_damping_the_fewer_changes(problem):
    before = masks.from_scores(problem[0].abs(), PATTERN)
    changed = [int((revised(problem, before, damping) != before).sum()) for damping in (1.0, 3.0, 10.0, 1e6)]
    assert changed == sorted(changed, reverse=True) and changed[0] > changed[1] > changed[3] == 0


def test_a_linear_that_the_loss_does_not_see_keeps_its_mask(problem):
    weight, _, gram, curvature = problem
    before = masks.from_scores(weight.abs(), PATTERN)
    after = EXACT.revise(weight, before, torch.ones(OUT, IN), torch.zeros_like(curvature), gram, PATTERN, 1.0)
    assert torch.equal(after, before)


def test_a_row_without_curvature_is_not_free_to_be_anything(problem):
    weight, _, gram, curvature = problem
    before = masks.from_scores(weight.abs(), PATTERN)
    flat = curvature.clone()
    flat[0] = 0.0
    tiny = torch.full((OUT, IN), 1e-9)
    after = EXACT.revise(weight, before, tiny, flat, gram, PATTERN, 1.0)
    assert torch.equal(after, before)


def test_what_it_starts_from_and_carries():
    prior = masks.from_scores(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)), PATTERN)
    method = GlobalDescent(damping=7.0)
    state = method.begin(torch.randn(OUT, IN), prior, PATTERN, torch.Generator())
    assert torch.equal(method.hard_mask(torch.zeros(OUT, IN), state, PATTERN), prior)
    assert method.carried()["damping"].item() == 7.0
