"""Tokens that count more or less: from weights per linear and block of rows to statistics, masks and records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import tiny_models
from nmprune import masks
from nmprune.methods import PerLinear, Pruned, create
from nmprune.refine import Chain, Reconstruct
from nmprune.stats import InputStats, StatsAccumulator
from nmprune.stream import DecoderModel, select
from nmprune.stream.per_linear import prune_linear, statistics_keys, weightings
from walks import PATTERN, layers_done, pruned, walk

N_SEQUENCES, SEQ_LEN = 5, 16  # in batches of two: the last one is shorter


def windows() -> Tensor:
    return tiny_models.windows(N_SEQUENCES, SEQ_LEN)


def weights_of(model: DecoderModel, n_blocks: int, ones: bool = False):
    """layer -> linear -> (n_sequences, seq_len, n_blocks), far apart, different for each of them; no experts."""
    generator = torch.Generator().manual_seed(5)
    shape = (N_SEQUENCES, SEQ_LEN, n_blocks)
    found = {
        linear.name: torch.ones(shape) if ones else torch.rand(shape, generator=generator).mul(6).exp()
        for selection in select(model, PATTERN)
        for linear in selection.prune
        if linear.in_module.expert is None
    }
    return lambda index: {name: value for name, value in found.items() if f".{index}." in name}


def walked(name="llama", method="wanda", n_blocks=0, ones=False, **kwargs):
    model = tiny_models.build(name)
    weights = weights_of(DecoderModel.from_model(model), n_blocks, ones) if n_blocks else None
    return walk(model, windows(), method, token_weights=weights, **kwargs)


def first_layer_inputs(name="llama") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the dense model's first layer: linear -> (n_sequences, seq_len, in), and its weight (out, in)."""
    model = tiny_models.build(name)
    linears = select(DecoderModel.from_model(model), PATTERN)[0].prune
    inputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    plain = [one.name for one in linears if one.in_module.expert is None]
    for one in plain:
        modules[one].register_forward_pre_hook(lambda m, args, one=one: inputs.update({one: args[0].detach()}))
    with torch.no_grad():
        model(input_ids=windows())
    return inputs, {one: modules[one].weight.detach().clone() for one in plain}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "descent"])
def test_weights_of_one_are_no_weights(method):
    plain, ones = pruned(walked(method=method)), pruned(walked(method=method, n_blocks=1, ones=True))
    assert plain.keys() == ones.keys() and len(plain) == 14
    for name, one in plain.items():
        assert torch.equal(one.mask, ones[name].mask), name
        assert one.weight is None or torch.equal(one.weight, ones[name].weight), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("n_blocks", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_each_block_of_rows_is_pruned_by_its_own_statistics(method, n_blocks, batch_size):
    inputs, dense = first_layer_inputs()
    steps = walked(method=method, n_blocks=n_blocks, options={"batch_size": batch_size})
    given = weights_of(DecoderModel.from_model(tiny_models.build("llama")), n_blocks)(0)
    records = {one.name: one for one in layers_done(steps)[0].linears}
    chosen = create(method)
    assert records.keys() == dense.keys()
    for name, record in records.items():
        expected, lost, total = [], 0.0, 0.0
        for block, rows in enumerate(dense[name].tensor_split(n_blocks)):
            sums = StatsAccumulator(dense[name].shape[1], frozenset({"input_sq_norm", "input_gram"}))
            for part in range(0, N_SEQUENCES, batch_size):  # sequence by sequence as the stream has them
                batch = slice(part, part + batch_size)
                roots = given[name][batch, :, block].sqrt()[..., None]
                sums.add(inputs[name][batch] * roots)
            stats = sums.result()
            own = chosen.prune(rows, stats, PATTERN)
            expected.append(own)
            new = torch.where(own.mask, rows, 0) if own.weight is None else own.weight
            lost += ((new - rows) @ stats.gram() * (new - rows)).sum().item()
            total += (rows @ stats.gram() * rows).sum().item()
        assert torch.equal(record.pruned.mask, torch.cat([one.mask for one in expected])), name
        if method == "sparsegpt":
            torch.testing.assert_close(record.pruned.weight, torch.cat([one.weight for one in expected]))
            assert record.output_error == pytest.approx(lost / total, rel=1e-4)
        assert record.n_tokens == N_SEQUENCES * SEQ_LEN
        assert record.pruned.notes.get("row_blocks") == (None if n_blocks == 1 else 2)
    plain = pruned(walked(method=method))
    assert any(not torch.equal(plain[name].mask, record.pruned.mask) for name, record in records.items())


def test_batches_change_nothing():
    one, other = (pruned(walked(n_blocks=2, options={"batch_size": size})) for size in (1, 2))
    assert all(torch.equal(one[name].mask, other[name].mask) for name in one)


def test_held_out_sequences_have_weights_of_their_own():
    """The held-out sequence is the last, in a batch of its own: the first batch's weights must not be used for it."""
    inputs, _ = first_layer_inputs()
    name = "model.layers.0.mlp.up_proj"
    seen: dict[str, InputStats] = {}

    class Watching(type(create("wanda"))):
        needs: ClassVar = frozenset({"input_gram", "held_out_gram"})

        def prune(self, weight, stats, pattern):
            seen.setdefault(f"{len(seen)}", stats)
            return super().prune(weight, stats, pattern)

    steps = walked(method=Watching(), n_blocks=1, options={"n_held_out": 1})
    order = [one.name for one in layers_done(steps)[0].linears]
    weights = weights_of(DecoderModel.from_model(tiny_models.build("llama")), 1)(0)[name][..., 0]
    rows = (inputs[name] * weights.sqrt()[..., None]).double()
    found = seen[str(order.index(name))]
    for gram, part in ((found.gram(), rows), (found.held_out_gram, rows[-1:])):
        flat = part.reshape(-1, part.shape[-1])
        torch.testing.assert_close(gram.double(), flat.T @ flat, rtol=1e-4, atol=1e-3 * gram.max().item())


def test_experts_are_left_unweighted():
    plain = walked("mixtral", "sparsegpt", options={"propagate": "dense"})
    weighted = walked("mixtral", "sparsegpt", n_blocks=2, options={"propagate": "dense"})
    one, other = pruned(plain), pruned(weighted)
    experts = [name for name in one if ".experts." in name]
    assert experts and len(experts) < len(one)
    assert all(torch.equal(one[name].mask, other[name].mask) for name in experts)
    assert all("row_blocks" not in other[name].notes for name in experts)
    rest = set(one) - set(experts)
    assert all(other[name].notes["row_blocks"] == 2 for name in rest)
    assert any(not torch.equal(one[name].mask, other[name].mask) for name in rest)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "qwen2_moe"])
