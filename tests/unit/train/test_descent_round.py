"""Slopes, curvature and damping of a round of global descent."""

import math

import pytest
import torch

import learners
import tiny_models
from nmprune import masks
from nmprune.distributed import ALONE
from nmprune.methods.global_descent import GlobalDescent
from nmprune.stream import DecoderModel, select
from nmprune.stream.experts import observable_experts
from nmprune.stream.input_sums import InputSums
from nmprune.train.descent_round import LossTerms, choose
from nmprune.train.loop import Text
from nmprune.train.losses import lm_loss
from nmprune.train.masked_linear import MaskedModel, Phase

SAME = Text(tiny_models.windows(6), tiny_models.windows(6))


def search(loss_at, damping):
    """`choose` from masks that are worth 1; `loss_at` of a damping, None where it changes nothing. And what was judged."""
    judged = []

    def masks_of(at):
        return {"linear": torch.tensor([0.0 if loss_at(at) is None else at])}

    def loss_of(bits):
        judged.append(bits["linear"].item())
        return loss_at(judged[-1])

    return (*choose(masks_of, loss_of, {"linear": torch.tensor([0.0])}, 1.0, damping), judged)


def valley(at):
    """Too bold below 8, nothing changes above 512, best at 32."""
    if at > 512:
        return None
    return 5.0 if at < 8 else 0.5 + 0.02 * math.log2(at / 32) ** 2


@pytest.mark.parametrize("damping", [1.0, 12.0, 40.0, 300.0, 1e4])
def test_the_search_finds_a_gain_from_either_side(damping):
    best, following, judged = search(valley, damping)
    assert best is not None and best.loss == pytest.approx(valley(best.damping)) and following == best.damping
    assert 8 <= best.damping <= 512 and best.loss == pytest.approx(min(valley(at) for at in judged))
    assert len(judged) <= 6


def test_it_goes_down_for_as_long_as_it_gains():
    best, _, judged = search(valley, 100.0)
    assert judged == sorted(judged, reverse=True) and len(judged) > 2
    assert best.damping == pytest.approx(judged[-2]) and valley(judged[-1]) > best.loss


def test_where_nothing_gains_it_says_so_and_ends():
    best, following, judged = search(lambda at: 2.0, 10.0)
    assert best is None and following > 10.0 and 0 < len(judged) < 10
    best, following, judged = search(lambda at: None, 10.0)
    assert best is None and judged == [] and math.isfinite(following) and following > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_slopes_and_grams_are_those_of_the_masked_model(name):
    model = tiny_models.build(name)
    found = learners.targets(model)
    decoder = DecoderModel.from_model(model)
    priors = learners.magnitudes(found)
    windows = tiny_models.windows(4)
    weights = {one.name: learners.weight(one) for one in found}
    phase = Phase("learn")
    masked = MaskedModel(found, GlobalDescent(), phase, priors, 0)
    with observable_experts(model.config):
        inputs = InputSums(decoder, select(decoder, learners.PATTERN))
        with masked.installed():
            terms = LossTerms(masked, inputs)
            for batch in windows.split(2):
                with inputs.watching():
                    logits = model(input_ids=batch, use_cache=False).logits
                lm_loss(logits, batch).mean().backward()
                terms.add()
            taken = terms.take(ALONE, 2, 2 * windows.shape[1])
    # the same by autograd on a model whose weights are masked for good
    parameters = {id(p): p for one in found for p in [one.layer.get_parameter(one.parameter)]}
    for one in found:
        with torch.no_grad():
            one.view.of(one.layer.get_parameter(one.parameter)).mul_(masks.unpack(priors[one.name], one.shape))
    squares = {one.name: torch.zeros(one.shape[0]) for one in found}
    slopes = {one.name: torch.zeros(one.shape) for one in found}
    for batch in windows.split(2):
        for parameter in parameters.values():
            parameter.requires_grad_().grad = None
        lm_loss(model(input_ids=batch, use_cache=False).logits, batch).mean().backward()
        for one in found:
            grad = one.layer.get_parameter(one.parameter).grad
            slope = one.view.of(grad) if grad is not None else torch.zeros(one.shape)
            slopes[one.name] += slope / 2
            squares[one.name] += slope.square().sum(1) / 2
    for one in found:
        its = taken[one.name]
        torch.testing.assert_close(
            its.slope, torch.where(weights[one.name] != 0, slopes[one.name], 0.0), rtol=1e-3, atol=1e-7
        )
        trace = its.gram.diagonal().sum()
        if trace > 0:
            wanted = 2 * windows.shape[1] * squares[one.name] / trace
            torch.testing.assert_close(its.curvature, wanted, rtol=1e-3, atol=1e-9)
    if name == "llama":
        seen = []
        layer = model.model.layers[0].mlp.down_proj
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
        with torch.no_grad():
            model(input_ids=windows, use_cache=False)
        handle.remove()
        inputs_TI = torch.cat(seen)
        gram = taken["model.layers.0.mlp.down_proj"].gram
        torch.testing.assert_close(gram, inputs_TI.T @ inputs_TI / len(inputs_TI), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_rounds_lower_the_held_out_loss_and_never_raise_it(name):
    method = GlobalDescent(damping=100.0)
    steps, learned = learners.run(
        tiny_models.build(name), method, steps=3, accumulation=3, loss="kl", text=SAME, eval_every=1
    )
    judged = [one.values["held_out_loss"] for one in steps[1:]]
    assert all(after <= before for before, after in zip([learned.prior_loss, *judged], judged, strict=False))
    assert learned.loss < 0.95 * learned.prior_loss and not learned.guarded
    assert learned.best.flips > 0.01


def test_other_patterns_descend():
    _, learned = learners.run(
        tiny_models.build("llama"),
        GlobalDescent(damping=100.0),
        pattern=learners.Pattern.parse("4:8"),
        steps=2,
        accumulation=3,
        loss="kl",
        text=SAME,
    )
    assert learned.loss < learned.prior_loss
