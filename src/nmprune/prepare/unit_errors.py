"""What each pattern would cost each linear, measured in one pass over the dense model.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nmprune.architectures import Linear
from nmprune.errors import InputError
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.prepare.allocation import Measured, Unit
from nmprune.prepare.choices import Choice
from nmprune.prepare.owl import outlier_share
from nmprune.stats import InputStats, Statistic
from nmprune.stream import DecoderModel, LayerObserved, LayerSelection, LayerStep, StreamOptions, observe_layers

NEEDS: frozenset[Statistic] = frozenset({"input_gram"})


def measure_layers(
    model: DecoderModel,
    windows: Tensor,
    selections: Sequence[LayerSelection],
    choices: Sequence[Choice],
    options: StreamOptions | None = None,
    *,
    owl_m: float | None = None,
    scratch: Path | None = None,
) -> Generator[LayerStep | Measured, None, None]:
    """Measure every unit under every choice; yields a LayerStep per batch and linear and a Measured per decoder layer.

    The error of a linear under a pattern is ||X (W' - W)^T||^2 / ||X W^T||^2, X its input in the dense model and W' its
    weights under Wanda's mask: exact for that mask, from the Gram matrix. Experts of a kind are one unit, their squared
    errors and outputs added up. A unit whose output is zero on all calibration tokens (experts that saw none) counts the
    weights instead: ||W' - W||^2 / ||W||^2 by magnitude.

    Args:
        model: streamed from a folder, or in memory; its weights stay as they are.
        windows: int64 (n_sequences, seq_len) calibration token ids.
        selections: from `select`, one per layer.
        choices: the set; every linear's width is a whole number of each pattern's groups.
        options: how hidden states flow.
        owl_m: also count OWL's outliers above this many times the mean; None = not (the shares are then 0).
        scratch: folder for hidden states past the budget.

    Raises:
        InputError: a weight or a statistic is not finite; the message names the linear.
    """
    n_batches = 0
    for step in observe_layers(model, windows, selections, NEEDS, options, scratch=scratch):
        linears = selections[step.index].prune
        if isinstance(step, LayerObserved):
            work = _Layer(model, step, linears, choices)
            for done, linear in enumerate(linears, start=1):
                work.add(linear)
                yield LayerStep(step.index, "measure", n_batches + done, n_batches + len(linears))
            yield Measured(step.index, 0.0 if owl_m is None else outlier_share(work.scores, owl_m), work.units())
            del work
        else:
            n_batches = step.total
            yield replace(step, total=n_batches + len(linears))
        del step  # its Gram matrices must not stay while the next layer runs


@dataclass
class Energies:
    """Squared norms: of the whole, and of what each choice takes away; of a linear, or added up over a unit's."""

    whole: float = 0.0
    lost: tuple[float, ...] = ()

    def add(self, other: Energies) -> None:
        """Add a linear's."""
        self.whole += other.whole
        self.lost = tuple(a + b for a, b in zip(self.lost or (0.0,) * len(other.lost), other.lost, strict=True))


class _Layer:
    """One decoder layer, its weights and statistics in memory."""

    def __init__(
        self, model: DecoderModel, observed: LayerObserved, linears: Sequence[Linear], choices: Sequence[Choice]
    ) -> None:
        self._model, self._observed, self._linears, self._choices = model, observed, linears, choices
        self._outputs: defaultdict[str, Energies] = defaultdict(Energies)
        self._weights: defaultdict[str, Energies] = defaultdict(Energies)

    def add(self, linear: Linear) -> None:
        """Measure one linear.

        Raises:
            InputError: its weight or its statistics are not finite.
        """
        weight_OI = self._model.weight(self._observed.layer, linear)
        try:
            output, weights = linear_errors(weight_OI, self._observed.stats[linear.shared_input], self._choices)
        except InputError as error:
            raise error.located(linear.name) from error
        self._outputs[unit_key(linear)].add(output)
        self._weights[unit_key(linear)].add(weights)

    def scores(self) -> Iterator[Tensor]:
        """|w| * root mean square of its input, linear by linear: comparable between experts of different token counts."""
        for linear in self._linears:
            stats = self._observed.stats[linear.shared_input]
            norm_I = (stats.squared_norms() / max(stats.n_tokens, 1)).sqrt()
            weight_OI = self._model.weight(self._observed.layer, linear)
            yield weight_OI.abs() * norm_I.to(weight_OI)

    def units(self) -> tuple[Unit, ...]:
        """The layer's units, in order of execution."""
        members: defaultdict[str, list[Linear]] = defaultdict(list)
        for linear in self._linears:
            members[unit_key(linear)].append(linear)
        return tuple(self._unit(key, linears) for key, linears in members.items())

    def _unit(self, key: str, linears: Sequence[Linear]) -> Unit:
        sums = self._outputs[key] if self._outputs[key].whole > 0 else self._weights[key]
        alone = linears[0].in_module.expert is None
        return Unit(
            name=linears[0].name if alone else f"{self._model.family.layers}.{self._observed.index}.{key}",
            layer=self._observed.index,
            role=linears[0].role,
            linears=tuple(linear.name for linear in linears),
            n_weights=sum(math.prod(linear.shape) for linear in linears),
            errors=tuple(max(lost, 0.0) / sums.whole if sums.whole > 0 else 0.0 for lost in sums.lost),
        )


def unit_key(linear: Linear) -> str:
    """What tells a decoder layer's units apart: the linear's name, or the role that all experts of a kind share."""
    return linear.name if linear.in_module.expert is None else linear.role


def linear_errors(weight_OI: Tensor, stats: InputStats, choices: Sequence[Choice]) -> tuple[Energies, Energies]:
    """What each choice takes from one linear: of its output on the calibration tokens, and of its weights.

    Args:
        weight_OI: fp32 (out, in), dense.
        stats: with the Gram matrix of its input.
        choices: the set.

    Raises:
        InputError: the weight or the statistics are not finite, or the width does not fit a pattern.
    """
    output, weights = Energies(_output_energy(weight_OI, stats.gram())), Energies(_energy(weight_OI))
    for choice in choices:
        lost_OI = None if choice is None else torch.where(_mask(weight_OI, stats, choice), 0.0, weight_OI)
        output.lost += (0.0 if lost_OI is None else _output_energy(lost_OI, stats.gram()),)
        weights.lost += (0.0 if lost_OI is None else _energy(lost_OI),)
    return output, weights


def _mask(weight_OI: Tensor, stats: InputStats, pattern: Pattern) -> Tensor:
    """Wanda's mask; by magnitude where an expert saw no token."""
    method = Wanda() if stats.n_tokens else Magnitude()
    return method.prune(weight_OI, stats, pattern).mask


def _output_energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    """||X W^T||_F^2 from X^T X."""
    return _total((weight_OI @ gram_II).mul_(weight_OI))


def _energy(weight_OI: Tensor) -> float:
    return _total(weight_OI.square())


def _total(values_OI: Tensor) -> float:
    return values_OI.sum(-1).cpu().double().sum().item()
