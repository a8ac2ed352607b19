from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from checkpoint_folders import sharded, tensors, write_folder, write_index
from nmprune.checkpoint import Checkpoint
from nmprune.errors import InputError

SINGLE = "model.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "single", {SINGLE: tensors()}, config={"model_type": "llama", "hidden_size": 8})


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    for word in words:
        assert word in str(caught.value)


def put_header(file: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_reads_every_tensor_of_a_single_file(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    assert checkpoint.shards == (SINGLE,)
    assert checkpoint.config["hidden_size"] == 8
    expected = tensors()
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read, tensor)
        assert checkpoint.shapes()[name] == tuple(tensor.shape)
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in expected.values())


def test_reads_shards_and_knows_where_tensors_lie(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path / "m"))
    assert checkpoint.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    info = checkpoint.info("layers.0.up.weight")
    assert (info.shard, info.dtype_name, info.shape, info.nbytes) == (checkpoint.shards[1], "F16", (4, 12), 96)
    assert torch.equal(checkpoint.read("layers.0.up.weight"), tensors()["layers.0.up.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ],
)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (3 * 8 * dtype.itemsize,), generator=generator)
    tensor = raw.to(torch.uint8).view(dtype).reshape(3, 8)  # NaN payloads and -0.0 among the floats
    read = Checkpoint.open(write_folder(tmp_path / "m", {SINGLE: {"w": tensor}})).read("w")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_what_is_read_is_the_readers_own(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    checkpoint.read("embed.weight").zero_()
    assert torch.equal(checkpoint.read("embed.weight"), tensors()["embed.weight"])


def test_chunks_are_the_bytes(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    pieces = [bytes(piece) for piece in checkpoint.chunks("embed.weight", chunk_bytes=64)]
    assert [len(piece) for piece in pieces] == [64, 64, 64, 64, 64]
    assert b"".join(pieces) == tensors()["embed.weight"].numpy().tobytes()
    assert list(checkpoint.chunks("layers.0.none")) == []


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    size = 4 << 20
    folder = write_folder(
        tmp_path / "m", {SINGLE: {f"w{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(16)}}
    )
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("w0")
    before = psutil.Process().memory_info().rss
    for name in checkpoint.names():
        assert int(checkpoint.read(name)[-1]) == int(name[1:])
        assert psutil.Process().memory_info().rss - before < 5 * size  # a map of the file would reach 16 of them


def test_unknown_tensor_names_near_matches(single: Path) -> None:
    with pytest.raises(
        InputError, match=r"no tensor named 'layers\.0\.q\.weigth'.*Did you mean 'layers\.0\.q\.weight'"
    ):
        Checkpoint.open(single).read("layers.0.q.weigth")


def test_tensors_that_the_index_forgot_belong_to_the_model(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    write_index(folder, {"embed.weight": "model-00001-of-00002.safetensors"})
    names = Checkpoint.open(folder).names()
    assert "layers.0.q.weight" in names
    assert "layers.0.up.weight" not in names  # its shard is not named


def test_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    base = Checkpoint.open(write_folder(tmp_path / "a", {SINGLE: tensors()})).fingerprint()
    assert len(base) == 64
    # neither config nor sharding is part of it
    assert Checkpoint.open(write_folder(tmp_path / "b", {SINGLE: tensors()}, config={"x": 1})).fingerprint() == base
    assert Checkpoint.open(sharded(tmp_path / "c")).fingerprint() == base
    changed = tensors()
    changed["layers.0.up.weight"][-1, -1] += 1
    renamed = {name.replace("up", "down"): t for name, t in tensors().items()}
    reshaped = tensors() | {"layers.0.norm.weight": torch.ones(2, 4)}
    for i, other in enumerate((changed, renamed, reshaped)):
        assert Checkpoint.open(write_folder(tmp_path / f"d{i}", {SINGLE: other})).fingerprint() != base


# -- folders that cannot be read ---------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    refuses(tmp_path / "absent", "absent: no such folder", "Hugging Face folder")


def test_no_config_hints_at_a_run_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "run" / "model", {SINGLE: tensors()})
    refuses(tmp_path / "run", "no config.json", f"Did you mean {tmp_path / 'run' / 'model'}?")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": NaN'])
def test_config_that_is_no_json_object(single: Path, text: str) -> None:
    (single / "config.json").write_text(text)
    refuses(single, "config.json")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", ("pytorch_model.bin", "we never unpickle", "save_pretrained")),
        ("model.gguf", ("a GGUF file", "Pass the file itself", "model.gguf")),
        ("weights.safetensors", ("weights.safetensors", "name a single file model.safetensors")),
        ("vocab.txt", ("only config.json, vocab.txt", "Download the weights")),
    ],
)
def test_no_safetensors_says_what_was_found(single: Path, name: str, words: tuple[str, ...]) -> None:
    (single / SINGLE).rename(single / name)
    refuses(single, "neither model.safetensors nor model.safetensors.index.json", *words)


@pytest.mark.parametrize("cut", [1, 100, 400])
def test_truncated_file(single: Path, cut: int) -> None:
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:-cut])
    refuses(single, "model.safetensors: truncated", f"{len(content) - cut:,} bytes, expected {len(content):,}")


