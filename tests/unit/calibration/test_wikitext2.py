from __future__ import annotations

import pytest

from nmprune.calibration import load_text
from nmprune.calibration.wikitext2 import articles, rows_of_raw_file
from nmprune.errors import InputError
from shared_data import shared

RAW = " \n = First = \n \n Some text . \n \n = = Part = = \n \n More . \n \n = Second = \n \n End . \n"
ROWS = ["", " = First = \n", "", " Some text . \n", "", " = = Part = = \n", "", " More . \n", ""]
ROWS += [" = Second = \n", "", " End . \n"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    monkeypatch.setenv("NMPRUNE_DATA", str(tmp_path))
    return folder


def test_rows_are_lines_with_their_end_and_blank_lines_are_empty(tmp_path):
    (tmp_path / "raw").write_text(RAW, encoding="utf-8")
    assert rows_of_raw_file(tmp_path / "raw") == ROWS


def test_rows_are_not_cut_at_other_line_separators_of_unicode(tmp_path):
    (tmp_path / "raw").write_text(" a\u2028b\x85c \n d", encoding="utf-8")
    assert rows_of_raw_file(tmp_path / "raw") == [" a\u2028b\x85c \n", " d"]


def test_articles_join_to_the_corpus_of_the_field():
    found = articles(ROWS)
    assert len(found) == 2
    assert found[1] == " = Second = \n\n\n\n\n End . \n"
    assert "\n\n".join(found) == "\n\n".join(ROWS)


def test_purpose_chooses_the_split(data):
    for split in ("train", "valid", "test"):
        (data / f"wiki.{split}.raw").write_text(f" {split} \n", encoding="utf-8")
    splits = {purpose: load_text("wikitext2", purpose).split for purpose in ("calibration", "choose", "evaluation")}
    assert splits == {"calibration": "train", "choose": "validation", "evaluation": "test"}
    assert load_text("wikitext2", "calibration").joined == " train \n"


def test_calibration_falls_to_validation_and_says_so(data):
    (data / "wiki.valid.raw").write_text(RAW, encoding="utf-8")
    (data / "wiki.test.raw").write_text("test", encoding="utf-8")
    assert load_text("wikitext2", "calibration").label == "wikitext2 (validation)"


def test_a_named_split_is_taken_whatever_the_purpose(data):
    (data / "wiki.valid.raw").write_text(RAW, encoding="utf-8")
    assert load_text("wikitext2:validation", "evaluation").split == "validation"


def test_an_unknown_split_names_the_near_one():
    with pytest.raises(InputError, match=r"no split 'valdation'\. Did you mean 'validation'"):
        load_text("wikitext2:valdation", "evaluation")


@pytest.mark.usefixtures("unreachable_hub")
def test_absent_everywhere_says_how_to_get_it(data):
    with pytest.raises(InputError) as caught:
        load_text("wikitext2", "evaluation")
    message = str(caught.value)
    assert message.startswith("wikitext2 (test) was not found: ")
    assert f"{data / 'wiki.test.raw'} is absent" in message
    assert "hub cannot be reached" in message
    assert "put wiki.test.raw of wikitext-2-raw-v1 at $NMPRUNE_DATA/wikitext2/wiki.test.raw" in message
    assert "datasets.load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1')" in message


@pytest.mark.usefixtures("unreachable_hub", "no_data_folder")
def test_absent_everywhere_says_when_the_variable_is_not_set():
    with pytest.raises(InputError, match=r"\$NMPRUNE_DATA is not set"):
        load_text("wikitext2", "evaluation")


@pytest.mark.usefixtures("no_data_folder")
def test_the_hubs_rows_give_the_same_text_as_the_raw_file(data, monkeypatch):
    asked = []

    def fetch(*given, **_):
        asked.append(given)
        return {"text": ROWS}, "test"

    monkeypatch.setattr("nmprune.calibration.hub.fetch", fetch)
    from_hub = load_text("wikitext2", "evaluation")
    monkeypatch.setenv("NMPRUNE_DATA", str(data.parent))
    (data / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    assert load_text("wikitext2", "evaluation") == from_hub
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", ("test",))]


def test_the_real_file_has_the_rows_and_articles_of_the_hub(monkeypatch):
    monkeypatch.setenv("NMPRUNE_DATA", str(shared("data")))
    text = load_text("wikitext2", "evaluation")
    rows = rows_of_raw_file(shared("data/wikitext2/wiki.test.raw"))
    assert len(rows) == 4358
    assert rows[:3] == ["", " = Robert Boulter = \n", ""]
    assert text.joined == "\n\n".join(rows)
    assert 55 < len(text.documents) < 70
