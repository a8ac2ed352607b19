import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.sparsegpt import SparseGPT
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "3:4", "4:8", "2:6", "8:16")]


def problem(rows=24, width=96, n_tokens=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(n_tokens, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), InputStats(n_tokens, input_gram=x.T @ x)


def column_by_column(weight, gram, pattern, damping):
    """The paper's algorithm 1 with blocks of one column, in fp64, with U itself: slow and plain."""
    hessian = gram.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    moved, mask = weight.double(), torch.zeros_like(weight, dtype=torch.bool)
    for j in range(moved.shape[1]):
        if j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            best = (moved[:, group] / u.diagonal()[group]).square().topk(pattern.kept, dim=1).indices
            mask[:, group] = mask[:, group].scatter(1, best, True)
        error = torch.where(mask[:, j], 0.0, moved[:, j]) / u[j, j]
        moved = moved - torch.outer(error, u[j])
        moved[~mask[:, j], j] = 0.0
    return mask, moved


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_the_plain_algorithm(pattern):
    weight, stats = problem()
    mask, moved = column_by_column(weight, stats.gram(), pattern, 0.01)
    pruned = SparseGPT(block_size=32).prune(weight, stats, pattern)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight.double(), moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 7, 16, 50, 96, 1000])
def test_the_block_size_changes_nothing(block_size):
    weight, stats = problem()
    pattern = Pattern(4, 8)
    expected = SparseGPT().prune(weight, stats, pattern)
    pruned = SparseGPT(block_size=block_size).prune(weight, stats, pattern)
    assert torch.equal(pruned.mask, expected.mask)
    torch.testing.assert_close(pruned.weight, expected.weight, rtol=0, atol=1e-5)


def output_error(weight, pruned_weight, stats):
    change = (pruned_weight - weight).double()
    return ((change @ stats.gram().double()) * change).sum().item()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_moving_weights_helps(pattern):
    weight, stats = problem()
    pruned = SparseGPT().prune(weight, stats, pattern)
    moved = output_error(weight, pruned.weight, stats)
    assert moved < 0.8 * output_error(weight, weight * pruned.mask, stats)
    assert moved < 0.8 * output_error(weight, weight * Magnitude().prune(weight, stats, pattern).mask, stats)


def test_with_uncorrelated_equal_inputs_it_is_magnitude():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    pruned = SparseGPT().prune(weight, InputStats(9, input_gram=3.0 * torch.eye(32)), Pattern(2, 4))
    assert torch.equal(pruned.mask, masks.from_scores(weight.abs(), Pattern(2, 4)))
    torch.testing.assert_close(pruned.weight, weight * pruned.mask, rtol=0, atol=1e-6)


def test_dead_inputs_become_zero_and_are_counted():
    weight, stats = problem(width=32)
    gram = stats.gram().clone()
    for j in (3, 8, 9, 10):
        gram[j, :] = gram[:, j] = 0.0
    pruned = SparseGPT().prune(weight, InputStats(300, input_gram=gram), Pattern(2, 4))
    assert not pruned.weight[:, [3, 8, 9, 10]].any()
    assert not pruned.mask[:, 3].any()
    assert pruned.mask[:, 8].all()  # three of four are dead: one of them is kept, and its weight is 0
    assert pruned.notes == {"damping": 0.01, "damping_steps": 0, "dead_inputs": 4}


def test_damping_steps_are_recorded():
    weight, stats = problem(width=8)
    gram = stats.gram().clone()
    gram[0, 1] = gram[1, 0] = 1.5 * gram[0, 0]
    notes = SparseGPT().prune(weight, InputStats(300, input_gram=gram), Pattern(2, 4)).notes
    assert notes["damping_steps"] == 2 and notes["damping"] == pytest.approx(1.0)


def test_the_scale_of_the_inputs_cancels_to_the_bit():
    weight, stats = problem()
    gram = stats.gram().clone()
    gram[7, :] = gram[:, 7] = 0.0
    one, other = (
        SparseGPT().prune(weight, InputStats(300, input_gram=s * gram), Pattern(2, 4)) for s in (1.0, 2.0**-20)
    )
    assert torch.equal(one.mask, other.mask) and torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_impossible_damping(damping):
    with pytest.raises(InputError, match=r"sparsegpt\.damping is .*; expected a number >= 0"):
        SparseGPT(damping=damping)


def test_impossible_block_size():
    with pytest.raises(InputError, match=r"sparsegpt\.block_size is 0; expected a whole number >= 1"):
        SparseGPT(block_size=0)


def test_compensation_that_overflows_is_an_error():
    weight, gram = torch.full((1, 2), 3e38), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    with pytest.raises(InputError, match=r"compensated weights are not finite.*higher damping"):
        SparseGPT().prune(weight, InputStats(2, input_gram=gram), Pattern(1, 2))
