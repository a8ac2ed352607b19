import math

import pytest
import torch

from nmprune.evaluate.information import NOISE_SHARES, DenseOutput, activation_terms, spread_of
from nmprune.stats import StatsAccumulator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(inputs):
    sums = StatsAccumulator(inputs.shape[-1], frozenset({"input_gram", "input_sum"}))
    sums.add(inputs)
    return sums.result()


def whitened(n_inputs, tokens=64, seed=0):
    """Inputs whose sample mean is 0 and whose sample covariance is the identity, up to fp32."""
    inputs = normal(tokens, n_inputs, seed=seed).double()
    inputs -= inputs.mean(0)
    return (torch.linalg.qr(inputs).Q * tokens**0.5).float()


def nats(inputs, dense, pruned, shares=NOISE_SHARES):
    return DenseOutput(spread_of(stats_of(inputs)), dense).nats(pruned, shares)


def from_joint_covariance(cov, dense, pruned, share):
    """I = 1/2 log |cov Z| |cov Y| / |cov (Z, Y)|, the definition; needs an invertible cov Z."""
    cov, a, b = cov.double(), dense.double(), pruned.double()
    zz, zy, yy = a @ cov @ a.T, a @ cov @ b.T, b @ cov @ b.T
    yy = yy + share * yy.trace() / len(b) * torch.eye(len(b), dtype=yy.dtype)
    joint = torch.cat([torch.cat([zz, zy], 1), torch.cat([zy.T, yy], 1)])
    parts = [torch.linalg.slogdet(one).logabsdet.item() for one in (zz, yy, joint)]
    return 0.5 * (parts[0] + parts[1] - parts[2])


def test_one_dimension():
    """Y = w' x + N of variance c times the signal's: the Gaussian channel's 1/2 log(1 + 1 / c), whatever w' is."""
    x = normal(50, 1) * 3 + 7
    for weight in (0.1, -5.0):
        found = nats(x, torch.tensor([[2.0]]), torch.tensor([[weight]]))
        assert found == pytest.approx([0.5 * math.log(1 + 1 / c) for c in NOISE_SHARES], rel=1e-9)
    assert nats(x, torch.tensor([[2.0]]), torch.tensor([[0.0]])) == (0.0, 0.0, 0.0)
    assert nats(x, torch.tensor([[0.0]]), torch.tensor([[1.0]])) == (0.0, 0.0, 0.0)  # Z tells nothing


def test_what_the_dense_output_does_not_tell():
    """Z = x1, Y = a x1 + b x2 + N: the part of x2 is noise to whoever knows Z."""
    a, b, share = 1.5, 0.5, 0.01
    noise = share * (a * a + b * b)
    expected = 0.5 * math.log((a * a + b * b + noise) / (b * b + noise))
    found = nats(whitened(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[a, b]]), [share])
    assert found == pytest.approx([expected], rel=1e-4)


def test_independent_outputs_add_up():
    """Diagonal weights on white inputs: sum over outputs of 1/2 log(1 + w_i^2 / s^2), 0 where Z or Z' lacks the input."""
    dense, pruned = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0])), torch.diag(torch.tensor([1.0, 0.0, 4.0, 2.0]))
    share = 1e-3
    noise = share * (1 + 16 + 4) / 4
    expected = sum(0.5 * math.log(1 + w * w / noise) for w in (1.0, 2.0))
    assert nats(whitened(4), dense, pruned, [share]) == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize(("n_out", "n_in"), [(3, 8), (8, 8), (12, 8)])
def test_it_is_the_definition(n_out, n_in):
    inputs = normal(400, n_in) @ normal(n_in, n_in, seed=1) + 2
    dense, pruned = normal(n_out, n_in, seed=2), normal(n_out, n_in, seed=3)
    pruned[:, ::2] = 0
    spread = spread_of(stats_of(inputs))
    cov = torch.cov(inputs.double().T, correction=0)
    assert torch.allclose(spread.root @ spread.root.T, cov, rtol=1e-4, atol=1e-4)
    output = DenseOutput(spread, dense)
    assert output.rank == min(n_out, n_in) and output.determines_input == (n_out >= n_in)
    # more outputs than inputs are redundant: the same Z from the first eight of them, which the definition can invert
    for share, found in zip(NOISE_SHARES, output.nats(pruned), strict=True):
        assert found == pytest.approx(from_joint_covariance(cov, dense[:n_in], pruned, share), rel=1e-3)


