from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmprune.checkpoint.header import read_header
from nmprune.checkpoint.permutation_file import PermutationFile, read_permutation, write_permutation
from nmprune.errors import InputError
from nmprune.results import PermutationResult


def result(name, kind="ffn", taken=1, blocks=1):
    return PermutationResult(name, kind, 0, 1, 0.8, 0.9 if taken else 0.8, taken, blocks)


@pytest.fixture
def sample():
    permutations = {"b": torch.tensor([[2, 0, 1, 3], [0, 1, 2, 3]]), "a": torch.tensor([[1, 0]])}
    results = (result("b", blocks=2), result("a", "heads"), result("c", "heads", taken=0))
    return PermutationFile(permutations, results, ("ffn", "heads"), "2:4", "a/b", "ab" * 32, "0.1.0")


def test_what_is_written_is_read_back(sample, tmp_path):
    path = tmp_path / "permutation.safetensors"
    write_permutation(path, sample)
    back = read_permutation(path)
    assert replace(back, permutations={}) == replace(sample, permutations={})
    assert {name: one.tolist() for name, one in back.permutations.items()} == {
        name: one.tolist() for name, one in sample.permutations.items()
    }
    assert all(one.dtype == torch.int64 for one in back.permutations.values())
    assert back.moved == ("ffn", "heads")
    assert {name: one.dtype for name, one in load_file(path).items()} == {"a": torch.int32, "b": torch.int32}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_equal_permutations_give_equal_bytes(sample, tmp_path):
    other = replace(sample, permutations=dict(reversed(sample.permutations.items())))
    write_permutation(tmp_path / "one", sample)
    write_permutation(tmp_path / "other", other)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_nothing_taken_is_a_file_without_tensors(sample, tmp_path):
    write_permutation(tmp_path / "p", replace(sample, permutations={}, results=(result("c", taken=0),)))
    back = read_permutation(tmp_path / "p")
    assert (back.permutations, back.moved) == ({}, ())


def changed(path, sample, tensors=None, **metadata):
    write_permutation(path, sample)
    kept = dict(read_header(path).metadata) | metadata
    stored = load_file(path) | (tensors or {})
    save_file(stored, path, {key: value for key, value in kept.items() if value is not None})


@pytest.mark.parametrize(
    "rows", [[[1, 1]], [[0, 2]], [[-1, 0]]], ids=["a channel twice", "a channel past the end", "before the first"]
)
def test_what_is_no_permutation_is_refused(rows, sample, tmp_path):
    changed(tmp_path / "p", sample, {"a": torch.tensor(rows, dtype=torch.int32)})
    with pytest.raises(InputError, match="p: a is no permutation: a channel occurs twice or not at all"):
        read_permutation(tmp_path / "p")


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": "nmprune-masks"}, "no permutation file: its metadata says format 'nmprune-masks'"),
        ({}, {"format_version": "2"}, "permutation format version '2'; this nmprune reads version 1"),
        ({}, {"results": "{"}, "its metadata cannot be read"),
        ({}, {"results": '[{"name": "a"}]'}, "its metadata cannot be read"),
        ({}, {"pattern": None}, "its metadata cannot be read"),
        ({"c": torch.zeros(1, 1, dtype=torch.int32)}, {}, "1 spaces are only in the metadata .* such as c"),
        ({"a": torch.zeros(1, 1)}, {}, r"a is F32 \(1, 1\), expected I32 of two axes"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, {}, "expected I32 of two axes"),
    ],
)
def test_damaged_files_are_refused(tensors, metadata, message, sample, tmp_path):
    changed(tmp_path / "p", sample, tensors, **metadata)
    with pytest.raises(InputError, match=message):
        read_permutation(tmp_path / "p")


def test_a_tensor_that_is_missing_is_seen(sample, tmp_path):
    results = json.dumps([{**vars(one)} for one in (*sample.results, result("d"))])
    changed(tmp_path / "p", sample, results=results)
    with pytest.raises(InputError, match="such as d"):
        read_permutation(tmp_path / "p")
