import itertools
import math

import pytest
import torch

from nmprune import masks, sampling
from nmprune.errors import InputError
from nmprune.methods.base import Course
from nmprune.methods.maskpro import MaskPro
from nmprune.pattern import Pattern

PATTERN = Pattern(2, 4)
PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "3:4", "4:8", "8:16")]
COURSE = Course(0, 10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prior_of(shape, pattern=PATTERN, seed=0):
    return masks.from_scores(torch.randn(*shape, generator=generator(seed)), pattern)


def begun(method, prior, pattern=PATTERN):
    return method.begin(torch.ones(prior.shape), prior, pattern, generator())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_begins_at_the_prior_mask(pattern):
    prior = prior_of((6, 4 * pattern.group), pattern)
    state = begun(MaskPro(), prior, pattern)
    assert torch.equal(state["logits"], 10.0 * prior)
    assert torch.equal(MaskPro().hard_mask(torch.ones(prior.shape), state, pattern), prior)


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_flip_share_is_the_share_of_groups_that_a_draw_takes_off_the_prior(pattern, share):
    groups = 20_000
    prior = prior_of((1, groups * pattern.group), pattern)
    method = MaskPro(flip_share=share)
    drawn = method.draw(begun(method, prior, pattern), pattern, generator(1))
    flipped = (drawn != prior).unflatten(-1, (-1, pattern.group)).any(-1).float().mean().item()
    # to first order in the share, and a sampling error of sqrt(share / groups)
    assert flipped == pytest.approx(share, rel=0.75 * share * pattern.group / 2, abs=4 * math.sqrt(share / groups))


def test_flip_share_of_the_papers_logit():
    assert MaskPro(flip_share=3 * math.exp(-10)).start(PATTERN) == pytest.approx(10)
    assert MaskPro().start(PATTERN) == 10


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_draws_are_legal_and_the_weights_under_them_are_what_the_forward_sees(pattern):
    prior = prior_of((5, 3 * pattern.group), pattern)
    method = MaskPro(prior_logit=1.0)
    state = begun(method, prior, pattern)
    mask = method.draw(state, pattern, generator(4))
    assert masks.n_wrong_groups(mask, pattern) == 0 and not torch.equal(mask, prior)
    weight = torch.randn(prior.shape, generator=generator(2))
    assert torch.equal(method.effective(weight, state, pattern, COURSE, generator(4)), weight * mask)


def test_the_tracker_is_updated_before_it_is_used():
    method = MaskPro()
    advantage, carried = method.advantage(5.0, 3.0, method.carried())
    assert carried["tracker"].item() == pytest.approx(0.02)
    assert advantage == pytest.approx(1.98)
    advantage, carried = method.advantage(2.0, 3.0, carried)
    assert carried["tracker"].item() == pytest.approx(0.99 * 0.02 - 0.01)
    assert advantage == pytest.approx(-1 - (0.99 * 0.02 - 0.01))


def test_a_tracker_that_remembers_all_takes_nothing_off():
    advantage, carried = MaskPro(tracker=1.0).advantage(5.0, 3.0, MaskPro().carried())
    assert advantage == 2.0 and carried["tracker"] == 0


def test_advantage_does_not_change_what_it_is_given():
    carried = MaskPro().carried()
    MaskPro().advantage(5.0, 3.0, carried)
    assert carried["tracker"] == 0


@pytest.mark.parametrize(("score", "pattern"), [("auto", "2:4"), ("auto", "4:8"), ("set", "3:4"), ("ordered", "2:4")])
def test_a_step_moves_the_logits_along_the_score_of_what_was_drawn(score, pattern):
    pattern = Pattern.parse(pattern)
    method = MaskPro(prior_logit=1.5, lr=3.0, score=score)
    state = begun(method, prior_of((4, 2 * pattern.group), pattern), pattern)
    before = state["logits"].clone()
    drawn_mask = method.draw(state, pattern, generator(6))
    method.score_step(state, pattern, 0.5, COURSE, generator(6))
    logits = before.unflatten(-1, (-1, pattern.group)).double().requires_grad_()
    drawn = sampling.draw_without_replacement(logits.float(), pattern.kept, generator(6))
    assert torch.equal(torch.zeros(logits.shape).scatter(-1, drawn, 1.0).flatten(-2).bool(), drawn_mask)
    exact = score == "set" or (score == "auto" and pattern.kept == 2)
    orders = itertools.permutations(range(pattern.kept)) if exact else [tuple(range(pattern.kept))]
    log_p = torch.stack([plackett_luce(logits, drawn[..., list(order)]) for order in orders]).logsumexp(0)
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    torch.testing.assert_close(
        state["logits"].double(), before - 3.0 * 0.5 * gradient.flatten(-2), rtol=1e-5, atol=1e-6
    )


def plackett_luce(logits, drawn):
    total = 0
    for slot in drawn.split(1, -1):
        total = total + logits.log_softmax(-1).gather(-1, slot).squeeze(-1)
        logits = logits.scatter(-1, slot, -torch.inf)
    return total


def test_what_was_worse_than_expected_becomes_less_likely():
    method = MaskPro(prior_logit=1.0, lr=1.0)
    for advantage, sign in ((1.0, -1), (-1.0, 1)):
        state = begun(method, prior_of((3, 8)))
        drawn = sampling.draw_without_replacement(state["logits"].unflatten(-1, (-1, 4)), 2, generator(3))
        before = sampling.set_log_score(state["logits"].unflatten(-1, (-1, 4)), drawn)
        method.score_step(state, PATTERN, advantage, COURSE, generator(3))
        after = sampling.set_log_score(state["logits"].unflatten(-1, (-1, 4)), drawn)
        assert ((after - before).sign() == sign).all()


@pytest.mark.parametrize("pattern", ["2:4", "3:4"])
def test_it_learns_which_weights_matter(pattern):
    """A loss that is the sum of the weights that are kept: the smallest ones are to stay."""
    pattern = Pattern.parse(pattern)
    weight = torch.arange(8.0).flip(0).repeat(1, 1)
    method = MaskPro(prior_logit=0.5, lr=0.3)
    prior = masks.from_scores(weight, pattern)
    state, carried = begun(method, prior, pattern), method.carried()
    for step in range(600):
        loss = (weight * method.draw(state, pattern, generator(step))).sum().item() / 10
        advantage, carried = method.advantage(loss, (weight * prior).sum().item() / 10, carried)
        method.score_step(state, pattern, advantage, COURSE, generator(step))
    assert torch.equal(method.hard_mask(weight, state, pattern), masks.from_scores(-weight, pattern))


def test_no_graph_is_made():
    method = MaskPro(prior_logit=1.0)
    weight = torch.ones(3, 8, requires_grad=True)
    state = method.begin(weight, prior_of((3, 8)), PATTERN, generator())
    method.score_step(state, PATTERN, 1.0, COURSE, generator())
    assert not state["logits"].requires_grad
    assert not method.draw(state, PATTERN, generator()).requires_grad


def test_steps_by_pieces_are_steps_as_one(monkeypatch):
    method, prior = MaskPro(prior_logit=1.0), prior_of((9, 16))
    whole, pieces = begun(method, prior), begun(method, prior)
    method.score_step(whole, PATTERN, 0.7, COURSE, generator())
    monkeypatch.setattr("nmprune.methods.maskpro._CHUNK", 20)
    method.score_step(pieces, PATTERN, 0.7, COURSE, generator())
    torch.testing.assert_close(whole["logits"], pieces["logits"])


@pytest.mark.parametrize(
    "setting",
    [{"lr": 0}, {"prior_logit": -1}, {"flip_share": 1}, {"flip_share": -0.1}, {"tracker": 1.5}, {"score": "sett"}],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(setting):
    (key,) = setting
    with pytest.raises(InputError, match=rf"maskpro\.{key} is "):
        MaskPro(**setting)


def test_the_exact_score_has_a_largest_n():
    assert MaskPro(score="set").why_not(Pattern(4, 8)) is None
    reason = MaskPro(score="set").why_not(Pattern(8, 16))
    assert reason is not None and "40,320" in reason and "ordered" in reason
    assert MaskPro().why_not(Pattern(8, 16)) is None


def test_memory_is_one_logit_a_weight():
    assert MaskPro().state_bytes(1000, PATTERN) == 4000
