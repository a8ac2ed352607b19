"""Random access by tensor name to an HF checkpoint folder, one `model.safetensors` or shards with an index.

Tensors are read with plain reads into fresh memory. Nothing is mapped, so memory in use is what the caller still holds
and does not grow with the depth of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmprune.checkpoint.bits import as_bytes
from nmprune.checkpoint.header import TensorInfo, read_header
from nmprune.errors import InputError, near_matches

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
# A multiple of every dtype's width, so that no value is cut in two.
CHUNK_BYTES = 8 << 20
_FINGERPRINT_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """An HF folder of safetensors; made by `Checkpoint.open`.

    Attributes:
        folder: where it lies.
        config: config.json as a dict.
        shards: names of the weight files, in order (with an index: sorted by name, as the library numbers them).
        has_index: True where an index file names the shards.
        metadata: shard -> the metadata in its header.
        tensors: tensor name -> where it lies, in the order of shards and bytes.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    has_index: bool
    metadata: dict[str, dict[str, str]]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config, index and shard headers, and check them against each other and the files' sizes; no weights.

        Where both a single file and an index exist, the single file is the model, as for transformers. Tensors that are
        in a shard but not in the index belong to the model, as for transformers.

        Raises:
            InputError: anything missing, truncated, contradictory or outside the folder; the message names the file.
        """
        folder = Path(folder)
        config = read_config(folder)
        has_index = not (folder / SINGLE_FILE).is_file() and (folder / INDEX_FILE).is_file()
        promised = _read_index(folder) if has_index else {}
        if not has_index and not (folder / SINGLE_FILE).is_file():
            raise _no_weights(folder)
        shards = tuple(sorted(set(promised.values()))) if has_index else (SINGLE_FILE,)
        tensors: dict[str, TensorInfo] = {}
        metadata = {}
        for shard in shards:
            header = read_header(folder / shard)
            metadata[shard] = header.metadata
            for info in header.tensors:
                if info.name in tensors:
                    raise InputError(
                        f"{folder}: tensor {info.name!r} is in {tensors[info.name].shard} and in {shard}. "
                        "Keep one of them: save the model again."
                    )
                tensors[info.name] = info
        for name, shard in promised.items():
            if name not in tensors or tensors[name].shard != shard:
                raise InputError(
                    f"{folder / INDEX_FILE}: promises tensor {name!r} in {shard}, which does not hold it. "
                    "Index and shards are of different versions: download the folder again."
                )
        return cls(folder, config, shards, has_index, metadata, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def names(self) -> list[str]:
        """All tensor names, in the order of shards and bytes."""
        return list(self.tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape on disk."""
        return {name: info.shape for name, info in self.tensors.items()}

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies, its dtype and shape.

        Raises:
            InputError: the checkpoint has no such tensor; near matches are named.
        """
        if name not in self.tensors:
            close = near_matches(name, self.tensors).partition("Known: ")[0]
            raise InputError(f"{self.folder}: no tensor named {name!r} among its {len(self.tensors)}. {close}".rstrip())
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the disk, in writable memory of its own.

        Raises:
            InputError: no such tensor, or the file changed or vanished since it was opened.
        """
        info = self.info(name)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with self._open_shard(info) as stream:
            self._read_into(stream, info, as_bytes(raw), info.start)
        return raw.view(info.dtype).reshape(info.shape)

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The tensor's raw bytes in pieces; each piece is valid until the next one is asked for.

        Raises:
            InputError: as `read`.
        """
        info = self.info(name)
        buffer = memoryview(bytearray(min(chunk_bytes, info.nbytes)))
        with self._open_shard(info) as stream:
            for offset in range(0, info.nbytes, chunk_bytes):
                piece = buffer[: min(chunk_bytes, info.nbytes - offset)]
                self._read_into(stream, info, piece, info.start + offset)
                yield piece

    def fingerprint(self) -> str:
        """sha256 (hex) of all tensor names, dtypes and shapes, and the first and last 4 KiB of every tensor's bytes.

        It tells checkpoints apart without reading them whole and does not depend on config.json or on how tensors are
        spread over shards. It is no protection against tampering: a change in the middle of a tensor goes unseen.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype_name, info.shape]).encode())
            with self._open_shard(info) as stream:
                for offset in sorted({0, max(0, info.nbytes - _FINGERPRINT_BYTES)}):
                    piece = memoryview(bytearray(min(_FINGERPRINT_BYTES, info.nbytes)))
                    self._read_into(stream, info, piece, info.start + offset)
                    digest.update(piece)
        return digest.hexdigest()

    def _open_shard(self, info: TensorInfo) -> FileIO:
        path = self.folder / info.shard
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: cannot be read any more ({error.strerror}). Restore the file.") from error

    def _read_into(self, stream: FileIO, info: TensorInfo, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            # seek and readinto, not preadv: macOS has no preadv, and every read opens the file for itself
            stream.seek(offset + done)
            n = stream.readinto(target[done:])
            if not n:
                raise InputError(
                    f"{self.folder / info.shard}: ends inside tensor {info.name!r}: the file was cut since it was "
                    "opened. Download it again."
                )
            done += n


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an HF folder; needs no weights.

    Raises:
        InputError: no folder, no config.json, or not a JSON object.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give a Hugging Face folder with {CONFIG_FILE} and safetensors.")
    file = folder / CONFIG_FILE
    if not file.is_file():
        inner = f" Did you mean {folder / 'model'}?" if (folder / "model" / CONFIG_FILE).is_file() else ""
        raise InputError(f"{folder}: no {CONFIG_FILE}, so this is no Hugging Face model folder.{inner}")
    return _json_object(file)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a JSON {type(content).__name__}, expected an object.")
    return content


def _read_index(folder: Path) -> dict[str, str]:
    """The index's weight_map, every shard checked to be a plain file of this folder."""
    file = folder / INDEX_FILE
    weight_map = _json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file}: no weight_map that says which shard holds which tensor. Download it again.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{file}: weight_map must map tensor names to file names. Download it again.")
    for shard in dict.fromkeys(weight_map.values()):
        _check_shard(folder, file, shard)
    return weight_map


