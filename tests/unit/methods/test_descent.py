import itertools

import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods.descent import Descent
from nmprune.methods.descent_sweep import descend, load_diagonal
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "3:4", "4:8", "2:6", "8:16")]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
# Both ways through a group, for any pattern: all candidates, or swaps.
each_way = pytest.mark.parametrize("max_listed", [70, 1], ids=["candidates", "swaps"])


def problem(rows=10, width=96, n_tokens=200, seed=0):
    """A weight and the statistics of inputs with strong correlations and unequal scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.arange(1, width + 1).pow(-0.5).unsqueeze(1)
    x = torch.randn(n_tokens, width, generator=generator) @ mix * torch.randn(width, generator=generator).exp()
    return torch.randn(rows, width, generator=generator), InputStats(n_tokens, input_gram=x.T @ x)


def objectives(weight, hessian, mask):
    """e H e^T of every row, in fp64."""
    error = weight.double() * ~mask
    return ((error @ hessian.double()) * error).sum(1)


def plain(weight, hessian, mask, pattern, sweeps):
    """Row by row and group by group in fp64, the whole objective for each candidate: slow and plain."""
    mask, hessian = mask.clone(), hessian.double()
    candidates = masks.candidates(pattern)
    for _, o, start in itertools.product(range(sweeps), range(len(mask)), range(0, mask.shape[1], pattern.group)):
        tried = mask[o].repeat(len(candidates), 1)
        tried[:, start : start + pattern.group] = candidates
        mask[o] = tried[objectives(weight[o], hessian, tried).argmin()]
    return mask


def small_changes(mask, pattern, most):
    """Every mask that differs from `mask` (in,) in one group, in at most `most` kept weights."""
    candidates = masks.candidates(pattern)
    for start in range(0, len(mask), pattern.group):
        group = slice(start, start + pattern.group)
        for candidate in candidates[(candidates & ~mask[group]).sum(1) <= most]:
            yield torch.cat([mask[:start], candidate, mask[start + pattern.group :]])


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.n_candidates <= 70], ids=str)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_equals_the_plain_algorithm_over_several_blocks(pattern, sweeps):
    weight, stats = problem(rows=3, width=264, n_tokens=500)
    prior = Wanda().prune(weight, stats, pattern).mask
    found = descend(weight, stats.gram(), prior, pattern, sweeps)
    expected = plain(weight, stats.gram(), prior, pattern, sweeps)
    assert torch.equal(found.mask, expected)
    assert found.sweeps == sweeps
    changed = (expected != prior).unflatten(1, (-1, pattern.group)).any(-1)
    assert found.changed_groups == pytest.approx(changed.double().mean().item())
    assert found.start == pytest.approx(objectives(weight, stats.gram(), prior).sum().item(), rel=1e-5)
    assert found.end == pytest.approx(objectives(weight, stats.gram(), expected).sum().item(), rel=1e-5)


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(3, 4), Pattern(7, 8)], ids=str)
def test_where_every_change_is_a_swap_both_ways_are_one(pattern):
    weight, stats = problem(width=144)
    prior = Wanda().prune(weight, stats, pattern).mask
    listed, swapped = (descend(weight, stats.gram(), prior, pattern, 4, most) for most in (70, 1))
    assert torch.equal(listed.mask, swapped.mask)
    assert not torch.equal(listed.mask, prior)


@each_pattern
@each_way
def test_the_objective_of_no_row_ever_rises(pattern, max_listed):
    weight, stats = problem(rows=32, width=288, n_tokens=60)  # rank 60 of 288: the products cancel a lot
    for hessian in (stats.gram(), load_diagonal(stats.gram(), 0.5)[0]):
        mask = Wanda().prune(weight, stats, pattern).mask
        before = objectives(weight, hessian, mask)
        for _ in range(6):
            found = descend(weight, hessian, mask, pattern, 1, max_listed)
            mask, after = found.mask, objectives(weight, hessian, found.mask)
            assert masks.n_wrong_groups(mask, pattern) == 0
            assert (after <= before).all()
            before = after
        assert after.sum() < 0.8 * objectives(weight, hessian, Wanda().prune(weight, stats, pattern).mask).sum()


@pytest.mark.parametrize("prior", ["wanda", "first", "random"])
@each_way
def test_it_ends_where_no_single_group_can_do_better(prior, max_listed):
    for pattern in (Pattern(2, 4), Pattern(4, 8)):
        weight, stats = problem(rows=6, width=16, seed=3)
        generator = torch.Generator().manual_seed(5)
        scores = {
            "wanda": weight.abs() * stats.gram().diagonal().sqrt(),
            "first": torch.zeros_like(weight),
            "random": torch.rand(weight.shape, generator=generator),
        }[prior]
        found = descend(weight, stats.gram(), masks.from_scores(scores, pattern), pattern, 100, max_listed)
        assert found.sweeps < 100
        most = 1 if max_listed == 1 else pattern.group
        for row, mask, best in zip(weight, found.mask, objectives(weight, stats.gram(), found.mask), strict=True):
            others = torch.stack(list(small_changes(mask, pattern, most)))
            assert (objectives(row, stats.gram(), others) >= best * (1 - 1e-5)).all()


@each_way
def test_the_best_mask_of_all_stays(max_listed):
    pattern = Pattern(2, 4)
    weight, stats = problem(rows=8, width=8, seed=1)
    candidates = masks.candidates(pattern)
    every = torch.stack([torch.cat(pair) for pair in itertools.product(candidates, candidates)])
    best = torch.stack([every[objectives(row, stats.gram(), every).argmin()] for row in weight])
    found = descend(weight, stats.gram(), best, pattern, 5, max_listed)
    assert torch.equal(found.mask, best)
    assert (found.sweeps, found.changed_groups) == (1, 0.0)
    assert found.end == found.start


@each_pattern
@pytest.mark.parametrize("shrinkage", [1e9, 1e300])
def test_with_much_shrinkage_it_is_wanda_exactly(pattern, shrinkage):
    weight, stats = problem(rows=40, width=192)
    weight = (weight * 4).round() / 4  # ties and zeros
    pruned = Descent(shrinkage=shrinkage, target=0.0).prune(weight, stats, pattern)
    assert torch.equal(pruned.mask, Wanda().prune(weight, stats, pattern).mask)
    assert pruned.notes == {"sweeps": 1, "changed_groups": 0.0, "objective_fall": 0.0}


@each_pattern
def test_with_uncorrelated_inputs_it_is_wanda_exactly(pattern):
    weight, stats = problem(rows=40, width=192)
    stats = InputStats(stats.n_tokens, input_gram=stats.gram().diagonal().diag())
    wanda = Wanda().prune(weight, stats, pattern).mask
    assert torch.equal(Descent(shrinkage=0.0).prune(weight, stats, pattern).mask, wanda)
    anywhere = masks.from_scores(torch.zeros_like(weight), pattern)
    assert torch.equal(descend(weight, stats.gram(), anywhere, pattern, 1).mask, wanda)


def test_shrinkage_moves_from_the_output_error_to_wanda():
    weight, stats = problem(rows=64)
    wanda = Wanda().prune(weight, stats, Pattern(2, 4)).mask
    agreeing, errors = [], []
    for shrinkage in (0.0, 0.5, 5.0, 500.0):
        mask = Descent(shrinkage=shrinkage).prune(weight, stats, Pattern(2, 4)).mask
        agreeing.append((mask == wanda).double().mean().item())
        errors.append(objectives(weight, stats.gram(), mask).sum().item())
    assert agreeing == sorted(agreeing) and agreeing[0] < 0.9 < agreeing[-1]
    assert errors == sorted(errors)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**100])
def test_the_loaded_gram_is_the_formula_up_to_a_factor(shrinkage, scale):
    gram = problem(width=12)[1].gram()
    loaded, factor = load_diagonal(gram * scale, shrinkage)
    loaded = loaded.double()
    expected = gram.double() + shrinkage * gram.double().diagonal().diag()
    torch.testing.assert_close(loaded / loaded[0, 0], expected / expected[0, 0], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(loaded, expected * scale * factor, rtol=1e-6, atol=1e-12)
    assert 0.5 <= loaded.diagonal().max() < 1
    assert torch.equal(loaded, load_diagonal(gram, shrinkage)[0].double())


def test_a_gram_matrix_of_zeros_stays():
    assert not load_diagonal(torch.zeros(4, 4), 0.5)[0].any()


@each_pattern
@each_way
def test_powers_of_two_change_nothing(pattern, max_listed):
    weight, stats = problem(width=96)
    powers = torch.tensor([2.0**e for e in (0, 90, -90, 3, -1, 40, -60, 100, -100, 7)]).unsqueeze(1)
    prior = Wanda().prune(weight, stats, pattern).mask
    one = descend(weight, stats.gram(), prior, pattern, 3, max_listed)
    other = descend(weight * powers, stats.gram() * 2.0**-20, prior, pattern, 3, max_listed)
    assert torch.equal(one.mask, other.mask)
    rows = objectives(weight, stats.gram(), one.mask) * powers.double().flatten() ** 2
    assert other.end == pytest.approx(rows.sum().item() * 2.0**-20, rel=1e-5)


def test_a_row_of_tiny_weights_is_pruned_as_any_other():
    weight, stats = problem(rows=2)
    weight[0] = weight[1] * 2.0**-120
    pruned = Descent().prune(weight, stats, Pattern(2, 4))
    assert torch.equal(pruned.mask[0], pruned.mask[1])
    assert not torch.equal(pruned.mask, Wanda().prune(weight, stats, Pattern(2, 4)).mask)


@each_pattern
@each_way
def test_rows_are_independent(pattern, max_listed):
    weight, stats = problem(rows=12)
    prior = Wanda().prune(weight, stats, pattern).mask
    whole = descend(weight, stats.gram(), prior, pattern, 5, max_listed).mask
    for some in (slice(0, 1), slice(3, 8), slice(4, None, 3)):
        assert torch.equal(descend(weight[some], stats.gram(), prior[some], pattern, 5, max_listed).mask, whole[some])


def test_ties_stay_where_they_are():
    pattern = Pattern(2, 4)
    twins = torch.full((4, 4), 1.0)  # four equal inputs: all candidates are equal
    for prior in masks.candidates(pattern):
        found = descend(torch.ones(1, 4), twins, prior.unsqueeze(0), pattern, 3)
        assert torch.equal(found.mask[0], prior)
    # w = 3, 1, 1, 1 with equal inputs: any mask that keeps the first is best; the lower candidate of those is 0 and 1
    found = descend(
        torch.tensor([[3.0, 1.0, 1.0, 1.0]]), torch.eye(4), torch.tensor([[False] + [True] * 3]), Pattern(3, 4), 1
    )
    assert found.mask.tolist() == [[True, True, True, False]]


def test_it_sees_that_two_inputs_cancel():
    # Inputs 0 and 1 are equal and their weights opposite: dropping both costs nothing. Wanda keeps them, being large.
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    weight, stats = torch.tensor([[2.0, -2.0, 1.0, 1.0]]), InputStats(50, input_gram=x.T @ x)
    assert Wanda().prune(weight, stats, Pattern(2, 4)).mask.tolist() == [[True, True, False, False]]
    pruned = Descent(shrinkage=0.0).prune(weight, stats, Pattern(2, 4))
    assert pruned.mask.tolist() == [[False, False, True, True]]
    # Wanda's mask drops inputs 2 and 3: all of the objective; the best one drops nothing of the output
    dropped = (x[:, 2] + x[:, 3]).square().sum() / (x @ weight[0]).square().sum()
    assert pruned.notes["objective_fall"] == pytest.approx(dropped.item(), rel=1e-5)
    assert (pruned.notes["sweeps"], pruned.notes["changed_groups"]) == (2, 1.0)


def test_linears_of_one_input_share_the_loaded_gram():
    weight, stats = problem()
    Descent().prune(weight, stats, Pattern(2, 4))
    kept = stats.derived(("loaded gram", 0.5), lambda: pytest.fail("it was not kept"))
    assert torch.equal(kept[0], load_diagonal(stats.gram(), 0.5)[0])


def with_dense(stats_seed=1, rows=6, width=32, n_tokens=120):
    """A weight, inputs X, what the inputs are in the dense model D, and the statistics of both."""
    generator = torch.Generator().manual_seed(stats_seed)
    mix = torch.randn(width, width, generator=generator)
    dense = torch.randn(n_tokens, width, generator=generator) @ mix
    x = dense * 0.8 + 0.3 * torch.randn(n_tokens, width, generator=generator) @ mix
    weight = torch.randn(rows, width, generator=generator)
    return weight, x, dense, InputStats(n_tokens, input_gram=x.T @ x, cross_gram=x.T @ dense)


@each_way
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)], ids=str)
def test_with_a_target_it_ends_where_no_single_swap_brings_the_output_nearer(pattern, max_listed):
    weight, x, dense, stats = with_dense()
    mask = Wanda().prune(weight, stats, pattern).mask
    share = 0.7
    target = (share * dense + (1 - share) * x) @ weight.T
    pull = share * (weight @ stats.cross_gram.T - weight @ stats.gram())

    def distance(row, kept):
        return ((x @ (weight[row] * kept)).double() - target[:, row].double()).square().sum().item()

    start = sum(distance(row, mask[row]) for row in range(len(weight)))
    found = descend(weight, stats.gram(), mask, pattern, 30, max_listed, pull_OI=pull)
    end = sum(distance(row, found.mask[row]) for row in range(len(weight)))
    assert found.start - found.end == pytest.approx(start - end, rel=1e-4)
    assert end < 0.9 * start
    for row in range(len(weight)):
        least = distance(row, found.mask[row])
        assert all(distance(row, other) >= least * (1 - 1e-5) for other in small_changes(found.mask[row], pattern, 1))


def test_the_target_comes_from_the_statistics_with_its_share_and_the_shrinkage_in():
    weight, _, _, stats = with_dense()
    prior = Wanda().prune(weight, stats, Pattern(2, 4)).mask
    gram = stats.gram()
    for share, shrinkage in ((1.0, 0.5), (0.3, 0.0)):
        pull = share * (weight @ stats.cross_gram.T - weight @ gram)
        hessian = gram + shrinkage * gram.diagonal().diag()
        expected = descend(weight, hessian, prior, Pattern(2, 4), 12, pull_OI=pull)
        pruned = Descent(shrinkage=shrinkage, target=share).prune(weight, stats, Pattern(2, 4))
        assert torch.equal(pruned.mask, expected.mask)
        assert not torch.equal(
            pruned.mask, Descent(shrinkage=shrinkage, target=0.0).prune(weight, stats, Pattern(2, 4)).mask
        )
        output = ((weight @ gram) * weight).sum().item()
        assert pruned.notes["objective_fall"] == pytest.approx((expected.start - expected.end) / output, rel=1e-4)
        assert "target" not in pruned.notes


def test_without_the_dense_models_inputs_it_looks_at_its_own_and_says_so():
    weight, stats = problem()
    pruned = Descent(target=0.5).prune(weight, stats, Pattern(2, 4))
    assert torch.equal(pruned.mask, Descent(target=0.0).prune(weight, stats, Pattern(2, 4)).mask)
    assert pruned.notes["target"] == "own inputs"


@pytest.mark.parametrize("target", [-0.1, 1.5, float("nan")])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(InputError, match=r"descent\.target"):
        Descent(target=target)


def test_a_prior_that_is_not_of_the_pattern_is_a_bug():
    with pytest.raises(ValueError, match="2 groups that are not 2 kept of 4"):
        descend(torch.ones(1, 8), torch.eye(8), torch.ones(1, 8, dtype=torch.bool), Pattern(2, 4), 1)


@pytest.mark.parametrize("shrinkage", [-0.1, float("nan"), float("inf")])
def test_impossible_shrinkage(shrinkage):
    with pytest.raises(InputError, match=r"descent\.shrinkage is .*; expected a number >= 0"):
        Descent(shrinkage=shrinkage)


def test_impossible_sweeps():
    with pytest.raises(InputError, match=r"descent\.sweeps is 0; expected a whole number >= 1"):
        Descent(sweeps=0)
