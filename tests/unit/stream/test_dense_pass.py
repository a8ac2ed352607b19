from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune.stats import StatsAccumulator
from nmprune.stream import DecoderModel, LayerStep, StreamOptions, select
from nmprune.stream.dense_pass import LayerObserved, observe_layers
from walks import PATTERN, counted_forwards

NEEDS = frozenset({"input_sq_norm"})
OPTIONS = StreamOptions(batch_size=2)


def layers(model, windows, exclude=(), **kwargs):
    """Everything yielded; statistics and shapes only, as weights are valid for one step."""
    selections = select(model, PATTERN, exclude)
    found = []
    for step in observe_layers(model, windows, selections, NEEDS, OPTIONS, **kwargs):
        if isinstance(step, LayerObserved):
            assert not any(parameter.is_meta for parameter in step.layer.parameters())
        found.append(step)
    return found


def observed(steps):
    return [step for step in steps if isinstance(step, LayerObserved)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "gpt_oss"])
def test_streamed_equals_in_memory(name, tmp_path):
    windows = tiny_models.windows()
    streamed = observed(layers(DecoderModel.open(tiny_models.save(name, tmp_path / "m")), windows))
    in_memory = observed(layers(DecoderModel.from_model(tiny_models.build(name)), windows))
    assert [one.index for one in streamed] == [0, 1]
    for ours, theirs in zip(streamed, in_memory, strict=True):
        assert ours.stats.keys() == theirs.stats.keys()
        for key, stats in ours.stats.items():
            torch.testing.assert_close(stats.input_sq_norm, theirs.stats[key].input_sq_norm, rtol=0, atol=0)
            assert stats.n_tokens == theirs.stats[key].n_tokens


def test_the_statistics_are_those_of_the_dense_models_own_forward():
    model = tiny_models.build("llama")
    windows = tiny_models.windows()
    sums = StatsAccumulator(64, NEEDS)
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: sums.add(args[0]))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    last = observed(layers(DecoderModel.from_model(model), windows))[-1]
    torch.testing.assert_close(last.stats["mlp.down_proj"].input_sq_norm, sums.result().input_sq_norm)


def test_each_layer_runs_once_and_says_so():
    model = DecoderModel.from_model(tiny_models.build("llama"))
    before = [parameter.clone() for parameter in model.model.parameters()]
    with counted_forwards(model.layers) as counts:
        steps = layers(model, tiny_models.windows())
        assert counts() == [3, 3]
    assert [(s.index, s.done, s.total) for s in steps if isinstance(s, LayerStep)] == [
        (layer, done, 3) for layer in (0, 1) for done in (1, 2, 3)
    ]
    assert set(observed(steps)[0].seconds) == {"read", "forward", "statistics"}
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))


def test_only_what_is_pruned_is_observed_and_nothing_past_the_last_of_it():
    model = DecoderModel.from_model(tiny_models.build("llama"))
    steps = layers(model, tiny_models.windows(), ("model.layers.1.*", "*.self_attn.*"))
    assert [(one.index, set(one.stats)) for one in observed(steps)] == [(0, {"mlp.gate_proj", "mlp.down_proj"})]


def test_without_windows_the_weights_come_without_a_forward(tmp_path):
    model = DecoderModel.open(tiny_models.save("llama", tmp_path / "m"))
    with counted_forwards(model.layers) as counts:
        steps = layers(model, None)
        assert counts() == [0, 0]
    assert [(type(one), one.index, one.stats) for one in steps] == [(LayerObserved, 0, {}), (LayerObserved, 1, {})]
    assert all(parameter.is_meta for parameter in model.layers.parameters())


def test_hidden_states_past_the_budget_live_in_a_file(tmp_path):
    model = DecoderModel.from_model(tiny_models.build("llama"))
    in_memory = observed(layers(model, tiny_models.windows()))
    small = StreamOptions(batch_size=2, hidden_budget=0)
    selections = select(model, PATTERN)
    for step in observe_layers(model, tiny_models.windows(), selections, NEEDS, small, scratch=tmp_path):
        if isinstance(step, LayerObserved):
            mine = in_memory[step.index].stats["mlp.down_proj"].input_sq_norm
            assert torch.equal(step.stats["mlp.down_proj"].input_sq_norm, mine)
    assert not list(tmp_path.iterdir())
