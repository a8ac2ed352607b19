import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import dsnot
from nmprune.methods.dsnot import Dsnot
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, StatsAccumulator

PATTERN = Pattern(2, 4)
NEEDS = Dsnot.needs


def stats(mean, variance, n_tokens=4):
    """Statistics of inputs with these means and variances."""
    mean, variance = (torch.tensor(values, dtype=torch.float64) for values in (mean, variance))
    return InputStats(n_tokens, input_sq_norm=n_tokens * (variance + mean**2), input_sum=n_tokens * mean)


def kept(weight, mean, variance, **settings):
    settings = {"threshold_unit": "token", **settings}
    return Dsnot(**settings).prune(torch.tensor([weight]), stats(mean, variance), PATTERN).mask[0].int().tolist()


def problem(pattern, rows=20, groups=12, seed=0, whole=False):
    """A weight and statistics of inputs that are not centred; whole numbers, with many ties, where asked."""
    generator = torch.Generator().manual_seed(seed)
    width = groups * pattern.group
    weight = torch.randn(rows, width, generator=generator)
    inputs = torch.randn(50, width, generator=generator) + 0.5 * torch.randn(width, generator=generator)
    if whole:
        weight, inputs = (2 * weight).round(), inputs.round()
    sums = StatsAccumulator(width, NEEDS)
    sums.add(inputs)
    return weight, sums.result()


def expected_error(weight, mask, stats):
    return (weight.double() * ~mask) @ stats.input_sum / stats.n_tokens


def one_row(weight, prior, mean, variance, score, pattern, limit, cycles):
    """The method as one would write it for a single row, in plain Python; the mask and the errors on the way."""
    part = (weight * mean.float()).tolist()
    error = sum(p for p, keep in zip(part, prior, strict=True) if not keep)
    sign = (error > 0) - (error < 0)
    gains = [sign * p / v for p, v in zip(part, variance, strict=True)]
    order = sorted((i for i, keep in enumerate(prior) if not keep and sign * part[i] > 0), key=lambda i: (-gains[i], i))
    mask, best, errors, regrown = list(prior), list(prior), [abs(error)], set()
    for i in order[:cycles]:
        if abs(error) <= limit or sign * error < 0:
            break
        start = i // pattern.group * pattern.group
        can = [j for j in range(start, start + pattern.group) if mask[j] and j not in regrown]
        can = [j for j in can if sign * part[j] < 0] or can
        if not can:
            continue
        j = min(can, key=lambda j: (score[j], j))
        mask[i], mask[j] = True, False
        regrown.add(i)
        error += part[j] - part[i]
        if abs(error) < min(errors):
            best = list(mask)
        errors.append(abs(error))
    return best, errors


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(8, 16)], ids=str)
@pytest.mark.parametrize("prior", ["wanda", "magnitude"])
@pytest.mark.parametrize("whole", [False, True])
def test_every_row_is_what_a_plain_loop_over_it_gives(pattern, prior, whole):
    weight, seen = problem(pattern, whole=whole)
    method = Dsnot(prior=prior, threshold=0.02, threshold_unit="token")
    found = method.prune(weight, seen, pattern)
    start = {"wanda": Wanda(), "magnitude": Magnitude()}[prior].prune(weight, seen, pattern).mask
    mean, mean_sq = seen.input_sum / 50, seen.input_sq_norm / 50
    variance = torch.maximum(mean_sq - mean**2, mean_sq * 2.0**-20).masked_fill(mean_sq == 0, 1.0).tolist()
    score = weight.abs() * seen.input_sq_norm.sqrt().float()
    n_cycles = 0
    for row in range(len(weight)):
        best, errors = one_row(
            weight[row], start[row].tolist(), mean, variance, score[row].tolist(), pattern, 0.02, cycles=50
        )
        assert found.mask[row].tolist() == best, row
        n_cycles = max(n_cycles, len(errors) - 1)
    assert n_cycles > 3  # or the problem is too easy
    assert (found.mask != start).any()


