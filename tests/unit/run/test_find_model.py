from __future__ import annotations

import time

import pytest

from nmprune.checkpoint import DEMO_MODEL
from nmprune.errors import InputError
from nmprune.run.find_model import find_config, find_model, near_paths


@pytest.fixture
def unreachable_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def here(monkeypatch, tmp_path):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    (tmp_path / "story.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)


def test_a_folder_that_exists_is_itself(here):
    assert str(find_model("models/llama")) == "models/llama"
    assert str(find_config("models/llama")) == "models/llama"


@pytest.mark.parametrize(
    ("given", "meant"), [("smolm2-135m", DEMO_MODEL), ("smollm2_135m", DEMO_MODEL), ("storry.gguf", "story.gguf")]
)
@pytest.mark.parametrize("find", [find_model, find_config])
def test_a_misspelt_word_is_answered_at_once_without_the_hub(here, monkeypatch, given, meant, find):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"{given}: no such folder or file. Did you mean '{meant}'.*OWNER/NAME"):
        find(given)


def test_a_misspelt_path_is_answered_within_seconds_with_near_matches(here, unreachable_hub):
    start = time.monotonic()
    with pytest.raises(InputError, match=r"models/lama: no such folder here.*Did you mean 'models/llama'\?"):
        find_model("models/lama")
    assert time.monotonic() - start < 10


def test_a_hub_id_that_is_like_nothing_here(here, unreachable_hub):
    with pytest.raises(InputError, match="the hub did not give it") as caught:
        find_model("qqq/zzz")
    assert "Did you mean" not in str(caught.value)


def test_near_paths_of_a_folder_that_is_not_there(tmp_path):
    assert near_paths(tmp_path / "none" / "x", lambda entry: True) == []
