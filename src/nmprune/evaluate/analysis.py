"""Each linear of a pruned model beside its dense self on some text: output error, information, eq. 11; for other masks, too."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.checkpoint import Checkpoint
from nmprune.evaluate.information import DenseOutput, InputSpread, activation_terms, spread_of
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import InputStats, Statistic
from nmprune.stream import DecoderModel, LayerObserved, LayerSelection, LayerStep, StreamOptions, observe_layers
from nmprune.stream.per_linear import relative_error

RUN, MASK = "run", "run's mask, dense weights"
_NEEDS: frozenset[Statistic] = frozenset({"input_gram", "input_sum"})


@dataclass(frozen=True)
class MaskFacts:
    """One linear under one mask.

    Attributes:
        mask: "run" (the model as it is), "run's mask, dense weights" (where the run moved them), "magnitude", "wanda", or
            "wanda, 50 % random": so many of its groups replaced by random ones.
        error: ||X (W' - W)^T||^2 / ||X W^T||^2.
        nats: I(Z; Z' + noise), one for each share of noise.
    """

    mask: str
    error: float
    nats: tuple[float, ...]


@dataclass(frozen=True)
class LinearFacts:
    """One linear on the text; X is its input in the pruned model.

    Attributes:
        name: unique in the model.
        layer: 0-based decoder layer.
        role: its place in the decoder layer.
        shape: (out, in).
        n_tokens: it saw so many.
        input_rank: directions in which its input varies.
        determines_input: the dense output tells all of the input, so that the information does not depend on W.
        mean_term: sum_ij (W'_ij E[x_j])^2, the first term of eq. 11.
        variance_term: sum_ij W'_ij^2 Var[x_j], the second.
        kept: their sum as a share of the dense weights'.
        masks: the run first, then the others.
    """

    name: str
    layer: int
    role: str
    shape: tuple[int, int]
    n_tokens: int
    input_rank: int
    determines_input: bool
    mean_term: float
    variance_term: float
    kept: float
    masks: tuple[MaskFacts, ...]


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer's linears, and of those that could not be looked at the reasons."""

    index: int
    linears: tuple[LinearFacts, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class OtherMasks:
    """What the run's masks are compared with.

    Attributes:
        n_mixed: masks between Wanda's and a random one: the i-th has i / n_mixed of its groups at random.
        moved: the run moved weights: its mask is also looked at with the dense ones.
        seed: of the random groups.
    """

    n_mixed: int
    moved: bool
    seed: int = 0


def analyse_layers(
    dense: Checkpoint,
    pruned: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor,
    noise_shares: Sequence[float],
    others: OtherMasks,
    mask_of: Callable[[Linear], Tensor],
    options: StreamOptions | None = None,
    scratch: Path | None = None,
) -> Iterator[LayerStep | LayerFacts]:
    """One streamed pass over the pruned model; yields a LayerStep per batch and a LayerFacts per decoder layer.

    Args:
        dense: the dense model's tensors (in the pruned model's order of channels).
        pruned: the pruned model, opened from its folder.
        selections: its pruned linears, with their patterns.
        windows: int64 (n_sequences, seq_len) token ids.
        noise_shares: c of the noise's variance c tr(cov Z') / out.
        others: the masks to compare with.
        mask_of: the run's mask of a linear, bool (out, in).
        options: batch size and budget of the pass.
        scratch: folder for hidden states past the budget.
    """
    for step in observe_layers(pruned, windows, selections, _NEEDS, options, scratch=scratch):
        if isinstance(step, LayerStep):
            yield step
            continue
        yield _layer(step, dense, pruned, selections[step.index], noise_shares, others, mask_of)
        del step  # Gram matrices must not stay while the next layer runs


def _layer(
    step: LayerObserved,
    dense: Checkpoint,
    pruned: DecoderModel,
    selection: LayerSelection,
    noise_shares: Sequence[float],
    others: OtherMasks,
    mask_of: Callable[[Linear], Tensor],
) -> LayerFacts:
    found: list[LinearFacts] = []
    left_out: dict[str, str] = {}
    by_input: dict[str, list[Linear]] = {}
    for linear in selection.prune:
        by_input.setdefault(linear.shared_input, []).append(linear)
    for shared_input, linears in by_input.items():
        stats = step.stats.pop(shared_input)  # a Gram matrix and its root are large: one input at a time
        if stats.n_tokens < 2:
            left_out |= {one.name: f"saw {stats.n_tokens} tokens of this text" for one in linears}
            continue
        spread = spread_of(stats)
        for linear in linears:
            weight = pruned.weight(step.layer, linear)
            base = linear.on_disk.of(dense.read(linear.tensor)).to(weight)
            weights = {RUN: weight}
            if others.moved:
                weights[MASK] = base * mask_of(linear).to(base.device)
            pattern = selection.patterns[linear.name]
            weights |= {name: base * one for name, one in _other_masks(linear, base, stats, pattern, others).items()}
            found.append(_linear(step.index, linear, base, weights, stats, spread, noise_shares))
    order = {linear.name: place for place, linear in enumerate(selection.prune)}
    return LayerFacts(step.index, tuple(sorted(found, key=lambda one: order[one.name])), left_out)


def _other_masks(
    linear: Linear, weight_OI: Tensor, stats: InputStats, pattern: Pattern, others: OtherMasks
) -> dict[str, Tensor]:
    """Name -> mask: magnitude, Wanda, and what lies between Wanda's and a random one."""
    found = {one.name: one.prune(weight_OI, stats, pattern).mask for one in (Magnitude(), Wanda())}
    generator = torch.Generator().manual_seed(others.seed + zlib.crc32(linear.name.encode()))
    for number in range(1, others.n_mixed + 1):
        share = number / others.n_mixed
        random_OI = masks.from_scores(torch.rand(weight_OI.shape, generator=generator), pattern).to(weight_OI.device)
        groups_OG = torch.rand(weight_OI.shape[0], weight_OI.shape[1] // pattern.group, generator=generator) < share
        chosen_OI = groups_OG.repeat_interleave(pattern.group, 1).to(weight_OI.device)
        found[f"wanda, {share:.0%} random"] = torch.where(chosen_OI, random_OI, found["wanda"])
    return found


def _linear(
    index: int,
    linear: Linear,
    base: Tensor,
    weights: dict[str, Tensor],
    stats: InputStats,
    spread: InputSpread,
    noise_shares: Sequence[float],
) -> LinearFacts:
    output = DenseOutput(spread, base)
    terms = activation_terms(spread, base, weights[RUN])
    facts = []
    for name, weight in weights.items():
        error = relative_error(weight - base, base, [stats.gram()])
        facts.append(MaskFacts(name, error or 0.0, output.nats(weight, noise_shares)))
    return LinearFacts(
        name=linear.name,
        layer=index,
        role=linear.role,
        shape=linear.shape,
        n_tokens=stats.n_tokens,
        input_rank=spread.root.shape[1],
        determines_input=output.determines_input,
        mean_term=terms.mean_term,
        variance_term=terms.variance_term,
        kept=terms.kept,
        masks=tuple(facts),
    )
