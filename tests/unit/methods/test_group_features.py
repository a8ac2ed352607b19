import pytest
import torch

from nmprune import masks
from nmprune.methods.group_features import SETS, Features, n_features
from nmprune.pattern import Pattern

PATTERN = Pattern(2, 4)


def made(name, weight_scale=1.0, input_scale=1.0, rows=(0, 6)):
    draw = torch.Generator().manual_seed(0)
    weight = weight_scale * torch.randn(6, 16, generator=draw)
    inputs = input_scale * torch.randn(40, 16, generator=draw)
    gram = inputs.T @ inputs
    features = Features(name, weight, 4, gram.diagonal().sqrt(), gram)
    mask = masks.from_scores(weight.abs(), PATTERN)
    features.refresh(mask)
    return features.of(*rows), weight, gram, mask


@pytest.mark.parametrize("name", SETS)
def test_their_number_and_their_rows(name):
    whole, *_ = made(name)
    if name in ("raw", "scaled"):  # given norms, the others would be made as well
        weight = made(name)[1]
        whole = Features(name, weight, 4).of(0, 6)
        part = Features(name, weight, 4).of(2, 5)
    else:
        part = made(name, rows=(2, 5))[0]
    assert whole.shape == (n_features(name, 4), 6 * 4)
    assert torch.equal(whole[:, 2 * 4 : 5 * 4], part)


@pytest.mark.parametrize("name", ["activations", "first_order"])
def test_no_scale_gets_in(name):
    torch.testing.assert_close(made(name)[0], made(name, weight_scale=0.01)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(name)[0], made(name, input_scale=300.0)[0], rtol=1e-4, atol=1e-4)


def test_first_order_features_say_what_dropping_a_weight_costs():
    """The squared error when a group drops one weight alone, all other groups as they are: q + 2 v, over the mean q."""
    found, weight, gram, mask = made("first_order")
    row, group = 3, 2
    here = slice(4 * group, 4 * group + 4)
    column = row * 4 + group
    error = (weight * ~mask)[row].clone()
    error[here] = 0
    base = error @ gram @ error
    q = weight[row, here].square() * gram.diagonal()[here]
    for slot in range(4):
        one = error.clone()
        one[here.start + slot] = weight[row, here.start + slot]
        cost = (one @ gram @ one - base) / q.mean()
        pressed = found[14 + slot, column]  # v / sqrt(1 + |v|), solved for v
        pull = pressed * (pressed.abs() + (pressed.square() + 4).sqrt()) / 2
        stated = found[10 + slot, column] + 2 * pull
        torch.testing.assert_close(stated, cost, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[18:22, column].bool(), mask[row, here])


def test_degenerate_groups_stay_finite():
    weight = torch.zeros(2, 8)
    weight[1, 3] = 1e15
    gram = torch.zeros(8, 8)
    features = Features("first_order", weight, 4, gram.diagonal().sqrt(), gram)
    features.refresh(torch.tensor([[1, 1, 0, 0] * 2] * 2).bool())
    assert torch.isfinite(features.of(0, 2)).all()
