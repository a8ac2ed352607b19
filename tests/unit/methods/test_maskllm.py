import dataclasses

import pytest
import torch

from nmprune import masks, methods
from nmprune.errors import InputError
from nmprune.methods.base import Course
from nmprune.methods.maskllm import MaskLLM
from nmprune.pattern import Pattern

PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "4:8", "8:16")]
EACH_FORM = [(form, pattern) for pattern in PATTERNS for form in ("auto", "slot")]


def problem(pattern, method, rows=6, groups=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * pattern.group, generator=generator)
    prior = masks.from_scores(torch.randn(weight.shape, generator=generator), pattern)
    return weight, prior, method.begin(weight, prior, pattern, generator)


@pytest.mark.parametrize(("form", "pattern"), EACH_FORM)
def test_a_strong_prior_is_where_it_starts(form, pattern):
    method = MaskLLM(form=form, prior_strength=30.0)
    weight, prior, state = problem(pattern, method)
    assert torch.equal(method.hard_mask(weight, state, pattern), prior)
    assert state["logits"].shape[0] == weight.shape[0] and state["logits"].dtype == torch.float32


@pytest.mark.parametrize(("form", "pattern"), EACH_FORM)
def test_soft_masks_sum_to_n_and_end_hard(form, pattern):
    method = MaskLLM(form=form)
    weight, _, state = problem(pattern, method)
    for step, total in ((0, 10), (10, 10)):
        generator = torch.Generator().manual_seed(1)
        mask = method.random_mask(state, pattern, Course(step, total), generator)
        assert mask.shape == weight.shape and mask.min() >= 0 and mask.max() <= 1 + 1e-5
        torch.testing.assert_close(
            mask.unflatten(-1, (-1, pattern.group)).sum(-1),
            torch.full((6, 5), float(pattern.kept)),
            rtol=1e-4,
            atol=1e-4,
        )
    assert (mask - mask.round()).abs().mean() < 0.02


@pytest.mark.parametrize(("form", "pattern"), EACH_FORM)
def test_gradients_are_those_of_finite_differences(form, pattern):
    method = MaskLLM(form=form, kappa_first=2.0, tau_first=1.5)
    weight, _, state = problem(pattern, method, rows=2, groups=1)
    along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))

    def value(logits):
        generator = torch.Generator().manual_seed(1)
        return (method.effective(weight, {"logits": logits}, pattern, Course(0, 1), generator) * along).sum()

    logits = state["logits"].clone().requires_grad_()
    value(logits).backward()
    step = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        change = (value(logits + 1e-2 * step) - value(logits - 1e-2 * step)) / 2e-2
    assert (logits.grad * step).sum().item() == pytest.approx(change.item(), rel=2e-2, abs=2e-3)


def test_the_two_forms_are_one_where_slots_add_up_and_noise_is_silent():
    pattern = Pattern(2, 4)
    slots = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    summed = slots @ masks.candidates(pattern).float().T
    course = Course(1, 4)
    by_slot = MaskLLM(form="slot").mask_of(slots, pattern, course, torch.zeros_like(slots))
    listed = MaskLLM(form="candidate").mask_of(summed, pattern, course, torch.zeros_like(summed))
    torch.testing.assert_close(by_slot, listed, rtol=1e-4, atol=1e-6)


def test_the_priors_strength_is_the_same_in_both_forms():
    """Two candidates that differ in one slot differ by alpha * std."""
    pattern, prior = Pattern(2, 4), torch.tensor([[True, True, False, False]])
    listed = MaskLLM(form="candidate", gate_std=0.0).begin(torch.ones(1, 4), prior, pattern, torch.Generator())[
        "logits"
    ]
    slots = MaskLLM(form="slot", gate_std=0.0).begin(torch.ones(1, 4), prior, pattern, torch.Generator())["logits"]
    summed = slots @ masks.candidates(pattern).float().T
    torch.testing.assert_close(listed - listed[..., :1], summed - summed[..., :1])
    assert listed[0, 0, 0] - listed[0, 0, 1] == 3.0


