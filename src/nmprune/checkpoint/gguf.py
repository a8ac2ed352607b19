"""GGUF input: dequantised once and whole into an ordinary HF folder in a cache, which is then read like any other."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from nmprune.checkpoint.durable import finish_folder, flush_folder
from nmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MAGIC = b"GGUF"


def cache_folder() -> Path:
    """Where dequantised models are kept: `$NMPRUNE_CACHE/gguf`, else `~/.cache/nmprune/gguf`."""
    root = os.environ.get("NMPRUNE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "nmprune") / "gguf"


def dequantise_gguf(file: Path, cache: Path | None = None) -> Path:
    """The GGUF model as an HF folder of fp32 safetensors, made by transformers at the first call and reused afterwards.

    It is dequantised once and whole, not streamed: the first call needs memory for all weights in fp32 (4 bytes each)
    and as much disk. The folder is named after the file and its sha256, so a changed file is a new model; it appears by
    one rename, so a killed conversion leaves nothing that looks finished.

    Args:
        file: a .gguf file.
        cache: the folder that holds the dequantised models; None for `cache_folder()`.

    Raises:
        InputError: the file is absent, no GGUF, truncated, of an architecture that transformers cannot read, or the
            cache cannot be written.
    """
    folder = _folder_of(file, cache)
    if not folder.is_dir():
        _check_whole(file)
        _publish(folder, lambda place: _convert(file, place))
    return folder


def gguf_config(file: Path, cache: Path | None = None) -> Path:
    """A folder with the config.json of a GGUF model, made from the file's header: no weight is dequantised.

    Where the model is dequantised already that is its folder; else a small one beside it, `<name>-<sha256>.config`.

    Args:
        file: a .gguf file.
        cache: as for `dequantise_gguf`.

    Raises:
        InputError: the file is absent, no GGUF, of an architecture that transformers cannot read, or the cache cannot be
            written.
    """
    whole = _folder_of(file, cache)
    if whole.is_dir():
        return whole
    folder = whole.with_name(whole.name + ".config")
    if not folder.is_dir():
        _publish(folder, lambda place: _write_config(file, place))
    return folder


def _folder_of(file: Path, cache: Path | None) -> Path:
    """Where the dequantised model of this very file lies or will lie."""
    _check_magic(file)
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return (cache_folder() if cache is None else cache) / f"{file.stem}-{sha256[:12]}"


def _publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Have a new folder filled under another name, flush it and give it the name `folder`."""
    home = folder.parent
    temporary = home / f".{folder.name}-{secrets.token_hex(4)}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        fill(temporary)
        finish_folder(temporary)
        temporary.rename(folder)
        flush_folder(home)
    except (OSError, SafetensorError) as error:
        # Another process may have finished the same file in the meantime; its folder is as good as ours.
        if not (getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir()):
            raise _cannot_write(home, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cannot_write(home: Path, error: Exception) -> InputError:
    return InputError(
        f"{home}: the dequantised GGUF model cannot be kept here ({getattr(error, 'strerror', None) or error}). "
        "Free some space, or set NMPRUNE_CACHE to a folder with room for all weights in fp32."
    )


def _check_magic(file: Path) -> None:
    """Raise InputError unless the file can be read and begins as a GGUF."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}). Give the path of a .gguf file.") from error
    if magic != _MAGIC:
        raise InputError(
            f"{file}: not a GGUF file: it starts with {magic!r}, expected {_MAGIC!r}. "
            "Download it again, or give an HF folder."
        )


def _check_whole(file: Path) -> None:
    """Raise InputError unless all tensors of the GGUF lie inside it; maps the file, so only done before a conversion."""
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception as error:  # the reader raises whatever numpy raises when an offset points past the end
        raise InputError(
            f"{file}: the GGUF file is truncated or damaged ({type(error).__name__}: {error}). "
            f"It has {file.stat().st_size:,} bytes; compare with the source and download it again."
        ) from error


def _write_config(file: Path, folder: Path) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the reader of a damaged file raises whatever its parser met
        raise InputError(
            f"{file}: transformers cannot read this GGUF model ({type(error).__name__}: {error}). Download it again, "
            "or give the original HF folder."
        ) from error
    _plain(config).save_pretrained(folder)


def _plain(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the model once it is dequantised."""
    settings = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    return type(config).from_dict(settings | {"dtype": "float32"})


def _convert(file: Path, folder: Path) -> None:
    """Dequantise `file` into `folder`."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    GgufConfig = getattr(transformers, "GgufConfig", None)
    # Newer transformers leave the weights packed, and fetch a kernel for them, unless told not to.
    quantisation = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        # the small parts first: most files that transformers cannot read fail here, within seconds
        AutoConfig.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **source, **quantisation, dtype=torch.float32, device_map="cpu", output_loading_info=True
        )
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise InputError(
            f"{file}: transformers cannot read this GGUF model ({type(error).__name__}: {error}). "
            "Give the original HF folder or hub id instead."
        ) from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise InputError(
            f"{file}: {len(missing)} weights of the model are not in the GGUF file, among them {missing[0]}. "
            "Give the original HF folder or hub id instead."
        )
    # The model remembers where it came from and would refuse to be saved; what is saved here is plain fp32.
    model.hf_quantizer = None
    model.config = _plain(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
