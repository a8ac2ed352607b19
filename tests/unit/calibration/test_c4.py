from __future__ import annotations

import gzip
import json

import pytest

from nmprune.calibration import load_text
from nmprune.errors import InputError


def _lines(count: int) -> str:
    return "".join(json.dumps({"text": f"document {i}", "url": "x"}) + "\n" for i in range(count))


@pytest.fixture
def sample(tmp_path, monkeypatch):
    (tmp_path / "calibration").mkdir()
    monkeypatch.setenv("NMPRUNE_DATA", str(tmp_path))
    path = tmp_path / "calibration" / "c4_sample.jsonl"
    path.write_text(_lines(1480), encoding="utf-8")
    return path


@pytest.mark.usefixtures("sample")
@pytest.mark.parametrize(
    ("purpose", "first", "last"), [("calibration", 0, 999), ("choose", 1000, 1199), ("evaluation", 1200, 1479)]
)
def test_purpose_chooses_documents_by_number(purpose, first, last):
    text = load_text("c4", purpose)
    assert text.documents == tuple(f"document {i}" for i in range(first, last + 1))
    assert text.label == f"c4 sample (documents {first}-{last})"


@pytest.mark.usefixtures("sample")
def test_a_named_part_is_taken_whatever_the_purpose():
    assert load_text("c4:choose", "evaluation").split == "documents 1000-1199"
    with pytest.raises(InputError, match=r"no part 'chose'\. Did you mean 'choose'"):
        load_text("c4:chose", "evaluation")


def test_a_small_sample_has_no_evaluation_part(sample):
    sample.write_text(_lines(1000), encoding="utf-8")
    assert len(load_text("c4", "calibration").documents) == 1000
    with pytest.raises(InputError, match="c4 sample, evaluation: the text ends before document 1200"):
        load_text("c4", "evaluation")


@pytest.mark.usefixtures("no_data_folder")
def test_the_hubs_file_is_read_no_further_than_needed(tmp_path, monkeypatch):
    shard = tmp_path / "shard.json.gz"
    with gzip.open(shard, "wt", encoding="utf-8") as file:
        file.write(_lines(3000) + "this is never reached")
    monkeypatch.setattr("nmprune.calibration.hub.fetch_file", lambda dataset, file, way_out: shard)
    text = load_text("c4", "evaluation")
    assert text.label == "c4 (documents 1200-2199)"
    assert text.documents[0] == "document 1200"
    assert text.documents[-1] == "document 2199"


@pytest.mark.usefixtures("no_data_folder")
def test_a_damaged_file_of_the_hub(tmp_path, monkeypatch):
    shard = tmp_path / "shard.json.gz"
    shard.write_bytes(gzip.compress(_lines(3000).encode())[:2000])
    monkeypatch.setattr("nmprune.calibration.hub.fetch_file", lambda dataset, file, way_out: shard)
    with pytest.raises(InputError, match=r"shard\.json\.gz: damaged \(EOFError"):
        load_text("c4", "calibration")


@pytest.mark.usefixtures("unreachable_hub", "no_data_folder")
def test_absent_everywhere_says_how_to_get_it():
    with pytest.raises(InputError) as caught:
        load_text("c4", "calibration")
    message = str(caught.value)
    assert message.startswith("c4 was not found: $NMPRUNE_DATA is not set")
    assert "at $NMPRUNE_DATA/calibration/c4_sample.jsonl" in message
    assert "hf download --repo-type dataset allenai/c4 en/c4-train.00000-of-01024.json.gz" in message
