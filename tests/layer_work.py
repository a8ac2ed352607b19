"""One decoder layer of a tiny model as a learner sees it, without a walk around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tiny_models
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.stats import StatsAccumulator
from nmprune.stream import DecoderModel
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.stream.hidden_states import HiddenStates
from nmprune.stream.layer_run import LayerRun
from nmprune.stream.observe import LayerObserver

PATTERN = Pattern(2, 4)


def mean_squares(output_BTD: Tensor, target_BTD: Tensor, input_BTD: Tensor) -> Tensor:
    """(B,): a plain distance."""
    return (output_BTD - target_BTD).square().mean((1, 2))


def layer_work(
    name: str = "llama",
    *,
    index: int = 0,
    pattern: Pattern = PATTERN,
    method: Any = None,
    prior: str = "none",
    n_sequences: int = 6,
    n_held_out: int = 2,
    batch_size: int = 2,
    **changes: Any,
) -> LayerRun:
    """Layer `index` of a random model on random text; its inputs are the dense layers' before it, its targets its own outputs.

    Args:
        name: of `tiny_models.CONFIGS`.
        index: 0-based number of the decoder layer.
        pattern: N kept of M.
        method: whose `distance` and `needs`; None: mean squares, squared norms and Gram matrices.
        prior: name of a one-shot method that the prior masks come from, or "none".
        n_sequences: of 16 tokens.
        n_held_out: of these, the last ones.
        batch_size: sequences that go through together.
        changes: of the model's config.
    """
    model = DecoderModel.from_model(tiny_models.build(name, **changes))
    windows = tiny_models.windows(n_sequences)
    with observable_experts(model.config):
        inputs, calls = model.embed(windows, batch_size, 1 << 30)
        targets = HiddenStates(tuple(inputs.all.shape), inputs.all.dtype, model.device, 1 << 30)
        linears = model.linears(index)[0]
        needs = frozenset({"input_sq_norm", "input_gram"} if method is None else method.needs)
        needs |= frozenset() if prior == "none" else create(prior).needs
        wanted = {one.shared_input for one in linears}
        layer = model.layers[index]
        observer = LayerObserver(layer, model.family, model.module_linears(index), wanted, needs, model.device)
        with torch.no_grad():
            for batch in inputs.batches(batch_size):
                for before in range(index):
                    inputs.put(batch, _run(calls, model, before, inputs.get(batch)))
                with observer.watching():
                    targets.put(batch, _run(calls, model, index, inputs.get(batch)))
    found = observer.results()
    empty = {one.shape[1]: StatsAccumulator(one.shape[1], needs).result() for one in linears}
    stats = {one.name: found.get(one.shared_input, empty[one.shape[1]]) for one in linears}
    taught = [one for one in linears if stats[one.name].n_tokens]
    weights = {one.name: model.weight(layer, one) for one in taught}
    priors = {} if prior == "none" else {n: create(prior).prune(w, stats[n], pattern).mask for n, w in weights.items()}

    def calls_of(size: int) -> LayerCalls:
        return calls[size] if size in calls else model.calls(windows[:size])

    return LayerRun(
        index,
        model.n_layers,
        layer,
        taught,
        weights=weights,
        patterns=dict.fromkeys(weights, pattern),
        priors=priors,
        stats={name: stats[name] for name in weights},
        inputs=inputs,
        targets=targets,
        calls_of=calls_of,
        batch_size=batch_size,
        n_sequences=n_sequences,
        n_held_out=n_held_out,
        distance=mean_squares if method is None else method.distance,
    )


def _run(calls: dict[int, LayerCalls], model: DecoderModel, index: int, hidden: Tensor) -> Tensor:
    return calls[len(hidden)].run(index, model.layers[index], hidden)
