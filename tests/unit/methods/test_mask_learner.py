"""One layer's learner: the two-phase gradient against one graph through everything, blocks, sampling, resuming."""

import dataclasses

import pytest
import torch

from nmprune import masks, sampling
from nmprune.methods.hyperprune import HyperPrune
from nmprune.methods.mask_learner import seeded
from nmprune.methods.mask_logits import rows
from two_linears import TwoLinears, learn, start

SMALL = {
    "hidden": 8,
    "layer_width": 3,
    "component_width": 3,
    "steps": 6,
    "check_every": 2,
    "block": 40,
    "zero_start": False,
}
NOISY = {"noise": 1.0, "noise_end": 0.5, "gamma": 0.7, "lambda1": 0.3, "hard_share": 0.0}


def learner_of(method, pattern="2:4"):
    work = TwoLinears(method, pattern)
    return method._learner(work, start(method, pattern), 5), work


def collected(learner, gradients, chosen):
    """Gradients with respect to the slot scores by linear and block, and the network's."""
    found = {}

    def keep(linear, block, gradient):
        found[linear.name, block.number] = gradient.clone()

    learner.pull(gradients, chosen, True, keep)
    return found, learner.network.gradients()


def in_one_graph(method, learner, work):
    """The same loss with everything in one graph: (loss, gradients of the slot scores, of the network's parameters)."""
    network, step, pattern = learner.network, learner.step, learner.linears[0].logits.pattern
    candidates = masks.candidates(pattern).float()
    masked, slots_of, kept = {}, {}, 0.0
    for linear in learner.linears:
        parts = []
        for block in linear.blocks:
            outputs = network._form.forward(
                network._parameters, linear.features.of(block.start, block.stop), network._fold_anew(linear.role)
            )
            slots = torch.zeros(pattern.group, outputs.shape[1]).requires_grad_()
            slots_of[linear.name, block.number] = slots
            free = linear.residual_MG[:, block.groups] if method.residual else 0.0
            prior = linear.prior_slots("mask", block.start, block.stop)
            own = outputs if method.head == "candidates" else candidates @ outputs
            total = candidates @ (slots + free + method.gamma_at(step) * method.beta / pattern.kept * prior) + own
            noise = sampling.gumbel(
                outputs.shape if method.head == "candidates" else own.shape,
                seeded(5, "noise", step, linear.name, block.number),
            )
            mask = sampling.soft_mask(total.T, candidates, method.temperature_at(step), method.noise_at(step) * noise.T)
            parts.append(rows(mask.T, linear.weight_OI.shape[1]))
        mask = torch.cat(parts)
        energy = linear.weight_OI.square() * work.stats[linear.name].squared_norms().float()
        kept = kept + (mask * energy).sum() / energy.sum() / len(learner.linears)
        masked[linear.name] = linear.weight_OI * mask
    loss = work.distance(learner._batch(), masked)
    (loss - method.lambda1 * kept).backward()
    gradients = {name: value.grad.clone() for name, value in network._parameters.items() if value.grad is not None}
    for value in network._parameters.values():
        value.grad = None
    return loss.item(), {key: slots.grad for key, slots in slots_of.items()}, gradients


@pytest.mark.parametrize("head", ["slots", "candidates"])
@pytest.mark.parametrize("residual", [True, False])
def test_two_phases_are_one_graph(head, residual):
    method = HyperPrune(head=head, residual=residual, network_every=1 + residual, network_share=1.0, **SMALL, **NOISY)
    learner, work = learner_of(method)
    learner.step = 2
    assert len(learner.linears[0].blocks) > 1
    loss, expected_slots, expected = in_one_graph(method, learner, work)
    chosen = {linear.name: linear.blocks for linear in learner.linears}
    for linear in learner.linears:
        for block in linear.blocks:
            learner._write(linear, block, learner._soft(linear, block).mask)
    found_loss, gradients = work.gradients(learner._batch(), {one.name: one.masked_OI for one in learner.linears})
    slots, found = collected(learner, gradients, chosen)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert (
        set(slots) == (set(expected_slots) if residual else set())
        and set(found) == set(expected)
        and len(found) == 3 + 2 * 3
    )
    for key, gradient in slots.items():
        torch.testing.assert_close(gradient, expected_slots[key], rtol=1e-5, atol=1e-6)
    for key, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)