def test_straight_through_is_hard_in_value_and_soft_in_gradient():
    pattern, course = Pattern(2, 4), Course(0, 1)
    soft, hard = MaskLLM(), MaskLLM(hard=True)
    _, _, state = problem(pattern, soft)
    grads = []
    for method in (soft, hard):
        logits = state["logits"].clone().requires_grad_()
        mask = method.random_mask({"logits": logits}, pattern, course, torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad((mask * torch.arange(20.0)).sum(), logits)[0])
    torch.testing.assert_close(*grads)
    assert masks.n_wrong_groups(mask.bool(), pattern) == 0 and set(mask.unique().tolist()) == {0.0, 1.0}


def test_schedules_are_linear_and_the_step_size_a_cosine():
    method = MaskLLM()
    assert method.values(Course(0, 2000)) == {"tau": 4.0, "kappa": 100.0}
    assert method.values(Course(1000, 2000)) == pytest.approx({"tau": 2.025, "kappa": 300.0})
    rates = [method.optimiser(Course(step, 100)).lr for step in (0, 50, 100)]
    assert rates == pytest.approx([5e-4, (5e-4 + 5e-5) / 2, 5e-5])
    how = method.optimiser(Course(0, 100))
    assert (how.betas, how.eps, how.weight_decay, how.clip) == ((0.9, 0.95), 1e-5, 0.1, 1.0)
    warm = dataclasses.replace(method, warmup=0.1)
    assert warm.optimiser(Course(0, 100)).lr == pytest.approx(5e-4 / 10)


def test_the_reward_for_kept_energy_fades():
    pattern = Pattern(2, 4)
    method = MaskLLM(sparse_reg=0.5)
    weight, _, state = problem(pattern, method)
    found = []
    for step in (0, 5):
        course = Course(step, 10)
        penalty = method.penalty(weight, state, pattern, course, torch.Generator().manual_seed(1))
        energy = method.effective(weight, state, pattern, course, torch.Generator().manual_seed(1)).square().sum()
        found.append(penalty / energy)
    assert [one.item() for one in found] == pytest.approx([-0.5, -0.25], rel=1e-5)
    assert method.penalty(weight, state, pattern, Course(10, 10), torch.Generator()) is None
    assert MaskLLM(sparse_reg=0.0).penalty(weight, state, pattern, Course(0, 10), torch.Generator()) is None


def test_what_it_needs():
    two_four, eight_sixteen = Pattern(2, 4), Pattern(8, 16)
    assert MaskLLM().state_bytes(400, two_four) == 16 * 600
    assert MaskLLM(form="slot").state_bytes(400, two_four) == 16 * 400
    assert MaskLLM().state_bytes(1600, eight_sixteen) == 16 * 1600
    assert MaskLLM().why_not(eight_sixteen) is None
    assert "12,870 candidate masks" in str(MaskLLM(form="candidate").why_not(eight_sixteen))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"form": "both"}, r"maskllm\.form is 'both'; expected one of auto, candidate, slot"),
        ({"tau_last": 0.0}, r"maskllm\.tau_last is 0\.0; expected more than 0"),
        ({"lr": -1.0}, r"maskllm\.lr is -1\.0; expected 0 or more"),
        ({"beta2": 1.0}, r"maskllm\.beta2 is 1\.0; expected 0 or more and less than 1"),
    ],
)
def test_impossible_settings(settings, text):
    with pytest.raises(InputError, match=text):
        MaskLLM(**settings)


def test_presets():
    best = methods.create("maskllm", {"preset": "best"})
    assert best == MaskLLM(**MaskLLM.presets["best"]) and best.form == "slot" and best.prior == "descent"
    assert methods.create("maskllm", {"preset": "best", "lr": "0.1"}) == dataclasses.replace(best, lr=0.1)
    with pytest.raises(InputError, match=r"method maskllm has no preset 'bset'\. Did you mean 'best'\?"):
        methods.create("maskllm", {"preset": "bset"})
    with pytest.raises(InputError, match=r"method wanda has no preset 'best'\. It has none"):
        methods.create("wanda", {"preset": "best"})
