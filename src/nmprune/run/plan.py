"""What a run would do, need and take, told from config.json alone: linears, memory, disk, time. No weights are read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from nmprune.architectures import DenseLinear, Linear, starred
from nmprune.checkpoint import DEMO_MODEL
from nmprune.methods.base import WholeModel
from nmprune.methods.magnitude import Magnitude
from nmprune.prepare.layer_sums import n_token_blocks
from nmprune.refine import LayerChain
from nmprune.report.plan import Plan, RolePlan
from nmprune.run import rehearsal
from nmprune.run.allocate import select_fitting
from nmprune.run.find_model import find_config
from nmprune.run.machine import Machine
from nmprune.run.permute import check_permute
from nmprune.run.plan_allocation import NOTE, AllocationSizes
from nmprune.run.plan_gradients import GradientSizes
from nmprune.run.plan_layer_learning import LayerLearningSizes
from nmprune.run.plan_learning import prior_recipe, with_learning
from nmprune.run.plan_permute import PermuteSizes
from nmprune.run.probe import Rates, measure, nearest_folder, signature
from nmprune.run.pruner import solver_of
from nmprune.run.recipe import Recipe
from nmprune.stats import GRADIENTS, gram_block_shapes
from nmprune.stream import DecoderModel, DTypeName, LayerSelection, default_batch_size
from nmprune.stream.selection import stage_of
from nmprune.train.settings import TrainRecipe

_HEADROOM = 0.9  # share of a device's memory that a plan counts on: the allocator and the context need the rest
# Measured with small models (benchmarks/plan_accuracy.py): library code that a run touches for the first time, and what
# the tokenizer and the text leave behind and take while text is cut into windows.
_LIBRARIES, _AFTER_TEXT, _DURING_TEXT = 30 << 20, 32 << 20, 150 << 20


def plan(
    recipe: Recipe,
    machine: Machine | None = None,
    *,
    out: Path = Path(),
    device_memory: int | None = None,
    timed: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        recipe: what would be done.
        machine: how.
        out: a folder on the disk that the run would write to, for timing that disk.
        device_memory: bytes of a device that is not here: tells whether the run fits it, and gives no time.
        timed: measure this machine (seconds to a minute) and estimate the time.

    Raises:
        InputError: the recipe cannot be run: unknown model, linears that do not take the pattern, and so on.
    """
    machine = machine or Machine()
    if isinstance(recipe.method, WholeModel):
        return _learning(recipe, machine, out, device_memory, timed)
    device = torch.device("cpu") if device_memory else machine.resolve()
    dtype: DTypeName = recipe.dtype  # type: ignore[assignment]
    if device_memory and dtype == "auto":
        dtype = "bfloat16"
    machine.set_threads()
    folder = find_config(recipe.model)
    model = _described(recipe, folder, device, dtype)
    selections = select_fitting(model, recipe)
    sizes = _Sizes(recipe, machine, model, selections)
    on_accelerator = device_memory is not None or device.type != "cpu"
    rehearsed = None
    if timed and not on_accelerator and sizes.rehearsable:
        rehearsed = rehearsal.layer_peak(folder, recipe, machine, sizes.batch)
    memory = sizes.memory(on_accelerator, rehearsed)
    seconds = None
    if timed and device_memory is None:
        nearest = nearest_folder(out)
        rates = measure(model, sizes.solver, recipe.pattern, sizes.batch, nearest, recipe.token_blocks)
        seconds = sizes.seconds(rates)
        if sizes.allocation is not None:
            stored = sizes.parameters * sizes.stored_size
            observed = [sizes.observed(selection) for selection in selections]
            seconds["allocate"] = sizes.allocation.seconds(observed, stored, nearest)
        if sizes.permute is not None:
            stored = sizes.parameters * sizes.stored_size
            observed = [sizes.observed(selection) for selection in selections]
            seconds["permute"] = sizes.permute.seconds(observed, stored, nearest)
    return Plan(
        model=recipe.model,
        method=recipe.pruner.name,
        pattern=recipe.pattern_words,
        parameters=sizes.parameters,
        n_layers=model.n_layers,
        linears=_roles(selections),
        dense=_dense([*model.dense_outside(), *(one for selection in selections for one in selection.dense)]),
        global_sparsity=sizes.in_linears * (1 - recipe.density) / sizes.parameters,
        calibration=(recipe.calibration.n_sequences, *sizes.batch[::-1]) if recipe.calibrated else None,
        layer_passes=sizes.passes
        + sum(one.passes for one in (sizes.gradients, sizes.allocation, sizes.permute) if one is not None),
        memory=memory,
        peak_memory=max(sum(parts.values()) for parts in memory.values()),
        limit=memory_limit(device, device_memory),
        device_memory=device_memory,
        disk=sizes.disk(),
        seconds=seconds,
        notes=_notes(recipe, sizes, machine, rehearsed is not None or on_accelerator),
    )


