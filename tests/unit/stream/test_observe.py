from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune.stats import StatsAccumulator
from nmprune.stream import DecoderModel
from nmprune.stream.experts import observable_experts
from nmprune.stream.observe import LayerObserver

SQ_NORM, GRAM = frozenset({"input_sq_norm"}), frozenset({"input_gram"})


def observe(name: str, needs: frozenset, wanted=None):
    decoder = DecoderModel.from_model(tiny_models.build(name))
    linears = decoder.module_linears(0)
    wanted = {one.shared_input for one in linears} if wanted is None else wanted
    observer = LayerObserver(decoder.layers[0], decoder.family, linears, wanted, needs, torch.device("cpu"))
    by_hand: dict[str, list[torch.Tensor]] = {}
    handles = [
        decoder.layers[0]
        .get_submodule(one.module)
        .register_forward_pre_hook(lambda m, args, role=one.role: by_hand.setdefault(role, []).append(args[0]))
        for one in linears
        if one.view.expert is None
    ]
    with torch.no_grad(), observable_experts(decoder.config), observer.watching():
        for batch in tiny_models.windows(4).split(2):
            decoder.model(input_ids=batch)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        decoder.model(input_ids=tiny_models.windows(1))  # after the body: must not count
    return decoder, linears, observer.results(), by_hand


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "phi3"])
def test_statistics_equal_those_made_by_hand(name):
    _, linears, results, by_hand = observe(name, SQ_NORM | GRAM)
    for one in linears:
        x = torch.cat([inputs.reshape(-1, one.shape[1]) for inputs in by_hand[one.role]]).double()
        stats = results[one.shared_input]
        assert stats.n_tokens == x.shape[0] == 4 * 16
        torch.testing.assert_close(stats.squared_norms(), (x * x).sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.gram().double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_experts_see_the_tokens_that_the_router_sends_them():
    decoder, _, results, _ = observe("mixtral", SQ_NORM)
    experts = {name: stats for name, stats in results.items() if "experts" in name}
    assert len(experts) == 2 * decoder.config.num_local_experts
    for parameter in ("gate_up_proj", "down_proj"):
        tokens = sum(stats.n_tokens for name, stats in experts.items() if parameter in name)
        assert tokens == 4 * 16 * decoder.config.num_experts_per_tok


@pytest.mark.parametrize(("name", "n_expected"), [("llama", 4), ("phi3", 4), ("gpt_neox", 4), ("mixtral", 2 + 4 + 4)])
def test_linears_that_share_an_input_share_an_accumulator(name, n_expected, monkeypatch):
    made = []
    init = StatsAccumulator.__init__

    def counting(self, *args, **kwargs):
        made.append(args)
        init(self, *args, **kwargs)

    monkeypatch.setattr(StatsAccumulator, "__init__", counting)
    observe(name, SQ_NORM)
    assert len(made) == n_expected


def test_only_what_a_method_needs_is_collected():
    _, _, results, _ = observe("llama", SQ_NORM)
    assert all(stats.input_gram is None and stats.input_sq_norm is not None for stats in results.values())
    _, _, results, _ = observe("llama", GRAM)
    assert all(stats.input_gram is not None and stats.input_sq_norm is None for stats in results.values())


def test_only_wanted_inputs_are_collected():
    _, _, results, _ = observe("llama", SQ_NORM, wanted={"mlp.down_proj"})
    assert set(results) == {"mlp.down_proj"}
    _, _, results, _ = observe("mixtral", SQ_NORM, wanted={"mlp.experts.down_proj.2"})
    assert set(results) == {"mlp.experts.down_proj.2"}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_the_dense_model_meets_is_recorded_once_and_not_counted(name):
    decoder = DecoderModel.from_model(tiny_models.build(name))
    linears = decoder.module_linears(0)
    wanted = {one.shared_input for one in linears}
    needs = frozenset({"input_gram", "cross_gram", "held_out_gram"})
    own, dense = tiny_models.windows(2), tiny_models.windows(2, seed=5)

    def observed(*, record_both: bool):
        observer = LayerObserver(decoder.layers[0], decoder.family, linears, wanted, needs, torch.device("cpu"))
        with torch.no_grad(), observable_experts(decoder.config), observer.watching():
            for part, (mine, other) in enumerate(zip(own.split(1), dense.split(1), strict=True)):
                observer.held_out = part == 1
                if part == 0 or record_both:
                    with observer.recording():
                        decoder.model(input_ids=other)
                decoder.model(input_ids=mine)
        return observer.results()

    results = observed(record_both=True)
    attention = next(stats for shared_input, stats in results.items() if "self_attn" in shared_input)
    assert (attention.n_tokens, attention.held_out_tokens) == (2 * 16, 16)
    for shared_input, stats in results.items():
        assert (stats.cross_gram is None) == ("experts" in shared_input)
    assert not torch.allclose(attention.cross_gram, attention.gram(), atol=1e-2)
    down = [stats.n_tokens for shared_input, stats in results.items() if "experts.down_proj" in shared_input]
    assert sum(down) == (2 * 16 * decoder.config.num_experts_per_tok if down else 0), "recorded tokens were counted"
    once = observed(record_both=False)
    assert all(stats.cross_gram is None for stats in once.values()), "an old recording was used again"
