"""Loss-aware token weights: the formula, the files that they are read from, and whole runs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from nmprune.errors import InputError
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.prepare.gradients import LayerGradients
from nmprune.run.gradients import GradientFiles, collect_gradients, token_weights
from nmprune.run.loss_aware import LossAware
from nmprune.run.machine import Machine
from nmprune.run.progress import silent
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, select
from runs import output, prune


@pytest.fixture
def base(tmp_path):
    return tiny_models.save("llama", tmp_path / "base")


def squares(n_blocks: int = 2) -> torch.Tensor:
    return torch.rand(3, 5, n_blocks, generator=torch.Generator().manual_seed(0)).mul(8).exp()


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_weights_are_powers_with_mean_one_in_each_block(power):
    given = squares()
    before = given.clone()
    weights = LossAware(power=power).weights(given)
    assert weights.shape == given.shape and weights.dtype == torch.float32 and torch.equal(given, before)
    torch.testing.assert_close(weights.mean((0, 1)), torch.ones(2))
    powered = given.double().pow(power)
    torch.testing.assert_close(weights.double(), powered / powered.mean((0, 1)), rtol=1e-5, atol=0)


def test_blocks_are_weighted_by_themselves():
    given = squares(3) * torch.tensor([1e30, 1.0, 1e-30])  # so far apart that a common scale would lose some
    loss_aware = LossAware(power=8.0)
    whole = loss_aware.weights(given)
    for block in range(3):
        assert torch.equal(whole[..., block], loss_aware.weights(given[..., block : block + 1])[..., 0])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("power", [0.5, 1.0, 4.0])
def test_the_scale_of_the_gradients_does_not_matter(scale, power):
    loss_aware, given = LossAware(power=power), squares()
    weights = loss_aware.weights(given * scale)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights, loss_aware.weights(given), rtol=1e-4, atol=1e-6)


def test_where_no_token_has_a_gradient_all_count_the_same():
    given = squares()
    given[..., 1] = 0
    weights = LossAware().weights(given)
    assert torch.equal(weights[..., 1], torch.ones(3, 5))
    assert weights[..., 0].std() > 0.1


def test_a_token_without_a_gradient_counts_nothing():
    given = squares(1)
    given[1, 2] = 0
    weights = LossAware().weights(given)
    assert weights[1, 2] == 0 and (weights > 0).sum() == 14


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_are_refused_by_name(value, tmp_path):
    given = squares(1)
    given[0, 0] = value
    with pytest.raises(InputError, match="not finite, so tokens have no weight: use --dtype float32"):
        LossAware().weights(given)
    files = GradientFiles(tmp_path / "gradients")
    files.save(LayerGradients(0, {}, torch.zeros(1), {"model.layers.0.a": given}))
    with pytest.raises(InputError, match=r"^model\.layers\.0\.a: the loss's gradient is not finite"):
        files.token_weights(0, LossAware())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"power": 0.0}, r"loss_aware\.power is 0\.0; expected a number above 0, such as 0\.5"),
        ({"power": -1.0}, r"loss_aware\.power is -1\.0"),
        ({"power": float("nan")}, r"loss_aware\.power is nan"),
        ({"power": float("inf")}, r"loss_aware\.power is inf"),
        ({"blocks": 0}, r"loss_aware\.blocks is 0; expected a whole number >= 1, such as 1"),
    ],
)
def test_faults(settings, expected):
    with pytest.raises(InputError, match=expected):
        LossAware(**settings)


def test_what_is_kept_is_read_back_as_weights(tmp_path):
    files = GradientFiles(tmp_path / "gradients")
    kept = {"a": squares(1), "b": squares(2)}
    files.save(LayerGradients(3, {}, torch.zeros(1), kept, seconds=0.5))
    loss_aware = LossAware(power=1.0)
    found = files.token_weights(3, loss_aware)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], loss_aware.weights(value)) for name, value in kept.items())
    of_layer = token_weights(files, loss_aware)
    assert of_layer(3).keys() == kept.keys() and files.seconds() == 0.5
    assert token_weights(files, None) is None


def test_the_pass_keeps_weights_and_no_sums_where_only_they_are_asked_for(base, tmp_path):
    model = DecoderModel.open(base)
    files = GradientFiles(tmp_path / "gradients")
    selections = select(model, Pattern(2, 4), ("*.v_proj",))
    needs = create("wanda").needs
    collect_gradients(files, model, tiny_models.windows(3), selections, needs, Machine(), silent, 0)
    assert not files.path.exists()
    collect_gradients(files, model, tiny_models.windows(3), selections, needs, Machine(), silent, 40)
    found = files.token_weights(1, LossAware())
    assert {name: value.shape[-1] for name, value in found.items()} == {
        one.name: min(40, one.shape[0]) for one in selections[1].prune
    }
    assert all(value.shape[:2] == (3, 16) for value in found.values())
    assert not any("v_proj" in name for name in found)


@pytest.mark.parametrize(("method", "loss_aware"), [("descent", True), ("sparsegpt", LossAware(1.0, blocks=2))])
def test_a_model_in_memory_is_pruned_as_a_run_is(method, loss_aware, base, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    model = AutoModelForCausalLM.from_pretrained(base)
    in_memory = prune(model, None, method, loss_aware=loss_aware, machine=Machine(scratch=scratch))
    run = prune(base, tmp_path / "run", method, loss_aware=loss_aware)
    finished = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    assert all(torch.equal(value, finished[name]) for name, value in model.state_dict().items())
    assert [one.output_error for one in in_memory.linears] == [one.output_error for one in run.results.linears]
    assert list(scratch.iterdir()) == [] and all(one.grad is None for one in model.parameters())
    plain = prune(base, tmp_path / "plain", method)
    assert plain.results.mask_checksum != run.results.mask_checksum
    assert "gradients" not in plain.results.seconds and "loss_aware" not in plain.results.method
    settings = {"power": 0.5, "blocks": 1} if loss_aware is True else {"power": 1.0, "blocks": 2}
    assert run.results.method["loss_aware"] == settings and run.results.seconds["gradients"] > 0
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["nmprune"]["method"] == run.results.method
    assert not (tmp_path / "run/progress").exists()


def test_gradients_of_the_method_and_weights_of_tokens_come_from_one_pass(base, tmp_path):
    both = prune(base, tmp_path / "both", "gblm", loss_aware=LossAware(blocks=2)).results
    plain = prune(base, tmp_path / "plain", "gblm").results
    assert both.mask_checksum != plain.mask_checksum
    assert all(one.notes["row_blocks"] == 2 for one in both.linears)


def test_false_is_no_weights(base, tmp_path):
    prune(base, tmp_path / "a", loss_aware=False)
    prune(base, tmp_path / "b")
    assert output(tmp_path / "a") == output(tmp_path / "b")


@pytest.mark.parametrize("method", ["magnitude", "pruner_zero"])
def test_methods_that_read_no_inputs_have_no_tokens_to_weight(method, base):
    expected = f"loss_aware weights tokens in the statistics of inputs, and {method} reads none. Leave it out."
    with pytest.raises(InputError) as told:
        Recipe("m", create(method), Pattern(2, 4), loss_aware=LossAware())
    assert str(told.value) == expected
    with pytest.raises(InputError, match="reads none"):
        prune(AutoModelForCausalLM.from_pretrained(base), None, method, loss_aware=True)
    reconstructed = Recipe.from_dict({"model": "m", "method": method, "reconstruct": True, "loss_aware": True})
    assert reconstructed.loss_aware == LossAware(), "reconstruct reads inputs"
