from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_folders import sharded, tensors, write_folder
from nmprune.checkpoint import Checkpoint, apply_mask, writer
from nmprune.checkpoint.writer import write_checkpoint
from nmprune.errors import InputError
from nmprune.masks import from_scores
from nmprune.pattern import Pattern

NAME = "layers.0.q.weight"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    folder = sharded(tmp_path / "base")
    config = {"model_type": "llama", "quantization_config": {"bits": 4}, "dtype": "bfloat16", "title": "Größe"}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def halve(name: str, tensor: Tensor) -> Tensor:
    return tensor / 2


def unchanged(name: str, tensor: Tensor) -> None:
    return None


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_replaces_what_was_asked_and_copies_the_rest(base: Checkpoint, tmp_path: Path) -> None:
    offered = []

    def replace(name: str, tensor: Tensor) -> Tensor:
        offered.append(name)
        return tensor.mul_(2)

    write_checkpoint(base, tmp_path / "out", replace, [NAME], {"nmprune": {"pattern": "2 kept of 4"}})
    written = Checkpoint.open(tmp_path / "out")
    assert offered == [NAME]
    assert written.shards == base.shards
    assert [(i.name, i.dtype, i.shape, i.shard) for i in written.tensors.values()] == [
        (i.name, i.dtype, i.shape, i.shard) for i in base.tensors.values()
    ]
    for name, tensor in tensors().items():
        assert torch.equal(written.read(name), tensor * 2 if name == NAME else tensor)
    assert all(metadata["format"] == "pt" for metadata in written.metadata.values())
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base.folder / index).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_config_is_merged_and_loses_its_quantisation(base: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(base, tmp_path / "out", unchanged, [], {"nmprune": {"version": "1"}, "dtype": "float32"})
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    expected = {"model_type": "llama", "dtype": "float32", "title": "Größe", "nmprune": {"version": "1"}}
    assert json.loads(text) == expected
    assert list(json.loads(text)) == list(expected)  # the base's order, new keys last


def test_none_keeps_the_bytes_even_where_the_offered_tensor_was_changed(base: Checkpoint, tmp_path: Path) -> None:
    def spoil(name: str, tensor: Tensor) -> None:
        tensor.zero_()

    write_checkpoint(base, tmp_path / "out", spoil, [NAME], {})
    assert torch.equal(Checkpoint.open(tmp_path / "out").read(NAME), tensors()[NAME])


def test_unmasked_bits_survive_copying(tmp_path: Path) -> None:
    odd = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, -1], dtype=torch.int32).view(torch.float32)
    base = Checkpoint.open(write_folder(tmp_path / "base", {"model.safetensors": {"w": odd, "v": odd.clone()}}))
    write_checkpoint(base, tmp_path / "out", lambda name, tensor: tensor, ["v"], {})
    for name in ("w", "v"):
        assert torch.equal(Checkpoint.open(tmp_path / "out").read(name).view(torch.int32), odd.view(torch.int32))


