"""How gradient sums reach a method through the layer walker."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.stats import InputStats
from nmprune.stream import DecoderModel, select
from nmprune.stream.per_linear import with_gradients
from walks import PATTERN, counted_forwards, layers_done, pruned, walk


def random_gradients(model: DecoderModel, n_tokens: int = 96):
    """(layer, linear name) -> sums, and the calls that were made."""
    generator = torch.Generator().manual_seed(3)
    sums = {
        (index, linear.name): InputStats(
            n_tokens,
            weight_grad_abs=torch.rand(linear.shape, generator=generator),
            weight_grad_sq=torch.rand(linear.shape, generator=generator),
            n_grad_sequences=6,
        )
        for index, selection in enumerate(select(model, PATTERN))
        for linear in selection.prune
    }
    asked: list[tuple[int, str]] = []

    def of_linear(index: int, name: str) -> InputStats:
        asked.append((index, name))
        return sums[(index, name)]

    return of_linear, sums, asked


def test_a_method_of_gradients_alone_needs_no_forward_and_no_windows():
    model = tiny_models.build("llama")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    of_linear, sums, asked = random_gradients(DecoderModel.from_model(model))
    with counted_forwards(model.model.layers) as count:
        steps = walk(model, None, "pruner_zero", gradients=of_linear)
        assert count() == [0, 0]
    assert asked == list(sums)
    for (_, name), stats in sums.items():
        expected = create("pruner_zero").prune(weights[f"{name}.weight"], stats, PATTERN).mask
        assert torch.equal(pruned(steps)[name].mask, expected)
    assert all(one.n_tokens == 96 for done in layers_done(steps) for one in done.linears)


def test_windows_that_nobody_reads_cost_no_forward_either():
    model = tiny_models.build("llama")
    of_linear, _, _ = random_gradients(DecoderModel.from_model(model))
    with counted_forwards(model.model.layers) as count:
        walk(model, tiny_models.windows(), "pruner_zero", gradients=of_linear)
        assert count() == [0, 0]


def test_a_method_of_both_gets_both():
    model = tiny_models.build("llama")
    of_linear, _, asked = random_gradients(DecoderModel.from_model(model), n_tokens=5)
    steps = walk(model, tiny_models.windows(), "gblm", gradients=of_linear)
    assert len(asked) == 14
    assert all(one.n_tokens == 96 for done in layers_done(steps) for one in done.linears), "those of the stream"
    plain = pruned(walk(tiny_models.build("llama"), tiny_models.windows(), "wanda"))
    without = pruned(
        walk(tiny_models.build("llama"), tiny_models.windows(), create("gblm", {"alpha": 0}), gradients=of_linear)
    )
    assert all(torch.equal(plain[name].mask, without[name].mask) for name in plain)
    assert any(not torch.equal(plain[name].mask, pruned(steps)[name].mask) for name in plain)


def test_a_method_without_gradients_does_not_ask_for_them():
    model = tiny_models.build("llama")
    of_linear, _, asked = random_gradients(DecoderModel.from_model(model))
    walk(model, tiny_models.windows(), "wanda", gradients=of_linear)
    assert asked == []


@pytest.mark.parametrize("method", ["pruner_zero", "gblm"])
def test_gradients_that_are_missing_are_asked_for(method):
    with pytest.raises(InputError, match=rf"method {method} needs gradients.*nmprune.prepare.gradients"):
        walk(tiny_models.build("llama"), tiny_models.windows(), method)


def test_an_expert_with_few_tokens_is_pruned_by_magnitude():
    model = tiny_models.build("mixtral")
    of_linear, _, _ = random_gradients(DecoderModel.from_model(model), n_tokens=31)
    found = pruned(walk(model, None, "pruner_zero", gradients=of_linear))
    for name, one in found.items():
        assert one.notes.get("fallback_tokens") == (31 if "experts" in name else None)


def test_what_was_derived_from_the_inputs_stays_shared():
    gradients = InputStats(3, weight_grad_sq=torch.ones(2, 4), n_grad_sequences=1)
    stats = InputStats(7, input_gram=torch.eye(4))
    together = [with_gradients([stats], gradients, torch.device("cpu"))[0] for _ in range(2)]
    assert together[0].derived("key", lambda: 1) == together[1].derived("key", lambda: 2) == 1
    assert together[0].n_tokens == 7 and together[0].input_gram is stats.input_gram
    assert with_gradients([InputStats(0)], gradients, torch.device("cpu"))[0].n_tokens == 3