def _described(recipe: Recipe, folder: Path, device: torch.device, dtype: DTypeName) -> DecoderModel:
    return DecoderModel.from_config(
        folder,
        device=device,
        dtype=dtype,
        trust_remote_code=recipe.trust_remote_code,
        allow_sparse=recipe.allow_sparse,
    )


def _learning(recipe: Recipe, machine: Machine, out: Path, device_memory: int | None, timed: bool) -> Plan:
    """The plan of a method that learns the whole model: of its prior, and of learning."""
    first = prior_recipe(recipe) or replace(recipe, method=Magnitude(), train=TrainRecipe())
    prior = plan(first, machine, out=out, device_memory=device_memory, timed=timed)
    device = torch.device("cpu") if device_memory else machine.resolve()
    dtype: DTypeName = recipe.dtype  # type: ignore[assignment]
    if device_memory and dtype == "auto":
        dtype = "bfloat16"
    model = _described(recipe, find_config(recipe.model), device, dtype)
    on_accelerator = device_memory is not None or device.type != "cpu"
    return with_learning(prior, recipe, model, select_fitting(model, recipe), on_accelerator, timed)


def memory_limit(device: torch.device, device_memory: int | None) -> int:
    """Bytes that may be used: of the device asked about, of the accelerator here, or of this machine."""
    if device_memory is not None:
        return int(device_memory * _HEADROOM)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * _HEADROOM)
    return psutil.virtual_memory().total


