"""Models and calibrations that cannot be used: one InputError each, and nothing left that looks whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

import tiny_models
from nmprune import InputError, Pattern, masks
from runs import looks_whole, prune


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "base", max_shard_size="40KB")


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Prunes and gives the text of the InputError; nothing that looks whole may be left."""

    def refuse(model: Path, **kwargs) -> str:
        out = tmp_path / "run"
        with pytest.raises(InputError) as error:
            prune(model, out, **kwargs)
        assert not looks_whole(out)
        return str(error.value)

    return refuse


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file({**tensors, name: change(tensors[name])}, file, metadata={"format": "pt"})


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


# -- what the config says ---------------------------------------------------------------------------------------------


def test_quantised(model, refused):
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    text = refused(model)
    assert "is quantised already (gptq)" in text and "start from the fp16 or bf16 checkpoint" in text


@pytest.mark.parametrize("key", ["nmprune", "sparsity_config"])
def test_sparse_by_its_config(key, model, refused, tmp_path):
    edit_config(model, **{key: {"pattern": "2 kept of 4"}})
    text = refused(model)
    assert "is sparse already: its config.json says so" in text and "--allow-sparse" in text
    prune(model, tmp_path / "run", allow_sparse=True)


def test_our_own_result_is_not_pruned_again(model, refused, tmp_path):
    prune(model, tmp_path / "first")
    assert "is sparse already" in refused(tmp_path / "first/model")


def test_sparse_by_its_zeros_without_a_word_in_the_config(refused, tmp_path):
    model = tiny_models.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(masks.from_scores(torch.rand_like(parameter), Pattern(2, 4)))
    model.save_pretrained(tmp_path / "theirs")
    text = refused(tmp_path / "theirs")
    assert "theirs is sparse already: 7 of 7 linears of its first decoder layer" in text and "--allow-sparse" in text
    prune(tmp_path / "theirs", tmp_path / "run", allow_sparse=True)


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 96,
}


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_encoder(kind, refused, tmp_path):
    kind(BertConfig(**_SMALL)).save_pretrained(tmp_path / "bert")
    text = refused(tmp_path / "bert")
    assert f"is a bert model ({kind.__name__}), not a decoder-only language model" in text


def test_encoder_decoder(refused, tmp_path):
    config = T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=96, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert "is a t5 model (T5ForConditionalGeneration), not a decoder-only language model" in refused(tmp_path / "t5")


def test_a_decoder_without_a_table(model, refused):
    edit_config(model, model_type="bloom", architectures=["BloomForCausalLM"])
    text = refused(model)
    assert "model_type 'bloom' has no table of decoder layers and linears" in text and "CONTRIBUTING.md" in text


def test_a_model_type_that_nobody_knows(model, refused):
    edit_config(model, model_type="lamma")
    text = refused(model)
    assert "config.json cannot be used" in text and "lamma" in text


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_attention_heads": 5}, {"hidden_act": "swish9"}],
)
def test_numbers_that_make_no_model(changes, model, refused):
    edit_config(model, **changes)
    assert "config.json" in refused(model)


def test_remote_code_is_not_run(model, refused, tmp_path):
    (model / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(
        model, model_type="theirs", auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    )
    assert "config.json cannot be used" in refused(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", '"llama"'])
def test_a_config_that_is_no_json_object(text, model, refused):
    (model / "config.json").write_text(text)
    assert "config.json" in refused(model)


# -- what the folder holds --------------------------------------------------------------------------------------------


def test_no_folder(refused, tmp_path):
    assert "no such folder" in refused(tmp_path / "absent")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json, so this is no Hugging Face model folder" in refused(tmp_path / "empty")


def test_a_file_instead_of_a_folder(model, refused):
    text = refused(model / "config.json")
    assert "config.json: a file. Give the folder that holds config.json" in text


def test_no_weights(model, refused):
    for file in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        file.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(model)


def test_pickled_weights_are_not_read(model, refused):
    for file in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "we never unpickle" in refused(model)


def test_a_missing_shard(model, refused):
    gone = shards(model)[1]
    gone.unlink()
    assert f"names {gone.name}, which is absent" in refused(model)


def test_a_truncated_shard(model, refused):
    cut = shards(model)[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    text = refused(model)
    assert f"{cut}: truncated" in text and "Download it again" in text


def test_an_index_that_leads_outside(model, refused):
    first = shards(model)[0]
    first.rename(model.parent / "evil.safetensors")
    file = model / "model.safetensors.index.json"
    file.write_text(file.read_text().replace(first.name, "../evil.safetensors"))
    assert "names the shard '../evil.safetensors'; only plain file names inside" in refused(model)


def test_a_tensor_of_another_shape(model, refused):
    edit_config(model, intermediate_size=128)
    text = refused(model)
    assert "has shape (64, 32); config.json makes" in text or "has shape (32, 64); config.json makes" in text


def test_a_missing_tensor(model, refused):
    edit_config(model, num_hidden_layers=3)
    assert "the checkpoint holds no tensor for model.layers.2." in refused(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_another_kind(dtype, model, refused):
    edit_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.to(dtype))
    assert f"model.layers.1.mlp.up_proj.weight is {dtype}; expected float32" in refused(model)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad, method, model, refused):
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[5, 7] = bad
        return tensor

    edit_tensor(model, "model.layers.1.self_attn.k_proj.weight", spoil)
    text = refused(model, method=method)
    assert text.startswith("model.layers.1.self_attn.k_proj: ") and "NaN or infin" in text


def test_in_features_that_do_not_divide(refused, tmp_path):
    folder = tiny_models.save("llama", tmp_path / "odd", intermediate_size=52)
    text = refused(folder, pattern="4:8")
    assert text.startswith("decoder layer 0, mlp.down_proj: in_features 52 is not a multiple of 8")
    assert "--exclude '*.down_proj'" in text


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (torch.full((2, 8), 96), "token id 96 is not in the vocabulary (0 to 95)"),
        (torch.full((2, 8), -1), "token id -1 is not in the vocabulary"),
        (torch.ones(2, 8), "token ids are torch.float32; expected integers"),
        (torch.ones(8, dtype=torch.int64), "token ids have shape (8,)"),
        (torch.ones(2, 65, dtype=torch.int64), "seq_len 65 is more than the model's 64 positions"),
        (torch.ones(0, 8, dtype=torch.int64), "token ids have shape (0, 8)"),
    ],
)
def test_token_ids(ids, expected, model, refused):
    assert expected in refused(model, calibration=ids)


def test_a_text_that_is_absent(model, refused):
    text = refused(model, calibration="nowhere/text.txt", seq_len=16)
    assert "nowhere/text.txt" in text
    assert "there is no text source 'bultin'. Did you mean 'builtin'" in refused(
        model, calibration="bultin", seq_len=16
    )
