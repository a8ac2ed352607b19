import dataclasses

import pytest
import torch

from nmprune import masks, methods
from nmprune.errors import InputError
from nmprune.methods.hyperprune import HyperPrune
from nmprune.methods.network_alone import agreement
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from two_linears import ROLES, TwoLinears, learn, start

SMALL = {"hidden": 8, "layer_width": 3, "component_width": 3, "steps": 8, "check_every": 4, "cache_size": 10}
STILL = {"residual_lr": 1e-12, "network_lr": 1e-12}  # nothing is learned


def learned(method, **layer):
    work = TwoLinears(method, **layer)
    steps, pruned, state = learn(method, work)
    return steps, pruned, state, work


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16"])
@pytest.mark.parametrize("network", [True, False])
def test_every_group_keeps_exactly_n_and_no_weight_moves(pattern, network):
    method = HyperPrune(**SMALL, network=network)
    _, pruned, _, work = learned(method, pattern=pattern)
    assert list(pruned) == ["up", "down"]
    for one in pruned.values():
        assert masks.n_wrong_groups(one.mask, Pattern.parse(pattern)) == 0 and one.weight is None
    for name, weight in TwoLinears(method, pattern).weights.items():
        assert torch.equal(work.weights[name], weight), "the dense weights are not touched"


def test_it_learns_better_masks_than_its_prior():
    for changes in (
        {},
        {"network": False},
        {"residual": False, "network_every": 1, "network_share": 1.0, "gamma": 0.5},
    ):
        method = HyperPrune(**{**SMALL, "steps": 48, "network_lr": 0.01}, **changes)
        steps, pruned, _, work = learned(method)
        notes = pruned["up"].notes
        assert notes["accepted"] == 1 and notes["held_out_learned"] < 0.95 * notes["held_out_prior"], changes
        hard = {name: weight * pruned[name].mask for name, weight in work.weights.items()}
        assert work.loss(work.held_out, hard) == pytest.approx(notes["held_out_learned"], rel=1e-6)
        assert 0 < notes["flips"] < 0.6
        last = steps[-1].values
        assert {"loss", "temperature", "gamma", "flips", "hard_loss", "gap"} <= set(last)
        assert [step.step for step in steps] == list(range(1, 49)) and steps[0].total == 48


@pytest.mark.parametrize("head", ["slots", "candidates"])
@pytest.mark.parametrize("changes", [{"gamma": 1.0}, {"residual": True, "network_every": 4}])
def test_a_network_that_starts_at_zero_starts_at_the_priors_mask(head, changes):
    method = HyperPrune(
        **{**SMALL, "residual": False, "network_every": 1, "guard": False, **STILL, **changes}, head=head
    )
    _, pruned, _, work = learned(method)
    assert all(torch.equal(pruned[name].mask, work.priors[name]) for name in pruned)


def test_a_strong_prior_term_is_the_prior():
    method = HyperPrune(**SMALL, zero_start=False, gamma=1e6, guard=False)
    _, pruned, _, work = learned(method)
    assert all(torch.equal(pruned[name].mask, work.priors[name]) for name in pruned)


def test_a_prior_of_scores_is_wandas_mask_whatever_the_prior():
    method = HyperPrune(**SMALL, **STILL, prior_form="scores", gamma=1.0, network=False, guard=False)
    _, pruned, _, work = learned(method, prior="magnitude")
    for name, weight in work.weights.items():
        expected = Wanda().prune(weight, work.stats[name], work.patterns[name]).mask
        assert torch.equal(pruned[name].mask, expected)


@pytest.mark.parametrize("outlier", ["share", "sum"])
def test_a_strong_outlier_term_ends_at_wandas_mask(outlier):
    method = HyperPrune(
        lambda1=1e9, outlier=outlier, network=False, residual_start=0.0, residual_lr=0.5, steps=60, hard_share=0.0,
        temperature=4.0, temperature_end=4.0, guard=False, keep_best=False, schedule="constant",
    )  # fmt: skip
    _, pruned, _, work = learned(method, prior="magnitude")
    for name, weight in work.weights.items():
        expected = Wanda().prune(weight, work.stats[name], work.patterns[name]).mask
        assert torch.equal(pruned[name].mask, expected)


