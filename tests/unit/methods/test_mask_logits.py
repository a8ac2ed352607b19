import pytest
import torch

from nmprune import masks, sampling
from nmprune.methods.mask_logits import MaskLogits, planes, rows
from nmprune.pattern import Pattern

N_GROUPS = 50


def problem(text, seed=0):
    pattern = Pattern.parse(text)
    logits = MaskLogits(pattern)
    draw = torch.Generator().manual_seed(seed)
    slots = torch.randn(pattern.group, N_GROUPS, generator=draw)
    own = torch.randn(pattern.n_candidates, N_GROUPS, generator=draw) if logits.listed else None
    noise = sampling.gumbel((logits.n_noise, N_GROUPS), draw)
    along = torch.randn(pattern.group, N_GROUPS, generator=draw)
    return logits, slots, own, noise, along


def by_autograd(logits, slots, own, noise, temperature):
    """The soft masks as `sampling` makes them, group by group, with a graph."""
    pattern = logits.pattern
    if not logits.listed:
        return sampling.soft_top(slots.T, pattern.kept, temperature, noise.T).T
    candidates = masks.candidates(pattern).float()
    return sampling.soft_mask((candidates @ slots + own).T, candidates, temperature, noise.T).T


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "8:16"])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_soft_masks_and_their_gradient_are_those_of_the_plain_formula(text, temperature):
    logits, slots, own, noise, along = problem(text)
    leaves = [one.clone().requires_grad_() for one in (slots, own) if one is not None]
    expected = by_autograd(logits, leaves[0], leaves[-1], noise, temperature)
    expected_gradients = torch.autograd.grad(expected, leaves, along)
    soft = logits.soft(slots, own, temperature, noise)
    torch.testing.assert_close(soft.mask, expected.detach(), rtol=1e-5, atol=1e-6)
    pulled = logits.pull(soft, along, temperature)
    for found, wanted in zip(pulled, expected_gradients, strict=False):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (pulled[1] is None) == (not logits.listed)


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16"])
def test_straight_through_is_hard_forward_and_soft_backward(text):
    logits, slots, own, noise, along = problem(text)
    soft, hard = (logits.soft(slots, own, 0.7, noise, hard) for hard in (False, True))
    assert set(hard.mask.unique().tolist()) == {0.0, 1.0}
    assert (hard.mask.sum(0) == logits.pattern.kept).all()
    nearly = logits.soft(slots, own, 1e-4, noise).mask
    torch.testing.assert_close(hard.mask, nearly, rtol=0, atol=1e-3)
    torch.testing.assert_close(logits.pull(hard, along, 0.7)[0], logits.pull(soft, along, 0.7)[0])


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16"])
def test_hard_masks_are_the_largest_slots_and_the_best_candidates(text):
    logits, slots, own, _, _ = problem(text)
    expected = masks.from_scores(slots.T, logits.pattern)
    assert torch.equal(logits.hard(slots, None).T.bool(), expected)
    if own is not None:
        best = (masks.candidates(logits.pattern).float() @ slots + own).argmax(0)
        assert torch.equal(logits.hard(slots, own).T.bool(), masks.candidates(logits.pattern)[best])


@pytest.mark.parametrize("text", ["2:4", "8:16"])
def test_equal_logits_keep_the_first(text):
    logits, slots, own, _, _ = problem(text)
    zero_own = None if own is None else torch.zeros_like(own)
    first = torch.arange(logits.pattern.group) < logits.pattern.kept
    assert torch.equal(logits.hard(torch.zeros_like(slots), zero_own).T.bool(), first.expand(N_GROUPS, -1))
    if own is not None:
        assert torch.equal(logits.soft(0 * slots, zero_own, 1.0, hard=True).mask.T.bool(), first.expand(N_GROUPS, -1))


def test_extreme_logits_stay_finite():
    logits, slots, own, _, along = problem("2:4")
    soft = logits.soft(1e4 * slots, own, 1e-3)
    assert torch.isfinite(soft.mask).all()
    assert all(torch.isfinite(one).all() for one in logits.pull(soft, along, 1e-3))


def test_planes_and_back():
    values = torch.arange(24.0).view(2, 12)
    made = planes(values, 4)
    assert made.is_contiguous() and made[1].tolist() == [1, 5, 9, 13, 17, 21]
    assert torch.equal(rows(made, 12), values)
    made.zero_()
    assert values.sum() > 0, "planes are a copy"


def test_the_expected_outlier_term_is_that_of_the_expected_mask():
    """Equation 10 is linear in a binary mask: enumerated over a row of two groups."""
    logits, slots, own, _, _ = problem("2:4")
    energy = torch.rand(4, 2, generator=torch.Generator().manual_seed(1))
    soft = logits.soft(slots[:, :2], own[:, :2], 1.0)
    candidates = masks.candidates(logits.pattern).float()
    expected = sum(
        soft.softmax[a, 0]
        * soft.softmax[b, 1]
        * ((candidates[a] * energy[:, 0]).sum() + (candidates[b] * energy[:, 1]).sum())
        for a in range(6)
        for b in range(6)
    )
    torch.testing.assert_close((soft.mask * energy).sum(), expected)
