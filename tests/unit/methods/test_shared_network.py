"""The network between layers: the continual term, embeddings, updates."""

import pytest
import torch

from nmprune.methods.hyperprune import HyperPrune
from nmprune.methods.mask_logits import MaskLogits
from nmprune.methods.shared_network import SharedNetwork
from nmprune.pattern import Pattern
from two_linears import TwoLinears, learn

SMALL = {"hidden": 8, "layer_width": 3, "component_width": 3, "steps": 4, "check_every": 4, "cache_size": 10}
LOGITS = MaskLogits(Pattern(2, 4))
CPU = torch.device("cpu")


def after_layers(method, n):
    state = None
    for index in range(n):
        *_, state = learn(method, TwoLinears(method, index=index), state)
    return state


@pytest.mark.parametrize("continual", ["kl", "squared"])
@pytest.mark.parametrize("head", ["slots", "candidates"])
def test_the_continual_term_is_zero_right_after_the_snapshot_and_grows(continual, head):
    method = HyperPrune(**SMALL, continual=continual, anchor="latest", head=head)
    state = after_layers(method, 2)
    assert state["cache.features"].shape == (22, 2 * 2 * 10)
    network = SharedNetwork(method, LOGITS, state, 2, CPU)
    assert network.continual_value() == pytest.approx(0.0, abs=1e-7)
    network._parameters["weight2"].data += 0.3 * torch.rand(LOGITS.pattern.group if head == "slots" else 6, 8)
    network._folded.clear()
    assert network.continual_value() > 1e-5


def test_finished_anchors_stay_and_latest_ones_follow():
    first = {}
    for anchor in ("finished", "latest"):
        method = HyperPrune(**SMALL, anchor=anchor, network_lr=0.1)
        one, two = after_layers(method, 1), after_layers(method, 2)
        first[anchor] = torch.equal(two["cache.outputs"][:, :20], one["cache.outputs"])
        assert SharedNetwork(method, LOGITS, one, 1, CPU).continual_value() == pytest.approx(0.0, abs=1e-7)
    assert first == {"finished": True, "latest": False}


def test_the_continual_gradient_is_that_of_equation_9_and_leaves_earlier_layers_alone():
    method = HyperPrune(**SMALL, continual="squared", lambda2=3.0, embedding_norm=0.0)
    state = after_layers(method, 2)
    network = SharedNetwork(method, LOGITS, state, 2, CPU)
    network._parameters["weight2"].data += 0.3
    value = network.gather_terms()
    found = network.gradients()
    outputs = network._form.forward(
        network._parameters,
        state["cache.features"],
        network._form.fold(network._parameters, state["cache.layers"], state["cache.roles"]),
    )
    expected = (outputs - state["cache.outputs"]).square().sum(0).mean()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    gradient = torch.autograd.grad(3.0 * expected, network._parameters["weight1"])[0]
    torch.testing.assert_close(found["weight1"], gradient, rtol=1e-5, atol=1e-7)
    assert "layer" not in found and found["component"].abs().max() > 0


def test_a_layers_embedding_starts_where_the_last_one_ended_unless_it_is_finished():
    method = HyperPrune(**SMALL)
    state = after_layers(method, 1)
    warm = SharedNetwork(method, LOGITS, state, 1, CPU)._parameters["layer"]
    assert torch.equal(warm[1], warm[0])
    again = SharedNetwork(method, LOGITS, state, 1, CPU, finished=True)._parameters["layer"]
    cold = SharedNetwork(HyperPrune(**SMALL, warm_layer=False), LOGITS, state, 1, CPU)._parameters["layer"]
    assert torch.equal(again, cold) and not torch.equal(again[1], again[0])


def test_embeddings_have_their_own_rate_the_component_may_freeze_and_the_clip_holds():
    method = HyperPrune(**SMALL, weight_decay=0.0, component_lr=0.1, clip=1.0)
    network = SharedNetwork(method, LOGITS, after_layers(method, 1), 1, CPU)
    before = {name: value.detach().clone() for name, value in network._parameters.items()}
    network.gather(torch.randn(22, 9), 1, 1e4 * torch.randn(4, 9))
    total = torch.cat([value.flatten() for value in network.gradients().values()]).norm()
    assert total > 1
    network.update(0.01, frozen_component=True)
    moved = {name: (value - before[name]).abs().max().item() for name, value in network._parameters.items()}
    assert moved["component"] == 0
    assert moved["layer"] == pytest.approx(0.001, rel=1e-2) and moved["weight1"] == pytest.approx(0.01, rel=1e-2)
    clipped = torch.cat([value.flatten() for value in network._first.values()]).norm() / 0.1
    assert clipped.item() <= 1 + 1e-5
