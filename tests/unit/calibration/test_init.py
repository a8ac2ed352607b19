from __future__ import annotations

import pytest

from nmprune.calibration import SOURCES, load_text
from nmprune.errors import InputError


@pytest.mark.parametrize("source", ["wikitxt2", "wikitxt2:test"])
def test_an_unknown_source_names_the_near_one_and_all(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_text(source, "calibration")
    message = str(caught.value)
    assert message.startswith(
        f"there is no text source {source!r}. Did you mean 'wikitext2'? Known: builtin, c4, hf, wikitext2."
    )
    assert ".txt, .jsonl, .json, .parquet, or a folder" in message


def test_an_empty_source():
    with pytest.raises(InputError, match="there is no text source ''"):
        load_text("", "calibration")


def test_a_wrong_purpose_is_a_fault_of_the_caller():
    with pytest.raises(ValueError, match="purpose is 'test'"):
        load_text("builtin", "test")  # type: ignore[arg-type]


def test_a_users_file_is_taken_whole_for_every_purpose(tmp_path):
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    texts = {load_text(str(tmp_path / "a.txt"), purpose) for purpose in ("calibration", "choose", "evaluation")}
    assert len(texts) == 1


def test_every_source_says_how_it_is_written():
    for name, source in SOURCES.items():
        assert source.spelling.startswith(name)
        assert source.summary
