from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tiny_models
from nmprune.errors import InputError
from nmprune.methods import Magnitude, Pruned, SparseGPT, Wanda
from nmprune.stats import InputStats
from nmprune.stream import (
    DecoderModel,
    LayerDone,
    LayerStep,
    Restart,
    StreamOptions,
    default_batch_size,
    prune_layers,
    select,
)
from walks import PATTERN, counted_forwards, layers_done, pruned, walk, wrong_share

N_LAYERS = 3
N_BATCHES = 3  # of 2 sequences


def build(name: str = "llama", **changes):
    return tiny_models.build(name, num_hidden_layers=N_LAYERS, **changes)


def forwards(method: str, **kwargs) -> list[int]:
    """Passes through each layer, of the N_BATCHES batches."""
    decoder = DecoderModel.from_model(build())
    with counted_forwards(decoder.layers) as counts:
        walk(decoder, tiny_models.windows(), method, **kwargs)
        assert all(count % N_BATCHES == 0 for count in counts())
        return [count // N_BATCHES for count in counts()]


def test_a_method_without_needs_runs_no_forward():
    assert forwards("magnitude") == [0, 0, 0]


def test_two_passes_per_layer_and_one_for_the_last():
    assert forwards("wanda") == [2, 2, 1]
    assert forwards("sparsegpt") == [2, 2, 1]


def test_one_pass_per_layer_when_the_dense_layer_feeds_the_next():
    assert forwards("wanda", options={"propagate": "dense"}) == [1, 1, 1]


def test_true_sequential_takes_a_pass_per_shared_input_and_one_more():
    assert forwards("wanda", options={"true_sequential": True}) == [5, 5, 4]


def test_excluded_linears_are_not_observed():
    assert forwards("wanda", options={"true_sequential": True}, exclude=("mlp.*",)) == [3, 3, 2]
    assert forwards("wanda", exclude=("model.layers.1.*",)) == [2, 1, 1]
    assert forwards("wanda", exclude=("model.layers.1.*",), options={"propagate": "dense"}) == [1, 1, 1]


def test_nothing_runs_past_the_last_layer_that_is_pruned():
    assert forwards("wanda", exclude=("model.layers.2.*",)) == [2, 1, 0]
    assert forwards("wanda", exclude=("model.layers.1.*", "model.layers.2.*")) == [1, 0, 0]


def everything(index: int, done: dict[str, Pruned]) -> Callable[[int], dict[str, Pruned] | None]:
    """What a run that stopped before layer `index` can give back."""
    return lambda i: {n: p for n, p in done.items() if n.startswith(f"model.layers.{i}.")} if i < index else None


@pytest.mark.parametrize(("propagate", "expected"), [("pruned", [1, 1, 1]), ("dense", [1, 1, 1])])
def test_finished_layers_are_only_run_on(propagate, expected):
    windows, options = tiny_models.windows(), {"propagate": propagate}
    done = pruned(walk(build(), windows, options=options))
    assert forwards("wanda", finished=everything(2, done), options=options) == expected
    assert forwards("wanda", finished=everything(3, done), options=options) == [1, 1, 0]
    assert forwards("magnitude", finished=everything(2, done)) == [0, 0, 0]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "options", [{}, {"propagate": "dense"}, {"true_sequential": True}], ids=["pruned", "dense", "true_sequential"]
)
@pytest.mark.parametrize("exclude", [(), ("model.layers.1.*",), ("model.layers.2.*",)])
def test_the_steps_of_a_layer_add_up(method, options, exclude):
    windows = tiny_models.windows()
    first = walk(build(), windows, method, options=options, exclude=exclude)
    again = walk(build(), windows, method, options=options, exclude=exclude, finished=everything(1, pruned(first)))
    for steps in (first, again):
        assert [one.index for one in layers_done(steps)] == [0, 1, 2]
        for index in range(N_LAYERS):
            mine = [step for step in steps if isinstance(step, LayerStep) and step.index == index]
            assert [step.done for step in mine] == list(range(1, len(mine) + 1))
            assert all(step.total == len(mine) for step in mine)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "options", [{}, {"propagate": "dense"}, {"true_sequential": True}], ids=["pruned", "dense", "true_sequential"]
)
@pytest.mark.parametrize("keep_hidden", [False, True])
def test_a_resumed_walk_ends_in_the_same_bits(method, options, keep_hidden, tmp_path):
    folder, windows = tmp_path / "model", tiny_models.windows()
    build().save_pretrained(folder)
    whole = walk(DecoderModel.open(folder), windows, method, options=options)
    first = pruned(whole)
    kwargs = {}
    if keep_hidden:
        hidden = layers_done(whole)[1].hidden
        assert hidden is not None
        kwargs["restart"] = Restart(2, hidden)
    decoder = DecoderModel.open(folder)
    rest = walk(decoder, windows, method, options=options, finished=everything(2, first), **kwargs)
    redone = layers_done(rest)
    assert [(one.index, one.reused) for one in redone] == (
        [(2, False)] if keep_hidden else [(0, True), (1, True), (2, False)]
    )
    for name, one in pruned(rest).items():
        assert torch.equal(one.mask, first[name].mask), name
        assert one.weight is None or torch.equal(one.weight, first[name].weight), name