def test_families_that_fuse_or_turn_their_linears(name):
    ones, plain = pruned(walked(name, n_blocks=2, ones=True)), pruned(walked(name))
    assert ones.keys() == plain.keys()
    assert all(torch.equal(ones[key].mask, plain[key].mask) for key in plain)


def test_one_input_at_a_time_is_weighted_alike():
    """The first input of the first layer is met before anything is pruned."""
    options = {"true_sequential": True}
    one, other = pruned(walked(n_blocks=2)), pruned(walked(n_blocks=2, options=options))
    for role in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{role}"
        assert torch.equal(one[name].mask, other[name].mask)


def test_names_of_statistics():
    model = DecoderModel.from_model(tiny_models.build("llama"))
    linears = {one.name.rpartition(".")[2]: one for one in select(model, PATTERN)[0].prune}
    weights = {
        linears["q_proj"].name: torch.rand(3, 4, 2),
        linears["v_proj"].name: torch.rand(3, 4, 1),
    }
    assert statistics_keys(linears["q_proj"], weights) == [f"{linears['q_proj'].name}:{block}" for block in (0, 1)]
    assert statistics_keys(linears["o_proj"], weights) == [linears["o_proj"].shared_input]
    found = weightings(linears.values(), weights)
    assert list(found) == [linears["q_proj"].shared_input]
    of_input = found[linears["q_proj"].shared_input]
    assert len(of_input) == 3
    assert torch.equal(of_input[f"{linears['q_proj'].name}:1"], weights[linears["q_proj"].name][..., 1])


@dataclass(frozen=True)
class _MovesSome(PerLinear):
    """Moves weights only where the tokens say so, as a guard does."""

    name: ClassVar[str] = "moves_some"
    needs: ClassVar = frozenset({"input_sq_norm"})
    updates_weights: ClassVar[bool] = True

    def prune(self, weight: Tensor, stats: InputStats, pattern):
        mask = masks.from_scores(weight.abs(), pattern)
        moved = stats.squared_norms().sum() > 50
        return Pruned(mask, 2 * weight * mask if moved else None, {"moved": int(moved), "word": f"{int(moved)}"})


def test_a_block_whose_weights_stay_keeps_them_beside_one_whose_weights_move():
    model = DecoderModel.from_model(tiny_models.build("llama"))
    linear = select(model, PATTERN)[0].prune[0]
    weight = torch.randn(linear.shape, generator=torch.Generator().manual_seed(0))
    width = linear.shape[1]

    def done(*norms: float):
        stats = [InputStats(3, input_sq_norm=torch.full((width,), norm / width)) for norm in norms]
        return prune_linear(model, linear, weight, stats, _MovesSome(), PATTERN, 0).pruned

    half = linear.shape[0] // 2
    mixed = done(1, 100)
    torch.testing.assert_close(mixed.weight[:half] * mixed.mask[:half], weight[:half] * mixed.mask[:half])
    torch.testing.assert_close(mixed.weight[half:], 2 * weight[half:] * mixed.mask[half:])
    assert mixed.notes == {"row_blocks": 2, "moved": 0.5, "word": "0"}
    assert torch.equal(mixed.mask, masks.from_scores(weight.abs(), PATTERN))
    assert done(1, 1).weight is None
    assert done(1).notes == {"moved": 0, "word": "0"}


def test_reconstruct_goes_with_blocks():
    method = Chain(create("wanda"), reconstruct=Reconstruct(ridge=0.1))
    steps = walked(method=method, n_blocks=4, options={"n_held_out": 2})
    for done in layers_done(steps):
        for one in done.linears:
            assert 0 <= one.pruned.notes["reconstruct_taken"] <= 1
            assert one.pruned.weight is None or one.pruned.weight.shape == one.pruned.mask.shape
            assert 0 < one.output_error < 1 and 0 < one.held_out_error < 1
