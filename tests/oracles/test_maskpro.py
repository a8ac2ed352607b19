"""MaskPro against the authors' code: draws, scores, updates and two whole runs (../shared/oracles, section D)."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nmprune import masks, ranking, sampling
from nmprune.methods.maskpro import MaskPro
from nmprune.pattern import Pattern
from nmprune.train.losses import lm_loss
from shared_data import shared

PATTERN = Pattern(2, 4)


@pytest.fixture(scope="module")
def pointwise() -> dict[str, Tensor]:
    return load_file(shared("oracles/D_maskpro_pointwise.safetensors"))


def drawn_slots(mask_OI: Tensor, pattern: Pattern) -> Tensor:
    """int64 (O, G, N): the kept slots of each group, in rising order; the score of a set knows no order."""
    return mask_OI.unflatten(-1, (-1, pattern.group)).byte().topk(pattern.kept, -1).indices.sort(-1).values


def test_their_noise_gives_their_draws(pointwise):
    """Top N of log p - log(exponential noise): Gumbel top-n. They clamp p to 1e-8 first."""
    log_p = pointwise["logits"].view(-1, 4).softmax(-1).clamp(1e-8, 1).log()
    for noise, mask in zip(pointwise["exponential_noise"], pointwise["sampled_masks"], strict=True):
        assert torch.equal(ranking.top(log_p - noise.log(), 2).view(mask.shape), mask)
    for pattern in (Pattern(4, 8), Pattern(1, 4), Pattern(3, 4)):
        own = {
            key: pointwise[f"{pattern.kept}of{pattern.group}.{key}"] for key in ("logits", "exponential_noise", "mask")
        }
        logits = own["logits"].view(-1, pattern.group)
        drawn = ranking.top(logits - own["exponential_noise"].log(), pattern.kept)
        assert torch.equal(drawn.view(own["mask"].shape), own["mask"])


@pytest.mark.parametrize("pattern", [PATTERN, Pattern(4, 8), Pattern(1, 4), Pattern(3, 4)], ids=str)
def test_log_probabilities_of_every_set(pointwise, pattern):
    prefix = "" if pattern == PATTERN else f"{pattern.kept}of{pattern.group}."
    expected = pointwise["log_prob_6_fp64" if pattern == PATTERN else f"{prefix}log_prob_fp64"]
    logits = pointwise[f"{prefix}logits"].view(-1, pattern.group).double()
    sets = torch.tensor(list(itertools.combinations(range(pattern.group), pattern.kept)))
    for at, slots in enumerate(sets):
        ours = sampling.set_log_score(logits, slots.expand(len(logits), -1))
        torch.testing.assert_close(ours, expected[:, at], rtol=1e-5, atol=1e-9)  # they take 1 - p of sure slots


def test_the_exact_score_is_autograds_and_theirs(pointwise):
    logits = pointwise["logits"].view(-1, 4).double()
    moderate = pointwise["moderate_groups"].bool()
    for at, slots in enumerate(itertools.combinations(range(4), 2)):
        ours = sampling.set_score_gradient(logits, torch.tensor(slots).expand(len(logits), -1))
        torch.testing.assert_close(ours, pointwise["score_6_exact_fp64"][:, at], rtol=1e-8, atol=1e-8)
        theirs = pointwise["score_6_code_fp64"][:, at]
        torch.testing.assert_close(ours[moderate], theirs[moderate], rtol=0, atol=2e-5)


def test_start_and_final_mask(pointwise):
    prior = pointwise["prior_mask"]
    method = MaskPro()
    state = method.begin(torch.ones(prior.shape), prior, PATTERN, torch.Generator())
    assert torch.equal(state["logits"], pointwise["initial_logits_C10"])
    final = method.hard_mask(torch.ones(16, 16), {"logits": pointwise["logits"]}, PATTERN)
    ties = pointwise["logits"].unflatten(-1, (-1, 4)).sort(-1).values.diff(dim=-1)[..., 1] == 0
    same = (final == pointwise["argtop2_mask"]).unflatten(-1, (-1, 4)).all(-1)
    assert same[~ties].all()


def test_a_prescribed_sequence_of_losses():
    """48 steps of their script on one linear: tracker, advantage and, step by step from theirs, the logits."""
    trace = load_file(shared("oracles/D_maskpro_trace.safetensors"))
    method = MaskPro(prior_logit=3.0, lr=20.0)
    carried = method.carried()
    state = method.begin(torch.ones(8, 16), trace["prior_mask"], PATTERN, torch.Generator())
    assert torch.equal(state["logits"], trace["logits_before"][0])
    for step, loss in enumerate(trace["losses"].tolist()):
        prior_loss = trace["baseline_losses"][step % 2].item()
        advantage, carried = method.advantage(loss, prior_loss, carried)
        assert carried["tracker"].item() == pytest.approx(trace["tracker_after_update"][step].item(), abs=1e-12)
        assert advantage == pytest.approx(trace["advantage"][step].item(), abs=1e-12)
        state = {"logits": trace["logits_before"][step].clone()}
        drawn = drawn_slots(trace["mask_used"][step], PATTERN)
        theirs = trace["score"][step].unflatten(-1, (-1, 4))
        score = method.score_of(state["logits"].unflatten(-1, (-1, 4)), drawn, PATTERN)
        # their guards of 1e-8 move the score of groups that are nearly sure
        torch.testing.assert_close(score, theirs, rtol=0, atol=1e-4)
        method.move(state, drawn, PATTERN, advantage)
        torch.testing.assert_close(state["logits"], trace["logits_after"][step], rtol=0, atol=1e-4)
    assert torch.equal(method.hard_mask(torch.ones(8, 16), state, PATTERN), trace["final_mask"])


@pytest.fixture(scope="module", params=["run0", "run1"])
def run(request):
    """(description, tensors) of one run of their scripts on the 260K model."""
    place = shared(f"oracles/D_maskpro_{request.param}.safetensors")
    return json.loads(place.with_suffix(".json").read_text()), load_file(place)


def masks_of_step(description, tensors, step) -> dict[str, Tensor]:
    shapes = [tuple(shape) for shape in description["module_shapes"]]
    parts = masks.unpack(tensors["mask_used_bits"][step], (sum(o * i for o, i in shapes),)).split(
        [o * i for o, i in shapes]
    )
    return {
        name: part.view(shape) for name, part, shape in zip(description["module_order"], parts, shapes, strict=True)
    }


def test_a_run_replayed_with_their_masks(run):
    """Losses in, logits of every linear and final masks out."""
    description, tensors = run
    method = MaskPro(prior_logit=description["C"], lr=description["lr"])
    first = masks_of_step(description, tensors, 0)  # their first step uses the prior itself
    states = {n: method.begin(torch.ones(m.shape), m, PATTERN, torch.Generator()) for n, m in first.items()}
    carried = method.carried()
    for step, loss in enumerate(tensors["losses"].tolist()):
        advantage, carried = method.advantage(loss, tensors["baseline_losses"][step % 2].item(), carried)
        assert advantage + carried["tracker"].item() == pytest.approx(tensors["residual"][step].item(), abs=1e-9)
        assert carried["tracker"].item() == pytest.approx(tensors["tracker_after_update"][step].item(), abs=1e-12)
        for name, mask in masks_of_step(description, tensors, step).items():
            method.move(states[name], drawn_slots(mask, PATTERN), PATTERN, advantage)
    for name, state in states.items():
        torch.testing.assert_close(state["logits"], tensors[f"final_logits.{name}"], rtol=0, atol=5e-4)
        final = masks.unpack(tensors[f"final_mask_bits.{name}"], tuple(state["logits"].shape))
        assert torch.equal(method.hard_mask(torch.ones(final.shape), state, PATTERN), final)


@pytest.mark.parametrize("step", [0, 5])
def test_the_loss_of_their_masks(run, step):
    description, tensors = run
    model = AutoModelForCausalLM.from_pretrained(shared("oracles/model")).eval()
    batches = load_file(shared("oracles/tokens.safetensors"))["maskpro_tokens"].split(32)
    with torch.no_grad():
        for name, mask in masks_of_step(description, tensors, step).items():
            model.get_submodule(name).weight.mul_(mask)
        tokens = batches[step % 2]
        loss = lm_loss(model(input_ids=tokens).logits, tokens).mean().item()
    assert loss == pytest.approx(tensors["losses"][step].item(), rel=1e-5)
