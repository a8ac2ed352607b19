import math

import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import proxsparse
from nmprune.methods.base import Course
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.proxsparse import ProxSparse, prox, regulariser
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERN = Pattern(2, 4)
F64 = torch.float64
COURSE = Course(0, 10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype) * scale


def e3(w):
    return sum(w[..., i] * w[..., j] * w[..., k] for i, j, k in ((0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1)))


def objective(w, y, strength):
    """As the paper has it."""
    return (w - y).square().sum(-1) / 2 + strength * e3(w.abs())


def best_of_restarts(y, strength, restarts=12, sweeps=100):
    """Coordinate descent from random places in the box 0..|y|; the lowest objective of each group."""
    size = y.abs()
    lowest = torch.full(size.shape[:1], math.inf, dtype=F64)
    for seed in range(restarts):
        w = size * torch.rand(size.shape, generator=generator(seed), dtype=F64).round(decimals=1)
        for _ in range(sweeps):
            for i in range(4):
                a, b, c = (w[:, j] for j in range(4) if j != i)
                w[:, i] = (size[:, i] - strength * (a * b + b * c + c * a)).clamp(min=0)
        lowest = torch.minimum(lowest, objective(w, size, strength))
    return lowest


@pytest.mark.parametrize("strength", [0.05, 0.25, 1.0, 3.0, 10.0])
def test_prox_is_no_worse_than_restarts(strength):
    y = normal(200, 4)
    ours = objective(prox(y, strength), y, strength)
    assert ((ours - best_of_restarts(y, strength)) / ours).max() < 0.02
    assert ((ours - best_of_restarts(y, strength)) > 1e-9 * ours).sum() <= 1