def test_a_factor_on_weights_or_inputs_changes_no_mask():
    method = HyperPrune(**SMALL)
    plain = learned(method, linear=True)[1]["up"].mask
    for scale in (2.0**-6, 2.0**5):
        work = TwoLinears(method, linear=True, scale=scale)
        # of a layer without a residual stream the update is relative to 0
        assert (
            torch.equal(learn(method, work)[1]["up"].mask, plain)
            or agreement(learn(method, work)[1]["up"].mask, plain, Pattern(2, 4)) > 0.99
        )


def test_the_guard_keeps_the_prior_where_learning_did_not_help():
    bad = {**SMALL, "network": False, "lambda1": -1e9, "hard_share": 0.0, "temperature_end": 1.0, "residual_lr": 1.0}
    _, pruned, _, work = learned(HyperPrune(**bad))
    assert all(torch.equal(pruned[name].mask, work.priors[name]) for name in pruned)
    assert pruned["up"].notes["accepted"] == 0 and pruned["up"].notes["flips"] == 0
    assert pruned["up"].notes["held_out_learned"] > pruned["up"].notes["held_out_prior"]
    _, pruned, _, work = learned(HyperPrune(**bad, guard=False))
    assert not torch.equal(pruned["up"].mask, work.priors["up"]) and pruned["up"].notes["accepted"] == 1


def test_where_the_guard_has_nothing_to_judge_by_it_says_so():
    _, pruned, _, _ = learned(HyperPrune(**SMALL, prior="none"), prior="none")
    assert pruned["up"].notes["guard"] == "off: no prior" and "held_out_prior" not in pruned["up"].notes
    steps, pruned, _, _ = learned(HyperPrune(**SMALL), n_held_out=0)
    assert pruned["up"].notes["guard"] == "off: nothing held out" and pruned["up"].notes["best_step"] == 8
    assert not {"held_out_prior", "held_out_learned"} & set(pruned["up"].notes) and "hard_loss" not in steps[-1].values


def test_the_best_masks_seen_are_taken_or_the_last():
    noisy = {**SMALL, "steps": 12, "check_every": 1, "network": False, "schedule": "constant"}
    noisy |= {"residual_start": 1.0, "residual_lr": 2.0}
    steps, pruned, _, _ = learned(HyperPrune(**noisy))
    losses = [step.values["hard_loss"] for step in steps]
    assert pruned["up"].notes["held_out_learned"] == min(losses) < losses[-1]
    assert pruned["up"].notes["best_step"] == 1 + losses.index(min(losses))
    _, pruned, _, _ = learned(HyperPrune(**noisy, keep_best=False, guard=False))
    assert pruned["up"].notes["held_out_learned"] == losses[-1] and pruned["up"].notes["best_step"] == 12


def test_patience_ends_a_layer_early():
    method = HyperPrune(**{**SMALL, "steps": 50, "check_every": 1}, **STILL, patience=3)
    steps, _, _, _ = learned(method)
    assert len(steps) == 4  # the first look is the best, then three without a better mask


def test_polish_goes_down_from_the_learned_masks():
    method = HyperPrune(**SMALL, descend=3, target=0.0)
    _, pruned, _, work = learned(method)
    notes = pruned["up"].notes
    assert method.needs == {"input_gram"} and dataclasses.replace(method, target=0.5).needs == {
        "input_gram",
        "cross_gram",
    }
    assert notes["polished"] == int(notes["held_out_polished"] < notes["held_out_learned"])
    hard = {name: weight * pruned[name].mask for name, weight in work.weights.items()}
    taken = min(notes["held_out_polished"], notes["held_out_learned"], notes["held_out_prior"])
    assert work.loss(work.held_out, hard) == pytest.approx(taken, rel=1e-6)


