import pytest
import torch

from nmprune.errors import InputError
from nmprune.methods import hessian
from nmprune.stats import InputStats


def gram(width=40, n_tokens=200, seed=0):
    x = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


def test_the_factor_multiplies_back_and_its_inverse_is_the_cholesky_of_the_inverse():
    gram_II = gram()
    factor = hessian.factorise(gram_II, 0.01)
    damped = gram_II.double() + 0.01 * gram_II.diagonal().mean().double() * torch.eye(40)
    r = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(r @ r.T, damped, rtol=1e-5, atol=1e-4)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(torch.linalg.inv(r), u, rtol=1e-4, atol=1e-7)
    assert (factor.damping, factor.damping_steps, factor.dead.any().item()) == (0.01, 0, False)


def test_more_damping_in_steps_of_ten_and_none_of_it_hidden():
    gram_II = gram()
    gram_II[0, 1] = gram_II[1, 0] = 1.5 * gram_II[0, 0]  # |correlation| above 1: no X has this Gram matrix
    factor = hessian.factorise(gram_II, 0.01)
    assert factor.damping_steps == 2 and factor.damping == pytest.approx(1.0)
    assert hessian.factorise(gram_II, 0.0).damping == pytest.approx(1.0)  # 0, 1e-5, 1e-4, ... 1
    assert torch.isfinite(factor.upper).all()


def test_a_rank_deficient_gram_without_damping_still_factors():
    factor = hessian.factorise(gram(width=40, n_tokens=7), 0.0)
    assert torch.isfinite(factor.upper).all()
    assert factor.damping <= 1e-3


def test_hopeless_is_an_error_that_says_what_to_do():
    gram_II = gram()
    gram_II[3, 3] = -1e9 * gram_II[0, 0]
    gram_II[4, 4] = 2e9 * gram_II[0, 0]
    gram_II[0, 1] = gram_II[1, 0] = 1e15 * gram_II[0, 0]
    with pytest.raises(InputError, match=r"not positive definite, even with 10000 times .*6 steps up from damping 0"):
        hessian.factorise(gram_II, 0.01)


def test_dead_inputs_are_decoupled_and_scale_with_the_rest():
    gram_II = gram(8)
    gram_II[5, :] = gram_II[:, 5] = 0.0
    factor, larger = hessian.factorise(gram_II, 0.01), hessian.factorise(4 * gram_II, 0.01)
    assert factor.dead.tolist() == [i == 5 for i in range(8)]
    alone = factor.upper.clone()
    alone[5, 5] = 0.0
    assert not alone[5].any() and not alone[:, 5].any()
    assert torch.equal(larger.upper, 2 * factor.upper)


def test_nothing_but_dead_inputs():
    factor = hessian.factorise(torch.zeros(4, 4), 0.01)
    assert factor.dead.all() and torch.isfinite(factor.upper).all()


def test_the_gram_matrix_is_not_modified_and_threads_come_back():
    gram_II, threads = gram(), torch.get_num_threads()
    before = gram_II.clone()
    hessian.factorise(gram_II, 0.01)
    assert torch.equal(gram_II, before) and torch.get_num_threads() == threads


def test_checked_gram():
    gram_II = gram(8)
    assert hessian.checked_gram(InputStats(5, input_gram=gram_II), 8) is gram_II
    with pytest.raises(InputError, match=r"shape \(8, 8\), but the weight has 16 input features"):
        hessian.checked_gram(InputStats(5, input_gram=gram_II), 16)
    with pytest.raises(InputError, match="no calibration token"):
        hessian.checked_gram(InputStats(0, input_gram=gram_II), 8)
    gram_II[1, 2] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        hessian.checked_gram(InputStats(5, input_gram=gram_II), 8)


@pytest.mark.parametrize("width", [8, 64, 200])  # less than the rows turned at a time, as many, more and not a multiple
def test_turned_round_in_pieces_is_turned_round(width):
    matrix_II = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hessian._backwards(matrix_II, torch.float64), matrix_II.flip(0, 1).double())
    columns_first_II = matrix_II.double().T  # as a Cholesky factor comes: the order in memory decides later roundings
    turned_II = hessian._backwards(columns_first_II, torch.float32)
    assert torch.equal(turned_II, columns_first_II.float().flip(0, 1))
    assert turned_II.stride() == columns_first_II.stride()
