import itertools

import pytest
import torch

from nmprune import least_squares


def problem(rows=10, width=24, n_tokens=60, seed=0):
    """Gram matrix, weight, and a mask without any pattern (one row keeps nothing, one keeps all)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(n_tokens, width, generator=generator) @ mix
    mask = torch.rand(rows, width, generator=generator) < 0.5
    mask[0], mask[1] = False, True
    return x.T @ x, torch.randn(rows, width, generator=generator), mask


def exact(gram, loading, dense, mask):
    """The normal equations of each row, in fp64."""
    hessian = gram.double() + torch.diag(loading.double())
    weight = torch.zeros_like(dense, dtype=torch.float64)
    for row, keep in enumerate(mask):
        right = (hessian @ dense[row].double())[keep]
        weight[row, keep] = torch.linalg.solve(hessian[keep][:, keep], right)
    return weight


def objective(gram, loading, dense, weight):
    change = (weight - dense).double()
    return ((change @ (gram.double() + torch.diag(loading.double()))) * change).sum(1)


def ones(width, value):
    return torch.full((width,), value)


@pytest.mark.parametrize("ridge", [0.0, 0.5, 100.0])
def test_it_solves_the_normal_equations_of_every_row(ridge):
    gram, dense, mask = problem()
    solved = least_squares.on_mask(gram, ones(24, ridge), dense, mask, dense * mask, 200, tolerance=1e-6)
    expected = exact(gram, ones(24, ridge), dense, mask)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=0, atol=2e-4)
    assert not solved.weight.view(torch.int32)[~mask].any(), "not exactly +0.0 off the mask"
    torch.testing.assert_close(solved.weight[1], dense[1], rtol=0, atol=1e-6)


def test_a_loading_of_its_own_for_every_input():
    gram, dense, mask = problem()
    loading = gram.diagonal() * torch.linspace(0, 1, 24)
    solved = least_squares.on_mask(gram, loading, dense, mask, dense * mask, 200, tolerance=1e-6)
    torch.testing.assert_close(solved.weight.double(), exact(gram, loading, dense, mask), rtol=0, atol=2e-4)


def test_the_objective_never_rises_and_nothing_given_is_modified():
    gram, dense, mask = problem()
    given = [gram, ones(24, 0.5), dense, mask, dense * mask]
    before = [value.clone() for value in given]
    errors = [objective(gram, given[1], dense, least_squares.on_mask(*given, n).weight) for n in range(12)]
    torch.testing.assert_close(errors[0], objective(gram, given[1], dense, dense * mask))
    for one, other in itertools.pairwise(errors):
        assert (other <= one * (1 + 1e-6)).all()
    assert errors[-1].sum() < 0.7 * errors[0].sum()
    for value, was in zip(given, before, strict=True):
        assert torch.equal(value, was)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_with_a_pull_it_solves_for_the_output_on_other_inputs(share):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(90, 24, generator=generator) @ (torch.eye(24) + torch.randn(24, 24, generator=generator) / 24**0.5)
    target = x + share * 0.5 * torch.randn(90, 24, generator=generator)
    _, dense, mask = problem()
    loading = ones(24, 0.5)
    pull = dense @ (target - x).T @ x
    solved = least_squares.on_mask(
        x.T @ x, loading, dense, mask, dense * mask, 300, tolerance=1e-6, pull_OI=pull
    ).weight
    # row by row, as plain least squares: the ridge is more rows of inputs, whose outputs are the dense ones
    rows = torch.cat([x.double(), torch.diag(loading.double().sqrt())])
    goals = torch.cat([target.double(), torch.diag(loading.double().sqrt())])
    for row, keep in enumerate(mask):
        best = torch.linalg.lstsq(rows[:, keep], goals @ dense[row].double()).solution
        torch.testing.assert_close(solved[row, keep].double(), best, rtol=0, atol=5e-4)
    assert not solved.view(torch.int32)[~mask].any(), "not exactly +0.0 off the mask"
    plain = least_squares.on_mask(x.T @ x, loading, dense, mask, dense * mask, 300, tolerance=1e-6).weight
    assert torch.allclose(plain, solved, atol=1e-4) == (share == 0)


def test_with_a_pull_the_objective_does_not_rise_either():
    gram, dense, mask = problem()
    loading, pull = ones(24, 0.5), 20 * torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    before = pull.clone()

    def value(weight):
        return objective(gram, loading, dense, weight) - 2 * (pull.double() * (weight - dense).double()).sum(1)

    values = [
        value(least_squares.on_mask(gram, loading, dense, mask, dense * mask, n, pull_OI=pull).weight)
        for n in range(10)
    ]
    for one, other in itertools.pairwise(values):
        assert (other <= one + 1e-6 * one.abs().clamp_min(1)).all()
    assert values[-1].sum() < values[0].sum() - 1
    assert torch.equal(pull, before)


def test_it_stops_when_every_row_has_arrived():
    gram, dense, mask = problem()
    loading = ones(24, 0.5)
    few = least_squares.on_mask(gram, loading, dense, mask, dense * mask, 500)
    more = least_squares.on_mask(gram, loading, dense, mask, dense * mask, 500, tolerance=1e-5)
    assert 3 < few.iterations < more.iterations < 100
    arrived = exact(gram, loading, dense, mask).float()
    assert least_squares.on_mask(gram, loading, dense, mask, arrived, 500).iterations == 0
    assert least_squares.on_mask(gram, loading, dense, mask, arrived, 0).iterations == 0


def test_a_diagonal_takes_one_iteration_and_entries_off_the_mask_are_ignored():
    _, dense, mask = problem()
    gram = torch.diag(torch.linspace(1, 1e4, 24))
    solved = least_squares.on_mask(gram, ones(24, 0.0), dense, mask, torch.full_like(dense, 7.0), 10)
    assert solved.iterations == 1
    torch.testing.assert_close(solved.weight, dense * mask, rtol=0, atol=1e-5)


def test_singular_systems_stay_finite_and_dead_inputs_stay_where_they_start():
    gram, dense, mask = problem(n_tokens=5)
    gram[3, :] = gram[:, 3] = 0.0
    mask[:, 3] = True
    solved = least_squares.on_mask(gram, ones(24, 0.0), dense, mask, dense * mask, 300, tolerance=1e-7)
    assert torch.isfinite(solved.weight).all()
    assert torch.equal(solved.weight[:, 3], dense[:, 3])
    left = objective(gram, ones(24, 0.0), dense, solved.weight)
    assert (left[1:] < 1e-4 * objective(gram, ones(24, 0.0), dense, dense * mask)[0]).all()  # row 0 keeps no other
    silent = least_squares.on_mask(0 * gram, ones(24, 0.0), dense, mask, dense * mask, 10)
    assert silent.iterations == 0 and torch.equal(silent.weight, dense * mask)


def test_the_layout_of_what_is_given_does_not_matter():
    gram, dense, mask = problem()
    given = [gram, ones(24, 0.5), dense, mask, dense * mask]
    turned = [value if value is given[1] else value.T.contiguous().T for value in given]
    assert torch.equal(least_squares.on_mask(*given, 9).weight, least_squares.on_mask(*turned, 9).weight)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**80])
def test_tiny_and_huge_weights_are_solved_as_well_as_others(scale):
    gram, dense, mask = problem()
    one, other = (
        least_squares.on_mask(gram, ones(24, 0.5), s * dense, mask, s * dense * mask, 10) for s in (1.0, scale)
    )
    assert torch.equal(scale * one.weight, other.weight) and one.iterations == other.iterations


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_a_pull_scales_with_the_weights(scale):
    gram, dense, mask = problem()
    pull = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    one, other = (
        least_squares.on_mask(gram, ones(24, 0.5), s * dense, mask, s * dense * mask, 10, pull_OI=s * pull)
        for s in (1.0, scale)
    )
    assert torch.equal(scale * one.weight, other.weight)


def test_output_error():
    gram, dense, _ = problem()
    expected = objective(gram, ones(24, 0.0), dense, 0 * dense)
    torch.testing.assert_close(least_squares.output_sq_error(gram, dense), expected, rtol=1e-5, atol=0)
    huge = least_squares.output_sq_error(gram, 2.0**100 * dense)
    torch.testing.assert_close(huge, 2.0**200 * expected, rtol=1e-5, atol=0)
    assert not least_squares.output_sq_error(gram, 0 * dense).any()