def test_regenerating_all_layers_from_the_last_state():
    method = HyperPrune(**SMALL, lambda2=1.0)
    state, works = None, [TwoLinears(method, index=index) for index in range(TwoLinears.n_layers)]
    for work in works:
        *_, state = learn(method, work, state, seed=work.index)
    before = {name: value.clone() for name, value in state.items()}
    for work in works:
        again = method.regenerate(work, state)
        assert all(masks.n_wrong_groups(again[name], work.patterns[name]) == 0 for name in work.weights)
        assert all(torch.equal(mask, method.regenerate(work, state)[name]) for name, mask in again.items())
    assert all(torch.equal(value, before[name]) for name, value in state.items())


@pytest.mark.parametrize("head", ["slots", "candidates"])
def test_a_network_that_is_taught_the_final_masks_makes_them_again(head):
    agreements = {}
    for distil in (0, 150):
        method = HyperPrune(
            **{**SMALL, "hidden": 32}, distil=distil, residual_lr=0.3, network_lr=0.01, head=head, guard=False
        )
        _, pruned, state, work = learned(method)
        again = method.regenerate(work, state)
        shares = [agreement(again[name], pruned[name].mask, Pattern(2, 4)) for name in again]
        agreements[distil] = min(shares)
        assert min(agreement(work.priors[name], pruned[name].mask, Pattern(2, 4)) for name in again) < 0.9
    assert agreements[0] < 0.9 < agreements[150]


def test_regenerating_needs_a_network():
    method = HyperPrune(**SMALL, network=False)
    with pytest.raises(InputError, match="network=false: there is no network"):
        method.regenerate(TwoLinears(method), {})


def test_presets_and_needs():
    literal = methods.create("hyperprune", {"preset": "paper-literal"})
    assert (literal.steps, literal.gamma, literal.alpha, literal.prior) == (2000, 1e-5, 2.0, "sparsegpt")
    assert literal.needs == {"input_sq_norm"}
    assert not literal.residual and not literal.guard and literal.loss == "sum"
    paper = methods.create("hyperprune", {"preset": "paper", "lambda1": "0"})
    assert paper.lambda1 == 0 and paper.steps == 200 and paper.needs == frozenset()
    assert HyperPrune().needs == {"input_gram"}
    assert HyperPrune(features="activations").needs == {"input_sq_norm"}
    assert HyperPrune(network=False).needs == frozenset()
    for method in (literal, paper):
        short = dataclasses.replace(method, steps=2, hidden=8)
        _, pruned, _, _ = learned(short)
        assert masks.n_wrong_groups(pruned["down"].mask, Pattern(2, 4)) == 0


def test_schedules():
    literal = HyperPrune(**HyperPrune.presets["paper-literal"])
    assert literal.gamma_at(3) == pytest.approx(1e-5 * 2.718281828**-6)
    assert literal.temperature_at(2000) == pytest.approx(0.8187, rel=1e-3) and literal.lr_factor(1999) == 1
    paper = HyperPrune(**HyperPrune.presets["paper"])
    assert paper.gamma_at(0) == 2 and paper.gamma_at(199) == pytest.approx(2 * 2.718281828**-2)
    assert paper.temperature_at(0) == 2 and paper.temperature_at(199) == pytest.approx(0.1)
    assert dataclasses.replace(paper, temperature_decay="linear").temperature_at(100) == pytest.approx(1.045, rel=1e-2)
    assert [paper.is_hard(step) for step in (149, 150)] == [False, True]
    assert paper.lr_factor(0) == pytest.approx(0.1) and paper.lr_factor(199) == pytest.approx(0.1, rel=1e-2)
    assert HyperPrune(noise=1.0, noise_end=0.5, steps=3).noise_at(1) == 0.75


