"""Find channel permutations under which N:M costs less: one pass over the dense model, before any linear is pruned.

The objective of a space is the share of Wanda's squared scores, |w_ij|^2 ||x_j||^2, that the best N of every group keep,
averaged over the linears that read the space: to first order what is lost is the relative output error. Without
calibration it is that of |w_ij|^2. A permutation that does not raise it is not taken.

Legend: B blocks of a space, S channels of a block, R rows, I columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.architectures.channels import RESIDUAL, Channels, Kind, Space
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.prepare.swap_search import retained, search
from nmprune.results import PermutationResult
from nmprune.stats import InputStats, Statistic
from nmprune.stream import DecoderModel, LayerObserved, LayerSelection, LayerStep, StreamOptions, observe_layers

NEEDS: frozenset[Statistic] = frozenset({"input_sq_norm"})
# Scores that a search looks at; of more, evenly spaced rows, but at least so many. Judged are always all rows.
_SEARCHED, _LEAST_ROWS = 1 << 23, 256


@dataclass(frozen=True)
class SpaceFound:
    """What was found for one channel space.

    Attributes:
        result: the numbers.
        permutation: int64 (B, S) on the CPU; None where none is taken.
    """

    result: PermutationResult
    permutation: Tensor | None


def check_kinds(
    channels: Channels, kinds: Collection[Kind], pattern: Pattern, selections: Sequence[LayerSelection]
) -> None:
    """Raise InputError where a kind cannot help with this pattern or has nothing to do."""
    for kind in kinds:
        spaces = [space for space in channels.spaces.values() if space.kind == kind]
        read = {name for index in range(len(selections)) for name in _readers(channels, selections[index], index)}
        if not any(space.name in read for space in spaces):
            raise InputError(
                f"permute {kind}: every linear that reads these channels stays dense, so there is nothing to gain. Leave "
                f"{kind} out."
            )
        for space in spaces:
            if space.name in read and space.shape[1] % pattern.group:
                raise InputError(
                    f"permute {kind}: {space.name} has {space.shape[1]} channels a {'head' if kind == 'heads' else 'block'}, "
                    f"not a whole number of groups of {pattern.group}. Leave {kind} out, or choose another pattern."
                )


def find_permutations(
    model: DecoderModel,
    channels: Channels,
    windows: Tensor | None,
    selections: Sequence[LayerSelection],
    pattern: Pattern,
    kinds: Collection[Kind],
    options: StreamOptions | None = None,
    *,
    scratch: Path | None = None,
) -> Generator[LayerStep | SpaceFound, None, None]:
    """Look for permutations; yields a LayerStep at every sign of life and a SpaceFound per space.

    One decoder layer is in memory at a time. With "residual" every layer is read a second time, without a forward, to
    judge what was found on all rows of all linears: a step of that pass has the phase "judge".

    Args:
        model: dense and not permuted; it stays as it is.
        channels: its spaces.
        windows: int64 (n_sequences, seq_len) calibration token ids; None = weights alone.
        selections: what will be pruned; linears that stay dense have no say.
        pattern: N kept of M, what all of them are judged by.
        kinds: which spaces: ffn, heads, residual.
        options: how hidden states flow; an expert that saw fewer than `min_expert_tokens` counts by its weights alone.
        scratch: folder for hidden states past the budget.

    Raises:
        InputError: see `check_kinds`; or a weight is not finite.
    """
    check_kinds(channels, kinds, pattern, selections)
    options = options or StreamOptions()
    finder = _Finder(model, channels, selections, pattern, options.min_expert_tokens)
    for step in observe_layers(model, windows, selections, NEEDS, options, scratch=scratch):
        if isinstance(step, LayerObserved):
            yield from finder.layer_spaces(step, kinds)
            if "residual" in kinds:
                finder.sample_residual(step)
            yield LayerStep(step.index, "search", 1, 1)
        else:
            # the search of a layer takes about as long as its forwards
            yield LayerStep(step.index, step.phase, step.done, 2 * step.total)
        del step
    if "residual" in kinds:
        yield from finder.residual()


def searched_scores(
    channels: Channels, selections: Sequence[LayerSelection], kinds: Collection[Kind]
) -> dict[Kind, int]:
    """How many scores the searches of each kind will look at, for plans."""
    scores: dict[Kind, int] = dict.fromkeys(kinds, 0)
    residual_rows = 0
    for index, selection in enumerate(selections):
        for name, linears in _readers(channels, selection, index).items():
            space = channels.spaces[name]
            if space.kind == "residual":
                residual_rows += sum(linear.shape[0] for linear in linears)
            elif space.kind in kinds:
                scores[space.kind] += sum(_searched(math.prod(one.shape) // space.shape[1], space) for one in linears)
    if "residual" in kinds:
        scores["residual"] = _searched(residual_rows, channels.spaces[RESIDUAL])
    return scores


def _searched(n_rows: int, space: Space) -> int:
    return n_rows // _every(n_rows, space.shape[1]) * space.shape[1]


@dataclass
class _Finder:
    model: DecoderModel
    channels: Channels
    selections: Sequence[LayerSelection]
    pattern: Pattern
    min_expert_tokens: int
    sampled: list[Tensor] = field(default_factory=list)
    stats: dict[tuple[int, str], InputStats] = field(default_factory=dict)

    @cached_property
    def residual_step(self) -> int:
        """Of the rows of all linears that read the residual stream, every how many-th is searched."""
        n_rows = sum(
            linear.shape[0]
            for index, selection in enumerate(self.selections)
            for linear in _readers(self.channels, selection, index).get(RESIDUAL, ())
        )
        return _every(n_rows, self.channels.spaces[RESIDUAL].shape[1])

    def layer_spaces(self, seen: LayerObserved, kinds: Collection[Kind]) -> Iterator[SpaceFound]:
        """The spaces inside one decoder layer."""
        for name, linears in _readers(self.channels, self.selections[seen.index], seen.index).items():
            space = self.channels.spaces[name]
            if space.kind in kinds and space.kind != "residual":
                yield self._space(space, linears, seen)

    def _space(self, space: Space, linears: Sequence[Linear], seen: LayerObserved) -> SpaceFound:
        n_blocks, size = space.shape
        permutation_BS = torch.arange(size).repeat(n_blocks, 1)
        before = after = 0.0
        n_taken = 0
        for linear in linears:
            scores_OI = self._scores(seen.layer, linear, seen.stats.get(linear.shared_input))
            for block, scores_RS in _blocks(space, linear, scores_OI):
                order_S = search(scores_RS[:: _every(*scores_RS.shape)], self.pattern, self._generator())
                kept = retained(scores_RS, self.pattern)
                better = retained(scores_RS[:, order_S], self.pattern)
                before += kept
                after += max(kept, better)
                if better > kept:
                    permutation_BS[block] = order_S.cpu()
                    n_taken += 1
        share = 1 / len(linears)
        result = PermutationResult(
            space.name, space.kind, space.layer, len(linears), before * share, after * share, n_taken, n_blocks
        )
        return SpaceFound(result, permutation_BS if n_taken else None)

    def sample_residual(self, seen: LayerObserved) -> None:
        """Keep some rows of the scores of every linear that reads the residual stream, and the norms of its inputs."""
        for linear in _readers(self.channels, self.selections[seen.index], seen.index).get(RESIDUAL, ()):
            stats = seen.stats.get(linear.shared_input)
            if stats is not None:
                self.stats[seen.index, linear.shared_input] = stats  # norms: small, and the judgement needs them all
            rows_RI = self._scores(seen.layer, linear, stats)[:: self.residual_step]
            self.sampled.append(rows_RI * (linear.shape[0] / rows_RI.shape[0]))

    def residual(self) -> Iterator[LayerStep | SpaceFound]:
        """The permutation of the residual stream, found on the sampled rows and judged on all."""
        space = self.channels.spaces[RESIDUAL]
        order_S = search(torch.cat(self.sampled), self.pattern, self._generator())
        self.sampled.clear()
        before = after = 0.0
        n_linears = 0
        for index, selection in enumerate(self.selections):
            linears = _readers(self.channels, selection, index).get(RESIDUAL, ())
            if linears:
                with self.model.layer(index) as layer:
                    for linear in linears:
                        scores_OI = self._scores(layer, linear, self.stats.get((index, linear.shared_input)))
                        before += retained(scores_OI, self.pattern)
                        after += retained(scores_OI[:, order_S], self.pattern)
                n_linears += len(linears)
            yield LayerStep(index, "judge", 1, 1)
        taken = after > before
        result = PermutationResult(
            space.name,
            space.kind,
            None,
            n_linears,
            before / n_linears,
            max(before, after) / n_linears,
            int(taken),
            1,
        )
        yield SpaceFound(result, order_S.cpu()[None] if taken else None)

    def _scores(self, layer: nn.Module, linear: Linear, stats: InputStats | None) -> Tensor:
        """A linear's squared scores as shares of their sum, fp32 (out, in)."""
        scores_OI = self.model.weight(layer, linear).square_()
        few = linear.in_module.expert is not None and stats is not None and stats.n_tokens < self.min_expert_tokens
        if stats is not None and not few and stats.n_tokens:
            scores_OI *= (stats.squared_norms() / stats.n_tokens).to(scores_OI)
        if not masks.all_finite(scores_OI):
            raise InputError(
                f"{linear.name}: weights or calibration activations are NaN or infinite, so no order of its channels can be "
                "judged. Check the checkpoint, or use --dtype float32."
            )
        return scores_OI.div_(scores_OI.sum().clamp(min=torch.finfo(torch.float32).tiny))

    def _generator(self) -> torch.Generator:
        """The same draws for every space: what is found for one does not depend on which others were looked at."""
        return torch.Generator().manual_seed(0)


def _readers(channels: Channels, selection: LayerSelection, index: int) -> Mapping[str, list[Linear]]:
    """Space -> the linears of a decoder layer that are to be pruned and whose inputs are its channels."""
    readers: defaultdict[str, list[Linear]] = defaultdict(list)
    for linear in selection.prune:
        prefix = channels.layer_prefix(index)
        for carrier in channels.carriers[prefix + linear.parameter]:
            if carrier.axis == linear.in_module.group_axis:
                readers[carrier.space].append(linear)
    return readers


def _blocks(space: Space, linear: Linear, scores_OI: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(block, scores of its channels (rows, S)): of query heads that share a key-value head, one below the other."""
    if space.experts:
        assert linear.in_module.expert is not None
        yield linear.in_module.expert, scores_OI
        return
    n_blocks, size = space.shape
    by_block = scores_OI.view(scores_OI.shape[0], n_blocks, -1, size)
    for block in range(n_blocks):
        yield block, by_block[:, block].reshape(-1, size)


def _every(n_rows: int, n_columns: int) -> int:
    """Every how many-th row a search looks at."""
    return max(1, n_rows // max(_SEARCHED // n_columns, _LEAST_ROWS))
