"""The loop: what it judges and keeps, that it goes on exactly, that the model is left alone."""

import dataclasses
import math

import pytest
import torch

import learners
import tiny_models
from nmprune import masks, sampling
from nmprune.errors import InputError
from nmprune.methods.base import AdamStep, WholeModel
from nmprune.methods.global_descent import GlobalDescent
from nmprune.methods.maskllm import MaskLLM
from nmprune.train.loop import Text


@dataclasses.dataclass(frozen=True)
class Scored(WholeModel):
    """Learns by score: one logit per weight, plain policy gradient."""

    name = "scored"
    summary = paper = "of the tests"
    learns_by = "score"
    noise = "step"

    def begin(self, weight_OI, prior_OI, pattern, generator):
        return {"slots": 2.0 * prior_OI.float()}

    def draw(self, state, pattern, generator):
        assert not torch.is_grad_enabled()
        return sampling.draw_mask(state["slots"].unflatten(-1, (-1, pattern.group)), pattern.kept, generator).flatten(
            -2
        )

    def hard_mask(self, weight_OI, state, pattern):
        return masks.from_scores(state["slots"], pattern)

    def carried(self):
        return {"tracker": torch.tensor(0.0, dtype=torch.float64)}

    def advantage(self, loss, prior_loss, carried):
        residual = loss - prior_loss
        tracker = 0.9 * carried["tracker"] + 0.1 * residual
        return residual - tracker.item(), {"tracker": tracker}

    def score_step(self, state, pattern, advantage, course, generator):
        slots = state["slots"].unflatten(-1, (-1, pattern.group))
        drawn = sampling.draw_without_replacement(slots, pattern.kept, generator)
        score = sampling.ordered_score_gradient(slots, drawn)
        assert not score.requires_grad
        slots.sub_(20.0 * advantage * score)

    def state_bytes(self, n_weights, pattern):
        return 4 * n_weights


@dataclasses.dataclass(frozen=True)
class Weights(WholeModel):
    """Learns the weights themselves and the rest of the model, and reads the masks off: as ProxSparse does."""

    name = "weights"
    summary = paper = "of the tests"

    @property
    def trains_rest(self):
        return True

    def begin(self, weight_OI, prior_OI, pattern, generator):
        return {"weight": weight_OI}

    def effective(self, weight_OI, state, pattern, course, generator):
        return state["weight"]

    def after_step(self, weight_OI, state, pattern, course):
        assert not torch.is_grad_enabled()
        state["weight"].mul_(0.9)

    def optimiser(self, course):
        return AdamStep(lr=0.05)

    def hard_mask(self, weight_OI, state, pattern):
        return masks.from_scores(state["weight"].abs(), pattern)

    def state_bytes(self, n_weights, pattern):
        return 16 * n_weights


SAME = Text(
    tiny_models.windows(4), tiny_models.windows(4)
)  # judged by what was learned: a random model generalises nothing
LEARNERS = [learners.QUICK, Scored(), Weights(), GlobalDescent(damping=100.0)]
each = pytest.mark.parametrize("method", LEARNERS, ids=[one.name for one in LEARNERS])


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@each
def test_the_model_is_left_as_it_was(method):
    model = tiny_models.build("llama_tied")
    before, flags = state_of(model), [one.requires_grad for one in model.parameters()]
    steps, learned = learners.run(model, method)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [one.requires_grad for one in model.parameters()] == flags
    assert all(one.grad is None for one in model.parameters())
    assert [one.step for one in steps] == list(range(7))
    assert learned.steps == 6 and learned.epochs == 2.0


@each
def test_masks_are_lawful_and_worth_what_the_loop_says(method):
    model = tiny_models.build("llama")
    steps, learned = learners.run(model, method, guard=False)
    found = learners.targets(model)
    ids = tiny_models.windows(8)[6:]
    for one in found:
        mask = masks.unpack(learned.bits[one.name], one.shape)
        assert masks.n_wrong_groups(mask, one.pattern) == 0
        with torch.no_grad():
            one.view.of(one.layer.get_parameter(one.parameter)).mul_(mask)
        assert one.pattern.group == 4
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert learned.best.loss == pytest.approx(loss, rel=1e-5)
    judged = [one.values["held_out_loss"] for one in steps if "held_out_loss" in one.values]
    assert len(judged) == (6 if method.learns_by == "descent" else 3)  # descent judges every round
    assert learned.best.loss == min(judged) and learned.last.loss == judged[-1]
    gaps = [one.values for one in steps if "soft_hard_gap" in one.values]
    assert all(v["soft_hard_gap"] == pytest.approx(v["held_out_loss"] - v["held_out_soft_loss"]) for v in gaps)


@each
@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(method, stop_after):
    whole, learned = learners.run(tiny_models.build("llama"), method, accumulation=2, batch_size=1)
    settings = {"accumulation": 2, "batch_size": 1}
    _, kept = learners.run(tiny_models.build("llama"), method, stop_after=stop_after, **settings)
    rest, again = learners.run(tiny_models.build("llama"), method, snapshot=kept, **settings)
    assert [one.step for one in rest] == list(range(stop_after + 1, 7))
    assert [one.values for one in rest] == [one.values for one in whole][stop_after + 1 :]
    assert all(torch.equal(learned.bits[name], again.bits[name]) for name in learned.bits)
    assert dataclasses.replace(learned, bits={}) == dataclasses.replace(again, bits={})


