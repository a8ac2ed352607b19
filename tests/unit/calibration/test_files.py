from __future__ import annotations

import json
import sys

import pytest

from nmprune.calibration import load_text
from nmprune.calibration.files import in_data_folder, is_path
from nmprune.errors import InputError


def _load(path, field=""):
    return load_text(f"{path}{field}", "calibration")


def _written(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_txt_is_one_document(tmp_path):
    text = _load(_written(tmp_path / "a.txt", "one\n\ntwo\n"))
    assert text.documents == ("one\n\ntwo\n",)
    assert text.label == "a.txt (all)"


def test_folder_gives_its_txt_files_by_name(tmp_path):
    for name in ("b", "a"):
        _written(tmp_path / f"{name}.txt", name)
    _written(tmp_path / "notes.md", "no")
    assert _load(tmp_path).documents == ("a", "b")


def test_folder_without_txt(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.txt file"):
        _load(tmp_path)


def test_jsonl_gives_a_document_a_line_without_blank_ones(tmp_path):
    path = _written(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": " "}\n{"text": "two\\u2028"}\n')
    assert _load(path).documents == ("one", "two\u2028")


def test_jsonl_with_a_named_field(tmp_path):
    path = _written(tmp_path / "a.jsonl", '{"body": "one"}\n')
    assert _load(path, "#body").documents == ("one",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl, line 2: not JSON"),
        ('["text"]', r"a\.jsonl, line 2: a list; expected an object"),
        ('{"body": "x", "id": 1}', r"line 2: there is no field 'text'; fields: body, id\. Name one with FILE#FIELD"),
        ('{"text": 3}', r"line 2: field 'text' is a int; expected a string"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = _written(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        _load(path)


def test_json_is_a_list_or_lines(tmp_path):
    entries = [{"text": "one"}, {"text": "two"}]
    as_list = _written(tmp_path / "a.json", json.dumps(entries, indent=1))
    as_lines = _written(tmp_path / "b.json", "\n".join(map(json.dumps, entries)))
    assert _load(as_list).documents == _load(as_lines).documents == ("one", "two")


def test_bad_json_lists(tmp_path):
    with pytest.raises(InputError, match=r"a\.json, entry 2: a str; expected an object"):
        _load(_written(tmp_path / "a.json", '[{"text": "one"}, "two"]'))
    with pytest.raises(InputError, match=r"b\.json, line 3: not JSON"):
        _load(_written(tmp_path / "b.json", '[\n{"text": "one"},\n'))


@pytest.fixture
def parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "two"], "title": ["x", "y", "z"]})
    writer.write_table(table, tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def test_parquet(parquet):
    assert _load(parquet).documents == ("one", "two")
    assert _load(parquet, "#title").documents == ("x", "y", "z")
    with pytest.raises(InputError, match=r"a\.parquet: there is no column 'titel'\. Did you mean 'title'"):
        _load(parquet, "#titel")


def test_a_damaged_parquet(parquet):
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file"):
        _load(parquet)


def test_parquet_without_pyarrow(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'nmprune\[data\]'"):
        _load(parquet)


@pytest.mark.parametrize(("name", "shown"), [("a.csv", r"\*\.csv"), ("a", r"\*\.? ?\(no suffix\)")])
def test_a_wrong_suffix(tmp_path, name, shown):
    with pytest.raises(InputError, match=rf"{shown}\. Expected \.txt, \.jsonl, \.json, \.parquet"):
        _load(_written(tmp_path / name, "x"))


def test_a_field_of_a_txt_file(tmp_path):
    with pytest.raises(InputError, match=r"a \.txt file has no field 'body'\. Leave out #body"):
        _load(_written(tmp_path / "a.txt", "x"), "#body")


def test_a_name_with_a_hash_is_a_name_where_it_exists(tmp_path):
    assert _load(_written(tmp_path / "a#b.txt", "x")).documents == ("x",)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_an_empty_file(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: holds no text"):
        _load(_written(tmp_path / name, " \n"))


def test_absent(tmp_path):
    with pytest.raises(InputError, match=r"a\.txt: there is no such file"):
        _load(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_found_by_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=rf"{name}, line 2: byte 0xe9 is not UTF-8"):
        _load(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert _load(tmp_path / "a.txt").documents == ("one",)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a.txt", True), ("a.parquet#x", True), ("no/where", True), ("wiki", False), ("x#y", False)],
)
def test_what_is_meant_as_a_path(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_path(source) == expected


def test_the_data_folder_must_be_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NMPRUNE_DATA", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"\$NMPRUNE_DATA is '.*absent', which is not a folder"):
        in_data_folder("x")
