from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny_models
from nmprune.architectures import FAMILIES
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.prepare.gradients import GradientStep, LayerGradients, layer_gradients
from nmprune.prepare.layer_sums import LayerSums
from nmprune.stats import GRADIENTS
from nmprune.stream import DecoderModel, select
from nmprune.stream.hidden_states import HiddenStates

PATTERN = Pattern(2, 4)
N_BLOCKS = 3


def walk(
    model: DecoderModel, windows: Tensor, needs=GRADIENTS, exclude=(), **kwargs
) -> list[GradientStep | LayerGradients]:
    """Everything that is yielded; `input_gradient` is copied, as it is valid for one step only."""
    found = []
    for step in layer_gradients(model, windows, select(model, PATTERN, exclude), needs, **kwargs):
        if isinstance(step, LayerGradients):
            object.__setattr__(step, "input_gradient", step.input_gradient.clone())
        found.append(step)
    return found


def layers(steps) -> dict[int, LayerGradients]:
    return {step.index: step for step in steps if isinstance(step, LayerGradients)}


def plain_autograd(
    model: PreTrainedModel, windows: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameter -> sum of |g| and of g^2 over sequences; module -> (n_sequences, seq_len, out) of its outputs."""
    model.config._experts_implementation = "eager"
    absolute = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    square = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    outputs: dict[str, list[Tensor]] = {}

    def hook(name):
        def forward(module, args, output):
            if isinstance(output, Tensor):  # a router gives several
                output.register_hook(lambda g: outputs.setdefault(name, []).append(g.reshape(-1, g.shape[-1]).clone()))

        return forward

    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2 and "embed" not in name:
            module.register_forward_hook(hook(name))
    for ids in windows:
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for name, one in model.named_parameters():
            if one.grad is not None:
                absolute[name] += one.grad.abs()
                square[name] += one.grad.square()
    return absolute, square, {name: torch.stack(parts) for name, parts in outputs.items()}


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_streamed_sums_are_plain_autograds(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model", max_shard_size="40KB")
    windows = tiny_models.windows(3)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    absolute, square, outputs = plain_autograd(whole, windows)
    streamed = DecoderModel.open(folder)
    found = layers(walk(streamed, windows, token_blocks=N_BLOCKS))
    assert list(found) == [1, 0]
    for index in found:
        prefix = f"{streamed.family.layers}.{index}."
        selected = select(streamed, PATTERN)[index].prune
        assert found[index].stats.keys() == {linear.name for linear in selected}
        for linear in selected:
            stats = found[index].stats[linear.name]
            parameter = prefix + linear.parameter
            for mine, theirs in ((stats.weight_grad_abs, absolute), (stats.weight_grad_sq, square)):
                expected = linear.in_module.of(theirs[parameter])
                scale = theirs[parameter].max().item()
                assert scale > 0 and mine.dtype == torch.float32
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * scale, msg=linear.name)
            assert stats.n_grad_sequences == 3
            if linear.in_module.expert is None:
                assert stats.n_tokens == windows.numel()
                g = outputs[parameter.removesuffix(".weight")]
                rows = linear.in_module.rows
                parts = (g if rows is None else g[..., rows[0] : rows[1]]).tensor_split(N_BLOCKS, dim=-1)
                weights = torch.stack([part.square().mean(-1) for part in parts], dim=-1)
                mine = found[index].token_weights[linear.name]
                torch.testing.assert_close(mine, weights, rtol=1e-3, atol=1e-6 * weights.max().item())
            else:
                assert linear.name not in found[index].token_weights


def test_the_families_are_covered():
    assert {tiny_models.CONFIGS[name][0] for name in tiny_models.CONFIGS} == set(FAMILIES)


def same(one: dict[int, LayerGradients], other: dict[int, LayerGradients]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for index, mine in one.items():
        theirs = other[index]
        assert torch.equal(mine.input_gradient, theirs.input_gradient)
        assert mine.stats.keys() == theirs.stats.keys()
        for name, stats in mine.stats.items():
            assert stats.n_tokens == theirs.stats[name].n_tokens
            assert torch.equal(stats.weight_grad_abs, theirs.stats[name].weight_grad_abs)
            assert torch.equal(stats.weight_grad_sq, theirs.stats[name].weight_grad_sq)


@pytest.fixture
def deep(tmp_path):
    """A folder with a Llama of four layers."""
    return tiny_models.save("llama", tmp_path / "deep", num_hidden_layers=4)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gpt_oss"])
def test_a_model_in_memory_gives_the_same_and_stays_as_it_was(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model")
    windows = tiny_models.windows(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    marks = {}
    for number, (key, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, 7.0) if number % 4 == 0 else None
        marks[key] = parameter.grad
    same(layers(walk(DecoderModel.from_model(model), windows)), layers(walk(DecoderModel.open(folder), windows)))
    for number, (key, parameter) in enumerate(model.named_parameters()):
        assert parameter.requires_grad == (number % 2 == 0) and torch.equal(parameter, before[key])
        assert parameter.grad is marks[key]
        assert parameter.grad is None or (parameter.grad == 7).all()
    assert not any("gate_up_proj" in vars(module) for module in model.modules())


def test_one_layers_weights_at_a_time_and_none_afterwards(deep):
    model = DecoderModel.open(deep)
    windows = tiny_models.windows(2)
    most = []

    def loaded() -> int:
        return sum(not all(p.is_meta for p in layer.parameters()) for layer in model.layers)

    for step in layer_gradients(model, windows, select(model, PATTERN), GRADIENTS):
        most.append(loaded())
        if isinstance(step, LayerGradients):
            assert loaded() == 0, "a layer's weights are dropped before its gradients are handed out"
    assert max(most) == 1
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_whole_gradients_do_not_pile_up(deep, monkeypatch):
    """When autograd has made the gradient of one weight, those of the others are gone already."""
    alive: list[weakref.ref] = []
    take = LayerSums._take

    def watching(self, views, parameter):
        assert not any(one() is not None for one in alive)
        alive.append(weakref.ref(parameter.grad))
        take(self, views, parameter)

    monkeypatch.setattr(LayerSums, "_take", watching)
    walk(DecoderModel.open(deep), tiny_models.windows(2))
    assert len(alive) == 4 * 7 * 2


def test_files_past_the_budget_change_no_bit_and_are_gone_afterwards(deep, tmp_path, monkeypatch):
    windows = tiny_models.windows(3)
    stores: list[HiddenStates] = []
    init = HiddenStates.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        stores.append(self)

    monkeypatch.setattr(HiddenStates, "__init__", remember)
    in_memory = layers(walk(DecoderModel.open(deep), windows))
    assert len(stores) == 5 and not any(store.on_disk for store in stores)
    stores.clear()
    one_store = 3 * 16 * 32 * 4
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    some = layers(walk(DecoderModel.open(deep), windows, hidden_budget=2 * one_store + 1, scratch=scratch))
    assert [store.on_disk for store in stores] == [False, False, True, True, True]
    same(in_memory, some)
    assert list(scratch.iterdir()) == []
    assert all(store.all.numel() == 0 for store in stores)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_restart_ends_in_the_same_bits(deep, kept):
    windows = tiny_models.windows(3)
    whole = layers(walk(DecoderModel.open(deep), windows))
    done = [3, 2, 1, 0][:kept]
    oldest = whole[3]  # gradients of hidden states are not kept for every layer
    steps = walk(
        DecoderModel.open(deep),
        windows,
        finished=lambda index: index in done,
        restart=(oldest.index, oldest.input_gradient.clone()),
    )
    same(layers(steps), {index: one for index, one in whole.items() if index not in done})
    without = walk(DecoderModel.open(deep), windows, finished=lambda index: index in done)
    same(layers(without), {index: one for index, one in whole.items() if index not in done})
    for all_steps in (steps, without):
        signs = [step for step in all_steps if isinstance(step, GradientStep)]
        assert signs[-1].done == signs[-1].total
        assert all(a.done < b.done for a, b in pairwise(signs))


def test_finished_means_nothing_is_done(deep):
    assert walk(DecoderModel.open(deep), tiny_models.windows(2), finished=lambda index: True) == []


def test_a_restart_that_skips_a_layer_is_a_bug(deep):
    with pytest.raises(ValueError, match="restart at layer 1, but layer 2 is not finished"):
        walk(
            DecoderModel.open(deep),
            tiny_models.windows(2),
            finished=lambda index: index in (0, 1, 3),
            restart=(1, torch.zeros(2, 16, 32)),
        )


def test_excluded_layers_pass_the_gradient_on_and_early_ones_are_not_run_back(deep):
    windows = tiny_models.windows(2)
    whole = layers(walk(DecoderModel.open(deep), windows))
    steps = walk(DecoderModel.open(deep), windows, exclude=("model.layers.0.*", "model.layers.2.*", "*.3.mlp.up_proj"))
    found = layers(steps)
    assert list(found) == [3, 1]
    assert "model.layers.3.mlp.up_proj" not in found[3].stats and len(found[3].stats) == 6
    for index in found:
        for name, stats in found[index].stats.items():
            assert torch.equal(stats.weight_grad_sq, whole[index].stats[name].weight_grad_sq)
    signs = [step for step in steps if isinstance(step, GradientStep)]
    assert signs[-1].total == 2 * (4 + 1 + 3 * 3) == signs[-1].done


def test_only_what_is_asked_for(deep):
    model, windows = DecoderModel.open(deep), tiny_models.windows(2)
    squares = layers(walk(model, windows, frozenset({"weight_grad_sq", "input_sq_norm"})))
    stats = squares[0].stats["model.layers.0.mlp.up_proj"]
    assert stats.weight_grad_abs is None and stats.weight_grad_sq is not None and not squares[0].token_weights
    weights = layers(walk(model, windows, frozenset(), token_blocks=1))
    assert not weights[0].stats and weights[0].token_weights["model.layers.0.mlp.up_proj"].shape == (2, 16, 1)
    many = layers(walk(model, windows, frozenset(), token_blocks=50))
    assert many[0].token_weights["model.layers.0.self_attn.k_proj"].shape == (2, 16, 16)


def test_an_expert_without_a_token_has_no_gradient(tmp_path):
    model = tiny_models.build("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[:3] *= 5
    windows = tiny_models.windows(1, 4)
    seen = []
    for one in layers(walk(DecoderModel.from_model(model), windows)).values():
        for name, stats in one.stats.items():
            if "experts" in name:
                seen.append(stats.n_tokens)
                if not stats.n_tokens:
                    assert not stats.weight_grad_sq.any() and not stats.weight_grad_abs.any()
    assert 0 in seen and max(seen) > 0
    assert sum(seen) == 2 * 4 * 2 * 2, "layers, tokens, experts per token, linears"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_gradients_are_close_and_do_not_vanish(deep, dtype):
    windows = tiny_models.windows(3)
    exact = layers(walk(DecoderModel.open(deep), windows))
    rounded = layers(walk(DecoderModel.open(deep, dtype=dtype), windows))
    for index in exact:
        for name, stats in exact[index].stats.items():
            a, b = stats.weight_grad_sq.sqrt().flatten(), rounded[index].stats[name].weight_grad_sq.sqrt().flatten()
            assert torch.nn.functional.cosine_similarity(a, b, dim=0) > (0.98 if dtype == "bfloat16" else 0.999)
            assert b.norm() == pytest.approx(a.norm().item(), rel=0.1)


def test_a_loss_that_is_not_finite_is_an_input_error():
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(InputError, match=r"loss of calibration sequence 0 is nan.*--dtype float32"):
        walk(DecoderModel.from_model(model), tiny_models.windows(2))