def test_file_longer_than_its_header(single: Path) -> None:
    with (single / SINGLE).open("ab") as stream:
        stream.write(b"\0")
    refuses(single, "longer than its header says")


@pytest.mark.parametrize("content", [b"", b"\x01\x02", (10**15).to_bytes(8, "little") + b"{}", bytes(8) + b"{}"])
def test_header_length_that_cannot_be(single: Path, content: bytes) -> None:
    (single / SINGLE).write_bytes(content)
    refuses(single, "model.safetensors: the header should take", "truncated or no safetensors file")


def test_git_lfs_pointer(single: Path) -> None:
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses(single, "git-lfs pointer", "git lfs pull")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json", "not valid JSON"),
        (b'{"a":' * 2000, "not valid JSON"),
        ([], "a JSON list"),
        ({"__metadata__": {"format": 1}}, "__metadata__"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "lacks dtype, shape or data_offsets"),
        ({"w": 3}, "lacks dtype, shape or data_offsets"),
        ({"w": {**F32, "shape": [-2]}}, "whole numbers >= 0"),
        ({"w": {**F32, "shape": [True, 2]}}, "whole numbers >= 0"),
        ({"w": {**F32, "dtype": "Q4_0"}}, "dtype 'Q4_0'"),
        ({"w": {**F32, "dtype": ["F32"]}}, "dtype ['F32']"),
        ({"w": {**F32, "shape": [3]}}, "needs 12 bytes, its offsets 0..8 give 8"),
        ({"w": {**F32, "data_offsets": [4, 12]}}, "overlap or leave a hole"),
        ({"v": F32, "w": F32}, "overlap or leave a hole"),
        (
            b'{"w":' + json.dumps(F32).encode() + b',"w":' + json.dumps(F32).encode() + b"}",
            "lists the tensor 'w' twice",
        ),
    ],
)
def test_header_that_contradicts_itself(single: Path, header: object, words: str) -> None:
    put_header(single / SINGLE, header, bytes(8))
    refuses(single, "model.safetensors", words)


def test_index_naming_an_absent_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuses(folder, "names model-00002-of-00002.safetensors, which is absent", "the folder holds model-00001")


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "a\0b"]
)
def test_index_naming_a_path(tmp_path: Path, shard: str) -> None:
    folder = sharded(tmp_path / "m")
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    write_index(folder, {"w": shard})
    refuses(folder, repr(shard), "only plain file names inside")


def test_index_naming_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    (folder / "linked.safetensors").symlink_to(tmp_path / "secret.safetensors")
    write_index(folder, {"w": "linked.safetensors"})
    refuses(folder, "linked.safetensors, a link to", "outside", "Copy the file into the folder")


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    real = sharded(tmp_path / "real")
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(real.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert torch.equal(Checkpoint.open(snapshot).read("embed.weight"), tensors()["embed.weight"])


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], {"w": 3}])
def test_index_without_a_usable_weight_map(tmp_path: Path, weight_map: object) -> None:
    folder = sharded(tmp_path / "m")
    write_index(folder, weight_map)
    refuses(folder, "model.safetensors.index.json", "weight_map")


def test_index_promising_what_the_shard_lacks(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for lie in ({"ghost": "model-00001-of-00002.safetensors"}, {"embed.weight": "model-00002-of-00002.safetensors"}):
        write_index(folder, weight_map | lie)
        refuses(folder, f"promises tensor {next(iter(lie))!r}", next(iter(lie.values())), "does not hold it")


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "m",
        {"a.safetensors": {"w": torch.ones(2), "v": torch.ones(2)}, "b.safetensors": {"w": torch.ones(2)}},
    )
    write_index(folder, {"v": "a.safetensors", "w": "b.safetensors"})
    refuses(folder, "tensor 'w' is in a.safetensors and in b.safetensors")


def test_file_that_changed_after_opening(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    last = checkpoint.names()[-1]
    (single / SINGLE).write_bytes((single / SINGLE).read_bytes()[:-1])
    with pytest.raises(InputError, match=f"ends inside tensor '{last}'"):
        checkpoint.read(last)
    (single / SINGLE).unlink()
    with pytest.raises(InputError, match="cannot be read any more"):
        checkpoint.read(last)
