import pytest
import torch

from nmprune.errors import InputError
from nmprune.methods.gblm import Gblm
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERN = Pattern(2, 4)


def stats(gradients, sq_norms=(0.0, 0.0, 0.0, 0.0), n=128):
    """`gradients`: per sequence, (n_sequences, out, in); repeated until there are `n` sequences."""
    each = torch.tensor(gradients).repeat(n // len(gradients), 1, 1)
    return InputStats(
        7,
        input_sq_norm=torch.tensor(sq_norms, dtype=torch.float64),
        weight_grad_abs=each.abs().sum(0),
        weight_grad_sq=each.square().sum(0),
        n_grad_sequences=n,
    )


def kept(weight, given, **settings):
    return Gblm(**settings).prune(torch.tensor(weight), given, PATTERN).mask.int().tolist()


def test_known_answers_in_the_authors_units():
    weight = [[1.0, 2.0, -2.0, 4.0]]
    # 128 sequences: l1 norms 128 * (.5 .1 .1 .2), times 100, plus norms per sequence sqrt(128 * (1 9 49 1) / 128) = 1 3 7 1
    given = stats([[[-0.5, 0.1, 0.1, 0.2]]], (128.0, 1152.0, 6272.0, 128.0))
    # without gradients 1 6 14 4; with them 6401 2566 2574 10244
    assert kept(weight, given, alpha=0.0) == [[0, 1, 1, 0]]
    assert kept(weight, given) == [[1, 0, 0, 1]]
    # alpha 1 / 128: 1.5 6.2 14.2 4.8; the fourth passes the second when alpha * 128 * .6 > 2
    assert kept(weight, given, alpha=0.9 * 2 / (0.6 * 128)) == [[0, 1, 1, 0]]
    assert kept(weight, given, alpha=1.1 * 2 / (0.6 * 128)) == [[0, 0, 1, 1]]
    # l2: sqrt(128) * (.5 .1 .1 .2)
    assert kept(weight, given, norm="l2", alpha=0.9 * 2 / (0.6 * 128**0.5)) == [[0, 1, 1, 0]]
    assert kept(weight, given, norm="l2", alpha=1.1 * 2 / (0.6 * 128**0.5)) == [[0, 0, 1, 1]]


def test_l1_and_l2_differ_where_sequences_differ():
    weight = [[1.0, 1.0, 1.0, 1.0]]
    # mean of |g|: 1 1.1 .1 .9; root mean square: 1.41 1.1 .1 .9
    given = stats([[[2.0, 1.1, 0.1, 0.9]], [[0.0, -1.1, 0.1, 0.9]]])
    assert kept(weight, given) == [[1, 1, 0, 0]]
    given = stats([[[1.6, 1.0, 0.1, 0.9]], [[0.0, -1.0, 0.1, 0.9]]])
    assert kept(weight, given, norm="l1") == [[0, 1, 0, 1]]
    assert kept(weight, given, norm="l2") == [[1, 1, 0, 0]]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_alpha_means_the_same_for_any_number_of_sequences(norm):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator)
    each, inputs = torch.randn(4, 8, 16, generator=generator), torch.rand(16, generator=generator).double()
    found = [
        Gblm(norm, 0.01)
        .prune(
            weight,
            InputStats(
                7,
                copies * inputs,
                None,
                weight_grad_abs=each.abs().sum(0) * copies,
                weight_grad_sq=each.square().sum(0) * copies,
                n_grad_sequences=4 * copies,
            ),
            PATTERN,
        )
        .mask
        for copies in (1, 4, 64)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_without_gradients_it_is_wanda():
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(8, 16, generator=generator), torch.rand(16, generator=generator).double()
    given = InputStats(7, norms, weight_grad_abs=torch.rand(8, 16), n_grad_sequences=4)
    mask = Gblm(alpha=0.0).prune(weight, given, PATTERN).mask
    assert torch.equal(mask, Wanda().prune(weight, given, PATTERN).mask)


def test_it_needs_the_gradients_of_its_norm_only():
    assert Gblm("l1").needs == {"input_sq_norm", "weight_grad_abs"}
    assert Gblm("l2").needs == {"input_sq_norm", "weight_grad_sq"}
    assert Gblm.needs == Gblm("l1").needs | Gblm("l2").needs


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match=r"gblm.norm is 'l3'\. Did you mean 'l"):
        Gblm(norm="l3")
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"gblm.alpha is .*; expected a number >= 0, such as 100"):
            Gblm(alpha=alpha)
