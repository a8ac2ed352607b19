"""What a finetuning would need and take: sizes from shapes, the rest from some real steps on the first decoder layers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from nmprune.report.finetune_plan import FinetunePlan
from nmprune.run.finetune_job import dense_dtype, stored_dtype
from nmprune.run.finetune_parent import Parent, check_low_rank, finetune_recipe, open_parent, uses_autocast
from nmprune.run.finetune_rehearsal import N_HELD_OUT, N_STEPS, Rehearsed, rehearse
from nmprune.run.finetune_text import FinetuneText, finetune_text
from nmprune.run.machine import Machine, compute_words
from nmprune.run.plan import memory_limit
from nmprune.run.probe import disk_seconds, nearest_folder
from nmprune.run.progress import Progress, Report, silent
from nmprune.train.finetune import HELD_OUT_TOP_K
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.parts import masked_parameters, trained_parameters

_DEPTHS = ((2, 4), (1, 2))  # decoder layers of the two rehearsals; the first that is affordable
_MOST_BYTES = 0.5  # share of the memory that a rehearsal may take
_MOST_FLOPS = 1e13  # of all rehearsed steps: a minute or two on two cores
_FLOPS = 10  # per weight, token and step: forward, backward, the dense model's forward, some for attention
# Where nothing is rehearsed: what autograd keeps of a decoder layer, in inputs and outputs of its linears; fp32 tensors as
# large as the logits at the worst moment.
_AUTOGRAD = 2.5
_LOGITS = {"kl": 7, "lm": 4}
# what tokenizer and text take while it is cut, and leave, as for pruning
_DURING_TEXT, _AFTER_TEXT = 150 << 20, 32 << 20
_FROM_THE_START = ("model, fp32", "masks", "dense model")  # parts that lie there while the text is cut


def plan_finetune(
    parent: Path,
    settings: FinetuneRecipe,
    machine: Machine | None = None,
    *,
    base: str | None = None,
    out: Path = Path(),
    report: Report = silent,
) -> FinetunePlan:
    """Plan a finetuning. Nothing is written but what times the disk, and the text is read and cut as the run will.

    Args:
        parent: a finished run.
        settings: how it would be finetuned.
        machine: where.
        base: where the dense model is now.
        out: a folder on the disk that the run would write to.
        report: called at every sign of life.

    Raises:
        InputError: what `finetune_run` would raise before its first step.
    """
    machine = machine or Machine()
    device = machine.resolve()
    machine.set_threads()
    origin = open_parent(parent, base)
    recipe = finetune_recipe(origin, settings)
    check_low_rank(origin, settings)
    text = finetune_text(recipe, origin.folder, origin.model.config, report)
    sizes = _Sizes(origin, settings, text, device)
    report(Progress("finetune", text="timing some steps on the first decoder layers"))
    rehearsed = []
    for n_layers in sizes.depths(memory_limit(device, None)):
        seq_len = text.windows.shape[1]
        found = rehearse(parent, base, settings, machine, n_layers, seq_len, sizes.autocast)
        rehearsed += [found] if found is not None else []
    measured = [one for one in rehearsed if one.peak is not None]
    memory = sizes.memory(measured)
    step = sizes.extrapolated([(one.n_layers, one.step) for one in rehearsed])
    judged = sizes.extrapolated([(one.n_layers, one.judged) for one in rehearsed])
    steps, seconds = sizes.course(step, judged)
    if seconds is not None:
        write, read = disk_seconds(nearest_folder(out))
        seconds |= {"read": sizes.read_bytes * read, "write": sizes.stored_bytes * write}
    peak = max(sum(parts.values()) for parts in memory.values())
    return FinetunePlan(
        run=str(parent),
        model=recipe.model,
        pattern=origin.results.pattern_words,
        parameters=sizes.parameters,
        n_layers=origin.model.n_layers,
        trained=sizes.moved,
        what=sizes.what(),
        loss="KL from the dense model" if settings.loss == "kl" else "next token",
        compute=compute_words(torch.bfloat16 if sizes.autocast else torch.float32, device),
        text=f"{text.name} ({text.split})",
        windows=(*text.windows.shape, settings.batch_size, settings.accumulation),
        steps=steps,
        memory=memory,
        peak_memory=peak,
        limit=memory_limit(device, None),
        disk=sizes.disk(),
        seconds=seconds,
        notes=tuple(_notes(sizes, bool(measured), bool(rehearsed), peak > memory_limit(device, None))),
    )


def _notes(sizes: _Sizes, weighed: bool, timed: bool, too_large: bool) -> list[str]:
    settings = sizes.settings
    notes = []
    if too_large:
        ways = {
            "--lora 16": not settings.lora,
            "--set activation_checkpointing=true": not settings.activation_checkpointing,
            "--set batch_size=1": settings.batch_size > 1,
            "--set autocast=yes": not sizes.autocast,
            "--loss lm": settings.loss == "kl",
        }
        notes.append(f"ways to less memory: {', '.join(way for way, open_ in ways.items() if open_) or 'none left'}.")
    if not weighed:
        notes.append(
            "memory is added up from sizes and was not rehearsed: a process may take up to half as much again."
        )
    if not timed:
        notes.append("no time: this model's first decoder layers are too large to rehearse here, or could not be.")
    if settings.patience:
        notes.append(
            f"it stops sooner where {settings.patience} looks at the held-out windows bring no gain (patience)."
        )
    return notes


class _Sizes:
    """Bytes of a finetuning at any depth, and what is read off rehearsals of a smaller one."""

    def __init__(self, origin: Parent, settings: FinetuneRecipe, text: FinetuneText, device: torch.device) -> None:
        self.origin, self.settings, self.text, self._device = origin, settings, text, device
        self.autocast = uses_autocast(settings.autocast, device)
        model = origin.model
        self._whole, self._prefix, self._n_layers = model.model, f"{model.family.layers}.", model.n_layers
        self._masked = masked_parameters(model.pieces, origin.masks)
        self._trained = trained_parameters(self._whole, model.family.layers, self._masked, settings.also)
        self.parameters, self.moved = self._weights(self._n_layers), self._moved(self._n_layers)[0]
        self.stored_bytes = origin.checkpoint.nbytes
        self.read_bytes = self.stored_bytes * (2 if settings.loss == "kl" else 1)

    def what(self) -> str:
        """What is trained, in words."""
        first = f"low-rank deltas of rank {self.settings.lora}" if self.settings.lora else "the kept weights"
        return f"{first} of the pruned linears" + "".join(f", {part}" for part in self.settings.also)

    def depths(self, limit: int) -> tuple[int, ...]:
        """Decoder layers of the rehearsals; none where they would take too long or too much."""
        if self._n_layers <= _DEPTHS[0][1] and self._affordable(self._n_layers, limit):
            return (self._n_layers,)
        return next((both for both in _DEPTHS if both[1] < self._n_layers and self._affordable(both[1], limit)), ())

    def _affordable(self, n_layers: int, limit: int) -> bool:
        tokens = self._tokens * self.settings.accumulation
        flops = 2 * (N_HELD_OUT + N_STEPS) * _FLOPS * tokens * self._weights(n_layers)
        needed = sum(self._exact(n_layers, N_HELD_OUT).values()) + self._rest(n_layers)
        return flops <= _MOST_FLOPS and needed <= _MOST_BYTES * limit

    # -- memory -------------------------------------------------------------------------------------------------------

    def memory(self, rehearsed: list[Rehearsed]) -> dict[str, dict[str, int]]:
        """Stage -> part -> bytes; with rehearsals what cannot be told from shapes is theirs."""
        held = self._exact(self._n_layers, len(self.text.held_out))
        on_host = self._device.type == "cpu"
        windows = {"tokenizer, token windows": _AFTER_TEXT + 8 * self.text.windows.numel()} if on_host else {}
        if rehearsed:
            rest = {
                one.n_layers: max(0, (one.peak or 0) - sum(self._exact(one.n_layers, N_HELD_OUT).values()))
                for one in rehearsed
            }
            found = self.extrapolated([(depth, float(value)) for depth, value in rest.items()])
            more = {"activations, logits, workspace, libraries (rehearsed)": int(found or 0)}
        else:
            more = {"activations": self._activations(self._n_layers), "logits": self._logits}
            more |= {"libraries": 30 << 20} if on_host else {}
        stages = {"training": {**held, **more, **windows}}
        if on_host:
            loaded = {part: size for part, size in held.items() if part in _FROM_THE_START}
            stages["start"] = {**loaded, **windows, "digest of the text": 16 * self.text.windows.numel()}
            stages["text"] = {"tokenizer, text, token windows": _DURING_TEXT + 16 * self.text.windows.numel()}
        return stages

    def _exact(self, n_layers: int, n_held_out: int) -> dict[str, int]:
        """Part -> bytes of what shapes tell."""
        weights, (moved, best) = self._weights(n_layers), self._moved(n_layers)
        masked = sum(one.numel() for name, one in self._at(n_layers).items() if name in self._masked)
        parts = {
            "model, fp32": 4 * weights,
            "masks": (1 if self.settings.lora else 2) * masked,
            "gradients": 4 * moved,
            "moments of Adam": 8 * moved,
        }
        if self.settings.loss == "kl":
            top = min(HELD_OUT_TOP_K, self._vocabulary)
            parts["dense model"] = dense_dtype(self.autocast).itemsize * weights
            parts["its distributions of held-out text"] = 12 * top * n_held_out * self.text.windows.shape[1]
        if self._device.type == "cpu":
            parts["best values so far"] = best
        return parts

    def _at(self, n_layers: int) -> dict[str, nn.Parameter]:
        """The parameters of the model with so many decoder layers."""
        return {name: one for name, one in self._whole.named_parameters() if self._layer(name) < n_layers}

    def _layer(self, name: str) -> int:
        return int(name.removeprefix(self._prefix).partition(".")[0]) if name.startswith(self._prefix) else -1

    def _weights(self, n_layers: int) -> int:
        return sum(one.numel() for one in self._at(n_layers).values())

    def _moved(self, n_layers: int) -> tuple[int, int]:
        """Values that the optimiser moves, and bytes of their best ones."""
        moved = best = 0
        for name, one in self._trained.items():
            if self._layer(name) >= n_layers:
                continue
            if self.settings.lora and name in self._masked:
                factors = self.settings.lora * sum(one.shape)
                moved, best = moved + factors, best + 4 * factors
            else:
                moved, best = moved + one.numel(), best + stored_dtype(self.origin.model, name).itemsize * one.numel()
        return moved, best

    @property
    def _vocabulary(self) -> int:
        vocabulary: int = self._whole.config.get_text_config().vocab_size
        return vocabulary

    @property
    def _tokens(self) -> int:
        """Of a forward."""
        return self.settings.batch_size * int(self.text.windows.shape[1])

    @property
    def _logits(self) -> int:
        return _LOGITS[self.settings.loss] * 4 * self._tokens * self._vocabulary

    def _activations(self, n_layers: int) -> int:
        """What autograd keeps for the way back, from sizes."""
        size = 2 if self.autocast else 4
        hidden: int = self._whole.config.get_text_config().hidden_size
        per_layer = []
        for index in range(n_layers):
            linears = [one for one in self.origin.model.module_linears(index) if one.view.expert in (None, 0)]
            widths = {one.shared_input: one.shape[1] for one in linears}
            values = sum(widths.values()) + sum(one.shape[0] for one in linears) + 4 * hidden
            weights = sum(math.prod(one.shape) for one in self.origin.model.module_linears(index))
            copies = (2 * weights if self.autocast else 0) + (8 * weights if self.settings.lora else 0)
            per_layer.append(int(_AUTOGRAD * values * self._tokens * size) + copies)
        if self.settings.activation_checkpointing:
            return max(per_layer) + n_layers * self._tokens * hidden * size
        return sum(per_layer)

    def _rest(self, n_layers: int) -> int:
        return self._activations(n_layers) + self._logits

    def disk(self) -> dict[str, int]:
        """Part -> bytes."""
        _, best = self._moved(self._n_layers)
        return {
            "checkpoint (given back)": 12 * self.moved + best,
            "masks": self.origin.folder.masks_file.stat().st_size,
            "model": self.stored_bytes,
        }

    # -- time ---------------------------------------------------------------------------------------------------------

    def extrapolated(self, found: list[tuple[int, float]]) -> float | None:
        """A quantity at the model's depth from one or two (depth, quantity): every decoder layer adds as much.

        From one depth alone, all of it is taken to grow with the depth.
        """
        if not found:
            return None
        (few, low), (many, high) = found[0], found[-1]
        slope = max(0.0, (high - low) / (many - few)) if many > few else low / few
        return high + slope * (self._n_layers - many)

    def course(self, step: float | None, judged: float | None) -> tuple[int | None, dict[str, float] | None]:
        """Steps that the budget allows, and phase -> seconds.

        Args:
            step: seconds of one; None where it is unknown.
            judged: seconds of a held-out window.
        """
        settings = self.settings
        if step is None or judged is None:
            return settings.steps or None, None
        look = judged * len(self.text.held_out)
        looks = settings.evaluations + 1
        steps = settings.steps or math.inf
        if settings.minutes:
            steps = min(steps, max(1, round((60 * settings.minutes - looks * look) / step)))
        training = {"training": steps * step, "held-out windows": (looks + 1) * look}
        return int(steps), training