def test_metadata_is_kept_and_format_added(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", {"model.safetensors": {"w": torch.ones(2)}})
    content = (folder / "model.safetensors").read_bytes()
    text = json.dumps(
        {"__metadata__": {"who": "x"}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[-8:])
    write_checkpoint(Checkpoint.open(folder), tmp_path / "out", unchanged, [], {})
    assert Checkpoint.open(tmp_path / "out").metadata["model.safetensors"] == {"format": "pt", "who": "x"}


def test_side_files(base: Checkpoint, tmp_path: Path) -> None:
    wanted = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"]
    wanted += ["LICENSE", "LICENSE.md", "modeling_x.py", "qwen.tiktoken"]
    unwanted = [
        "README.md",
        ".hidden.json",
        "pytorch_model.bin",
        "x.pt",
        "x.pth",
        "x.gguf",
        "x.h5",
        "x.msgpack",
        "x.onnx",
    ]
    unwanted += [
        "other.safetensors",
        "pytorch_model.bin.index.json",
        "readme.txt",
        "picture.png",
        "events.out.tfevents.1",
    ]
    for name in wanted + unwanted:
        (base.folder / name).write_bytes(name.encode())
    (base.folder / "sub").mkdir()
    (base.folder / "sub" / "more.json").write_text("{}")
    write_checkpoint(base, tmp_path / "out", unchanged, [], {})
    weights = [*base.shards, "model.safetensors.index.json", "config.json"]
    assert sorted(contents(tmp_path / "out")) == sorted(wanted + weights)
    for name in wanted:
        assert (tmp_path / "out" / name).read_bytes() == name.encode()


def test_equal_input_gives_equal_bytes(base: Checkpoint, tmp_path: Path) -> None:
    for out in ("a", "b"):
        write_checkpoint(base, tmp_path / out, halve, [NAME], {"nmprune": {"x": 1}})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_progress_adds_up(base: Checkpoint, tmp_path: Path) -> None:
    steps: list[int] = []
    write_checkpoint(base, tmp_path / "out", halve, [NAME], {}, steps.append)
    assert sum(steps) == base.nbytes


@pytest.mark.parametrize("wrong", [lambda t: t.float(), lambda t: t[:-1], lambda t: t.T])
def test_replacement_of_another_shape_or_dtype_is_our_bug(base: Checkpoint, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"replacement of {NAME} is .* the checkpoint has torch.bfloat16 \(6, 8\)"):
        write_checkpoint(base, tmp_path / "out", lambda name, tensor: wrong(tensor), [NAME], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_transposed_replacement_is_written_as_its_shape_says(base: Checkpoint, tmp_path: Path) -> None:
    new = torch.arange(48, dtype=torch.bfloat16).reshape(8, 6).T
    write_checkpoint(base, tmp_path / "out", lambda name, tensor: new, [NAME], {})
    assert torch.equal(Checkpoint.open(tmp_path / "out").read(NAME), new)


def test_existing_out_is_left_alone(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="out: exists already and is left alone"):
        write_checkpoint(base, tmp_path / "out", unchanged, [], {})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_left_over_partial_is_removed(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "junk.json").write_text("{}")
    write_checkpoint(base, tmp_path / "out", unchanged, [], {})
    assert "junk.json" not in contents(tmp_path / "out")


def test_unknown_name_is_refused_before_anything_is_written(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensor named 'ghost'"):
        write_checkpoint(base, tmp_path / "out", halve, ["ghost"], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_too_little_room_is_seen_beforehand(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes and .* has 10 free"):
        write_checkpoint(base, tmp_path / "out", unchanged, [], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "no folder can be made there"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_disk_that_refuses(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=rf"out: cannot be written: .*{words}.* needs [\d,]+ bytes; nothing was kept"):
        write_checkpoint(base, tmp_path / "out", unchanged, [], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_name_that_is_too_long(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be looked at: the name is too long\. Choose another place"):
        write_checkpoint(base, tmp_path / ("x" * 300), unchanged, [], {})


def test_a_reader_that_goes_away_is_not_the_disk(base: Checkpoint, tmp_path: Path) -> None:
    def gone(n_bytes: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        write_checkpoint(base, tmp_path / "out", unchanged, [], {}, gone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_out_below_a_file(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a part of the path is a file"):
        write_checkpoint(base, tmp_path / "file" / "out", unchanged, [], {})


def test_disk_that_lies_is_caught(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writer.flush_file

    def flip_last_bit(stream: Any) -> None:
        real(stream)
        if stream.name.endswith("00002.safetensors"):
            with Path(stream.name).open("r+b") as again:
                again.seek(-1, 2)
                last = again.read(1)[0]
                again.seek(-1, 2)
                again.write(bytes([last ^ 1]))

    monkeypatch.setattr(writer, "flush_file", flip_last_bit)
    with pytest.raises(InputError, match=r"00002\.safetensors: reading it back gives other bytes"):
        write_checkpoint(base, tmp_path / "out", unchanged, [], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_interrupted_write_leaves_nothing(base: Checkpoint, tmp_path: Path) -> None:
    def interrupt(name: str, tensor: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(base, tmp_path / "out", interrupt, [NAME], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_result_loads_in_plain_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = Checkpoint.open(tmp_path / "base")
    assert len(base.shards) > 1
    names = [name for name in base.names() if name.endswith("proj.weight")]
    masks = {name: from_scores(base.read(name).float().abs(), Pattern(2, 4)) for name in names}
    key = {"pattern": "2 kept of 4"}
    write_checkpoint(
        base, tmp_path / "out", lambda name, tensor: apply_mask(tensor, masks[name]), names, {"nmprune": key}
    )
    model, loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded.values()), loaded
    state = model.state_dict()
    for name in base.names():
        expected = apply_mask(base.read(name), masks[name]) if name in masks else base.read(name)
        assert torch.equal(state[name], expected)
    assert model.config.nmprune == key
