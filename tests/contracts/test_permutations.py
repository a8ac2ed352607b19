"""Laws of channel permutations for every model family: the model computes the same, in memory and from the disk."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from nmprune.architectures.channels import KINDS
from nmprune.checkpoint import write_checkpoint
from nmprune.stream import DecoderModel
from nmprune.stream.permuted import channels_of, permute


def shuffled(channels, kinds, seed=3):
    """A random permutation of every block of every space of some kinds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.stack([torch.randperm(space.shape[1], generator=generator) for _ in range(space.shape[0])])
        for name, space in channels.spaces.items()
        if space.kind in kinds
    }


def logits(model):
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(input_ids=tiny_models.windows(3)).logits


def permuted(model, kinds):
    """The model, changed in place."""
    decoder = DecoderModel.from_model(model)
    channels = channels_of(decoder)
    permute(decoder, channels, shuffled(channels, kinds))
    return model


VARIANTS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "stablelm": {"qk_layernorm": True, "use_parallel_residual": False, "use_qkv_bias": True},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 4},
    "phi3": {"num_key_value_heads": 1},
    "olmo": {"clip_qkv": 0.5},
    "gpt_neox": {"attention_bias": False, "tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": False, "n_inner": 48, "scale_attn_by_inverse_layer_idx": True},
    "opt": {"do_layer_norm_before": False, "enable_bias": False, "tie_word_embeddings": False},
    "gpt_oss": {"num_key_value_heads": 1},
}
CASES = [(name, {}) for name in tiny_models.CONFIGS] + list(VARIANTS.items())
IDS = [name + ("+" if changes else "") for name, changes in CASES]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_permuted_models_logits_are_the_originals(name, changes, kind):
    expected = logits(tiny_models.build(name, **changes))
    before = tiny_models.build(name, **changes).state_dict()
    model = permuted(tiny_models.build(name, **changes), (kind,))
    assert not all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_read_through_permutations_and_written_it_is_the_same_model(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model", max_shard_size="40KB")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    streamed = DecoderModel.open(folder)
    fingerprint = streamed.checkpoint.fingerprint()
    channels = channels_of(streamed)
    permute(streamed, channels, shuffled(channels, KINDS))
    assert streamed.checkpoint.fingerprint() == fingerprint
    write_checkpoint(streamed.checkpoint, tmp_path / "permuted", lambda name, base: None, (), {})
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "permuted", dtype=torch.float32)
    torch.testing.assert_close(logits(written), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    in_memory = permuted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), KINDS).state_dict()
    for key, value in written.state_dict().items():
        assert torch.equal(value, in_memory[key]), key


@pytest.mark.parametrize("name", ["llama", "opt_projected", "gpt_oss", "mixtral"])
def test_streamed_layers_are_the_permuted_ones(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / "model")
    streamed, whole = DecoderModel.open(folder), DecoderModel.from_model(tiny_models.build(name))
    channels = channels_of(streamed)
    for model in (streamed, whole):
        permute(model, channels, shuffled(channels, KINDS))
    for index in range(streamed.n_layers):
        with streamed.layer(index) as layer:
            for key, value in whole.layers[index].state_dict().items():
                assert torch.equal(layer.state_dict()[key], value), key
    with streamed.embedding():
        rows = streamed.model.get_input_embeddings().weight
        assert torch.equal(rows, whole.model.get_input_embeddings().weight)


def test_pictures_reach_the_permuted_channels_too():
    model = tiny_models.build("gemma3")
    projector = model.model.multi_modal_projector
    features = torch.randn(1, (28 // 14) ** 2, 16, generator=torch.Generator().manual_seed(0))
    decoder = DecoderModel.from_model(model)
    channels = channels_of(decoder)
    moved = shuffled(channels, ("residual",))
    before = features @ projector.mm_input_projection_weight.detach()
    permute(decoder, channels, moved)
    after = features @ projector.mm_input_projection_weight.detach()
    torch.testing.assert_close(after, before[..., moved["residual"][0]])


def test_breaking_the_rule_of_shared_heads_would_be_seen():
    """The tolerance above is tight enough: another order for one head changes the logits by far more."""
    expected = logits(tiny_models.build("llama"))
    model = tiny_models.build("llama")
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.v_proj.weight
        weight.copy_(weight[[1, 0, *range(2, 16)]])
    assert (logits(model) - expected).abs().max() > 1e-3 * expected.abs().max()
