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


def test_the_sum_of_the_inputs_in_batches_is_that_of_their_concatenation_in_fp64():
    batches = [inputs(n, 40, seed=n).reshape(1, n, 40) + 0.1 for n in (1, 700, 64)]
    needs = frozenset({"input_sum"})
    whole, parts = collect([torch.cat(batches, dim=1)], 40, needs), collect(batches, 40, needs)
    exact = torch.cat(batches, dim=1)[0].double().sum(0)
    for found in (whole, parts):
        assert found.sums().dtype == torch.float64
        torch.testing.assert_close(found.sums(), exact, rtol=0, atol=1e-4)
        assert found.input_sq_norm is None and found.input_gram is None
    assert (exact.abs() > 10).any()
    with pytest.raises(ValueError, match="input_sum was not collected: the method does not declare it"):
        InputStats(3).sums()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_wide_whatever_the_inputs_are(dtype):
    x = torch.full((600, 8), 300.0).to(dtype)  # 600 of them overflow fp16, and bf16 stops growing
    assert collect([x], 8, frozenset({"input_sum"})).sums().tolist() == [600 * x[0, 0].item()] * 8


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


SPLIT = frozenset({"input_sq_norm", "input_sum", "input_gram", "held_out_gram", "cross_gram"})


def collect_pairs(batches, width, needs=SPLIT):
    """Statistics of (inputs, dense inputs, held out)."""
    accumulator = StatsAccumulator(width, needs)
    for inputs_TI, dense_TI, held_out in batches:
        accumulator.add(inputs_TI, dense_TI, held_out)
    return accumulator.result()


@pytest.mark.parametrize("width", [6, 500])
def test_held_out_tokens_have_sums_of_their_own_and_are_part_of_the_totals(width):
    sizes = ((5, False), (3, True), (40, False), (9, True))  # in any order
    batches = [(inputs(n, width, n), inputs(n, width, 100 + n), held) for n, held in sizes]
    stats = collect_pairs(batches, width)
    x, dense = (torch.cat([batch[i] for batch in batches]).double() for i in (0, 1))
    held = torch.cat([torch.full((n,), held) for n, held in sizes])
    assert (stats.n_tokens, stats.held_out_tokens) == (57, 12)
    for found, left, right in (
        (stats.gram(), x, x),
        (stats.cross_gram, x, dense),
        (stats.held_out_gram, x[held], x[held]),
        (stats.held_out_cross, x[held], dense[held]),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), left.T @ right, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(stats.input_sq_norm, x.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.sums(), x.sum(0), rtol=0, atol=1e-4)
    for one in (stats.input_gram, stats.held_out_gram):
        assert torch.equal(one, one.T)


def test_batches_of_pairs_equal_their_concatenation():
    parts = [(inputs(n, 8, n).reshape(1, n, 8), inputs(n, 8, 50 + n).reshape(1, n, 8), False) for n in (1, 7, 30)]
    held = [(inputs(n, 8, n).reshape(1, n, 8), inputs(n, 8, 50 + n).reshape(1, n, 8), True) for n in (2, 5)]

    def joined(batches):
        return (*(torch.cat([batch[i] for batch in batches], dim=1) for i in (0, 1)), batches[0][2])

    one, other = collect_pairs([*parts, *held], 8), collect_pairs([joined(parts), joined(held)], 8)
    assert (one.n_tokens, one.held_out_tokens) == (other.n_tokens, other.held_out_tokens) == (45, 7)
    for key in ("input_gram", "cross_gram", "held_out_gram", "held_out_cross"):
        torch.testing.assert_close(getattr(one, key), getattr(other, key), rtol=1e-5, atol=1e-4)


def test_the_cross_gram_has_the_own_inputs_as_rows():
    x, dense = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert collect_pairs([(x, dense, False)], 2).cross_gram.tolist() == [[0.0, 3.0], [0.0, 0.0]]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_one_batch_without_dense_inputs_and_there_is_no_cross_gram(missing):
    batches = [(inputs(4, 6, n), None if n == missing else inputs(4, 6, 9 + n), n == 2) for n in range(3)]
    stats = collect_pairs(batches, 6)
    assert stats.cross_gram is None and stats.held_out_cross is None
    assert stats.held_out_gram is not None and stats.held_out_tokens == 4


def test_where_nothing_is_to_be_held_out_nothing_is():
    x = inputs(7, 6)
    stats = collect_pairs([(x[:4], x[:4], False), (x[4:], x[4:], True)], 6, frozenset({"input_gram", "cross_gram"}))
    assert (stats.n_tokens, stats.held_out_tokens) == (7, 0)
    assert stats.held_out_gram is None and stats.held_out_cross is None
    for one in (stats.input_gram, stats.cross_gram):
        torch.testing.assert_close(one.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-5)


def weighted(batches, width=6, needs=SPLIT):
    """Statistics of (inputs, dense inputs, held out, weights)."""
    accumulator = StatsAccumulator(width, needs)
    for batch in batches:
        accumulator.add(*batch)
    return accumulator.result()


def token_weights(n_tokens, seed=0):
    """Positive and far apart; one token counts nothing."""
    weights = torch.rand(n_tokens, generator=torch.Generator().manual_seed(seed)).mul(4).exp()
    weights[n_tokens // 2] = 0
    return weights


def test_a_tokens_weight_multiplies_what_it_adds_to_every_sum():
    parts = [
        (inputs(n, 6, n), inputs(n, 6, 100 + n), held, token_weights(n, n)) for n, held in ((9, 0), (4, 1), (7, 0))
    ]
    stats = weighted([(x.reshape(1, -1, 6), d.reshape(1, -1, 6), bool(h), w.reshape(1, -1)) for x, d, h, w in parts])
    x, dense, w = (torch.cat([part[i] for part in parts]).double() for i in (0, 1, 3))
    held = torch.cat([torch.full((len(part[0]),), bool(part[2])) for part in parts])
    root = w.sqrt()[:, None]
    rows, dense_rows = x * root, dense * root
    for found, left, right in (
        (stats.gram(), rows, rows),
        (stats.cross_gram, rows, dense_rows),
        (stats.held_out_gram, rows[held], rows[held]),
        (stats.held_out_cross, rows[held], dense_rows[held]),
    ):
        torch.testing.assert_close(found.double(), left.T @ right, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.input_sq_norm, rows.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.sums(), (x * w[:, None]).sum(0), rtol=1e-5, atol=1e-4)
    assert (stats.n_tokens, stats.held_out_tokens) == (20, 4), "tokens are counted, not their weights"
    assert not torch.allclose(stats.gram().double(), x.T @ x, rtol=0.1)


@pytest.mark.parametrize("width", [6, 500])
def test_weights_of_one_change_no_bit(width):
    parts = [(inputs(n, width, n), inputs(n, width, 9 + n), n == 5) for n in (40, 5, 700)]
    plain = collect_pairs(parts, width)
    ones = weighted([(*part, torch.ones(len(part[0]))) for part in parts], width)
    for key in ("input_gram", "cross_gram", "held_out_gram", "held_out_cross", "input_sq_norm", "input_sum"):
        assert torch.equal(getattr(plain, key), getattr(ones, key)), key
