"""What learning masks through the whole model would need and take: all weights, learned state, activations; timed on a layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.methods.base import Course, WholeModel
from nmprune.pattern import Pattern
from nmprune.refine.layer_chain import one_shot_prior
from nmprune.report.plan import Plan
from nmprune.run.probe import head_seconds_of, random_calls, signature
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, LayerSelection
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.train.masked_linear import MaskedModel, Phase, Target, targets_of
from nmprune.train.settings import TrainRecipe

# What autograd keeps of a sequence in a decoder layer, in inputs and outputs of its linears: norms, activations and attention
# add as much again, and gradients are made beside.
_AUTOGRAD = 2.5
_LOGITS = {"lm": 4, "kl": 5}  # fp32 tensors as large as the logits at the worst moment, the dense model's among them
_TIMED_WEIGHTS = 64 << 20  # of a layer: learning a larger one is not rehearsed
_BASE = ("libraries", "tokenizer and text")  # parts that every stage of a plan on this machine has
_JUDGED = 3  # dampings that a round of descent judges as a rule
_MASKS = 3 / 8  # bytes per weight: prior, best and current masks, packed


def prior_recipe(recipe: Recipe) -> Recipe | None:
    """The run of the one-shot method that gives the prior masks; None where they come from a file."""
    assert isinstance(recipe.method, WholeModel)
    prior = one_shot_prior(recipe.method)
    return None if prior is None else replace(recipe, method=prior, train=TrainRecipe())


def with_learning(
    prior: Plan, recipe: Recipe, model: DecoderModel, selections: Sequence[LayerSelection], on_device: bool, timed: bool
) -> Plan:
    """The plan of the prior's run with learning added.

    Args:
        prior: of the run that gives the prior masks.
        recipe: its method is a `WholeModel`.
        model: made from its config.
        selections: one per layer.
        on_device: count only what lies on an accelerator.
        timed: rehearse a step on one decoder layer of each kind.
    """
    sizes = _Learning(recipe, model, selections)
    stages = {f"prior, {stage}": parts for stage, parts in prior.memory.items() if stage != "writing"}
    written = {stage: parts for stage, parts in prior.memory.items() if stage == "writing"}
    base = {part: size for parts in written.values() for part, size in parts.items() if part in _BASE}
    memory = {**stages, "learning": {**base, **sizes.memory(on_device)}, **written}
    seconds, notes = prior.seconds, prior.notes
    if timed and seconds is not None:
        if sizes.largest_layer > _TIMED_WEIGHTS:
            seconds = None
            notes = (
                *notes,
                "no time: a decoder layer of this model is too large to rehearse learning on this machine.",
            )
        else:
            seconds = {**seconds, "learn": sizes.seconds()}
    settings = recipe.train
    n_tokens = settings.steps * settings.batch_size * settings.accumulation * recipe.calibration.seq_len
    where = (
        "counted as in one process that holds all: train.shard spreads it, see docs/scale.md"
        if settings.shard
        else "the whole model is in memory while it learns"
    )
    words = f"{settings.steps} steps, {n_tokens:,} tokens, loss {settings.loss}; {where}."
    return replace(
        prior,
        method=recipe.pruner.name,
        calibration=(recipe.calibration.n_sequences, recipe.calibration.seq_len, settings.batch_size),
        memory=memory,
        peak_memory=max(sum(parts.values()) for parts in memory.values()),
        disk={**prior.disk, "checkpoint of learning (given back)": sizes.checkpoint()},
        seconds=seconds,
        notes=(*notes, words),
    )


class _Learning:
    def __init__(self, recipe: Recipe, model: DecoderModel, selections: Sequence[LayerSelection]) -> None:
        assert isinstance(recipe.method, WholeModel)
        self.recipe, self.method, self.model, self.selections = recipe, recipe.method, model, selections
        self.layers = [
            [(one, selection.patterns.get(one.name, recipe.pattern)) for one in selection.prune]
            for selection in selections
        ]
        self.largest_layer = max(sum(math.prod(one.shape) for one, _ in layer) for layer in self.layers)
        state = model.model.state_dict()
        tied = set(model.model.all_tied_weights_keys)
        self.parameters = sum(tensor.numel() for name, tensor in state.items() if name not in tied)

    def memory(self, on_device: bool) -> dict[str, int]:
        """Part -> bytes."""
        size, settings, score = self.model.dtype.itemsize, self.recipe.train, self.method.learns_by == "score"
        n_linears = self._over_linears(lambda n, pattern: n)
        parts = {
            "model": self.parameters * size,
            "learned state, gradients, moments": self._over_linears(self.method.state_bytes),
        }
        if self.method.trains_rest:
            parts["rest of the model: originals, gradients, moments"] = 4 * (self.parameters - n_linears) * size
        by_layer = [
            self._bytes(layer, self.method.forward_bytes) + self._activations([one for one, _ in layer])
            for layer in self.layers
        ]
        one_layer = score or settings.activation_checkpointing
        parts["masked weights and activations"] = max(by_layer) if one_layer else sum(by_layer)
        tokens = settings.batch_size * self.recipe.calibration.seq_len
        config = self.model.config.get_text_config()
        if settings.activation_checkpointing and not score:
            parts["inputs of the decoder layers"] = tokens * config.hidden_size * size * self.model.n_layers
        parts["logits"] = _LOGITS[settings.loss] * 4 * tokens * config.vocab_size
        if self._by_descent:
            parts["Gram matrices of the inputs"] = sum(8 * width**2 for one in self.layers for width in _widths(one))
        if not on_device:
            parts["masks, packed"] = int(_MASKS * n_linears)
        return parts

    def checkpoint(self) -> int:
        """Bytes of a snapshot on disk: what is learned and its moments, without gradients, and the best masks."""
        n_linears = self._over_linears(lambda n, pattern: n)
        share = {"score": 1.0, "gradient": 3 / 4, "descent": 1 / 3}[self.method.learns_by]
        rest = 12 * (self.parameters - n_linears) if self.method.trains_rest else 0
        return int(share * self._over_linears(self.method.state_bytes)) + n_linears // 8 + rest

    def _over_linears(self, n_bytes: Callable[[int, Pattern], int]) -> int:
        return sum(self._bytes(layer, n_bytes) for layer in self.layers)

    def _bytes(self, layer: Sequence[tuple[Linear, Pattern]], n_bytes: Callable[[int, Pattern], int]) -> int:
        return sum(n_bytes(math.prod(one.shape), pattern) for one, pattern in layer)

    def _activations(self, linears: Sequence[Linear]) -> int:
        """Of a micro-batch in one decoder layer."""
        seen = [one for one in linears if one.in_module.expert in (None, 0)]
        hidden = self.model.config.get_text_config().hidden_size
        values = sum(_shared_widths(seen)) + sum(one.shape[0] for one in seen) + 4 * hidden
        tokens = self.recipe.train.batch_size * self.recipe.calibration.seq_len
        share = 1.0 if self.method.learns_by == "score" else _AUTOGRAD
        return int(share * values * tokens * self.model.dtype.itemsize)

    # -- time ---------------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Of all steps and judgements, told from one decoder layer of each kind with random weights."""
        settings, calibration = self.recipe.train, self.recipe.calibration
        kinds: dict[object, int] = {}
        for index, layer in enumerate(self.model.layers):
            if self.layers[index]:
                kinds.setdefault(signature(layer), index)
        batch = (settings.batch_size, calibration.seq_len)
        with observable_experts(self.model.config):
            calls = random_calls(self.model, batch)
            timed = {kind: self._layer(index, calls) for kind, index in kinds.items()}
        head = settings.batch_size * head_seconds_of(self.model, calls.hidden)
        per_layer = [timed[kind] for one in self.model.layers if (kind := signature(one)) in timed]
        forward, learning, after = (sum(one[part] for one in per_layer) for part in range(3))
        dense = forward + head / 3 if settings.loss == "kl" else 0.0
        step = settings.accumulation * (learning + head + dense) + after
        held_out = math.ceil(self.recipe.n_held_out / settings.batch_size)
        looks = 1 + (
            _JUDGED * settings.steps if self._by_descent else 2 * math.ceil(settings.steps / settings.eval_every)
        )
        return settings.steps * step + looks * held_out * (forward + head / 3 + dense)

    def _layer(self, index: int, calls: LayerCalls) -> tuple[float, float, float]:
        """Seconds of one decoder layer: dense forward, learning's forward and backward, what follows in a step."""
        hidden = torch.randn(calls.hidden.shape, generator=torch.Generator().manual_seed(0)).to(calls.hidden)
        phase = Phase(course=Course(0, 1))
        with self.model.random_layer(index) as layer:
            targets = targets_of([layer], [self.layers[index]])
            masked = MaskedModel(targets, self.method, phase, _magnitudes(targets), seed=0)
            with masked.installed():
                forward = _seconds(lambda: self._forward(index, layer, calls, hidden, learns=False))
                phase.kind = "learn"
                learning = _seconds(lambda: self._forward(index, layer, calls, hidden, learns=True))
                if self._by_descent:
                    learning += _seconds(partial(self._grams, index))
                after = _seconds(lambda: self._after(masked))
        return forward, learning, after

    def _forward(self, index: int, layer: torch.nn.Module, calls: LayerCalls, hidden: Tensor, learns: bool) -> None:
        if not learns or self.method.learns_by == "score":
            with torch.no_grad():
                calls.run(index, layer, hidden)
            return
        inputs = hidden.detach().requires_grad_()
        calls.run(index, layer, inputs).float().square().mean().backward()
        if self.recipe.train.activation_checkpointing:
            with torch.no_grad():
                calls.run(index, layer, hidden)

    def _grams(self, index: int) -> None:
        """The Gram matrices of a micro-batch's inputs."""
        n_tokens = self.recipe.train.batch_size * self.recipe.calibration.seq_len
        for width in _widths(self.layers[index]):
            inputs = torch.ones(n_tokens, width, device=self.model.device)
            inputs.T @ inputs

    @torch.no_grad()
    def _rounds_end(self, masked: MaskedModel) -> None:
        """New masks under a few dampings. The time hangs on how many groups change; here few do."""
        for one, weight, state in masked.linears():
            rows, width = one.shape
            slope, curvature = torch.zeros_like(weight), torch.ones(rows, device=weight.device)
            gram = torch.eye(width, device=weight.device)
            mask = self.method.hard_mask(weight, state, one.pattern)
            for _ in range(_JUDGED):
                self.method.revise(weight, mask, slope, curvature, gram, one.pattern, 1.0)

    def _after(self, masked: MaskedModel) -> None:
        """Penalty and step of the learned state."""
        if self._by_descent:
            self._rounds_end(masked)
            return
        optimiser = torch.optim.AdamW(list(masked.parameters().values()), lr=0.0) if self._by_gradient else None
        for one, weight, state in masked.linears():
            generator = torch.Generator(self.model.device).manual_seed(0)
            course = Course(0, 2)
            if optimiser is None:
                with torch.no_grad():
                    self.method.score_step(state, one.pattern, 0.0, course, generator)
                continue
            penalty = self.method.penalty(weight, state, one.pattern, course, generator)
            if penalty is not None:
                penalty.backward()
        if optimiser is not None:
            optimiser.step()
            with torch.no_grad():
                for one, weight, state in masked.linears():
                    self.method.after_step(weight, state, one.pattern, Course(0, 2))

    @property
    def _by_gradient(self) -> bool:
        return self.method.learns_by == "gradient"

    @property
    def _by_descent(self) -> bool:
        return self.method.learns_by == "descent"


def _widths(linears: Sequence[tuple[Linear, Pattern]]) -> list[int]:
    return _shared_widths([one for one, _ in linears])


def _shared_widths(linears: Sequence[Linear]) -> list[int]:
    """Of the tensors that linears read, each once."""
    return list({one.shared_input: one.shape[1] for one in linears}.values())


def _magnitudes(targets: Sequence[Target]) -> Mapping[str, Tensor]:
    found = {}
    for one in targets:
        weight = one.view.of(one.layer.get_parameter(one.parameter)).detach().float()
        found[one.name] = masks.pack(masks.from_scores(weight.abs(), one.pattern)).cpu()
    return found


def _seconds(run: Callable[[], None]) -> float:
    """The faster of two: the first pays for what is made once."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
