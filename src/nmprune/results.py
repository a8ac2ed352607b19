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
        held_out_error: the same on the held-out tokens alone; null where none were held out.
        notes: what the method recorded (damping steps, a fallback).
        pattern: "N:M", what this linear was pruned to.
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
    held_out_error: float | None = None
    notes: dict[str, float | int | str] = field(default_factory=dict)
    pattern: str = ""


@dataclass(frozen=True)
class DenseResult:
    """A linear that stayed dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class AllocationResult:
    """How mixed patterns were allocated; every linear's errors and choice are in allocation.json.

    Attributes:
        rule: "error" or "owl".
        choices: patterns to choose from, and "dense", sparsest first.
        density_asked: share of weights that might be kept, 0..1.
        density: share that is kept, 0..1.
        weights: of all linears that took part, those that stay dense included.
        budget: of them, what might be kept.
        kept: of them, what is kept; never more than `budget`.
        error: sum of the relative output errors of what was chosen, one per linear (or experts of a kind), of Wanda's mask.
        least_error: no allocation within the budget has a smaller sum.
        exact: the sizes allow no larger `kept` within the budget.
        roles: role -> choice -> how many linears got it.
    """

    rule: str
    choices: tuple[str, ...]
    density_asked: float
    density: float
    weights: int
    budget: int
    kept: int
    error: float
    least_error: float
    exact: bool
    roles: dict[str, dict[str, int]]


@dataclass(frozen=True)
class PermutationResult:
    """Whether the channels of one space were reordered, and what for.

    Attributes:
        name: "residual", or the linear whose inputs the channels are.
        kind: "ffn", "heads" or "residual".
        layer: 0-based decoder layer; null for the residual stream.
        linears: how many linears read the channels, experts counted one by one.
        before: share of their squared scores that N:M keeps in the given order, 0..1, mean over the linears.
        after: the same in the order that was taken; never less.
        taken: blocks (experts, heads that share a key-value head, or one) that were reordered; 0 = nothing was gained.
        blocks: of so many.
    """

    name: str
    kind: str
    layer: int | None
    linears: int
    before: float
    after: float
    taken: int
    blocks: int


@dataclass(frozen=True)
class LearningResult:
    """What learning masks through the whole model came to; losses are in nats per token, on held-out sequences.

    Attributes:
        loss: "lm" (next token) or "kl" (from the dense model's distribution), in learning and in judging.
        steps: optimiser steps done.
        n_tokens: tokens learned from, repeats counted.
        epochs: how often each sequence was seen.
        held_out_tokens: that judged.
        prior_loss: of the prior masks.
        held_out_loss: of the masks that were taken.
        best_step: of all masks that were judged, the best came after so many steps.
        best_loss: of the best learned masks.
        best_flips: share of the groups in which they differ from the prior's, 0..1.
        last_loss: of the masks after the last step.
        last_flips: as `best_flips`.
        guarded: the prior masks were taken, because no learned ones were better.
    """

    loss: str
    steps: int
    n_tokens: int
    epochs: float
    held_out_tokens: int
    prior_loss: float
    held_out_loss: float
    best_step: int
    best_loss: float
    best_flips: float
    last_loss: float
    last_flips: float
    guarded: bool


@dataclass(frozen=True)
class LearnedLayerResult:
    """What learning the masks of one decoder layer came to; losses are the method's, on held-out sequences, of hard masks.

    Attributes:
        layer: 0-based decoder layer.
        steps: that the method made.
        prior_loss: with the prior masks; null where there is no prior, or nothing was held out.
        loss: with the masks that the method returned; null where nothing was held out.
        final_loss: after polish and reconstruct; null where none follow, or nothing was held out.
        flips: share of the groups whose mask is not the prior's, 0..1; null without a prior.
        accepted: whether the method's guard took the learned masks; null where the method has none.
    """

    layer: int
    steps: int
    prior_loss: float | None = None
    loss: float | None = None
    final_loss: float | None = None
    flips: float | None = None
    accepted: bool | None = None


@dataclass(frozen=True)
class FinetuneResult:
    """What finetuning found.

    Attributes:
        parent: the run that it started from.
        loss: "kl" from the dense model's next-token distribution, or "lm".
        text: what it was trained on; all settings are in recipe.yaml.
        split: which part of it.
        n_tokens: token positions trained on, repeats counted.
        epochs: how often the text was seen.
        steps: optimiser steps done.
        best_step: after which the weights that were written stood; 0 = nothing helped, the parent's weights.
        seconds: of training, held-out evaluations included, of all sessions.
        compute: what forwards were computed in, and where.
        tensors: checkpoint tensors whose values may have moved, the masked ones not counted.
        held_out_before: the parent's losses on held-out windows, nats per token: loss, nll (of the language model).
        held_out_after: the same of the model that was written.
    """

    parent: str
    loss: str
    text: str
    split: str
    n_tokens: int
    epochs: float
    steps: int
    best_step: int
    seconds: float
    compute: str
    tensors: tuple[str, ...]
    held_out_before: dict[str, float]
    held_out_after: dict[str, float]


@dataclass(frozen=True)
class Results:
    """What a finished pruning run found.

    Attributes:
        model: as the user named it.
        model_fingerprint: of the dense checkpoint.
        method: name and every hyper-parameter; `loss_aware` with its settings where tokens were weighted.
        pattern: "N:M", N kept of M; where patterns are mixed, all that occur, such as "1:4, 2:4".
        pattern_words: "N kept of M"; mixed ones as "mixed: 1 kept of 4, 2 kept of 4".
        updates_weights: whether kept weights may have moved.
        calibration: source, split, n_sequences, seq_len, seed, n_tokens; null for methods without calibration.
        weights_in_linears: weights of the pruned linears.
        weights_kept: of those, kept.
        parameters: all parameters of the checkpoint.
        global_sparsity: share of all the checkpoint's parameters that were pruned, 0..1.
        mask_checksum: sha256 of masks.safetensors.
        seconds: wall clock by phase (gradients, read, forward, statistics, solve, measure, write) of the sessions that did
            the work.
        sessions: how many times the run was started until it finished.
        peak_memory: bytes, peak RSS less the RSS after imports, of the last session; null where the process had used more
            before the run.
        device_peak_memory: bytes on the accelerator; null on a CPU.
        machine: processor, cores, threads, memory (bytes), device, dtype (of the forward passes), versions.
        linears: pruned linears in order.
        dense: linears that stayed dense.
        allocation: how mixed patterns were allocated; null where every linear has the same.
        permutation: which channels were reordered before pruning; empty where none were asked for.
        finetune: how kept weights were trained afterwards; null where they were not.
        learning: how masks were learned through the whole model; null for other methods.
        learned_layers: how masks were learned decoder layer by decoder layer; empty for other methods.
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
    allocation: AllocationResult | None = None
    permutation: tuple[PermutationResult, ...] = ()
    finetune: FinetuneResult | None = None
    learning: LearningResult | None = None
    learned_layers: tuple[LearnedLayerResult, ...] = ()
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
            mixed = raw.pop("allocation", None)
            allocation = AllocationResult(**{**mixed, "choices": tuple(mixed["choices"])}) if mixed else None
            permutation = tuple(PermutationResult(**one) for one in raw.pop("permutation", ()))
            raw["learned_layers"] = tuple(LearnedLayerResult(**one) for one in raw.pop("learned_layers", ()))
            tuned = raw.pop("finetune", None)
            finetune = FinetuneResult(**{**tuned, "tensors": tuple(tuned["tensors"])}) if tuned else None
            learned = raw.pop("learning", None)
            learning = LearningResult(**learned) if learned else None
            parts: dict[str, Any] = {"allocation": allocation, "permutation": permutation}
            parts |= {"finetune": finetune, "learning": learning}
            return cls(linears=linears, dense=dense, **parts, **raw)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. Is it a finished run folder?") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a results.json of nmprune: {error}.") from error
