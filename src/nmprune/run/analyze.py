"""Analyze a run: each linear's output error on text that it was not made on, and what its output still tells of the dense one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nmprune.architectures import Linear
from nmprune.calibration import SOURCES, Text, consecutive_windows, load_text
from nmprune.checkpoint import Checkpoint, MaskFile, read_masks
from nmprune.errors import InputError
from nmprune.evaluate.analysis import LinearFacts, OtherMasks, analyse_layers
from nmprune.evaluate.information import NOISE_SHARES
from nmprune.evaluate.rank_correlation import spearman
from nmprune.pattern import Pattern
from nmprune.report.scatter import Point, scatter_svg
from nmprune.results import Results
from nmprune.run.base import find_base, wrong_base
from nmprune.run.folder import RunFolder, write_text
from nmprune.run.machine import Machine
from nmprune.run.permuted_base import permuted_base
from nmprune.run.progress import Progress, Report, silent
from nmprune.run.recipe import Recipe
from nmprune.run.tokens import check_windows, load_tokenizer
from nmprune.stream import DecoderModel, DTypeName, LayerSelection, LayerStep, StreamOptions

_DRAWN = 1  # which of the noise shares the picture shows


@dataclass(frozen=True)
class Question:
    """What to analyze a run on.

    Attributes:
        text: a text source; None = the run's calibration source, a part that it does not calibrate on, where it has parts;
            else the builtin text.
        n_sequences: token windows from the start of it.
        seq_len: tokens per window.
        n_mixed: masks between Wanda's and a random one that are looked at, too.

    Raises:
        InputError: a number out of range.
    """

    text: str | None = None
    n_sequences: int = 16
    seq_len: int = 512
    n_mixed: int = 2

    def __post_init__(self) -> None:
        for name, least in (("n_sequences", 1), ("seq_len", 2), ("n_mixed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}.")


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of output error and information; Theorem 1 of HyperPrune says -1.

    Attributes:
        over: "linears": of the run, one against the other; "masks": those of one linear, averaged over the linears.
        open_only: only linears whose dense output does not determine their input.
        noise_share: c of the noise.
        n: linears that took part.
        nats: error against nats; null without three values that differ.
        nats_per_output: error against nats / out_features; null over masks, where it is the same.
        least: the smallest of the linears averaged; null over linears.
        most: the largest.
    """

    over: str
    open_only: bool
    noise_share: float
    n: int
    nats: float | None
    nats_per_output: float | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Analysis:
    """What evaluations/analysis.json holds.

    Attributes:
        method: of the run.
        text: data set.
        split: which part of it.
        seq_len: tokens per window.
        n_windows: windows looked at.
        windows_checksum: sha256 of their token ids.
        dtype: compute dtype of the forward passes.
        noise_shares: c of the noise's variance c tr(cov Z') / out; `nats` has a value for each.
        correlations: of output error and information.
        linears: in the order of the model.
        calibration_errors: linear name -> output error on the calibration tokens, from results.json; null where unknown.
        left_out: linear name -> why it was not looked at.
        seconds: wall clock.
    """

    method: str
    text: str
    split: str
    seq_len: int
    n_windows: int
    windows_checksum: str
    dtype: str
    noise_shares: tuple[float, ...]
    correlations: tuple[Correlation, ...]
    linears: tuple[LinearFacts, ...]
    calibration_errors: dict[str, float | None]
    left_out: dict[str, str]
    seconds: float


def analyze(
    path: Path,
    question: Question | None = None,
    machine: Machine | None = None,
    base: str | None = None,
    report: Report = silent,
) -> tuple[Analysis, Path]:
    """Analyze a finished run of any method, one decoder layer in memory at a time; kept in its evaluations/.

    Args:
        path: the run folder.
        question: on what.
        machine: how.
        base: where the dense model is now; None = where the recipe says.
        report: called at every sign of life.

    Returns:
        What was found, and the JSON file that holds it; the picture lies beside it, with the suffix .svg.

    Raises:
        InputError: no finished run, its dense model is not there or another one, or the text cannot be had or is too short.
    """
    question, machine = question or Question(), machine or Machine()
    start = time.perf_counter()
    folder = RunFolder(path)
    results, recipe = folder.read_results(), folder.read_recipe()
    device = machine.resolve()
    machine.set_threads()
    dense = _dense(folder, recipe, results, base)
    dtype: DTypeName = recipe.dtype  # type: ignore[assignment]
    pruned = DecoderModel.open(
        folder.model, device=device, dtype=dtype, trust_remote_code=recipe.trust_remote_code, allow_sparse=True
    )
    text = _text(question, recipe)
    tokenizer = load_tokenizer(folder.model, recipe.trust_remote_code)
    windows = consecutive_windows(text, tokenizer, question.seq_len, question.n_sequences)
    check_windows(windows, pruned.config)
    selections = _selections(pruned, results)
    others = OtherMasks(question.n_mixed, results.updates_weights, recipe.seed)
    report(Progress("open", text=_what_it_takes(selections, windows, text, others)))
    found, left_out = _layers(dense, pruned, selections, windows, others, folder, machine, report)
    analysis = Analysis(
        method=recipe.pruner.name,
        text=text.name,
        split=text.split,
        seq_len=question.seq_len,
        n_windows=len(windows),
        windows_checksum=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        dtype=str(pruned.dtype).removeprefix("torch."),
        noise_shares=NOISE_SHARES,
        correlations=correlations(found),
        linears=tuple(found),
        calibration_errors={one.name: one.output_error for one in results.linears},
        left_out=left_out,
        seconds=time.perf_counter() - start,
    )
    file = folder.path / "evaluations" / "analysis.json"
    write_text(file, json.dumps(dataclasses.asdict(analysis), indent=1) + "\n")
    write_text(file.with_suffix(".svg"), picture(analysis))
    return analysis, file


