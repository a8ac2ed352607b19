"""The typed schema of a run folder's results.json: every key, its unit and its meaning."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmprune.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class LinearResult:
    """One pruned linear.

    Attributes:
        name: unique in the model.
        layer: 0-based decoder layer.
        role: its place in the decoder layer.
        tensor: the checkpoint tensor that holds it.
        shape: [out, in].
        density: share of weights kept, 0..1.
        n_tokens: calibration tokens it saw; 0 for methods without calibration.
        seconds: time in the method.
        output_error: ||X (W' - W)^T||^2 / ||X W^T||^2 on the calibration tokens; null where no Gram matrix was collected.
        notes: what the method recorded (damping steps, a fallback).
    """

    name: str
    layer: int
    role: str
    tensor: str
    shape: tuple[int, int]
    density: float
    n_tokens: int
    seconds: float
    output_error: float | None
    notes: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class DenseResult:
    """A linear that stayed dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Results:
    """What a finished pruning run found.

    Attributes:
        model: as the user named it.
        model_fingerprint: of the dense checkpoint.
        method: name and every hyper-parameter.
        pattern: "N:M", N kept of M.
        pattern_words: "N kept of M".
        updates_weights: whether kept weights may have moved.
        calibration: source, split, n_sequences, seq_len, seed, n_tokens; null for methods without calibration.
        weights_in_linears: weights of the pruned linears.
        weights_kept: of those, kept.
        parameters: all parameters of the checkpoint.
        global_sparsity: share of all the checkpoint's parameters that were pruned, 0..1.
        mask_checksum: sha256 of masks.safetensors.
        seconds: wall clock by phase (read, forward, statistics, solve, measure, write) of the sessions that did the work.
        sessions: how many times the run was started until it finished.
        peak_memory: bytes, peak RSS less the RSS after imports, of the last session; null where the process had used more
            before the run.
        device_peak_memory: bytes on the accelerator; null on a CPU.
        machine: processor, cores, threads, memory (bytes), device, dtype (of the forward passes), versions.
        linears: pruned linears in order.
        dense: linears that stayed dense.
    """

    model: str
    model_fingerprint: str
    method: dict[str, Any]
    pattern: str
    pattern_words: str
    updates_weights: bool
    calibration: dict[str, Any] | None
    weights_in_linears: int
    weights_kept: int
    parameters: int
    global_sparsity: float
    mask_checksum: str
    seconds: dict[str, float]
    sessions: int
    peak_memory: int | None
    device_peak_memory: int | None
    machine: dict[str, Any]
    linears: tuple[LinearResult, ...]
    dense: tuple[DenseResult, ...]
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The text of results.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read results.json.

        Raises:
            InputError: no such file, not JSON, or of another schema.
        """
        try:
            raw = json.loads(path.read_text())
            if raw["schema"] != SCHEMA:
                raise InputError(
                    f"{path} has schema {raw['schema']}; this version reads {SCHEMA}. Use the nmprune that wrote it."
                )
            linears = tuple(LinearResult(**{**one, "shape": tuple(one["shape"])}) for one in raw.pop("linears"))
            dense = tuple(DenseResult(**{**one, "shape": tuple(one["shape"])}) for one in raw.pop("dense"))
            return cls(linears=linears, dense=dense, **raw)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. Is it a finished run folder?") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a results.json of nmprune: {error}.") from error
