from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune.errors import InputError
from nmprune.methods import Magnitude, Wanda
from nmprune.pattern import Pattern
from nmprune.prepare.allocation import Measured
from nmprune.prepare.choices import parse_choices
from nmprune.prepare.unit_errors import linear_errors, measure_layers
from nmprune.stats import InputStats, StatsAccumulator
from nmprune.stream import DecoderModel, LayerStep, select

CHOICES = parse_choices(["1:4", "2:4", "3:4", "dense"])


def measured(model, windows=None, owl_m=None, exclude=()):
    decoder = model if isinstance(model, DecoderModel) else DecoderModel.from_model(model)
    selections = select(decoder, Pattern(2, 4), exclude)
    ids = tiny_models.windows() if windows is None else windows
    steps = list(measure_layers(decoder, ids, selections, CHOICES, owl_m=owl_m))
    return steps, [step for step in steps if isinstance(step, Measured)]


def inputs_of(model, modules, windows):
    """What reaches the linears of `modules`, by name."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in modules
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return seen


def test_errors_are_the_relative_output_errors_of_wandas_masks():
    model, windows = tiny_models.build("llama"), tiny_models.windows()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    _, layers = measured(model)
    units = {unit.name: unit for layer in layers for unit in layer.units}
    assert list(units)[:3] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"] and len(units) == 14
    for name, x_TI in inputs_of(model, units, windows).items():
        weight = model.get_submodule(name).weight.detach()
        sums = StatsAccumulator(x_TI.shape[1], frozenset({"input_sq_norm"}))
        sums.add(x_TI)
        stats = sums.result()
        for pattern, error in zip(CHOICES, units[name].errors, strict=True):
            if pattern is None:
                assert error == 0
                continue
            mask = Wanda().prune(weight, stats, pattern).mask
            lost = (x_TI @ torch.where(mask, 0.0, weight).T).square().sum() / (x_TI @ weight.T).square().sum()
            assert error == pytest.approx(lost.item(), rel=1e-4)
        assert units[name].errors == tuple(sorted(units[name].errors, reverse=True))
        assert (units[name].linears, units[name].n_weights) == ((name,), weight.numel())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_every_batch_and_every_linear_is_a_sign_of_life():
    steps, _ = measured(tiny_models.build("llama"), exclude=("model.layers.1.mlp.*",))
    told = [step for step in steps if isinstance(step, LayerStep)]
    for index, n_linears in ((0, 7), (1, 4)):
        mine = [(step.done, step.total) for step in told if step.index == index]
        assert mine == [(i + 1, len(mine)) for i in range(len(mine))] and len(mine) == 1 + n_linears


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_experts_of_a_kind_are_one_unit(name):
    _, layers = measured(tiny_models.build(name))
    for layer in layers:
        experts = [unit for unit in layer.units if len(unit.linears) > 1]
        assert experts and all(len(unit.linears) == 4 for unit in experts)
        assert len({unit.name for unit in layer.units}) == len(layer.units)
        for unit in layer.units:
            assert all(0 < error < 1 for error in unit.errors[:3]) and unit.errors[3] == 0


def test_experts_that_saw_no_token_count_their_weights():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    unseen = InputStats(0, input_gram=torch.zeros(16, 16))
    output, weights = linear_errors(weight, unseen, CHOICES)
    assert (output.whole, output.lost) == (0.0, (0.0,) * 4)
    kept = torch.where(Magnitude().prune(weight, unseen, Pattern(2, 4)).mask, weight, 0.0)
    assert weights.lost[1] == pytest.approx((weight.square().sum() - kept.square().sum()).item(), rel=1e-5)
    # the first expert sees every token: the other experts' weights, as nobody asks for their output, do not count
    model = tiny_models.build("mixtral", num_local_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    _, layers = measured(model)
    assert all(0 < error < 1 for layer in layers for unit in layer.units for error in unit.errors[:3])


def test_outlier_shares_only_where_asked_for():
    model = tiny_models.build("llama")
    assert {layer.outlier_share for layer in measured(model)[1]} == {0.0}
    few, many = (measured(model, owl_m=m)[1] for m in (3.0, 1.5))
    assert all(0 < a.outlier_share < b.outlier_share < 1 for a, b in zip(few, many, strict=True))


def test_an_outlier_share_counts_the_scores_of_all_linears_of_a_layer():
    model, windows = tiny_models.build("llama"), tiny_models.windows()
    layer = measured(model, owl_m=2.0)[1][1]
    inputs = inputs_of(model, [unit.name for unit in layer.units], windows)
    scores = torch.cat(
        [
            (model.get_submodule(name).weight.detach().abs() * x_TI.square().mean(0).sqrt()).flatten()
            for name, x_TI in inputs.items()
        ]
    )
    expected = (scores > 2 * scores.mean()).float().mean().item()
    assert layer.outlier_share == pytest.approx(expected, abs=2 / scores.numel())


def test_streamed_equals_in_memory(tmp_path):
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path)
    assert measured(DecoderModel.open(tmp_path), owl_m=3.0)[1] == measured(model, owl_m=3.0)[1]


def test_a_weight_that_is_not_finite_is_named():
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"^model.layers.0.self_attn.k_proj: .*NaN or infinite"):
        measured(model)