def _dense(folder: RunFolder, recipe: Recipe, results: Results, base: str | None) -> Checkpoint:
    dense = Checkpoint.open(find_base(folder, recipe.model, base))
    if (fingerprint := dense.fingerprint()) != results.model_fingerprint:
        raise wrong_base(dense.folder, fingerprint, results.model_fingerprint)
    return permuted_base(folder, recipe, dense) if recipe.permute else dense


def _text(question: Question, recipe: Recipe) -> Text:
    if question.text is not None:
        return load_text(question.text, "evaluation")
    source = recipe.calibration.source if recipe.calibrated else "builtin"
    return load_text(source if source.partition(":")[0] in SOURCES else "builtin", "choose")


def _selections(pruned: DecoderModel, results: Results) -> list[LayerSelection]:
    """The linears that were pruned, with their patterns."""
    patterns = {one.name: Pattern.parse(one.pattern) for one in results.linears}
    selections = []
    for index in range(pruned.n_layers):
        linears = tuple(linear for linear in pruned.linears(index)[0] if linear.name in patterns)
        selections.append(LayerSelection(linears, (), {one.name: patterns[one.name] for one in linears}))
    return selections


def _what_it_takes(selections: Sequence[LayerSelection], windows: Tensor, text: Text, others: OtherMasks) -> str:
    """A line on what is coming."""
    linears = [linear for selection in selections for linear in selection.prune]
    n_masks = 3 + others.moved + others.n_mixed
    widest = max(linear.shape[1] for linear in linears)
    mebibytes = 8 * 4 * widest**2 / 2**20  # covariance, eigenvectors and their workspace, in fp64
    return (
        f"{len(linears)} linears under {n_masks} masks each, on {windows.shape[0]} x {windows.shape[1]} tokens of {text.label}: "
        f"one forward pass; eigenvectors of {widest} x {widest} and smaller in fp64, about {mebibytes:,.0f} MiB beside a layer"
    )


def _layers(
    dense: Checkpoint,
    pruned: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor,
    others: OtherMasks,
    folder: RunFolder,
    machine: Machine,
    report: Report,
) -> tuple[list[LinearFacts], dict[str, str]]:
    found: list[LinearFacts] = []
    left_out: dict[str, str] = {}
    options = StreamOptions(hidden_budget=machine.hidden_budget)
    mask_of = masks_by_linear(read_masks(folder.masks_file))
    n_layers, start = pruned.n_layers, time.perf_counter()
    for step in analyse_layers(
        dense, pruned, selections, windows, NOISE_SHARES, others, mask_of, options, machine.scratch
    ):
        if isinstance(step, LayerStep):
            report(Progress("analyze", step.index + 0.5 * step.done / step.total, n_layers))
            continue
        found += step.linears
        left_out |= step.left_out
        seconds = time.perf_counter() - start
        text = f"decoder layer {step.index + 1}/{n_layers}: {len(step.linears)} linears, {seconds:.1f} s so far"
        report(Progress("analyze", step.index + 1, n_layers, text))
    return found, left_out


def masks_by_linear(file: MaskFile) -> Callable[[Linear], Tensor]:
    """Linear -> its (out, in) mask; the last tensor is kept, for experts that share one."""
    last: dict[str, Tensor] = {}

    def mask_of(linear: Linear) -> Tensor:
        if linear.tensor not in last:
            last.clear()
            last[linear.tensor] = file.mask(linear.tensor)
        return linear.on_disk.of(last[linear.tensor])

    return mask_of


def correlations(linears: Sequence[LinearFacts]) -> tuple[Correlation, ...]:
    """Output error against information, over linears and over masks, for all linears and for the open ones."""
    found = []
    for open_only in (False, True):
        chosen = [one for one in linears if not (open_only and one.determines_input)]
        for place, share in enumerate(NOISE_SHARES):
            errors = [one.masks[0].error for one in chosen]
            nats = [one.masks[0].nats[place] for one in chosen]
            per_output = [value / one.shape[0] for value, one in zip(nats, chosen, strict=True)]
            over_linears = spearman(errors, nats), spearman(errors, per_output)
            found.append(Correlation("linears", open_only, share, len(chosen), *over_linears))
        for place, share in enumerate(NOISE_SHARES):
            each = [
                value
                for one in chosen
                if (value := spearman([m.error for m in one.masks], [m.nats[place] for m in one.masks])) is not None
            ]
            mean = sum(each) / len(each) if each else None
            ends = (min(each), max(each)) if each else (None, None)
            found.append(Correlation("masks", open_only, share, len(each), mean, None, *ends))
    return tuple(found)


def picture(analysis: Analysis) -> str:
    """Output error and information of every linear under every mask, as an SVG; errors of 0 are not on its axis."""
    share = analysis.noise_shares[_DRAWN]
    points = [
        Point(
            one.error,
            one.nats[_DRAWN] / linear.shape[0],
            linear.role if place == 0 else "",
            f"{linear.name}, {one.mask}: error {one.error:.4f}, {one.nats[_DRAWN]:.1f} nats",
        )
        for linear in analysis.linears
        for place, one in enumerate(linear.masks)
        if one.error > 0
    ]
    where = f"{analysis.text} ({analysis.split}), {analysis.n_windows} x {analysis.seq_len} tokens"
    return scatter_svg(
        f"{analysis.method}: output error and information, by linear",
        "relative squared output error",
        f"information in nats per output, noise {share:g}",
        points,
        f"Coloured: the run. Grey: other masks of the same linears. On {where}.",
    )
