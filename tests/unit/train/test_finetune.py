from __future__ import annotations

import math

import pytest
import torch

import tiny_models
from nmprune.errors import InputError
from nmprune.masks import from_scores
from nmprune.pattern import Pattern
from nmprune.train.finetune import Finetuning
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.held_masks import Held, HeldMasks


def settings(**changes) -> FinetuneRecipe:
    return FinetuneRecipe(**{"minutes": 0, "steps": 8, "lr": 0.01, "evaluations": 4, **changes})


def job(recipe: FinetuneRecipe, autocast: bool = False) -> tuple[Finetuning, dict[str, Held]]:
    dense, student = tiny_models.build("llama").requires_grad_(False), tiny_models.build("llama").requires_grad_(False)
    linears = {name: one for name, one in student.named_parameters() if name.endswith("_proj.weight")}
    held = {}
    for name, one in linears.items():
        held[name] = Held(from_scores(one.abs(), Pattern(2, 4)))
        one.masked_fill_(~held[name].kept, 0.0).requires_grad_(True)
    masks = HeldMasks(student, held)
    windows = (torch.arange(40)[:, None] + torch.arange(16)) % 20 + 3  # a text whose next token can be learned
    made = Finetuning(
        student,
        dense,
        linears,
        masks,
        list(student.model.layers),
        lambda _: torch.float32,
        windows[4:],
        windows[:4],
        recipe,
        autocast,
    )
    return made, held


def run(made: Finetuning, saved=None, stop: int = 10**9):
    """(what was yielded, the last snapshot, what it ended with or None)."""
    signs, snapshot = [], None
    loop = made.run(saved)
    while True:
        try:
            sign = next(loop)
        except StopIteration as end:
            return signs, snapshot, end.value
        signs.append(sign)
        if sign.step == stop:
            return signs, {name: one.clone() for name, one in sign.snapshot().items()}, None


def weights(made: Finetuning) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in made._trained.items()}


@pytest.mark.parametrize("loss", ["kl", "lm"])
def test_it_learns_and_the_masks_hold(loss):
    made, held = job(settings(loss=loss, steps=16))
    signs, _, standing = run(made)
    assert standing is not None and standing.best_loss < 0.95 * standing.start_loss
    assert [sign.step for sign in signs] == list(range(17)) and signs[-1].total == 16
    judged = [sign.step for sign in signs if "held_out_loss" in sign.values]
    assert judged == [0, 4, 8, 12, 16], "the start, and evaluations spread over the budget"
    assert made.held_out()["held_out_loss"] == pytest.approx(standing.best_loss, rel=1e-5), "the best weights are in"
    for name, one in weights(made).items():
        assert not one[~held[name].kept].view(torch.int32).any()
    rates = [sign.values["rate"] for sign in signs[1:]]
    assert max(rates) <= 0.01 and rates[-1] == pytest.approx(0.05 * 0.01)


def test_going_on_from_a_snapshot_is_as_if_nothing_had_happened():
    whole, _ = job(settings())
    expected, _, first = run(whole)
    begun, _ = job(settings())
    before, snapshot, _ = run(begun, stop=5)
    again, _ = job(settings())
    after, _, second = run(again, snapshot)
    values = [sign.values for sign in (*before, *after)]
    assert values == [sign.values for sign in expected]
    assert all(
        torch.equal(one, other) for one, other in zip(weights(whole).values(), weights(again).values(), strict=True)
    )
    assert first is not None and second is not None
    assert (first.best_step, first.best_loss, first.evaluations) == (
        second.best_step,
        second.best_loss,
        second.evaluations,
    )


def test_the_best_weights_are_kept_when_it_gets_worse():
    made, _ = job(settings(lr=1.0, warm_up=0.0, clip=0.0, patience=2, steps=40, evaluations=20))
    before = weights(made)
    signs, _, standing = run(made)
    assert standing is not None and standing.best_step == 0 and standing.best_loss == standing.start_loss
    assert standing.since_best == 2 and standing.step == 4 < 40, "patience: two evaluations without a gain"
    assert all(torch.equal(one, other) for one, other in zip(before.values(), weights(made).values(), strict=True))
    assert signs[-1].values["held_out_loss"] > standing.start_loss


def test_accumulation_is_a_larger_batch():
    one, _ = job(settings(batch_size=4, accumulation=1, steps=3))
    two, _ = job(settings(batch_size=2, accumulation=2, steps=3))
    for made in (one, two):
        run(made)
    for a, b in zip(weights(one).values(), weights(two).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_changes_nothing_and_autocast_little():
    plain, _ = job(settings(steps=3))
    twice, _ = job(settings(steps=3, activation_checkpointing=True))
    half, _ = job(settings(steps=3), autocast=True)
    losses = [run(made)[0][-1].values["held_out_loss"] for made in (plain, twice, half)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.05) and losses[2] != losses[0]


def test_time_is_a_budget_too(monkeypatch):
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr("nmprune.train.finetune.time.monotonic", lambda: float(next(clock)))
    made, _ = job(settings(steps=0, minutes=1.0))
    signs, _, standing = run(made)
    assert standing is not None and 60 <= standing.seconds < 70
    assert standing.evaluations == 5 and "held_out_loss" in signs[-1].values
    assert signs[-1].total == standing.step


def test_a_rate_is_relative_to_the_size_of_the_weights():
    made, _ = job(settings())
    top = {group["top_lr"] for group in made._optimiser.param_groups}
    for group in made._optimiser.param_groups:
        kept = group["params"][0].detach()
        kept = kept[kept != 0]
        assert group["top_lr"] == pytest.approx(0.01 * kept.square().mean().sqrt().item())
    assert len(top) > 1


def test_a_loss_that_is_no_number_ends_it():
    made, _ = job(settings())
    with torch.no_grad():
        next(iter(made._trained.values()))[0, 0] = math.nan
    with pytest.raises(InputError, match=r"training loss is nan at step 1.*--set lr=0.0025"):
        run(made)
