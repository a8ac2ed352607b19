from __future__ import annotations

import pytest
import torch
from torch import nn

from nmprune.architectures.linears import View
from nmprune.checkpoint import MaskFile, TensorMask
from nmprune.checkpoint.names import Piece
from nmprune.masks import from_scores
from nmprune.pattern import Pattern
from nmprune.train.held_masks import Held, HeldMasks, MaskBroken, held_parameters

PATTERN = Pattern(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(8, 4)


def pruned(seed: int = 0) -> tuple[Net, dict[str, Held]]:
    torch.manual_seed(seed)
    net = Net()
    kept = from_scores(net.first.weight.detach().abs(), PATTERN)
    with torch.no_grad():
        net.first.weight.masked_fill_(~kept, 0.0)
    return net, {"first.weight": Held(kept)}


def train(net: Net, optimiser: torch.optim.Optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimiser.zero_grad()
        x = torch.randn(32, 16, generator=generator)
        (net.second(net.first(x)) - x[:, :4]).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_masks_hold_under_momentum_and_decay(make):
    net, held = pruned()
    before = net.first.weight.detach().clone()
    extra = {"momentum": 0.9} if make is not torch.optim.AdamW else {"fused": True}
    optimiser = make(net.parameters(), lr=0.05, weight_decay=0.1, **extra)
    HeldMasks(net, held).watch(optimiser)
    train(net, optimiser)
    kept = held["first.weight"].kept
    assert not net.first.weight[~kept].view(torch.int32).any(), "+0.0 to the last bit"
    assert (net.first.weight[kept] != before[kept]).all()
    for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg"):
        if moment in optimiser.state[net.first.weight]:
            assert not optimiser.state[net.first.weight][moment][~kept].any()


def test_without_the_watch_the_masks_are_lost():
    """What all this is for."""
    net, held = pruned()
    train(net, torch.optim.AdamW(net.parameters(), lr=0.05))
    assert net.first.weight[~held["first.weight"].kept].all()


def test_an_optimiser_that_moves_a_masked_weight_is_found_out_and_undone():
    net, held = pruned()

    class Careless(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                net.first.weight[0] += 0.5

    optimiser = Careless(net.parameters(), lr=0.01)
    HeldMasks(net, held).watch(optimiser)
    with pytest.raises(MaskBroken, match=r"in 1 of 1 tensors, such as 8 of first.weight"):
        train(net, optimiser, 1)
    assert not net.first.weight[~held["first.weight"].kept].any()


def test_minus_zero_is_no_zero():
    net, held = pruned()
    with torch.no_grad():
        net.first.weight[~held["first.weight"].kept] = -0.0
    with pytest.raises(ValueError, match=r"masked weights that are not \+0.0"):
        HeldMasks(net, held)


def test_rows_that_stay_dense_do_not_move():
    net, held = pruned()
    kept = held["first.weight"].kept
    still = torch.zeros_like(kept)
    kept[:2], still[:2] = True, True
    with torch.no_grad():
        net.first.weight[:2] = torch.randn(2, 16)
    before = net.first.weight.detach().clone()
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    HeldMasks(net, {"first.weight": Held(kept, still)}).watch(optimiser)
    train(net, optimiser)
    assert torch.equal(net.first.weight[:2], before[:2]), "weight decay moves what has no gradient"
    assert (net.first.weight[2:][kept[2:]] != before[2:][kept[2:]]).all()


def mask_file(**masks: TensorMask) -> MaskFile:
    return MaskFile(masks, "wanda", "a model", "", "")


def legal(*shape: int) -> torch.Tensor:
    return from_scores(torch.rand(*shape), PATTERN)


def test_masks_reach_parameters_that_are_made_of_several_tensors():
    """A Mixtral expert's w1 and w3 are rows of one parameter; an expert without a mask stays still."""
    w1, w3 = legal(4, 8), legal(4, 8)
    regions = {"e0.w1": View(0, (0, 4)), "e0.w3": View(0, (4, 8)), "e1.w1": View(1, (0, 4)), "e1.w3": View(1, (4, 8))}
    pieces = {"experts": tuple(Piece(name, region) for name, region in regions.items()), "norm": (Piece("norm"),)}
    masks = mask_file(**{"e0.w1": TensorMask.from_mask(w1, PATTERN), "e0.w3": TensorMask.from_mask(w3, PATTERN)})
    held = held_parameters({"experts": (2, 8, 8), "norm": (8,)}, pieces, masks)
    assert list(held) == ["experts"]
    one = held["experts"]
    assert torch.equal(one.kept[0], torch.cat([w1, w3])) and one.kept[1].all()
    assert one.still is not None and one.still[1].all() and not one.still[0].any()
    assert torch.equal(one.trained[0], one.kept[0]) and not one.trained[1].any()


@pytest.mark.parametrize("axis", [-1, -2])
def test_dense_rows_of_a_tensor_of_experts(axis):
    rows = legal(2 * 4, 8)
    rows[4:] = True
    mask = rows.view(2, 4, 8) if axis == -1 else rows.view(2, 4, 8).transpose(-1, -2).contiguous()
    entry = TensorMask.from_mask(mask, PATTERN, axis, ((4, 8),))
    (one,) = held_parameters({"x": mask.shape}, {"x": (Piece("t"),)}, mask_file(t=entry)).values()
    assert torch.equal(one.kept, mask)
    assert one.still is not None and one.still[1].all() and not one.still[0].any()
