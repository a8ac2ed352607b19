"""Token perplexity of a run, dense beside pruned, or of one model; a run's is kept in its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nmprune.calibration import Text, consecutive_windows, load_text
from nmprune.checkpoint import Checkpoint
from nmprune.errors import InputError, near_matches
from nmprune.evaluate.perplexity import Perplexity, summarise
from nmprune.evaluate.streamed import streamed_nlls
from nmprune.run.base import find_base, wrong_base
from nmprune.run.find_model import find_model
from nmprune.run.folder import RunFolder, write_text
from nmprune.run.machine import Machine
from nmprune.run.progress import Progress, Report, Stage, report_untied, silent
from nmprune.run.recipe import DTYPES
from nmprune.run.tokens import check_windows, load_tokenizer
from nmprune.stream import DecoderModel, DTypeName

FIRST_CHOICE, FALLBACK = "wikitext2", "builtin"
What = Literal["dense", "pruned", "model"]


@dataclass(frozen=True)
class Measure:
    """What to measure.

    Attributes:
        text: a text source; None = wikitext2 where it is found, else the held-out part of the builtin text.
        seq_len: tokens per window.
        max_windows: windows from the start of the text; fewer where it is shorter.
        batch_size: windows per forward; 0 = about 2048 tokens.
        dtype: compute dtype; "auto" is fp32 on a CPU and the checkpoint's elsewhere.
        trust_remote_code: run Python code from the model's folder, where its config names some.

    Raises:
        InputError: a number out of range or an unknown dtype.
    """

    text: str | None = None
    seq_len: int = 512
    max_windows: int = 16
    batch_size: int = 0
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("seq_len", self.seq_len, 2),
            ("max_windows", self.max_windows, 1),
            ("batch_size", self.batch_size, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; expected at least {least}.")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}. {near_matches(self.dtype, DTYPES)}")


@dataclass(frozen=True)
class Measured:
    """One model's number.

    Attributes:
        what: "dense" or "pruned" of a run, "model" where there is only one.
        model: its folder.
        fingerprint: of its checkpoint.
        perplexity: value, errors, and what it was measured on.
        seconds: wall clock; None where the saved number of an earlier measurement was taken.
    """

    what: What
    model: str
    fingerprint: str
    perplexity: Perplexity
    seconds: float | None


@dataclass(frozen=True)
class Evaluation:
    """Token perplexities on the same windows.

    Attributes:
        text: data set.
        split: which part of it.
        seq_len: tokens per window.
        n_windows: windows measured.
        windows_checksum: sha256 of their token ids: equal checksums, equal windows.
        dtype: compute dtype of all models, such as "float32".
        device: where it ran.
        models: dense before pruned.
        saved: the file that holds this; empty for a plain model.
    """

    text: str
    split: str
    seq_len: int
    n_windows: int
    windows_checksum: str
    dtype: str
    device: str
    models: tuple[Measured, ...]
    saved: str = ""


def evaluate(
    path: str,
    measure: Measure | None = None,
    machine: Machine | None = None,
    base: str | None = None,
    report: Report = silent,
) -> Evaluation:
    """Measure a finished run (dense beside pruned, saved in its evaluations/) or a model.

    Args:
        path: a run folder, or a model: HF folder, .gguf file, hub id, smollm2-135m.
        measure: what to measure.
        machine: how.
        base: where a run's dense model is now; None = where its recipe says.
        report: called at every sign of life.

    Raises:
        InputError: no such run or model, a run that is not finished, or a text that cannot be had or is too short.
    """
    measure, machine = measure or Measure(), machine or Machine()
    device = machine.resolve()
    machine.set_threads()
    if not RunFolder(Path(path)).is_run:
        if base is not None:
            raise InputError(f"{path} is not a run folder, so --base has no meaning. Leave it out.")
        source = find_model(path)
        bench = _Bench(source, measure, machine, device, report)
        model = bench.open(source)
        return bench.evaluation((bench.measured("model", model, Checkpoint.open(source).fingerprint()),), model)
    folder = RunFolder(Path(path))
    results, recipe = folder.read_results(), folder.read_recipe()
    dense = find_base(folder, recipe.model, base)
    fingerprint = Checkpoint.open(dense).fingerprint()
    if fingerprint != results.model_fingerprint:
        raise wrong_base(dense, fingerprint, results.model_fingerprint)
    bench = _Bench(folder.model, measure, machine, device, report)
    file = folder.path / "evaluations" / bench.file_name
    model = bench.open(dense)
    before = bench.saved_dense(file, model, fingerprint) or bench.measured("dense", model, fingerprint)
    pruned = bench.open(folder.model, dtype_name(model))
    after = bench.measured("pruned", pruned, Checkpoint.open(folder.model).fingerprint())
    evaluation = dataclasses.replace(bench.evaluation((before, after), model), saved=str(file))
    kept = {**dataclasses.asdict(evaluation)}
    del kept["saved"]
    write_text(file, json.dumps(kept, indent=1) + "\n")
    return evaluation


def dtype_name(model: DecoderModel) -> DTypeName:
    """The dtype that "auto" came to."""
    return str(model.dtype).removeprefix("torch.")  # type: ignore[return-value]


class _Bench:
    """The windows, and how a model is measured on them."""

    def __init__(
        self, tokenizer: Path, measure: Measure, machine: Machine, device: torch.device, report: Report
    ) -> None:
        self.measure, self.machine, self.device, self.report = measure, machine, device, report
        self.text = _text(measure.text, report)
        self.windows = consecutive_windows(
            self.text, load_tokenizer(tokenizer, measure.trust_remote_code), measure.seq_len, measure.max_windows
        )
        self.checksum = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        report(Progress("open", text=f"{len(self.windows)} windows of {measure.seq_len} tokens of {self.text.label}"))

    @property
    def file_name(self) -> str:
        """<text>_<split>_<seq_len>x<windows>.json."""
        parts = (self.text.name, self.text.split, f"{self.measure.seq_len}x{len(self.windows)}")
        return "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts) + ".json"

    def open(self, folder: Path, dtype: DTypeName | None = None) -> DecoderModel:
        """The model in the dtype asked for, or in that of the model beside which it stands."""
        asked: DTypeName = self.measure.dtype  # type: ignore[assignment]
        model = DecoderModel.open(
            folder,
            device=self.device,
            dtype=dtype or asked,
            trust_remote_code=self.measure.trust_remote_code,
            allow_sparse=True,
        )
        check_windows(self.windows, model.config)
        report_untied(model.untied, self.report)
        return model

    def measured(self, what: What, model: DecoderModel, fingerprint: str) -> Measured:
        """Run one model over the windows."""
        start = time.perf_counter()
        assert model.checkpoint is not None
        folder = model.checkpoint.folder
        stage: Stage = "measure" if what == "model" else what
        self.report(Progress(stage, text=f"measuring the {what + ' model' if what != 'model' else 'model'}: {folder}"))
        nlls = streamed_nlls(
            model,
            self.windows,
            batch_size=self.measure.batch_size,
            hidden_budget=self.machine.hidden_budget,
            scratch=self.machine.scratch,
            on_progress=lambda done, total: self.report(Progress(stage, done, total)),
        )
        found = summarise(nlls, self.text, self.measure.seq_len)
        return Measured(what, str(folder), fingerprint, found, time.perf_counter() - start)

    def saved_dense(self, file: Path, model: DecoderModel, fingerprint: str) -> Measured | None:
        """The dense number of an earlier measurement, where it is of these very weights, windows, dtype and device."""
        if not file.is_file():
            return None
        try:
            saved = json.loads(file.read_text())
            same = all(saved[key] == value for key, value in self._key(model).items())
            dense = next(one for one in saved["models"] if one["what"] == "dense")
            if not same or dense["fingerprint"] != fingerprint:
                return None
            found = Measured("dense", dense["model"], fingerprint, Perplexity(**dense["perplexity"]), None)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            self.report(Progress("open", text=f"{file} is damaged ({error}): it will be replaced"))
            return None
        self.report(Progress("open", text=f"dense model: measured before, see {file}"))
        return found

    def evaluation(self, models: tuple[Measured, ...], model: DecoderModel) -> Evaluation:
        """The numbers with what they were measured on."""
        return Evaluation(
            text=self.text.name,
            split=self.text.split,
            seq_len=self.measure.seq_len,
            n_windows=len(self.windows),
            windows_checksum=self.checksum,
            dtype=dtype_name(model),
            device=str(self.device),
            models=models,
        )

    def _key(self, model: DecoderModel) -> dict[str, Any]:
        return {"windows_checksum": self.checksum, "dtype": dtype_name(model), "device": str(self.device)}


def _text(source: str | None, report: Report) -> Text:
    if source is not None:
        return load_text(source, "evaluation")
    try:
        return load_text(FIRST_CHOICE, "evaluation")
    except InputError:
        text = load_text(FALLBACK, "evaluation")
        report(
            Progress(
                "open",
                text=f"measuring on {text.label}: {FIRST_CHOICE} is not here (--text {FIRST_CHOICE} says how to get it)",
            )
        )
        return text