def test_known_answer_with_a_change_of_sign():
    weight, ones = [4.0, -3.0, 2.0, 1.0, 5.0, 6.0, -1.0, 1.0], [1.0] * 8
    # 2, 1, -1 and 1 are dropped: 3. Regrow the 2; of 4 and -3 the latter takes error back: 3 - 2 - 3 = -2, and stop
    assert kept(weight, ones, ones) == [1, 0, 1, 0, 1, 1, 0, 0]
    # an input that hardly varies: the 1 goes first. 3 - 1 - 3 = -1
    assert kept(weight, ones, [1.0, 1.0, 1.0, 0.1, *ones[4:]]) == [1, 0, 0, 1, 1, 1, 0, 0]
    assert kept(weight, ones, [1.0, 1.0, 1.0, 0.1, *ones[4:]], variance_power=0.0) == [1, 0, 1, 0, 1, 1, 0, 0]
    # the row's sign turned round, the same swaps
    assert kept([-w for w in weight], ones, ones) == [1, 0, 1, 0, 1, 1, 0, 0]


def test_a_swap_that_ends_further_off_is_not_kept():
    # only 1 is regrown to make up for 1, and -9 goes: 1 - 1 - 9 = -9, worse than 1
    assert kept([10.0, -9.0, 1.0, 0.0], [1.0] * 4, [1.0] * 4) == [1, 1, 0, 0]
    # 3, then 2 and 4 would go: the error grows without a change of sign
    assert kept([4.0, 3.0, 2.0, 1.0], [1.0] * 4, [1.0] * 4) == [1, 1, 0, 0]


def test_without_a_weight_that_takes_error_back_the_smallest_goes():
    # 5 - 3 + 2.5 = 4.5: the input of the 3 is strong on average and weak in its norm
    mean, variance = [0.5, 0.5, 1.0, 1.0], [9.0, 9.0, 0.01, 0.01]
    assert kept([6.0, 5.0, 3.0, 2.0], mean, variance) == [1, 0, 1, 0]


def test_a_row_within_the_threshold_is_left_alone_and_the_unit_counts():
    weight, ones = [4.0, -3.0, 2.0, 1.0, 5.0, 6.0, -1.0, 1.0], [1.0] * 8
    prior = [1, 1, 0, 0, 1, 1, 0, 0]
    assert kept(weight, ones, ones, threshold=3.0) == prior
    assert kept(weight, ones, ones, threshold=2.9) != prior
    assert kept(weight, ones, ones, threshold=3.0 * 2048, threshold_unit="sequence") == prior
    assert kept(weight, ones, ones, threshold=2.9 * 2048, threshold_unit="sequence") != prior
    # the row's output has RMS sqrt(2 * (16 + 9 + 4 + 1 + 25 + 36 + 1 + 1)) = 13.64 where inputs are not correlated
    assert kept(weight, ones, ones, threshold=0.23, threshold_unit="row") == prior
    assert kept(weight, ones, ones, threshold=0.21, threshold_unit="row") != prior


def test_equal_gains_regrow_the_lower_index_also_at_the_last_place():
    # the dropped weights are all 1: cycles=1 takes one of six equal ones
    weight, ones = [5.0, -5.0, 1.0, 1.0] * 3, [1.0] * 12
    assert kept(weight, ones, ones, cycles=1) == [1, 0, 1, 0] + [1, 1, 0, 0] * 2
    # equal scores drop the lower index
    weight[0] = -5.0
    assert kept(weight, ones, ones, cycles=1) == [0, 1, 1, 0] + [1, 1, 0, 0] * 2


def test_the_ranking_of_ties_is_the_stable_sort():
    generator = torch.Generator().manual_seed(1)
    part = torch.randint(-3, 4, (30, 40), generator=generator).float()
    kept = torch.rand(30, 40, generator=generator) < 0.5
    gain = part.masked_fill(kept | (part <= 0), float("-inf"))
    for count in (1, 3, 8, 40, 50):
        columns, number = dsnot._ranked(part, torch.ones(40), kept, count)
        expected = gain.sort(dim=1, descending=True, stable=True).indices
        for row in range(30):
            n = min(count, int((gain[row] > 0).sum()))
            assert number[row] == n
            assert torch.equal(columns[row, :n], expected[row, :n])


