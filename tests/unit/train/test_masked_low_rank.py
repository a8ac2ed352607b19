from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nmprune.errors import InputError
from nmprune.masks import from_scores
from nmprune.pattern import Pattern
from nmprune.train.held_masks import Held
from nmprune.train.masked_low_rank import add_low_rank, merge_low_rank, root_mean_square


def net(seed: int = 0) -> tuple[nn.Sequential, dict[str, Held]]:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    kept = from_scores(made[0].weight.detach().abs(), Pattern(2, 4))
    with torch.no_grad():
        made[0].weight.masked_fill_(~kept, 0.0)
    return made, {"0.weight": Held(kept)}


def trained(rank: int = 2) -> tuple[nn.Sequential, dict[str, Held], torch.Tensor]:
    made, held = net()
    before = made[0].weight.detach().clone()
    factors = add_low_rank(made, held, rank, seed=3)
    assert all(one.requires_grad for one in factors.values())
    optimiser = torch.optim.AdamW(factors.values(), lr=0.1)
    x = torch.randn(64, 16)
    for _ in range(10):
        optimiser.zero_grad()
        (made(x) - x[:, :4]).square().mean().backward()
        optimiser.step()
    return made, held, before


def test_starts_as_the_model_was():
    made, held = net()
    x = torch.randn(3, 16)
    before = made(x)
    factors = add_low_rank(made, held, 2, seed=3)
    assert torch.equal(made(x), before)
    assert {name.rpartition(".")[2] for name in factors} == {"low_in", "low_out"}
    assert not made[0].parametrizations.weight.original.requires_grad
    again, held = net()
    others = add_low_rank(again, held, 2, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(factors.values(), others.values(), strict=True))


def test_the_merged_weight_is_the_trained_one_and_keeps_its_zeros():
    made, held, before = trained()
    kept = held["0.weight"].kept
    x = torch.randn(5, 16)
    outputs, used = made(x), made[0].weight.detach().clone()
    merge_low_rank(made)
    assert not parametrize.is_parametrized(made[0]) and type(made[0]) is nn.Linear
    assert torch.equal(made[0].weight, used) and torch.equal(made(x), outputs)
    assert set(made.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not made[0].weight[~kept].view(torch.int32).any(), "+0.0 to the last bit"
    assert (made[0].weight[kept] != before[kept]).any()


def test_an_unmasked_merge_fills_the_zeros():
    """What other tools do with the same factors: W + s B A."""
    made, held, before = trained()
    adapter = made[0].parametrizations.weight[0]
    naive = before + adapter.scale * adapter.low_out @ adapter.low_in
    assert naive[~held["0.weight"].kept].abs().min() > 0


def test_rows_that_stay_dense_get_no_delta():
    made, held = net()
    still = torch.zeros_like(held["0.weight"].kept)
    still[:3] = True
    add_low_rank(made, {"0.weight": Held(held["0.weight"].kept | still, still)}, 2, seed=0)
    adapter = made[0].parametrizations.weight[0]
    with torch.no_grad():
        adapter.low_out.fill_(1.0)
    moved = made[0].weight != made[0].parametrizations.weight.original
    assert not moved[:3].any() and moved[3:].any()


def test_faults():
    made, held = net()
    with pytest.raises(InputError, match=r"lora is 9; expected 1 to 8, the smaller side of 0.weight \(8, 16\)"):
        add_low_rank(made, held, 9, seed=0)
    with pytest.raises(InputError, match=r"x holds 3 experts in one tensor.*Leave --lora out"):
        add_low_rank(made, {"x": Held(torch.ones(3, 4, 4, dtype=torch.bool))}, 2, seed=0)


def test_root_mean_square():
    assert root_mean_square(torch.tensor([3.0, 4.0])) == pytest.approx(12.5**0.5)
    assert root_mean_square(torch.empty(0)) == 0.0
