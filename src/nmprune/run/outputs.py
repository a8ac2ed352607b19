"""From a run's progress files to what stays: masks.safetensors, model/, and the numbers for results.json."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.checkpoint import (
    Checkpoint,
    MaskFile,
    TensorMask,
    apply_mask,
    checksum,
    write_checkpoint,
    write_masks,
)
from nmprune.checkpoint.permutation_file import read_permutation
from nmprune.heap import give_back
from nmprune.methods import Pruned
from nmprune.results import AllocationResult, DenseResult, LearnedLayerResult, LinearResult, Results
from nmprune.run.description import self_description, words_of
from nmprune.run.folder import RunFolder, SavedLayer
from nmprune.run.gradients import GradientFiles
from nmprune.run.learning_files import LearningFiles
from nmprune.run.machine import PeakMemory
from nmprune.run.progress import Progress, Report
from nmprune.run.recipe import Recipe
from nmprune.run.train_recipe import train_words
from nmprune.stream import DecoderModel, LayerSelection
from nmprune.version import VERSION


class Outputs:
    """What a run leaves behind, made from its progress files once all layers are finished.

    Args:
        folder: the run.
        recipe: what was done.
        model: the dense model, opened from its folder.
        selections: what was pruned and what stayed dense, layer by layer.
        allocation: how mixed patterns were chosen; None where all linears have the recipe's pattern.
        allocate_seconds: what that took.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        model: DecoderModel,
        selections: Sequence[LayerSelection],
        allocation: AllocationResult | None = None,
        allocate_seconds: float = 0.0,
    ) -> None:
        self._folder, self._recipe = folder, recipe
        self._allocation, self._allocate_seconds = allocation, allocate_seconds
        self._patterns = {
            linear.name: selection.patterns.get(linear.name, recipe.pattern)
            for selection in selections
            for linear in selection.prune
        }
        assert model.checkpoint is not None
        self._base: Checkpoint = model.checkpoint
        self._selections = selections
        self._dense = [*model.dense_outside(), *(one for selection in selections for one in selection.dense)]
        self._layer_of: dict[str, int] = {}
        self._by_tensor: defaultdict[str, list[Linear]] = defaultdict(list)
        for index, selection in enumerate(selections):
            for linear in selection.prune:
                self._layer_of[linear.tensor] = index
                self._by_tensor[linear.tensor].append(linear)
        self._permutation = read_permutation(folder.permutation_file) if recipe.permute else None
        moved = self._permutation is not None and self._permutation.permutations
        self._permutation_checksum = checksum(folder.permutation_file) if moved else ""
        self._write_seconds = 0.0
        self._open: tuple[int, dict[str, Pruned]] | None = None

    def _saved(self, index: int) -> SavedLayer:
        saved = self._folder.layer(index)
        assert saved is not None
        return saved

    def _pruned(self, index: int) -> dict[str, Pruned]:
        """A layer's masks and weights; the last one asked for is kept, as tensors come layer by layer."""
        if self._open is None or self._open[0] != index:
            self._open = None
            give_back()
            self._open = (index, self._saved(index).pruned())
        return self._open[1]

    def _mask(self, tensor: str) -> Tensor:
        """The mask in the shape of the disk; True where a part of the tensor stays dense."""
        mask = torch.ones(self._base.info(tensor).shape, dtype=torch.bool)
        pruned = self._pruned(self._layer_of[tensor])
        for linear in self._by_tensor[tensor]:
            linear.on_disk.of(mask).copy_(pruned[linear.name].mask)
        return mask

    def _packed(self, tensor: str) -> Tensor:
        return masks.pack(self._mask(tensor))

    def _replace(self, tensor: str, base: Tensor) -> Tensor:
        pruned = self._pruned(self._layer_of[tensor])
        moved = base
        for linear in self._by_tensor[tensor]:
            weight = pruned[linear.name].weight
            if weight is not None:
                linear.on_disk.of(moved).copy_(weight)
        return apply_mask(moved, self._mask(tensor))

    def write_masks(self, report: Report) -> None:
        """masks.safetensors."""
        start = time.perf_counter()
        report(Progress("masks", text=f"writing {self._folder.masks_file}"))
        # Bits are made when their turn comes to be written: in memory is one layer's, whatever the depth.
        entries = {
            tensor: TensorMask(
                partial(self._packed, tensor),
                self._base.info(tensor).shape,
                self._patterns[linears[0].name],
                linears[0].on_disk.group_axis,
                self._dense_rows(tensor),
            )
            for tensor, linears in self._by_tensor.items()
        }
        write_masks(
            self._folder.masks_file,
            MaskFile(
                entries,
                self._recipe.pruner.name,
                self._recipe.model,
                self._base.fingerprint(),
                VERSION,
                self._permutation_checksum,
            ),
        )
        self._write_seconds += time.perf_counter() - start

    def _dense_rows(self, tensor: str) -> tuple[tuple[int, int], ...]:
        """Experts of a 3-D tensor that were excluded, as ranges of its rows."""
        shape = self._base.info(tensor).shape
        if len(shape) == 2:
            return ()
        out_features = self._by_tensor[tensor][0].shape[0]
        present = {linear.on_disk.expert for linear in self._by_tensor[tensor]}
        return tuple((e * out_features, (e + 1) * out_features) for e in range(shape[0]) if e not in present)

    def write_model(self, report: Report) -> None:
        """model/, unless an interrupted session had it whole already."""
        if self._folder.model.exists():
            return
        start = time.perf_counter()
        total = self._base.nbytes
        done = 0

        def wrote(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            report(Progress("model", done, total))

        report(Progress("model", 0, total, f"writing {self._folder.model} ({total / 2**20:,.0f} MiB)"))
        description = self_description(
            self._patterns,
            self._method(),
            checksum(self._folder.masks_file),
            self._dense,
            self._permutation.moved if self._permutation is not None else (),
            self._permutation_checksum,
        )
        write_checkpoint(
            self._base, self._folder.model, self._replace, set(self._by_tensor), {"nmprune": description}, wrote
        )
        self._write_seconds += time.perf_counter() - start

    def _method(self) -> dict[str, Any]:
        """Name and every setting, those of token weights included."""
        pruner, loss_aware = self._recipe.pruner, self._recipe.loss_aware
        weighted = {} if loss_aware is None else {"loss_aware": asdict(loss_aware)}
        return {
            "name": pruner.name,
            **pruner.hyper_parameters(),
            **weighted,
            **train_words(self._recipe.method, self._recipe.train),
        }

    def results(
        self, origin: dict[str, Any] | None, sessions: int, peak: PeakMemory, machine: dict[str, Any]
    ) -> Results:
        """Everything for results.json."""
        seconds: defaultdict[str, float] = defaultdict(float)
        if self._allocation is not None:
            seconds["allocate"] = self._allocate_seconds
        linears: list[LinearResult] = []
        learned: list[LearnedLayerResult] = []
        for index in range(len(self._selections)):
            saved = self._saved(index)
            linears += saved.linears
            learned += [saved.learned] if saved.learned is not None else []
            for phase, value in saved.seconds.items():
                seconds[phase] += value
        if self._recipe.gradient_pass:
            seconds["gradients"] = GradientFiles(self._folder.gradients).seconds()
        if self._folder.permute_seconds.is_file():
            seconds["permute"] = float(self._folder.permute_seconds.read_text())
        seconds["write"] = self._write_seconds
        in_linears = sum(math.prod(one.shape) for one in linears)
        kept = sum(round(one.density * math.prod(one.shape)) for one in linears)
        parameters = sum(math.prod(self._base.info(name).shape) for name in self._base.names())
        recipe = self._recipe
        return Results(
            model=recipe.model,
            model_fingerprint=self._base.fingerprint(),
            method=self._method(),
            pattern=", ".join(map(str, sorted(set(self._patterns.values())))),
            pattern_words=words_of(self._patterns.values()),
            updates_weights=recipe.pruner.updates_weights,
            calibration=origin,
            weights_in_linears=in_linears,
            weights_kept=kept,
            parameters=parameters,
            global_sparsity=(in_linears - kept) / parameters,
            mask_checksum=checksum(self._folder.masks_file),
            seconds=dict(seconds),
            sessions=sessions,
            peak_memory=peak.host(),
            device_peak_memory=peak.device(),
            machine=machine,
            linears=tuple(linears),
            dense=tuple(DenseResult(one.name, one.shape, one.reason) for one in self._dense),
            allocation=self._allocation,
            permutation=self._permutation.results if self._permutation is not None else (),
            learned_layers=tuple(learned),
            learning=LearningFiles(self._folder).result(),
        )