def test_invariances():
    inputs = normal(300, 6) @ normal(6, 6, seed=1) + 1
    dense, pruned = normal(4, 6, seed=2), normal(5, 6, seed=3)
    expected = pytest.approx(nats(inputs, dense, pruned), rel=1e-6)
    assert nats(inputs, normal(4, 4, seed=4) @ dense, pruned) == expected  # Z in other coordinates
    assert nats(inputs, dense, 1e-3 * pruned) == expected  # noise is relative to Z'
    turn = torch.linalg.qr(normal(5, 5, seed=5).double()).Q
    assert nats(inputs, dense.double(), turn @ pruned.double()) == expected  # white noise has no direction
    assert nats(inputs, torch.cat([dense, dense]), pruned) == expected  # the same thing twice is no news
    assert nats(inputs + 100, dense, pruned) == pytest.approx(nats(inputs, dense, pruned), rel=1e-2)  # centred
    scale = torch.tensor([1e3, 1e-3, 1, 1, 10, 1])
    assert nats(inputs * scale, dense / scale, pruned / scale) == expected  # the inputs' units


def test_it_falls_with_noise_and_is_largest_for_the_dense_weights_themselves():
    inputs, dense = normal(500, 16), normal(4, 16, seed=1)
    whole = nats(inputs, dense, dense)
    assert whole[0] > whole[1] > whole[2] > 0
    kept = dense * (torch.arange(16) % 2 == 0)
    fewer = dense * (torch.arange(16) % 4 == 0)
    for one, half, quarter in zip(whole, nats(inputs, dense, kept), nats(inputs, dense, fewer), strict=True):
        assert one > half > quarter > 0
    other = normal(4, 16, seed=2)
    other -= (other @ torch.linalg.pinv(dense)) @ dense  # reads only what Z does not tell
    assert max(nats(whitened(16), dense, other)) < 1e-3


def test_fewer_tokens_than_inputs():
    inputs = normal(5, 12) + 3
    spread = spread_of(stats_of(inputs))
    assert spread.root.shape == (12, 4)  # centring takes one
    dense, pruned = normal(12, 12, seed=1), normal(12, 12, seed=2)
    assert DenseOutput(spread, dense).determines_input
    assert all(math.isfinite(one) and one > 0 for one in nats(inputs, dense, pruned))
    assert DenseOutput(spread, dense[:3]).rank == 3


def test_dead_and_constant_inputs():
    inputs = torch.cat([normal(40, 3), torch.zeros(40, 1), torch.full((40, 1), 2.5)], 1)
    spread = spread_of(stats_of(inputs))
    assert spread.root.shape == (5, 3)
    dense, pruned = normal(2, 5, seed=1), normal(2, 5, seed=2)
    assert nats(inputs, dense, pruned) == pytest.approx(nats(inputs[:, :3], dense[:, :3], pruned[:, :3]), rel=1e-6)
    assert nats(inputs[:, 3:], dense[:, 3:], pruned[:, 3:]) == (0.0, 0.0, 0.0)  # nothing varies


def test_one_channel_a_million_times_stronger():
    """The others' information must not drown in its rounding."""
    inputs = normal(200, 6)
    strong = inputs * torch.tensor([1e6, 1, 1, 1, 1, 1])
    assert spread_of(stats_of(strong)).root.shape == (6, 6)
    dense, pruned = normal(3, 6, seed=1), normal(3, 6, seed=2)
    dense[:, 0] = pruned[:, 0] = 0
    assert nats(strong, dense, pruned) == pytest.approx(nats(inputs, dense, pruned), rel=1e-5)


def test_the_terms_of_equation_11():
    inputs = normal(300, 6) * torch.tensor([1, 2, 3, 1, 1, 0.0]) + torch.tensor([0, 1, 0, 5, 0, 0.0])
    stats = stats_of(inputs)
    weight = normal(4, 6, seed=1)
    pruned = weight * (normal(4, 6, seed=2) > 0)
    found = activation_terms(spread_of(stats), weight, pruned)
    per_token = torch.stack([(pruned * x).square().sum() for x in inputs]).double().mean().item()
    assert found.mean_term + found.variance_term == pytest.approx(per_token, rel=1e-4)
    assert found.mean_term == pytest.approx((pruned * inputs.mean(0)).square().sum().item(), rel=1e-4)
    # Wanda's score squared, summed over what is kept: both terms, not the first one alone
    wanda = (pruned.abs() * stats.squared_norms().sqrt().float()).square().sum().item() / len(inputs)
    assert found.mean_term + found.variance_term == pytest.approx(wanda, rel=1e-4)
    assert found.mean_term < 0.9 * wanda
    assert found.kept == pytest.approx(wanda / activation_terms(spread_of(stats), weight, weight).dense)
    assert activation_terms(spread_of(stats), 0 * weight, 0 * weight).kept == 1.0
