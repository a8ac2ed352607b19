import pytest
import torch

import tiny_models
from nmprune import masks
from nmprune.methods.maskpro import MaskPro
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, select
from nmprune.train import score_variance as module
from nmprune.train.masked_linear import targets_of
from nmprune.train.score_variance import ESTIMATORS, score_variance

PATTERN = Pattern(2, 4)
TOKENS = torch.randint(0, 96, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny():
    """(model, targets, prior masks) of a 2-layer Llama."""
    model = tiny_models.build("llama").eval()
    decoder = DecoderModel.from_model(model)
    chosen = [[(linear, PATTERN) for linear in one.prune] for one in select(decoder, PATTERN)]
    targets = targets_of(list(decoder.layers), chosen)
    generator = torch.Generator().manual_seed(1)
    priors = {one.name: masks.from_scores(torch.randn(one.shape, generator=generator), PATTERN) for one in targets}
    return model, targets, {name: masks.pack(mask) for name, mask in priors.items()}


def measured(tiny, draws=12, run_in=3, seed=0, **settings):
    model, targets, priors = tiny
    return score_variance(model, targets, MaskPro(**settings), priors, TOKENS, 2, draws, run_in, seed)


def test_a_constant_factor_counts_by_its_square(tiny, monkeypatch):
    """Losses of 5 where the prior's is 3: the same scores times 5, times 2, times 2 - tracker."""
    losses = iter([5.0, 3.0] * 100)
    monkeypatch.setattr(module, "_loss", lambda model, tokens: next(losses))
    found = measured(tiny, flip_share=0.1, tracker=1.0)
    assert found.weight["vanilla"] == pytest.approx((5.0, 0.0))
    assert found.weight["residual"] == found.weight["tracker"] == pytest.approx((2.0, 0.0))
    assert found.variance["vanilla"] / found.variance["residual"] == pytest.approx(25 / 4)
    assert found.variance["tracker"] == found.variance["residual"] > 0
    # the expectation is 0 for a constant factor: what is left is the noise of a mean of 12
    assert abs(found.mean_sq_norm["residual"]) < found.variance["residual"] / 12


def test_variance_is_that_of_the_gradients_one_by_one(tiny, monkeypatch):
    kept = []
    add = module._Sums.add

    def remember(self, weights, score):
        kept.append({name: weight * score.double() for name, weight in weights.items()})
        add(self, weights, score)

    monkeypatch.setattr(module._Sums, "add", remember)
    found = measured(tiny, draws=7, flip_share=0.2)
    for name in ESTIMATORS:
        gradients = torch.stack([one[name] for one in kept])
        assert found.variance[name] == pytest.approx(gradients.var(0).sum().item(), rel=1e-6)
    assert found.draws == len(kept) == 7
    assert 0.1 < found.flips < 0.3


def test_the_residual_varies_less_than_the_loss_and_the_tracker_runs_in(tiny):
    found = measured(tiny, flip_share=0.02)
    assert found.variance["residual"] < 0.1 * found.variance["vanilla"]
    assert found.weight["vanilla"][0] > 3  # log 96 and more
    assert measured(tiny, run_in=30, flip_share=0.02).weight["tracker"] != found.weight["tracker"]


def test_it_leaves_the_model_as_it_was_and_repeats(tiny):
    model = tiny[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert measured(tiny, draws=3) == measured(tiny, draws=3) != measured(tiny, draws=3, seed=1)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_one_draw_has_no_variance(tiny):
    with pytest.raises(ValueError, match="two draws"):
        measured(tiny, draws=1)