def test_learning_lowers_the_held_out_loss_from_the_dense_model():
    model = tiny_models.build("llama")
    steps, learned = learners.run(model, steps=40, loss="kl", eval_every=10, text=SAME)
    assert not learned.guarded
    assert learned.loss == learned.best.loss < 0.9 * learned.prior_loss
    assert learned.best.flips > 0.02
    assert steps[0].values == {"held_out_prior_loss": learned.prior_loss}


def test_the_guard_keeps_the_prior_where_nothing_is_better():
    harmful = dataclasses.replace(learners.QUICK, lr=0.0, lr_last=0.0, prior_strength=0.0, gate_std=1.0)  # random masks
    model = tiny_models.build("llama")
    _, guarded = learners.run(model, harmful, loss="kl")
    priors = learners.magnitudes(learners.targets(model))
    assert guarded.guarded and guarded.loss == guarded.prior_loss < guarded.best.loss
    assert all(torch.equal(guarded.bits[name], priors[name]) for name in priors)
    _, unguarded = learners.run(model, harmful, loss="kl", guard=False)
    assert not unguarded.guarded and unguarded.loss == unguarded.best.loss == guarded.best.loss
    assert any(not torch.equal(unguarded.bits[name], priors[name]) for name in priors)


def test_patience_stops_a_run_that_gains_nothing():
    still = dataclasses.replace(learners.QUICK, lr=0.0, lr_last=0.0)
    steps, learned = learners.run(tiny_models.build("llama"), still, steps=40, patience=2)
    assert learned.steps == len(steps) - 1 == 6  # judged at 2, then twice the same
    assert learned.best.step == 2


def test_accumulation_is_one_larger_batch():
    """Without noise, the same sequences in one or in two forwards lead to the same place."""
    weights = Weights()
    _, one = learners.run(tiny_models.build("llama"), weights, batch_size=4, steps=2)
    _, two = learners.run(tiny_models.build("llama"), weights, batch_size=2, accumulation=2, steps=2)
    assert one.last.loss == pytest.approx(two.last.loss, rel=1e-4)
    assert one.epochs == two.epochs


def test_top_k_autocast_and_checkpointing_still_learn():
    for settings in ({"top_k": 8}, {"autocast": True}, {"activation_checkpointing": True}):
        _, learned = learners.run(tiny_models.build("llama"), steps=24, loss="kl", eval_every=8, text=SAME, **settings)
        assert learned.best.loss < learned.prior_loss, settings
    _, plain = learners.run(tiny_models.build("llama"), steps=3)
    _, recomputed = learners.run(tiny_models.build("llama"), steps=3, activation_checkpointing=True)
    assert plain.last.loss == pytest.approx(recomputed.last.loss, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral"])
def test_other_layouts_learn(name):
    _, learned = learners.run(tiny_models.build(name), steps=30, loss="kl", eval_every=10, text=SAME)
    assert learned.best.loss < learned.prior_loss


@pytest.mark.parametrize("pattern", ["4:8", "1:4", "8:16"])
def test_other_patterns_learn(pattern):
    method = dataclasses.replace(learners.QUICK, form="auto")
    wanted = learners.Pattern.parse(pattern)
    _, learned = learners.run(
        tiny_models.build("llama"), method, pattern=wanted, steps=30, loss="kl", eval_every=10, text=SAME
    )
    assert learned.best.loss < learned.prior_loss


def test_no_graph_exists_for_a_method_that_learns_by_score(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a backward was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", refused)
    model = tiny_models.build("llama")
    steps, _ = learners.run(model, Scored())
    assert {"loss", "prior_loss", "advantage", "tracker"} <= steps[1].values.keys()


def test_a_loss_that_is_no_number_is_an_error_that_says_what_to_do():
    wild = dataclasses.replace(Weights())
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(InputError, match=r"step 1: the loss is nan\. .*lower method\.lr.*float32"):
        learners.run(model, wild)


def test_penalty_reaches_the_gates():
    reward = dataclasses.replace(learners.QUICK, sparse_reg=100.0)
    model = tiny_models.build("llama")
    steps, learned = learners.run(model, reward, steps=20, guard=False)
    assert steps[1].values["penalty"] < 0
    # a reward for the energy of kept weights leads to magnitude masks, which the prior is
    assert learned.last.flips < 0.01


def test_the_default_is_the_papers():
    method = MaskLLM()
    assert (method.lr, method.kappa_last, method.tau_first, method.prior_strength) == (5e-4, 500.0, 4.0, 3.0)


@pytest.mark.parametrize(("noise", "draws"), [("micro_batch", 6), ("step", 3)])
def test_noise_is_new_when_the_method_says_so_and_the_same_in_a_recomputed_forward(noise, draws, monkeypatch):
    seen = []
    monkeypatch.setattr(MaskLLM, "noise", noise)
    plain = MaskLLM.random_mask

    def recorded(self, state, pattern, course, generator):
        seen.append(generator.initial_seed())
        return plain(self, state, pattern, course, generator)

    monkeypatch.setattr(MaskLLM, "random_mask", recorded)
    method = dataclasses.replace(learners.QUICK, sparse_reg=0.0)
    settings = {"steps": 3, "batch_size": 1, "accumulation": 2, "eval_every": 100}
    learners.run(tiny_models.build("llama"), method, activation_checkpointing=True, **settings)
    n_linears, judged = 14, 2  # the last step's masks are judged once, on two sequences, with noise of their own
    assert len(set(seen)) == (draws + 1) * n_linears
    assert len(seen) == (2 * 6 + judged) * n_linears  # every forward again on the way back
