"""Whole-model learners on two-layer models, for tests of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny_models
from nmprune import masks
from nmprune.methods.base import LearnStep, State, WholeModel
from nmprune.methods.maskllm import MaskLLM
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, select
from nmprune.stream.experts import observable_experts
from nmprune.stream.input_sums import InputSums
from nmprune.train.judge import Learned
from nmprune.train.loop import Text, learn
from nmprune.train.masked_linear import Target, targets_of
from nmprune.train.settings import TrainRecipe

PATTERN = Pattern(2, 4)
# Large steps and little noise: on random models of two layers a few steps then change masks.
QUICK = MaskLLM(gate_std=0.0, prior_strength=1.0, kappa_first=3.0, kappa_last=6.0, lr=0.3, lr_last=0.1, sparse_reg=1e-3)


def targets(model: PreTrainedModel, pattern: Pattern = PATTERN) -> list[Target]:
    """Every prunable linear of a model in memory."""
    decoder = DecoderModel.from_model(model)
    selections = select(decoder, pattern)
    return targets_of(list(decoder.layers), [[(one, pattern) for one in selection.prune] for selection in selections])


def magnitudes(found: Sequence[Target]) -> dict[str, Tensor]:
    """Magnitude masks, packed."""
    return {one.name: masks.pack(masks.from_scores(weight(one).abs(), one.pattern)).cpu() for one in found}


def weight(target: Target) -> Tensor:
    """The linear's weight as it lies in the model, (out, in)."""
    return target.view.of(target.layer.get_parameter(target.parameter)).detach().clone()


def run(
    model: PreTrainedModel,
    method: WholeModel = QUICK,
    *,
    snapshot: State | None = None,
    stop_after: int | None = None,
    seed: int = 0,
    pattern: Pattern = PATTERN,
    text: Text | None = None,
    **settings: Any,
) -> tuple[list[LearnStep], Learned | State]:
    """All that the loop yields, and what it returns; with `stop_after`, the snapshot after that step."""
    found = targets(model, pattern)
    decoder = DecoderModel.from_model(model)
    windows = tiny_models.windows(8)
    text = text or Text(windows[:6], windows[6:])
    wanted = TrainRecipe(**{"steps": 6, "batch_size": 2, "eval_every": 2, **settings})
    steps: list[LearnStep] = []
    with observable_experts(model.config):
        inputs = InputSums(decoder, select(decoder, pattern))
        layers, priors = list(decoder.layers), magnitudes(found)
        loop = learn(model, layers, found, method, priors, text, wanted, seed, snapshot, inputs=inputs)
        while True:
            try:
                steps.append(next(loop))
            except StopIteration as end:
                return steps, end.value
            if steps[-1].step == stop_after:
                kept = steps[-1].snapshot()
                loop.close()
                return steps, kept


def logits(model: PreTrainedModel) -> Tensor:
    """Of two windows."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tiny_models.windows(2), use_cache=False).logits
    return found