def test_dense_propagation_gives_every_layer_the_dense_models_inputs():
    windows, seen = tiny_models.windows(2), []
    model = build()
    hook = model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    hook.remove()
    done = layers_done(walk(model, windows, options={"propagate": "dense"}))
    torch.testing.assert_close(done[1].hidden, seen[0])
    other = layers_done(walk(build(), windows))
    assert not torch.allclose(other[1].hidden, seen[0])


def test_the_pruned_model_itself_gives_the_hidden_states_that_were_propagated():
    windows, seen = tiny_models.windows(2), []
    model = build()
    done = layers_done(walk(model, windows, "sparsegpt"))
    model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    torch.testing.assert_close(done[1].hidden, seen[0])
    assert done[2].hidden is None


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_batch_size_does_not_change_masks_beyond_rounding(method):
    windows = tiny_models.windows(6)
    runs = [pruned(walk(build(), windows, method, options={"batch_size": size})) for size in (0, 1, 4, 6)]
    assert all(wrong_share(runs[0], other) <= 0.005 for other in runs[1:])


def test_true_sequential_observes_what_earlier_linears_leave():
    windows = tiny_models.windows()
    plain, sequential = (
        pruned(walk(build(), windows, "sparsegpt", options={"true_sequential": flag})) for flag in (False, True)
    )
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(plain[first].weight, sequential[first].weight)
    assert not torch.equal(
        plain["model.layers.0.self_attn.o_proj"].weight, sequential["model.layers.0.self_attn.o_proj"].weight
    )


def test_true_sequential_reaches_all_experts_of_a_kind_together():
    done = layers_done(walk(tiny_models.build("mixtral"), tiny_models.windows(), options={"true_sequential": True}))
    assert all(one.n_tokens > 0 for layer in done for one in layer.linears)


def test_hidden_states_past_the_budget_change_nothing(tmp_path):
    windows = tiny_models.windows()
    in_memory = pruned(walk(build(), windows, "sparsegpt"))
    in_file = pruned(walk(build(), windows, "sparsegpt", options={"hidden_budget": 0}, scratch=tmp_path))
    assert all(torch.equal(one.weight, in_file[name].weight) for name, one in in_memory.items())


def test_experts_with_too_few_tokens_fall_back_to_magnitude_and_say_so():
    windows, least = tiny_models.windows(2), 12
    dense = {n: p.detach().clone() for n, p in tiny_models.build("mixtral").named_parameters()}
    done = layers_done(walk(tiny_models.build("mixtral"), windows, "sparsegpt", options={"min_expert_tokens": least}))
    fallen = [one for layer in done for one in layer.linears if "fallback" in one.pruned.notes]
    kept = [one for layer in done for one in layer.linears if "fallback" not in one.pruned.notes]
    assert fallen and any("experts" in one.name for one in kept)
    for one in fallen:
        assert one.pruned.notes == {"fallback": "magnitude", "fallback_tokens": one.n_tokens}
        assert one.n_tokens < least and one.pruned.weight is None
        parameter, _, expert = one.name.rpartition(".")
        expected = Magnitude().prune(dense[parameter][int(expert)], InputStats(0), PATTERN).mask
        assert torch.equal(one.pruned.mask, expected)
    assert all(one.n_tokens >= least for one in kept if "experts" in one.name)
    exactly = min(one.n_tokens for one in kept if "experts" in one.name)
    again = layers_done(
        walk(tiny_models.build("mixtral"), windows, "sparsegpt", options={"min_expert_tokens": exactly})
    )
    at_the_limit = [one for layer in again for one in layer.linears if one.n_tokens == exactly]
    assert at_the_limit and not any("fallback" in one.pruned.notes for one in at_the_limit)


