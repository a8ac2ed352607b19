"""What a path holds: a model (read from config and shard headers, no weights), a run, or a mask file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmprune.architectures import Linear, starred
from nmprune.checkpoint import DEMO_MODEL, Checkpoint, MaskFile, read_masks
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.report.model import ModelFacts, RoleFacts
from nmprune.report.registries import USUAL_PATTERNS
from nmprune.results import Results
from nmprune.run.find_model import find_config
from nmprune.run.folder import RunFolder
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel


@dataclass(frozen=True)
class RunFacts:
    """A run folder.

    Attributes:
        run: the folder.
        recipe: what it does.
        n_layers_finished: decoder layers whose results are kept; of a run that is not finished.
        results: what it found; None where it is not finished.
        evaluations: names of the measurements kept in it.
    """

    run: str
    recipe: Recipe
    n_layers_finished: int
    results: Results | None
    evaluations: tuple[str, ...]


@dataclass(frozen=True)
class NpzFacts:
    """A mask file in MaskLLM's form, which says neither shapes nor pattern: keys, and packed bits in all."""

    file: str
    keys: tuple[str, ...]
    n_bits: int


def inspect(path: str, trust_remote_code: bool = False) -> ModelFacts | RunFacts | MaskFile | NpzFacts:
    """Look at what the user named.

    Args:
        path: a model (HF folder, .gguf file, hub id, smollm2-135m), a run folder, or a mask file.
        trust_remote_code: run Python code from the model's folder, where its config names some.

    Raises:
        InputError: nothing there, or it is none of these.
    """
    place = Path(path).expanduser()
    if RunFolder(place).is_run:
        return _run(RunFolder(place))
    if place.is_file() and place.suffix == ".safetensors":
        return read_masks(place)
    if place.is_file() and place.suffix == ".npz":
        return _npz(place)
    return _model(path, trust_remote_code)


def _run(folder: RunFolder) -> RunFacts:
    return RunFacts(
        run=str(folder.path),
        recipe=folder.read_recipe(),
        n_layers_finished=len(list(folder.progress.glob("layer_*.safetensors"))),
        results=folder.read_results() if folder.finished else None,
        evaluations=tuple(sorted(file.name for file in folder.path.glob("evaluations/*.json"))),
    )


def _npz(file: Path) -> NpzFacts:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return NpzFacts(str(file), tuple(arrays.files), 8 * sum(arrays[key].size for key in arrays.files))
    except (OSError, ValueError, AttributeError, EOFError) as error:
        raise InputError(f"{file}: cannot be read as an npz of packed masks ({error}).") from error


def _model(name: str, trust_remote_code: bool) -> ModelFacts:
    path = Path(name).expanduser()
    folder_path = find_config(name)
    try:
        checkpoint = Checkpoint.open(folder_path)
    except InputError:
        # of a hub model the cache may hold the index without a shard, which is no damage
        weights = "*.safetensors*" if path.exists() else "*.safetensors"
        if any(folder_path.glob(weights)) or not (folder_path / "config.json").is_file():
            raise
        is_gguf = name == DEMO_MODEL or path.suffix == ".gguf"
        dtype = "GGUF: dequantised to float32 once, when pruned" if is_gguf else ""
        return _from_config(name, folder_path, trust_remote_code, dtype)
    decoder = DecoderModel.open(folder_path, trust_remote_code=trust_remote_code, allow_sparse=True)
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        dtypes[info.dtype_name] = dtypes.get(info.dtype_name, 0) + 1
    dtype = ", ".join(f"{key} ({count} tensors)" for key, count in dtypes.items())
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    return _facts(name, str(folder_path), decoder, dtype, parameters)


def _from_config(name: str, folder: Path, trust_remote_code: bool, dtype: str) -> ModelFacts:
    decoder = DecoderModel.from_config(folder, trust_remote_code=trust_remote_code, allow_sparse=True)
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    return _facts(name, "", decoder, dtype or f"{decoder.config.dtype or 'not said'} (by its config)", parameters)


def _facts(name: str, folder: str, decoder: DecoderModel, dtype: str, parameters: int) -> ModelFacts:
    linears: dict[tuple[str, tuple[int, int]], list[Linear]] = {}
    dense: dict[str, tuple[int, str]] = {}
    outside = decoder.dense_outside()
    for index in range(decoder.n_layers):
        found, table = decoder.linears(index)
        for linear in found:
            linears.setdefault((linear.role, linear.shape), []).append(linear)
        outside += table
    for one in outside:
        key = starred(one.name)
        dense[key] = (dense.get(key, (0, ""))[0] + 1, one.reason)
    rows = tuple(
        RoleFacts(role, len(each), shape, _without_expert(each[0].shared_input), each[0].tensor)
        for (role, shape), each in linears.items()
    )
    patterns = {str(pattern): _unfit(pattern, rows) for pattern in USUAL_PATTERNS}
    pruned = getattr(decoder.config, "nmprune", None)
    return ModelFacts(
        name,
        folder,
        decoder.config.model_type,
        decoder.n_layers,
        dtype,
        parameters,
        rows,
        dense,
        patterns,
        pruned if isinstance(pruned, dict) else {},
    )


def _without_expert(shared_input: str) -> str:
    return ".".join(part for part in shared_input.split(".") if not part.isdigit())


def _unfit(pattern: Pattern, rows: tuple[RoleFacts, ...]) -> str | None:
    bad = dict.fromkeys(f"{row.role} (in {row.shape[1]})" for row in rows if row.shape[1] % pattern.group)
    return ", ".join(bad) or None