def _check_shard(folder: Path, index: Path, shard: str) -> None:
    """The index is text from elsewhere: it must not make us read files outside the folder."""
    if Path(shard).name != shard or shard in ("", "..") or "\\" in shard or "\0" in shard:
        raise InputError(
            f"{index}: names the shard {shard!r}; only plain file names inside {folder} are read. "
            "Put the shards beside the index and name them so."
        )
    path = folder / shard
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no safetensors at all"
        raise InputError(
            f"{index}: names {shard}, which is absent; the folder holds {found}. Download the missing file."
        )
    # The hub's cache links snapshots/<revision>/<file> to blobs/<hash> of the same repository; that is inside enough.
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise InputError(
            f"{index}: names {shard}, a link to {path.resolve()} outside {folder}. Copy the file into the folder."
        )


def _no_weights(folder: Path) -> InputError:
    found = sorted(p.name for p in folder.iterdir() if p.is_file())
    pickles = [n for n in found if n.endswith((".bin", ".pt", ".pth", ".ckpt")) and n != "training_args.bin"]
    ggufs = [n for n in found if n.endswith(".gguf")]
    others = [n for n in found if n.endswith(".safetensors")]
    if pickles:
        why = (
            f"only pickled weights ({pickles[0]}), and pickle files can run code, so we never unpickle. Convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    elif ggufs:
        why = f"but a GGUF file. Pass the file itself: {folder / ggufs[0]}"
    elif others:
        why = f"but {', '.join(others[:3])}. Restore the index, or name a single file {SINGLE_FILE}."
    else:
        why = f"only {', '.join(found[:8])}. Download the weights."
    return InputError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}, {why}")
