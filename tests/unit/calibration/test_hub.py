from __future__ import annotations

import socket
import sys
import time

import pytest

from nmprune.calibration import hub, load_text
from nmprune.errors import InputError

datasets = pytest.importorskip("datasets")
WIKITEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1"


@pytest.fixture
def cached(tmp_path, unreachable_hub):
    """A data set in the cache as `datasets` leaves it there, and a hub that cannot be reached."""

    def write(columns, splits, config="wikitext-2-raw-v1"):
        folder = tmp_path / "datasets" / "Salesforce___wikitext" / config / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        features = datasets.Features({name: datasets.Value(dtype) for name, dtype in columns.items()})
        infos = []
        for split, rows in splits.items():
            with datasets.arrow_writer.ArrowWriter(
                path=str(folder / f"wikitext-{split}.arrow"), features=features
            ) as w:
                for row in rows:
                    w.write(dict(zip(columns, row, strict=True)))
                n_examples, n_bytes = w.finalize()
            infos.append({"name": split, "num_bytes": n_bytes, "num_examples": n_examples, "dataset_name": "wikitext"})
        datasets.DatasetInfo(
            features=features,
            builder_name="parquet",
            dataset_name="wikitext",
            config_name=config,
            version=datasets.Version("0.0.0"),
            splits=datasets.splits.SplitDict.from_split_dict(infos),
        ).write_to_directory(str(folder))

    return write


def _rows(*texts):
    return [(text,) for text in texts]


def test_purpose_chooses_the_split(cached):
    cached({"text": "string"}, {"train": _rows("a", "", "b"), "validation": _rows("c"), "test": _rows("d")})
    found = {purpose: load_text(WIKITEXT, purpose) for purpose in ("calibration", "choose", "evaluation")}
    assert {purpose: text.split for purpose, text in found.items()} == {
        "calibration": "train",
        "choose": "validation",
        "evaluation": "test",
    }
    assert found["calibration"].documents == ("a", "b")
    assert found["calibration"].name == "Salesforce/wikitext:wikitext-2-raw-v1"


def test_evaluation_falls_to_validation_but_never_to_train(cached):
    cached({"text": "string"}, {"train": _rows("a"), "validation": _rows("c")})
    assert load_text(WIKITEXT, "evaluation").split == "validation"
    cached({"text": "string"}, {"train": _rows("a")}, config="small")
    with pytest.raises(
        InputError, match=r"no split 'test' or .*Known: train\. Name one: hf:Salesforce/wikitext:small:SPLIT"
    ):
        load_text("hf:Salesforce/wikitext:small", "evaluation")
    assert load_text("hf:Salesforce/wikitext:small:train", "evaluation").split == "train"


def test_one_part_called_like_a_split_is_the_split(cached):
    cached({"text": "string"}, {"train": _rows("a"), "test": _rows("d")})
    text = load_text("hf:Salesforce/wikitext:train", "evaluation")
    assert text.label == "Salesforce/wikitext (train)"


def test_columns_are_found_named_or_listed(cached):
    cached({"prompt": "string", "answer": "string", "id": "int64"}, {"train": [("p", "a", 1)]})
    assert load_text(f"{WIKITEXT}#answer", "calibration").documents == ("a",)
    with pytest.raises(InputError, match=r"several columns could hold the text: answer, prompt"):
        load_text(WIKITEXT, "calibration")


def test_blank_rows_alone_are_no_text(cached):
    cached({"text": "string"}, {"train": _rows("", " \n")})
    with pytest.raises(InputError, match="column 'text' of split 'train' holds no text"):
        load_text(WIKITEXT, "calibration")


def test_wikitext2_is_found_in_the_cache(cached, no_data_folder):
    cached({"text": "string"}, {"test": _rows("", " = A = \n", "", " text \n")})
    text = load_text("wikitext2", "evaluation")
    assert text.joined == "\n\n = A = \n\n\n\n\n text \n"
    assert text.split == "test"


def test_offline_mode_is_put_back(cached, monkeypatch):
    cached({"text": "string"}, {"train": _rows("a")})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    verbosity = datasets.logging.get_verbosity()
    load_text(WIKITEXT, "calibration")
    assert datasets.config.HF_HUB_OFFLINE is False
    assert datasets.logging.get_verbosity() == verbosity


@pytest.mark.usefixtures("unreachable_hub")
def test_no_network_is_said_at_once():
    start = time.monotonic()
    with pytest.raises(InputError, match=r"not in the Hugging Face cache .*hub cannot be reached .*or use `builtin`"):
        load_text("hf:some/data", "calibration")
    assert time.monotonic() - start < 3


@pytest.mark.usefixtures("unreachable_hub")
def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.2)
        start = time.monotonic()
        with pytest.raises(InputError, match="hub cannot be reached"):
            load_text("hf:some/data", "calibration")
        assert time.monotonic() - start < 3


@pytest.mark.usefixtures("unreachable_hub")
def test_one_file_without_a_network():
    with pytest.raises(InputError, match=r"data set a/b: c\.gz is not in the Hugging Face cache, .* do this instead"):
        hub.fetch_file("a/b", "c.gz", way_out="do this instead")


def test_one_file_from_the_cache(unreachable_hub, tmp_path):
    repository = tmp_path / "hub" / "datasets--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f00", encoding="utf-8")
    (repository / "snapshots" / "f00").mkdir(parents=True)
    (repository / "snapshots" / "f00" / "c.gz").write_text("x", encoding="utf-8")
    assert hub.fetch_file("a/b", "c.gz", way_out="").read_text(encoding="utf-8") == "x"


def test_a_huge_download_is_refused(monkeypatch, unreachable_hub):
    class Builder:
        class info:  # noqa: N801 - as in `datasets`
            download_size = 300 << 30

    monkeypatch.setattr(hub, "_check_reachable", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder)
    with pytest.raises(InputError, match="the download is 300 GiB; the limit is 4 GiB"):
        load_text("hf:allenai/c4:en", "calibration")


def test_what_the_hub_refuses_is_an_input_error(monkeypatch, unreachable_hub):
    monkeypatch.setattr(hub, "_check_reachable", lambda *_: None)

    def refuse(*_):
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: ['y']")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(
        InputError, match=r"could not be loaded \(ValueError: BuilderConfig 'x' not found. Available: \['y'\]\)"
    ):
        load_text("hf:some/data:x", "calibration")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package `datasets`: pip install 'nmprune\[data\]'"):
        load_text("hf:some/data", "calibration")


@pytest.mark.parametrize("source", ["hf:", "hf", "hf:a:b:c:d"])
def test_badly_written(source):
    with pytest.raises(InputError, match=r"expected hf:DATASET\[:CONFIG\]\[:SPLIT\]"):
        load_text(source, "calibration")
