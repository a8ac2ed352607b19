from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from nmprune.checkpoint import Checkpoint, dequantise_gguf
from nmprune.checkpoint.gguf import cache_folder, gguf_config
from nmprune.errors import InputError

HIDDEN, FEED_FORWARD, LAYERS, HEADS = 64, 96, 2, 4

# Third parties: gguf reads through a map it does not close; the SWIG of sentencepiece; slow-tokenizer notices.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:.*SwigPy.*")


def byte_tokens() -> list[str]:
    """The 256 characters that byte-level BPE uses for bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(rest))]


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A 2-layer Llama; the linears in Q8_0, the rest in fp32. Returns the dequantised linears."""
    tokens = ["<|end|>", "<|start|>", *byte_tokens(), "he"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    generator = np.random.default_rng(0)
    kept = {}

    def add(name: str, *shape: int, quantised: bool = False) -> None:
        weight = generator.standard_normal(shape).astype(np.float32)
        if quantised:
            blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            kept[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, weight)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", HIDDEN, HIDDEN, quantised=True)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{part}.weight", FEED_FORWARD, HIDDEN, quantised=True)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD, quantised=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_becomes_a_plain_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_gguf(tmp_path / "tiny.gguf")
    folder = dequantise_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    assert folder.name.startswith("tiny-")
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    checkpoint = Checkpoint.open(folder)
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float32}
    down = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(checkpoint.read(down).numpy(), weights["blk.1.ffn_down.weight"])

    model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values()), loaded
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentence = "he said: Größe 12!"
    assert tokenizer.decode(tokenizer(sentence, add_special_tokens=False).input_ids) == sentence
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    assert model.config.eos_token_id == 0

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # a second conversion would call it
    assert dequantise_gguf(tmp_path / "tiny.gguf", tmp_path / "cache") == folder


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NMPRUNE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "gguf"
    monkeypatch.delenv("NMPRUNE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "nmprune" / "gguf"


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated(tmp_path: Path, share: float) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"tiny\.gguf: the GGUF file is truncated or damaged.*download it again"):
        dequantise_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_no_gguf_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(InputError, match=r"x\.gguf: not a GGUF file: it starts with b'PK"):
        dequantise_gguf(tmp_path / "x.gguf", tmp_path / "cache")
    with pytest.raises(InputError, match=r"y\.gguf: cannot be read"):
        dequantise_gguf(tmp_path / "y.gguf", tmp_path / "cache")


def test_unknown_architecture_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", architecture="nosuch")
    with pytest.raises(InputError, match=r"odd\.gguf: transformers cannot read this GGUF model \(.*nosuch"):
        dequantise_gguf(tmp_path / "odd.gguf", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be kept here .* set NMPRUNE_CACHE"):
        dequantise_gguf(tmp_path / "tiny.gguf", tmp_path / "cache" / "sub")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_its_files_have_the_ordinary_mode(tmp_path: Path, umask: None) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = dequantise_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert (folder / "model.safetensors").is_file()
    assert {mode(file) for file in folder.iterdir()} == {0o640}
    assert mode(folder) == 0o750


def test_a_full_disk_is_told_however_safetensors_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(InputError, match=r"cannot be kept here \(.*No space left on device.* set NMPRUNE_CACHE"):
        dequantise_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_folder_gets_its_name_after_the_files_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        flush(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = dequantise_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert {file.name for file in folder.iterdir()} <= set(events[: events.index("rename")])


def test_the_config_comes_from_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(file)
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        folder = gguf_config(file, cache)
        assert gguf_config(file, cache) == folder
    assert [entry.name for entry in cache.iterdir()] == [folder.name]
    assert [entry.name for entry in folder.iterdir()] == ["config.json"]
    whole = dequantise_gguf(file, cache)
    assert folder.name == f"{whole.name}.config"
    assert gguf_config(file, cache) == whole
    by_header, by_weights = (AutoConfig.from_pretrained(place).to_dict() for place in (folder, whole))
    different = {key for key in by_weights if by_header.get(key) != by_weights[key]}
    assert different <= {"architectures", "transformers_version", "_name_or_path"}


def test_the_config_of_what_is_no_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", architecture="nosuch")
    with pytest.raises(InputError, match=r"odd\.gguf: transformers cannot read this GGUF model \(.*nosuch"):
        gguf_config(tmp_path / "odd.gguf", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(InputError, match=r"y\.gguf: cannot be read"):
        gguf_config(tmp_path / "y.gguf", tmp_path / "cache")