def test_distances():
    draw = torch.Generator().manual_seed(0)
    inputs, target, output = (torch.randn(2, 5, 3, generator=draw) for _ in range(3))
    error, update = (output - target).square().sum(-1), (target - inputs).square().sum(-1)
    torch.testing.assert_close(HyperPrune(loss="sum").distance(output, target, inputs), error.sum(-1))
    relative = HyperPrune(loss="relative").distance(output, target, inputs)
    torch.testing.assert_close(relative, error.sum(-1) / update.sum(-1))
    per_token = error / (update + 0.1 * update.median(-1, keepdim=True).values)
    per_token[:, 0] = per_token[:, 0].clamp(max=1)
    found = HyperPrune().distance(output, target, inputs)
    torch.testing.assert_close(found, per_token.mean(-1))
    torch.testing.assert_close(HyperPrune().distance(9 * output, 9 * target, 9 * inputs), found)
    torch.testing.assert_close(HyperPrune().distance(target, target, inputs), torch.zeros(2))
    assert torch.isfinite(HyperPrune().distance(inputs, inputs, inputs)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "heads"}, r"hyperprune\.head is 'heads'; expected one of slots, candidates"),
        ({"steps": 0}, r"hyperprune\.steps is 0; expected a whole number >= 1"),
        ({"temperature": 0.0}, r"hyperprune\.temperature is 0\.0; expected a number above 0"),
        ({"hard_share": 1.5}, r"hyperprune\.hard_share is 1\.5; expected a number from 0 to 1"),
        ({"network": False, "residual": False}, "both off, so nothing learns"),
        ({"residual": False}, "Set network_every=1"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        HyperPrune(**changes)


def test_large_groups_need_a_head_of_slots():
    assert HyperPrune(head="candidates").why_not(Pattern(8, 16)).endswith("set method.head=slots")
    assert HyperPrune(head="candidates").why_not(Pattern(4, 8)) is None
    assert HyperPrune().why_not(Pattern(8, 16)) is None


def test_a_state_of_another_model_or_pattern():
    method = HyperPrune(**SMALL)
    work = TwoLinears(method)
    other = method.start(["mlp.up"], 7, Pattern(2, 4), torch.Generator())
    with pytest.raises(
        InputError, match=r"knows 7 layers and the components mlp\.up; this model has 3 layers and mlp\.down"
    ):
        next(method.learn(work, other, 0))
    with pytest.raises(InputError, match=r"makes 8 slots for a group, but the layer's patterns are 2:4"):
        next(method.learn(work, start(method, "4:8"), 0))


def test_statistics_that_cannot_be_used():
    method = HyperPrune(**SMALL)
    work = TwoLinears(method)
    work.stats["up"] = dataclasses.replace(work.stats["up"], n_tokens=0)
    with pytest.raises(InputError, match="saw no calibration token"):
        next(method.learn(work, start(method), 0))
    work = TwoLinears(method)
    work.weights["down"][0, 0] = torch.nan
    with pytest.raises(InputError, match="down: a weight is NaN or infinite"):
        next(method.learn(work, start(method), 0))


def test_planned_bytes_are_those_of_the_state():
    for changes in ({}, {"head": "candidates", "layer_width": 0, "depth_features": False}):
        method = HyperPrune(**{**SMALL, **changes})
        state = None
        for index in range(3):
            *_, state = learn(method, TwoLinears(method, index=index), state)
        held = sum(value.numel() * value.element_size() for name, value in state.items() if name != "roles")
        assert method.state_bytes(ROLES, 3, Pattern(2, 4)) == held
    assert HyperPrune(network=False).state_bytes(ROLES, 3, Pattern(2, 4)) == 0
    large = HyperPrune(hidden=256, layer_width=64, component_width=64).learner_bytes(200_000_000, Pattern(2, 4))
    assert 20 * 200e6 < large < 32 * 200e6
    paper = HyperPrune(**HyperPrune.presets["paper"])
    assert paper.learner_bytes(200_000_000, Pattern(2, 4)) < 10 * 200e6
    assert paper.learner_bytes(200_000_000, Pattern(2, 4)) > paper.learner_bytes(1000, Pattern(2, 4)) > 0