def test_no_row_ends_further_off_than_it_started():
    weight, seen = problem(PATTERN, rows=64)
    prior = Wanda().prune(weight, seen, PATTERN).mask
    found = Dsnot(threshold=0.0).prune(weight, seen, PATTERN)
    start, end = (expected_error(weight, mask, seen).abs() for mask in (prior, found.mask))
    assert (end <= start).all()
    assert end.mean() < 0.5 * start.mean()
    assert found.notes["relative_expected_error"] == pytest.approx((end.sum() / start.sum()).item(), rel=1e-4)
    assert found.notes["swaps_per_row"] == (found.mask & ~prior).sum().item() / 64
    assert masks.n_wrong_groups(found.mask, PATTERN) == 0


def test_a_share_of_the_rows_output_does_not_see_units():
    weight, seen = problem(PATTERN)
    method = Dsnot(threshold=0.01, threshold_unit="row")
    expected = method.prune(weight, seen, PATTERN).mask
    stronger = InputStats(50, input_sq_norm=seen.input_sq_norm * 2.0**-20, input_sum=seen.input_sum * 2.0**-10)
    assert torch.equal(method.prune(weight * 1024, seen, PATTERN).mask, expected)
    assert torch.equal(method.prune(weight, stronger, PATTERN).mask, expected)
    assert not torch.equal(Dsnot(threshold_unit="token").prune(weight * 1e-3, seen, PATTERN).mask, expected)


def test_rows_in_pieces_are_the_same_rows(monkeypatch):
    weight, seen = problem(PATTERN)
    whole = Dsnot().prune(weight, seen, PATTERN)
    monkeypatch.setattr(dsnot, "_CHUNK", 3 * weight.shape[1])
    pieces = Dsnot().prune(weight, seen, PATTERN)
    assert torch.equal(pieces.mask, whole.mask)
    assert pieces.notes == pytest.approx(whole.notes)


def test_constant_and_dead_inputs():
    # a constant input's variance is only rounding: it comes first, and nothing is NaN
    assert kept([4.0, -3.0, 2.0, 1.0], [1.0] * 4, [1.0, 1.0, 1.0, 0.0]) == [1, 0, 0, 1]
    assert kept([4.0, -3.0, 2.0, 1.0], [0.0] * 4, [0.0] * 4) == [1, 1, 0, 0]
    assert kept([4.0, -3.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]) == [0, 0, 1, 1]


def test_sums_of_another_linear():
    wrong = InputStats(3, input_sq_norm=torch.ones(4).double(), input_sum=torch.ones(2).double())
    with pytest.raises(InputError, match=r"input_sum has shape \(2,\), but the weight \(1, 4\) has 4 input"):
        Dsnot().prune(torch.ones(1, 4), wrong, PATTERN)
    with pytest.raises(ValueError, match="input_sum was not collected"):
        Dsnot().prune(torch.ones(1, 4), InputStats(3, input_sq_norm=torch.ones(4).double()), PATTERN)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prior": "wnada"}, r"dsnot\.prior is 'wnada'\. Did you mean 'wanda'"),
        ({"threshold_unit": "rows"}, r"dsnot\.threshold_unit is 'rows'\. Did you mean 'row'"),
        ({"cycles": 0}, r"dsnot\.cycles is 0; expected a whole number >= 1"),
        ({"threshold": -0.1}, r"dsnot\.threshold is -0\.1; expected a number >= 0, such as 0\.1"),
        ({"threshold": float("nan")}, r"dsnot\.threshold is nan"),
        ({"variance_power": float("inf")}, r"dsnot\.variance_power is inf; expected a number >= 0, such as 1\.0"),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(InputError, match=words):
        Dsnot(**settings)
