import pytest
import torch

from nmprune.stats import InputStats, StatsAccumulator

BOTH = frozenset({"input_sq_norm", "input_gram"})


def inputs(n_tokens, width, seed=0):
    return torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(seed))


def collect(batches, width, needs=BOTH):
    accumulator = StatsAccumulator(width, needs)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result()


@pytest.mark.parametrize("width", [3, 64, 384, 500, 900])  # below, at and beyond one block of the Gram matrix
def test_sums_equal_fp64(width):
    x = inputs(1100, width)
    stats = collect([x], width)
    exact = x.double()
    assert stats.n_tokens == 1100
    assert stats.input_sq_norm.dtype == torch.float64 and stats.input_gram.dtype == torch.float32
    torch.testing.assert_close(stats.squared_norms(), exact.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.gram().double(), exact.T @ exact, rtol=1e-5, atol=1e-3)
    assert torch.equal(stats.gram(), stats.gram().T)


def test_batches_equal_their_concatenation():
    batches = [inputs(n, 400, seed=n).reshape(1, n, 400) for n in (1, 7, 64)]
    whole, parts = collect([torch.cat(batches, dim=1)], 400), collect(batches, 400)
    assert whole.n_tokens == parts.n_tokens == 72
    torch.testing.assert_close(whole.input_sq_norm, parts.input_sq_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.input_gram, parts.input_gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_wide_whatever_the_inputs_are(dtype):
    x = (100 * inputs(600, 8)).to(dtype)  # the squares of 600 such tokens overflow fp16
    stats = collect([x], 8)
    torch.testing.assert_close(stats.input_sq_norm, x.double().square().sum(0), rtol=1e-6, atol=0)
    assert torch.isfinite(stats.input_gram).all()


def test_only_what_is_needed_is_collected():
    x = inputs(5, 4)
    norms, gram = collect([x], 4, frozenset({"input_sq_norm"})), collect([x], 4, frozenset({"input_gram"}))
    assert norms.input_gram is None and gram.input_sq_norm is None
    torch.testing.assert_close(gram.squared_norms(), norms.squared_norms(), rtol=1e-6, atol=0)
    assert gram.squared_norms().dtype == torch.float64
    with pytest.raises(ValueError, match="does not declare it"):
        norms.gram()
    with pytest.raises(ValueError, match="does not declare it"):
        InputStats(0).squared_norms()


def test_inputs_are_not_kept_and_not_changed():
    x = inputs(6, 4).requires_grad_()
    before = x.detach().clone()
    stats = collect([x], 4)
    assert torch.equal(x.detach(), before)
    assert not stats.input_gram.requires_grad and not stats.input_sq_norm.requires_grad


def test_no_token():
    stats = collect([torch.zeros(0, 4)], 4)
    assert stats.n_tokens == 0 and not stats.input_gram.any() and not stats.input_sq_norm.any()


def test_a_batch_of_another_width_is_a_bug():
    with pytest.raises(ValueError, match=r"inputs \(2, 6\) given to statistics of 4"):
        StatsAccumulator(4, BOTH).add(torch.zeros(2, 6))