def test_the_size_of_the_blocks_changes_nothing_but_rounding():
    outcomes = []
    for block in (8, 10_000):
        method = HyperPrune(**{**SMALL, "block": block}, network_every=1, network_share=1.0)
        learner, _ = learner_of(method)
        learner.advance()
        outcomes.append((learner.linears[0].residual_MG, learner.network.snapshot()["network.weight1"]))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_update_of_the_network_that_looks_at_half_of_the_blocks_counts_them_twice():
    method = HyperPrune(**{**SMALL, "block": 32}, network_every=1, network_share=0.5)
    learner, work = learner_of(method)
    half = {linear.name: learner._shown(linear, linear.blocks) for linear in learner.linears}
    assert all(2 * len(half[linear.name]) == len(linear.blocks) for linear in learner.linears)
    _, gradients = work.gradients(learner._batch(), work.weights)
    _, looked = collected(learner, gradients, {linear.name: linear.blocks for linear in learner.linears})
    learner.network.update(1e-12)
    learner.settings = dataclasses.replace(method, network_share=1.0)
    _, alone = collected(learner, gradients, half)
    for name, gradient in looked.items():
        torch.testing.assert_close(gradient, 2 * alone[name], rtol=1e-4, atol=1e-6)


def test_groups_that_are_not_chosen_stand_still_at_their_hard_mask():
    method = HyperPrune(**SMALL, sample_share=0.25)
    learner, work = learner_of(method)
    before = [linear.residual_MG.clone() for linear in learner.linears]
    seen = {}

    def spy(sequences, weights):
        seen.update({name: weight.clone() for name, weight in weights.items()})
        return TwoLinears.gradients(work, sequences, weights)

    hard = learner.hard_masks()
    work.gradients = spy
    learner.advance()
    for linear, old in zip(learner.linears, before, strict=True):
        moved = (linear.residual_MG != old).any(0)
        assert 0.2 < moved.float().mean() < 0.3
        stood = rows((~moved).float().expand(4, -1), linear.weight_OI.shape[1]).bool()
        expected = linear.weight_OI * hard[linear.name]
        assert torch.equal(seen[linear.name][stood], expected[stood])
        assert not torch.equal(seen[linear.name], expected)


def test_every_sequence_has_its_turn():
    method = HyperPrune(**SMALL, sequences=3)
    learner, work = learner_of(method)
    seen = []
    for learner.step in range(8):
        seen += learner._batch().tolist()
    assert sorted(seen) == sorted(3 * work.train.tolist())
    assert sorted(seen[:8]) == work.train.tolist()


RESUMED = {
    "default": {},
    "sampled": {"sample_share": 0.5, "noise": 1.0, "gamma": 1.0, "alpha": 1.0},
    "sampled without residual": {"sample_share": 0.5, "residual": False, "network_every": 1},
    "no network": {"network": False},
    "candidates": {"head": "candidates", "noise": 1.0, "lambda1": 0.1},
    "no prior": {"prior": "none", "features": "raw", "patience": 5},
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_layer_that_goes_on_from_a_snapshot_ends_in_the_same_bits(changes, stop):
    method = HyperPrune(**{**SMALL, **changes})
    prior = "none" if method.prior == "none" else "wanda"
    whole_steps, whole, whole_state = learn(method, TwoLinears(method, prior=prior))
    running = method.learn(TwoLinears(method, prior=prior), start(method), 0)
    snapshot = next(step for step in running if step.step == stop).snapshot()
    frozen = {name: value.clone() for name, value in snapshot.items()}
    next(running, None)
    for name, value in frozen.items():  # a snapshot is a copy
        torch.testing.assert_close(snapshot[name], value, rtol=0, atol=0, equal_nan=True)
    steps, resumed, state = learn(method, TwoLinears(method, prior=prior), snapshot=snapshot)
    assert [step.values for step in steps] == [step.values for step in whole_steps[stop:]]
    assert all(torch.equal(resumed[name].mask, whole[name].mask) for name in whole)
    assert {name: one.notes for name, one in resumed.items()} == {name: one.notes for name, one in whole.items()}
    assert state.keys() == whole_state.keys()
    assert all(torch.equal(state[name], whole_state[name]) for name in state)


def test_the_seed_decides():
    method = dataclasses.replace(HyperPrune(**SMALL), noise=1.0)
    one, same, other = (learn(method, TwoLinears(method), seed=seed)[0][-1].values for seed in (0, 0, 1))
    assert one == same and one != other
