import math

import torch

from nmprune.methods.hypernetwork import Hypernetwork

FORM = Hypernetwork(5, 6, 8, 2, 3, 4, True, False)


def parameters(form=FORM, n_roles=3, noise=0.01):
    return form.start(4, n_roles, noise, torch.Generator().manual_seed(0))


def test_folding_is_the_same_as_a_longer_input():
    made = parameters()
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    depth = 2 / 4
    context = torch.cat(
        [
            made["layer"][2],
            made["component"][1],
            torch.tensor([depth, math.sin(math.pi * depth), math.cos(math.pi * depth)]),
        ]
    )
    whole = torch.cat([features, context[:, None].expand(-1, 7)])
    hidden = (torch.cat([made["weight0"], made["context"]], 1) @ whole + made["bias0"][:, None]).relu()
    hidden = (made["weight1"] @ hidden + made["bias1"][:, None]).relu()
    expected = made["weight2"] @ hidden + made["bias2"][:, None]
    folded = FORM.fold(made, torch.tensor([2]), torch.tensor([1]))
    torch.testing.assert_close(FORM.forward(made, features, folded), expected)
    columns = FORM.fold(made, torch.full((7,), 2), torch.full((7,), 1))
    torch.testing.assert_close(FORM.forward(made, features, columns), expected)


def test_components_start_one_hot_with_noise_and_beyond_their_width_at_random():
    made = parameters(n_roles=6)["component"]
    torch.testing.assert_close(made[:4], torch.eye(4), rtol=0, atol=0.05)
    assert (made[:4] != torch.eye(4)).all()
    assert (made[4:].norm(dim=1) > 0.2).all() and not torch.equal(made[4], made[5])


def test_zero_start_answers_zero():
    form = Hypernetwork(5, 6, 8, 2, 0, 0, False, True)
    made = parameters(form)
    folded = form.fold(made, torch.tensor([2]), torch.tensor([1]))
    assert not form.forward(made, torch.randn(5, 7), folded).any()


def test_the_count_of_parameters():
    for form in (FORM, Hypernetwork(5, 6, 8, 3, 0, 0, False, True)):
        assert form.n_parameters(4, 3) == sum(value.numel() for value in parameters(form).values())