def test_a_nan_weight_names_its_linear():
    model = build()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = float("nan")
    for method in ("magnitude", "wanda", "sparsegpt"):
        with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\.up_proj: .*NaN"):
            walk(model, tiny_models.windows(), method)


def test_a_method_that_needs_calibration_says_so():
    with pytest.raises(InputError, match="method wanda needs calibration text: it reads input_sq_norm"):
        walk(build(), None)


def test_true_sequential_contradicts_dense_propagation():
    with pytest.raises(InputError, match="needs --propagate pruned"):
        walk(build(), tiny_models.windows(), options={"true_sequential": True, "propagate": "dense"})


def test_a_low_compute_dtype_still_solves_from_the_stored_weights(tmp_path):
    build().save_pretrained(tmp_path)
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}

    class Spy(Wanda):
        def prune(self, weight, stats, pattern):
            seen.setdefault(tuple(weight.shape), []).append(weight)
            return super().prune(weight, stats, pattern)

    walk(DecoderModel.open(tmp_path, dtype="bfloat16"), tiny_models.windows(), Spy())
    dense = build().model.layers[2].mlp.down_proj.weight
    assert torch.equal(seen[tuple(dense.shape)][2], dense)
    assert not torch.equal(dense, dense.bfloat16().float())


def test_moved_weights_are_rounded_to_what_the_checkpoint_stores(tmp_path):
    build(dtype=torch.float16).save_pretrained(tmp_path)
    done = pruned(walk(DecoderModel.open(tmp_path), tiny_models.windows(), "sparsegpt"))
    assert {one.weight.dtype for one in done.values()} == {torch.float16}


def test_moved_weights_that_the_checkpoint_cannot_hold_are_an_error(tmp_path):
    build(dtype=torch.float16).save_pretrained(tmp_path)

    class Huge(SparseGPT):
        def prune(self, weight, stats, pattern):
            done = super().prune(weight, stats, pattern)
            return Pruned(done.mask, done.weight * 1e6, done.notes)

    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj: moved weights up to .* do not fit .*float16"):
        walk(DecoderModel.open(tmp_path), tiny_models.windows(), Huge())


def test_a_method_that_breaks_its_promise_is_our_bug():
    class Broken(Magnitude):
        def prune(self, weight, stats, pattern):
            return Pruned(torch.ones_like(weight, dtype=torch.bool))

    with pytest.raises(RuntimeError, match="not 2 kept of 4"):
        walk(build(), None, Broken())


def test_pruned_entries_become_plus_zero_even_if_a_method_leaves_minus_zero():
    class Minus(SparseGPT):
        def prune(self, weight, stats, pattern):
            done = super().prune(weight, stats, pattern)
            return Pruned(done.mask, torch.where(done.mask, done.weight, -0.0), done.notes)

    model = build()
    walk(model, tiny_models.windows(), Minus())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert not torch.signbit(weight[weight == 0]).any()


def test_the_output_error_is_that_of_the_layers_own_outputs():
    model, windows = tiny_models.build("llama"), tiny_models.windows(2)
    dense, inputs = model.model.layers[0].self_attn.q_proj.weight.detach().clone(), []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=windows)
    hook.remove()
    one = layers_done(walk(model, windows, "sparsegpt"))[0].linears[0]
    x = inputs[0].reshape(-1, dense.shape[1]).double()
    expected = (
        (x @ (one.pruned.weight - dense).double().T).square().sum() / (x @ dense.double().T).square().sum()
    ).item()
    assert one.output_error == pytest.approx(expected, rel=1e-4)
    assert all(one.output_error is None for one in layers_done(walk(tiny_models.build("llama"), windows))[0].linears)


def test_gradients_are_on_again_between_the_steps():
    model = tiny_models.build("llama")
    decoder = DecoderModel.from_model(model)
    steps = prune_layers(decoder, tiny_models.windows(), Wanda(), PATTERN, select(decoder, PATTERN), StreamOptions())
    first = next(step for step in steps if isinstance(step, LayerDone))
    assert torch.is_grad_enabled()
    assert first.hidden is not None and not first.hidden.requires_grad
    steps.close()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_default_batch_is_about_two_thousand_tokens():
    assert [default_batch_size(n) for n in (16, 512, 2048, 4096)] == [128, 4, 1, 1]
