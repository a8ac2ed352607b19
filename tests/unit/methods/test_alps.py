import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods.alps import Alps
from nmprune.methods.sparsegpt import SparseGPT
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "3:4", "4:8", "2:6", "8:16")]


def problem(rows=24, width=96, n_tokens=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(n_tokens, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), InputStats(n_tokens, input_gram=x.T @ x)


def as_the_paper_writes_it(weight, gram, pattern, rho=0.1):
    """ADMM with B, D and V apart, fp64, and exact normal equations on the mask it ends in."""
    hessian = gram.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    norm = hessian.diagonal().sqrt()
    h, w = hessian / norm / norm[:, None], weight.double() * norm
    eye = torch.eye(len(h), dtype=torch.float64)
    seen = masks.from_scores(w.abs(), pattern)
    d, v, has_grown = w * seen, torch.zeros_like(w), False
    for iteration in range(1, 301):
        b = torch.linalg.solve(h + rho * eye, (w @ h - v + rho * d).T).T
        mask = masks.from_scores((b + v / rho).abs(), pattern)
        d = (b + v / rho) * mask
        v = v + rho * (b - d)
        if iteration % 3 == 0:
            changed = (mask != seen).sum().item() / mask.sum().item()
            if (changed == 0 and has_grown) or (iteration >= 30 and changed < 0.0003):
                break
            assert changed > 0.005 or has_grown, "this problem would start again; that is another test"
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            seen, has_grown = mask, True
    solved = torch.zeros_like(w)
    for row, keep in enumerate(mask):
        solved[row, keep] = torch.linalg.solve(h[keep][:, keep], (h @ w[row])[keep])
    return mask, solved / norm, iteration, rho


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_the_plain_algorithm(pattern):
    weight, stats = problem()
    mask, solved, iterations, rho = as_the_paper_writes_it(weight, stats.gram(), pattern)
    pruned = Alps(cg_iterations=60).prune(weight, stats, pattern)
    assert torch.equal(pruned.mask, mask)
    assert pruned.notes["iterations"] == iterations and pruned.notes["rho"] == pytest.approx(rho)
    torch.testing.assert_close(pruned.weight.double(), solved, rtol=0, atol=2e-3)


def test_a_large_linear_stops_while_a_few_entries_still_change():
    weight, stats = problem(rows=1000, width=32)
    mask, _, iterations, _ = as_the_paper_writes_it(weight, stats.gram(), Pattern(2, 4))
    pruned = Alps().prune(weight, stats, Pattern(2, 4))
    assert pruned.notes["iterations"] == iterations
    assert (pruned.mask != mask).float().mean() < 1e-3


def output_error(weight, pruned_weight, stats):
    change = (pruned_weight - weight).double()
    return ((change @ stats.gram().double()) * change).sum().item()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_less_output_error_than_sparsegpt_and_the_note_says_how_much(pattern):
    weight, stats = problem()
    pruned, other = (method.prune(weight, stats, pattern) for method in (Alps(), SparseGPT()))
    error = output_error(weight, pruned.weight, stats)
    assert error < 0.9 * output_error(weight, other.weight, stats)
    expected = error / output_error(weight, 0 * weight, stats)
    assert pruned.notes["relative_output_error"] == pytest.approx(expected, rel=1e-4)


def test_more_conjugate_gradients_are_better_and_change_no_mask():
    weight, stats = problem()
    none, few, many = (Alps(cg_iterations=n).prune(weight, stats, Pattern(2, 4)) for n in (0, 3, 40))
    assert torch.equal(none.mask, many.mask) and torch.equal(few.mask, many.mask)
    errors = [one.notes["relative_output_error"] for one in (none, few, many)]
    assert errors[0] > errors[1] > errors[2]
    assert [one.notes["cg_iterations"] for one in (none, few)] == [0, 3] and 3 < many.notes["cg_iterations"] < 40


def test_with_uncorrelated_inputs_no_weight_moves_and_the_mask_is_nearly_the_best():
    weight = torch.randn(60, 32, generator=torch.Generator().manual_seed(1))
    norms = torch.linspace(1, 3, 32)
    pruned = Alps().prune(weight, InputStats(9, input_gram=torch.diag(norms.square())), Pattern(2, 4))
    damped = (norms.square() + 0.01 * norms.square().mean()).sqrt()
    best = masks.from_scores(weight.abs() * damped, Pattern(2, 4))
    assert (pruned.mask == best).float().mean() > 0.95
    torch.testing.assert_close(pruned.weight, weight * pruned.mask, rtol=0, atol=1e-6)


def test_where_the_mask_does_not_change_at_first_rho_shrinks_and_it_starts_again():
    weight = torch.tensor([[4.0, 3.9, 1.0, 1.1]])  # kept and dropped are far apart, and inputs hardly correlated
    gram = torch.eye(4) + 0.001
    notes = Alps(rho=10.0, max_iterations=9).prune(weight, InputStats(9, input_gram=gram), Pattern(2, 4)).notes
    assert notes["iterations"] == 9 and notes["rho"] == pytest.approx(10 / 5**3)


def test_weights_that_are_n_of_m_already_stay():
    weight, stats = problem()
    weight = weight * masks.from_scores(weight.abs(), Pattern(2, 4))
    pruned = Alps().prune(weight, stats, Pattern(2, 4))
    torch.testing.assert_close(pruned.weight, weight, rtol=0, atol=1e-6)
    assert pruned.notes["iterations"] == 0 and pruned.notes["relative_output_error"] < 1e-12


def test_dead_inputs_go_first_keep_their_value_and_are_counted():
    weight, stats = problem(width=32)
    gram = stats.gram().clone()
    dead = [3, 8, 9, 10]
    for j in dead:
        gram[j, :] = gram[:, j] = 0.0
    pruned = Alps().prune(weight, InputStats(300, input_gram=gram), Pattern(2, 4))
    assert pruned.notes["dead_inputs"] == 4
    assert pruned.mask[:, dead].float().mean(0)[0] < 0.1
    assert (pruned.mask[:, 8:11].sum(1) >= 1).all()  # three of four are dead
    torch.testing.assert_close(pruned.weight[:, dead], weight[:, dead] * pruned.mask[:, dead], rtol=1e-3, atol=0)


def test_the_scale_of_the_inputs_cancels_to_the_bit():
    weight, stats = problem()
    gram = stats.gram().clone()
    gram[7, :] = gram[:, 7] = 0.0
    one, other = (Alps().prune(weight, InputStats(300, input_gram=s * gram), Pattern(2, 4)) for s in (1.0, 2.0**-20))
    assert torch.equal(one.mask, other.mask) and torch.equal(one.weight, other.weight)


def test_linears_of_one_input_share_eigenvectors_found_on_one_thread(monkeypatch):
    calls = []
    eigh, threads = torch.linalg.eigh, torch.get_num_threads()

    def watched(matrix):
        calls.append((matrix.dtype, torch.get_num_threads()))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    weight, stats = problem()
    torch.set_num_threads(2)
    try:
        for method in (Alps(), Alps(rho=0.2), Alps(damping=0.1)):
            method.prune(weight, stats, Pattern(2, 4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert calls == [(torch.float64, 1)] * 2  # one for each damping


def test_a_gram_matrix_that_rounding_made_indefinite():
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 1.5  # an eigenvalue of -0.5, where H + rho I would be singular
    weight = torch.tensor([[1.0, -0.9, 0.8, 0.7]])
    pruned = Alps(damping=1e-9, rho=0.5).prune(weight, InputStats(9, input_gram=gram), Pattern(2, 4))
    assert pruned.weight.abs().max() < 10


@pytest.mark.parametrize("name", ["damping", "rho"])
@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
def test_impossible_numbers(name, value):
    with pytest.raises(InputError, match=rf"alps\.{name} is .*; expected a number > 0, such as 0\.\d+\."):
        Alps(**{name: value})


def test_impossible_counts():
    with pytest.raises(InputError, match=r"alps\.max_iterations is 0; expected a whole number >= 1"):
        Alps(max_iterations=0)
    with pytest.raises(InputError, match=r"alps\.cg_iterations is -1; expected a whole number >= 0"):
        Alps(cg_iterations=-1)


def test_weights_that_overflow_are_an_error():
    weight, gram = torch.full((1, 2), 3e38), 0.01 * torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    with pytest.raises(InputError, match=r"solved weights are not finite.*higher damping"):
        Alps().prune(weight, InputStats(2, input_gram=gram), Pattern(1, 2))