def test_prox_obeys_the_scale_law():
    y = normal(50, 40)
    for scale in (1e-3, 7.0):
        torch.testing.assert_close(prox(scale * y, 0.4 / scale), scale * prox(y, 0.4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strength", [0.01, 0.5, 20.0])
def test_prox_shrinks_and_keeps_signs_and_order(strength):
    y = normal(40, 64)
    w = prox(y, strength)
    assert (w.abs() <= y.abs()).all()
    assert (w * y >= 0).all()
    by_size = y.abs().unflatten(-1, (-1, 4)).argsort(-1)
    assert (w.abs().unflatten(-1, (-1, 4)).gather(-1, by_size).diff(dim=-1) >= 0).all()


def test_groups_with_at_most_two_non_zeros_are_their_own_answer():
    y = normal(30, 16)
    y *= masks.from_scores(y.abs(), PATTERN)
    y[0] = 0
    assert torch.equal(prox(y, 5.0), y)
    assert torch.equal(regulariser(y), torch.zeros(30, 4, dtype=F64))


def test_prox_without_strength_changes_nothing_and_a_great_one_leaves_the_two_largest():
    y = normal(30, 16)
    assert torch.equal(prox(y, 0.0), y)
    assert torch.equal(prox(y, 1e6), y * masks.from_scores(y.abs(), PATTERN))


def test_prox_takes_a_strength_per_row_and_any_leading_axes():
    y = normal(3, 5, 8)
    strength = torch.tensor([0.01, 0.3, 2.0], dtype=F64).view(3, 1, 1)
    each = torch.stack([prox(one, s.item()) for one, s in zip(y, strength, strict=True)])
    torch.testing.assert_close(prox(y, strength), each)
    assert prox(y[0, 0], 0.3).shape == (8,)


def test_pieces_and_groups_that_stop_early_change_nothing(monkeypatch):
    """Whoever shares a piece with a slow group gets what it would get alone."""
    y = torch.cat([normal(20, 8, scale=0.01), normal(20, 8, scale=3.0)]).float()
    whole = prox(y, 0.3)
    assert torch.equal(torch.cat([prox(row[None], 0.3) for row in y]), whole)
    monkeypatch.setattr(proxsparse, "_CHUNK", 12)
    assert torch.equal(prox(y, 0.3), whole)


def test_prox_does_not_modify_what_it_is_given_and_is_done_in_fp32():
    y = normal(4, 8, dtype=torch.float32)
    before = y.clone()
    assert prox(y, 0.5).dtype == torch.float32
    assert torch.equal(y, before)


def test_the_proximal_step_alone_leads_to_the_magnitude_mask():
    weight = normal(16, 64, scale=0.02, dtype=torch.float32)
    method = ProxSparse(lambda_rel=1.0)
    state = method.begin(weight, masks.from_scores(weight.abs(), PATTERN), PATTERN, generator())
    at_start = regulariser(state["weight"]).sum()
    for step in range(400):
        method.after_step(weight, state, PATTERN, Course(step, 400))
    sparse = (state["weight"].unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2
    assert 0.8 < sparse.float().mean() < 1  # the paper's LLaMA setting, c = 1, takes 0.92 of the groups there
    assert regulariser(state["weight"]).sum() < 0.01 * at_start
    magnitude = Magnitude().prune(weight, InputStats(0), PATTERN).mask
    assert torch.equal(method.hard_mask(weight, state, PATTERN), magnitude)


def test_lambda_rel_means_the_same_at_every_scale_and_lambda_abs_does_not():
    weight = normal(6, 32, dtype=torch.float32)
    for settings, same in (({}, True), ({"lambda_rel": 0.0, "lambda_abs": 0.3}, False)):
        shrunk = []
        for scale in (1.0, 0.125):
            method = ProxSparse(lr=0.05 * scale, **settings)  # AdamW's step belongs to the scale, too
            state = {"weight": scale * weight}
            method.after_step(scale * weight, state, PATTERN, COURSE)
            shrunk.append(state["weight"] / scale)
        assert torch.allclose(*shrunk, rtol=1e-5, atol=1e-7) == same


def test_lambda_of_a_row_is_c_lr_over_its_mean_square_and_nothing_for_zeros():
    weight = torch.tensor([[1.0, -1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    method = ProxSparse(lambda_rel=3.0, lr=0.1)
    state = {"weight": torch.tensor([[0.9, 0.8, 1.1, 1.2]]).repeat(2, 1)}
    method.after_step(weight, state, PATTERN, COURSE)
    torch.testing.assert_close(state["weight"][:1], prox(torch.tensor([[0.9, 0.8, 1.1, 1.2]]), 3.0 * 0.1 / 2.5))
    assert state["weight"][1].tolist() == pytest.approx([0.9, 0.8, 1.1, 1.2])


def test_the_state_is_a_copy_and_the_mask_goes_by_it():
    weight = normal(4, 8, dtype=torch.float32)
    before = weight.clone()
    method = ProxSparse()
    state = method.begin(weight, masks.from_scores(-weight.abs(), PATTERN), PATTERN, generator())
    assert method.effective(weight, state, PATTERN, COURSE, generator()) is state["weight"]
    state["weight"][:, 0] = 100.0
    assert torch.equal(weight, before)
    mask = method.hard_mask(weight, state, PATTERN)
    assert mask[:, 0].all() and masks.n_wrong_groups(mask, PATTERN) == 0


def test_the_anchor_is_the_formula_and_off_by_default():
    weight = torch.tensor([[0.5, -0.25, 0.0, 1.0]])
    trained = torch.tensor([[0.4, -0.5, 0.2, 1.0]], requires_grad=True)
    state = {"weight": trained}
    assert ProxSparse().penalty(weight, state, PATTERN, COURSE, generator()) is None
    penalty = ProxSparse(anchor=0.25, anchor_eps=0.1).penalty(weight, state, PATTERN, COURSE, generator())
    terms = [0.4 / 0.6 * -0.1, -0.5 / -0.35 * -0.25, 0.2 / 0.1 * 0.2, 0.0]
    assert penalty.item() == pytest.approx(0.25 * sum(x**2 for x in terms))
    penalty.backward()
    assert trained.grad[0, :3].abs().min() > 0 and trained.grad[0, 3] == 0


def test_the_schedule_warms_up_over_a_tenth_and_falls_to_zero():
    method = ProxSparse(lr=1e-3)
    rates = [method.optimiser(Course(step, 100)).lr for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[55] == pytest.approx(5e-4) and rates[99] == pytest.approx(1e-3 / 90)
    assert method.optimiser(Course(0, 1)).lr == pytest.approx(1e-3)
    how = method.optimiser(Course(0, 100))
    assert (how.betas, how.eps, how.weight_decay, how.clip) == ((0.9, 0.999), 1e-8, 0.0, 1.0)


def test_only_2_of_4():
    assert ProxSparse().why_not(PATTERN) is None
    for other in ("4:8", "1:4", "3:4", "1:2"):
        reason = ProxSparse().why_not(Pattern.parse(other))
        assert reason is not None and "2:4" in reason and "maskllm" in reason


@pytest.mark.parametrize("setting", [{"lambda_rel": -1}, {"lambda_abs": math.nan}, {"lr": 0}, {"anchor_eps": 0}])
def test_a_setting_out_of_range_is_an_error_that_names_it(setting):
    (key,) = setting
    with pytest.raises(InputError, match=rf"proxsparse\.{key} is .*expected"):
        ProxSparse(**setting)


def test_rows_do_not_depend_on_each_other():
    weight = normal(10, 16, dtype=torch.float32)
    trained = weight + normal(10, 16, seed=1, scale=0.1, dtype=torch.float32)
    method = ProxSparse(lr=0.05)
    whole, some = {"weight": trained.clone()}, {"weight": trained[3:7].clone()}
    method.after_step(weight, whole, PATTERN, COURSE)
    method.after_step(weight[3:7], some, PATTERN, COURSE)
    assert torch.equal(whole["weight"][3:7], some["weight"])
    assert not torch.equal(whole["weight"], trained)
