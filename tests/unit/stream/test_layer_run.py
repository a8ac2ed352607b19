"""The gradients that a learner gets are those of the whole layer at once, for every way of storing a linear."""

import pytest
import torch
from torch.func import functional_call

import tiny_models
from layer_work import layer_work, mean_squares
from nmprune import masks
from nmprune.distributed import Processes
from nmprune.pattern import Pattern
from nmprune.stream.experts import observable_experts

FAMILIES = ["llama", "gemma2", "phi3", "opt", "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"]


def masked(work, scale=0.7):
    """Masked weights as a soft mask gives them: nothing is exactly dense or pruned."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: weight * (scale * torch.rand(weight.shape, generator=generator)) for name, weight in work.weights.items()
    }


def monolithic(work, sequences, weights):
    """Autograd through the whole layer over all sequences together, every parameter a leaf."""
    layer, calls = work._layer, work._calls_of(len(sequences))
    leaves = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for linear in work._linears:
        linear.in_module.of(leaves[linear.parameter]).copy_(weights[linear.name])
    leaves = {name: p.requires_grad_() for name, p in leaves.items()}
    inputs = work._inputs.rows(sequences)
    output = calls.run(work.index, lambda *a, **k: functional_call(layer, leaves, a, k), inputs)
    loss = mean_squares(output, work._targets.rows(sequences), inputs).mean()
    loss.backward()
    return loss.item(), {linear.name: linear.in_module.of(leaves[linear.parameter].grad) for linear in work._linears}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_in_pieces_are_those_of_the_whole(name, index):
    work = layer_work(name, index=index, n_sequences=7, batch_size=2)
    sequences = torch.tensor([0, 3, 1, 5, 2])  # pieces of 2, 2 and 1, in another order
    weights = masked(work)
    with observable_experts(work_config(work)):
        loss, gradients = work.gradients(sequences, weights)
        expected_loss, expected = monolithic(work, sequences, weights)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert work.loss(sequences, weights) == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == work.weights.keys() and len(gradients) >= 4
    for one, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.shape == work.weights[one].shape
        scale = expected[one].abs().max().item()
        torch.testing.assert_close(gradient, expected[one], rtol=1e-4, atol=1e-5 * scale)
    assert sum(gradient.abs().sum().item() > 0 for gradient in gradients.values()) >= 0.8 * len(gradients)


def work_config(work):
    """The config that the layer's modules read."""
    return next(module.config for module in work._layer.modules() if hasattr(module, "config"))


def test_nothing_of_the_layer_changes_and_no_gradient_stays():
    work = layer_work("llama")
    before = {name: p.detach().clone() for name, p in work._layer.named_parameters()}
    given = masked(work)
    kept = {name: weight.clone() for name, weight in given.items()}
    work.gradients(work.train, given)
    for name, parameter in work._layer.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name
    for name, weight in given.items():
        assert torch.equal(weight, kept[name]) and not weight.requires_grad, name


def test_dense_weights_lose_nothing_and_a_linear_that_is_not_given_is_dense():
    work = layer_work("phi3")
    assert work.loss(work.held_out, work.weights) == pytest.approx(0, abs=1e-12)
    assert work.loss(work.held_out, {}) == pytest.approx(0, abs=1e-12)
    one = next(iter(work.weights))
    loss, gradients = work.gradients(work.held_out, {one: work.weights[one] * 0.5})
    assert list(gradients) == [one] and loss > 0


def test_held_out_sequences_come_last():
    work = layer_work("llama", n_sequences=7, n_held_out=3)
    assert work.train.tolist() == [0, 1, 2, 3] and work.held_out.tolist() == [4, 5, 6]


def test_a_layer_in_bfloat16_gives_gradients_in_fp32():
    work = layer_work("llama", dtype=torch.bfloat16)
    weights = masked(work)
    loss, gradients = work.gradients(work.train, weights)
    exact = layer_work("llama")
    expected_loss, expected = exact.gradients(exact.train, {n: w.bfloat16().float() for n, w in weights.items()})
    assert loss == pytest.approx(expected_loss, rel=0.05)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_a_step_down_the_gradient_lowers_the_loss():
    work = layer_work("gpt2", prior="wanda")
    weights = {name: weight * work.priors[name] for name, weight in work.weights.items()}
    loss, gradients = work.gradients(work.train, weights)
    norm = sum(gradient.square().sum() for gradient in gradients.values())
    stepped = {name: weight - 0.05 * loss / norm * gradients[name] for name, weight in weights.items()}
    assert work.loss(work.train, stepped) < loss
    assert all(masks.n_wrong_groups(mask, Pattern(2, 4)) == 0 for mask in work.priors.values())


def test_a_loss_over_no_sequences_is_a_bug_of_the_caller():
    work = layer_work("llama")
    with pytest.raises(ValueError, match="no sequences"):
        work.loss(torch.tensor([], dtype=torch.int64), work.weights)


def test_windows_of_tiny_models_differ():
    assert len(tiny_models.windows(7).unique(dim=0)) == 7


class _Adding(Processes):
    """Stands for two processes: the first's sums are kept, and the second's are added to them."""

    def __init__(self, kept=None):
        super().__init__()
        self.kept = kept if kept is not None else []
        self.first = kept is None

    def sum_(self, tensors):
        for at, one in enumerate(list(tensors)):
            if self.first:
                self.kept.append(one.clone())
            else:
                one += self.kept[at]

    def sum_values(self, values):
        if self.first:
            self.kept.append(list(values))
            return list(values)
        return [a + b for a, b in zip(values, self.kept[-1], strict=True)]


@pytest.mark.parametrize("shares", [([0, 2], [1, 3, 4]), ([], [0, 1, 2, 3, 4])], ids=["both", "one has none"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradients_of_two_processes_are_those_of_one(name, shares):
    alone = layer_work(name, n_sequences=5)
    sequences, weights = torch.tensor([0, 1, 2, 3, 4]), masked(alone)
    with observable_experts(work_config(alone)):
        loss, gradients = alone.gradients(sequences, weights)
        first = _Adding()
        for processes, share in ((first, shares[0]), (_Adding(first.kept), shares[1])):
            work = layer_work(name, n_sequences=5)
            work._processes, work._local = (
                processes,
                lambda given, share=share: given[torch.isin(given, torch.tensor(share))],
            )
            found_loss, found = work.gradients(sequences, weights)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for one, gradient in gradients.items():
        torch.testing.assert_close(found[one], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