class _Sizes:
    """Bytes and operation counts of a run."""

    def __init__(
        self, recipe: Recipe, machine: Machine, model: DecoderModel, selections: Sequence[LayerSelection]
    ) -> None:
        self.recipe, self.machine, self.model, self.selections = recipe, machine, model, selections
        seq_len = recipe.calibration.seq_len
        self.n_sequences = n_sequences = recipe.calibration.n_sequences
        self.batch = (min(n_sequences, recipe.stream.batch_size or default_batch_size(seq_len)), seq_len)
        state = model.model.state_dict()
        tied = set(model.model.all_tied_weights_keys)
        self.parameters = sum(tensor.numel() for name, tensor in state.items() if name not in tied)
        self.in_linears = sum(math.prod(one.shape) for selection in selections for one in selection.prune)
        self.compute_size = model.dtype.itemsize
        self.stored_size = _stored_size(model)
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.solver = solver_of(recipe.pruner)
        learner = LayerLearningSizes(recipe, model, selections) if isinstance(recipe.pruner, LayerChain) else None
        self.learner = learner
        # the pruned model; the dense one beside it; the targets of what is learned
        self.streams = 1 + recipe.pruner.follows_dense + (learner is not None)
        self.hidden_bytes = self.streams * n_sequences * seq_len * self.hidden_size * self.compute_size
        self.layer_weights = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
        outside = sum(tensor.numel() for name, tensor in state.items() if not name.startswith(model.family.layers))
        self.outside_weights = outside - sum(state[name].numel() for name in tied)
        self.head_weights = 0 if tied else _numel(model.model.get_output_embeddings())
        self.gradients: GradientSizes | None = None
        if recipe.gradient_pass:
            shape = (n_sequences, seq_len)
            self.gradients = GradientSizes(
                model,
                selections,
                recipe.pruner.needs,
                shape,
                self.hidden_size,
                config.vocab_size,
                machine.hidden_budget,
                recipe.token_blocks,
            )

        self.allocation: AllocationSizes | None = None
        if recipe.choices:
            width = max(_activation_width(selection.prune, self.hidden_size) for selection in selections)
            self.allocation = AllocationSizes(model, selections, recipe, self.batch, width)
        self.permute: PermuteSizes | None = None
        if recipe.permute:
            check_permute(recipe, model, selections)
            width = max(_activation_width(selection.prune, self.hidden_size) for selection in selections)
            self.permute = PermuteSizes(model, selections, recipe, self.batch, width)

    @property
    def calibrated(self) -> bool:
        """Whether the stream makes forwards at all; gradients come from a pass before it."""
        return self.recipe.pruner.runs_layers

    @property
    def observes(self) -> bool:
        """Whether the stream adds up statistics: a learner's layers may run without."""
        return bool(self.recipe.pruner.needs - GRADIENTS)

    @property
    def from_text(self) -> bool:
        """Whether a tokenizer and a text are needed."""
        return self.recipe.calibrated and not self.recipe.calibration.source.endswith(".safetensors")

    @property
    def holds_hidden(self) -> bool:
        """Whether hidden states of all calibration tokens are held, by the stream or while patterns are allocated."""
        dense_pass = self.allocation is not None or (self.permute is not None and self.recipe.calibrated)
        return self.calibrated or dense_pass

    @property
    def passes(self) -> int:
        """Forwards of a decoder layer over all calibration tokens."""
        if not self.calibrated:
            return 0
        n_layers = self.model.n_layers
        if self.recipe.stream.propagate == "dense":
            return n_layers
        stages = [len({stage_of(one) for one in selection.prune}) for selection in self.selections]
        observing = sum(stages) if self.recipe.stream.true_sequential else n_layers
        return observing + n_layers - 1 + self.recipe.pruner.follows_dense * n_layers

    @property
    def rehearsable(self) -> bool:
        """Whether two decoder layers can be walked in about a minute."""
        method = self.solver
        flops = max(sum(method.solver_flops(*one.shape) for one in selection.prune) for selection in self.selections)
        return rehearsal.affordable(max(self.layer_weights), flops, learns=self.learner is not None)

    def memory(self, on_accelerator: bool, rehearsed: int | None) -> dict[str, dict[str, int]]:
        """Stage -> part -> bytes: on the accelerator, or of the process.

        Args:
            on_accelerator: count only what lies there.
            rehearsed: peak bytes of the rehearsed layers, their hidden states included; None = add up sizes.
        """
        if on_accelerator:
            stages = {"layers": self._layer_stage(hidden=False)}
            if self.allocation is not None:
                stages["allocation"] = self.allocation.memory()
            if self.permute is not None:
                stages["permutation"] = self.permute.memory()
            if self.holds_hidden:
                stages["embedding"] = {"embedding": self._embedding()}
            if self.gradients is not None:
                stages |= self.gradients.memory(False, self.outside_weights)
            return stages
        base = {"libraries": _LIBRARIES}
        if self.from_text:
            base["tokenizer and text"] = _AFTER_TEXT
        layers = {**base, **self._layer_stage(hidden=True)}
        if rehearsed is not None:
            rehearsed_tokens = rehearsal.N_BATCHES * self.batch[0] * self.batch[1] if self.holds_hidden else 0
            rehearsed_hidden = self.streams * rehearsed_tokens * self.hidden_size * self.compute_size
            layers = {
                "libraries, decoder layer, statistics, forward, solver (rehearsed)": rehearsed - rehearsed_hidden,
                "hidden states": self._hidden_in_memory(),
                **self._token_weights(),
                **({"tokenizer and text": _AFTER_TEXT} if self.from_text else {}),
            }
        stages = {"layers": layers, "writing": {**base, **self._write_stage()}}
        if self.permute is not None:
            hidden = {"hidden states": self._hidden_in_memory()}
            stages["permutation"] = {**base, **hidden, **self.permute.memory()}
        if self.allocation is not None and rehearsed is None:  # what is rehearsed takes it in
            hidden = {"hidden states": self._hidden_in_memory()}
            stages["allocation"] = {**base, **hidden, **self.allocation.memory()}
        if self.holds_hidden:
            stages["embedding"] = {**base, "embedding": self._embedding(), "hidden states": self._hidden_in_memory()}
        if self.gradients is not None:
            parts = self.gradients.memory(True, self.outside_weights)
            stages |= {stage: {**base, **of_stage} for stage, of_stage in parts.items()}
        if self.from_text:
            stages["calibration text"] = {"tokenizer and text": _DURING_TEXT}
        return stages

    def _hidden_in_memory(self) -> int:
        """Hidden states past the budget lie in a file; its mapped pages count as far as they are in use."""
        return min(self.hidden_bytes, self.machine.hidden_budget) if self.holds_hidden else 0

    def _embedding(self) -> int:
        """The embedding in the compute dtype, and while it is converted in the checkpoint's, too."""
        both = self.compute_size + (self.stored_size if self.stored_size != self.compute_size else 0)
        return (self.outside_weights - self.head_weights) * both

    def _layer_stage(self, hidden: bool) -> dict[str, int]:
        worst = max(range(self.model.n_layers), key=lambda index: self.layer_weights[index])
        linears = self.selections[worst].prune
        tokens = self.batch[0] * self.batch[1]
        parts = {"decoder layer": self.layer_weights[worst] * self.compute_size}
        method = self.solver
        solving = max(
            (4 * math.prod(one.shape) + method.solver_bytes(*one.shape) for one in linears),
            default=0,
        )
        results = self._results(linears)
        if not self.calibrated:
            return {**parts, "solver": solving, "masks and moved weights of the layer": results}
        if hidden:
            parts["hidden states"] = self._hidden_in_memory()
        parts |= {"statistics": self._statistics(linears), **self._token_weights()}
        forward = tokens * _activation_width(linears, self.hidden_size) * self.compute_size
        if self.learner is not None:
            parts |= self.learner.memory(linears, tokens)
        parts["batch in the forward, or solver"] = max(forward, solving + results)
        return parts

    def _token_weights(self) -> dict[str, int]:
        """What a layer's tokens count, where that is loss-aware: it is at hand while the layer is observed."""
        if self.gradients is None or not self.recipe.token_blocks:
            return {}
        return {"token weights": max(self.gradients.token_weights_of(one.prune) for one in self.selections)}

    def _statistics(self, linears: Sequence[Linear]) -> int:
        stages: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for one in linears:
            stage = stage_of(one) if self.recipe.stream.true_sequential else ""
            stages[stage] |= dict.fromkeys(self._statistics_keys(one), one.shape[1])
        return max((sum(map(self._of_width, stage.values())) for stage in stages.values()), default=0)

    def _statistics_keys(self, linear: Linear) -> list[str]:
        """The statistics that a linear reads: its shared input's, or one for each block of rows with token weights."""
        n_blocks = n_token_blocks(linear, self.recipe.token_blocks)
        return [f"{linear.name}:{block}" for block in range(n_blocks)] or [linear.shared_input]

    def _of_width(self, width: int) -> int:
        needs = self.recipe.pruner.needs
        vectors = 8 * width * len(needs & {"input_sq_norm", "input_sum"})
        parts = 2 if "held_out_gram" in needs else 1
        matrices = len(needs & {"input_gram", "cross_gram"})
        # while tokens are added up: blocks of a Gram matrix on and above the diagonal, of the sum so far and of a segment;
        # what is held out is one segment
        half = 4 * sum(map(math.prod, gram_block_shapes(width))) if "input_gram" in needs else 0
        whole = 4 * width * width if "cross_gram" in needs else 0
        more = 2 if self.recipe.stream.sum_segments > 1 else 1
        adding = (parts - 1 + more) * (half + whole + vectors)
        return max(4 * parts * matrices * width * width + vectors, adding)

    def observed(self, selection: LayerSelection, weighted: bool = False) -> list[tuple[int, float]]:
        """(in_features, share of the tokens that it sees) of every shared input, or of all statistics of the stream where
        tokens are `weighted`; an expert sees those routed to it."""
        config = self.model.config.get_text_config()
        experts = {one.in_module.expert for one in selection.prune if one.in_module.expert is not None}
        share = getattr(config, "num_experts_per_tok", 1) / max(len(experts), 1)
        inputs = {
            key: one
            for one in selection.prune
            for key in (self._statistics_keys(one) if weighted else [one.shared_input])
        }
        return [(one.shape[1], 1.0 if one.in_module.expert is None else share) for one in inputs.values()]

    def _results(self, linears: Sequence[Linear]) -> int:
        per_weight = 1 + (self.stored_size if self.recipe.pruner.updates_weights else 0)
        return per_weight * sum(math.prod(one.shape) for one in linears)

    def _write_stage(self) -> dict[str, int]:
        worst = max(self.selections, key=lambda selection: sum(math.prod(one.shape) for one in selection.prune))
        tensors: defaultdict[str, int] = defaultdict(int)  # all experts of a 3-D tensor are written together
        for one in worst.prune:
            tensors[one.tensor] += math.prod(one.shape)
        largest = max(tensors.values(), default=0)
        return {
            "masks and moved weights of a layer": self._results(worst.prune),
            "one tensor, dense and pruned": largest * (2 * self.stored_size + 1),
        }

    def disk(self) -> dict[str, int]:
        """Part -> bytes."""
        moved = self.in_linears * self.stored_size if self.recipe.pruner.updates_weights else 0
        hidden = self.hidden_bytes if self.calibrated else 0
        scratch = self.hidden_bytes if self.holds_hidden and self.hidden_bytes > self.machine.hidden_budget else 0
        return {
            "progress (given back)": self.in_linears // 8 + moved + hidden,
            **({"hidden states past the budget (given back)": scratch} if scratch else {}),
            **(self.gradients.disk() if self.gradients is not None else {}),
            **(self.learner.disk() if self.learner is not None else {}),
            "masks": self.in_linears // 8,
            "model": self.parameters * self.stored_size,
        }

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Phase -> seconds."""
        seconds: defaultdict[str, float] = defaultdict(float)
        n_batches = self.recipe.calibration.n_sequences / self.batch[0] if self.calibrated else 0.0
        for index, selection in enumerate(self.selections):
            if self.calibrated:
                passes = self.passes / self.model.n_layers
                seconds["forward"] += passes * n_batches * rates.layer_seconds[signature(self.model.layers[index])]
                for width, share in self.observed(selection, weighted=True) if self.observes else ():
                    seconds["statistics"] += n_batches * share * rates.statistics_seconds[width]
            seen: set[str] = set()
            for one in selection.prune:
                keys = set(self._statistics_keys(one))
                first, later = rates.solver_seconds[one.shape]
                seconds["solve"] += later + len(keys - seen) * (first - later)
                seconds["measure"] += rates.measure_seconds[one.shape]
                seen |= keys
        stored = self.parameters * self.stored_size
        if self.gradients is not None:
            seconds["gradients"] = self.gradients.seconds(rates, stored)
        if self.learner is not None:
            seconds["learn"] = self.learner.seconds(rates.layer_seconds, self.batch[0])
        seconds["read"] = 2 * stored * rates.read_seconds
        moved = self.disk()["model"] + self.in_linears * (self.stored_size if self.recipe.pruner.updates_weights else 0)
        seconds["write"] = moved * rates.write_seconds
        return dict(seconds)


def _activation_width(linears: Sequence[Linear], hidden_size: int) -> int:
    """Values per token alive at once in a layer's forward: the widest linear's inputs and outputs, and the residual stream."""
    widest = max((max(one.shape) for one in linears), default=hidden_size)
    return 3 * widest + 3 * hidden_size


def _stored_size(model: DecoderModel) -> int:
    dtype = model.config.dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize


def _numel(module: Any) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _roles(selections: Sequence[LayerSelection]) -> tuple[RolePlan, ...]:
    found: dict[tuple[str, tuple[int, int]], int] = defaultdict(int)
    for selection in selections:
        for one in selection.prune:
            found[(one.role, one.shape)] += 1
    return tuple(RolePlan(role, count, shape, count * math.prod(shape)) for (role, shape), count in found.items())


def _dense(dense: Sequence[DenseLinear]) -> tuple[tuple[str, int, str], ...]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for one in dense:
        counts[(starred(one.name), one.reason)] += 1
    return tuple((name, count, reason) for (name, reason), count in counts.items())


def _notes(recipe: Recipe, sizes: _Sizes, machine: Machine, measured: bool) -> tuple[str, ...]:
    notes = [] if sizes.learner is None else sizes.learner.notes()
    if recipe.choices:
        notes.append(NOTE)
    if not measured:
        notes.append(
            "memory is added up from sizes and was not rehearsed: a process may take up to half as much again."
        )
    if recipe.model.endswith(".gguf") or recipe.model == DEMO_MODEL:
        notes.append(
            "a GGUF file is dequantised once, whole, at the first run: "
            f"{sizes.parameters * 4 / 2**30:.1f} GiB of memory and disk."
        )
    if sizes.holds_hidden and sizes.hidden_bytes > machine.hidden_budget:
        notes.append(
            f"hidden states of {sizes.hidden_bytes / 2**30:.1f} GiB pass the budget of "
            f"{machine.hidden_budget / 2**30:.1f} GiB: they will live in a file of that size."
        )
    return tuple(notes)
