"""Sums over sequences of one decoder layer's weight gradients, taken while autograd runs back through the layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nmprune.architectures import Family, Linear, View
from nmprune.stats import InputStats, SegmentSum, Statistic
from nmprune.stream.experts import observed


def n_token_blocks(linear: Linear, n_blocks: int) -> int:
    """How many blocks of a linear's output rows have token weights: none of an expert's, and no more than it has rows."""
    return 0 if linear.in_module.expert is not None else min(n_blocks, linear.shape[0])


class LayerSums:
    """What the sequences' gradients of one decoder layer add up to.

    A gradient is taken when autograd has made it and dropped at once: of whole gradients only one tensor's is in memory.
    Experts held as one 3-D parameter are split for the time, so that an expert which saw no token costs nothing.

    Args:
        family: the table of the layer.
        linears: whose gradients to add up.
        needs: "weight_grad_abs", "weight_grad_sq", both, or neither.
        n_blocks: blocks of output rows for token weights; 0 = no token weights.
        shape: (n_sequences, seq_len) of what is added up here.
        scale: factor on the loss that was backpropagated; taken out of the results.
        device: where the sums live.

    Attributes:
        sums: linear name -> the sums that were asked for, fp32 (out, in), over segments of the sequences; they count tokens.
        sequence: the number of the sequence at work.
    """

    def __init__(
        self,
        family: Family,
        linears: Sequence[Linear],
        needs: frozenset[Statistic],
        n_blocks: int,
        shape: tuple[int, int],
        scale: float,
        device: torch.device,
    ) -> None:
        self._family, self._scale, self._shape = family, scale, shape
        self._experts = {linear.name for linear in linears if linear.in_module.expert is not None}
        self._linears: defaultdict[tuple[str, int | None], list[Linear]] = defaultdict(list)
        for linear in linears:
            self._linears[(linear.parameter, linear.in_module.expert)].append(linear)

        def zeros(linear: Linear) -> list[Tensor]:
            return [torch.zeros(linear.shape, dtype=torch.float32, device=device) for _ in self._kinds]

        self._kinds = [name for name in ("weight_grad_abs", "weight_grad_sq") if name in needs]
        self.sums = {one.name: SegmentSum(partial(zeros, one)) for one in linears if self._kinds}
        self._weighted = bool(needs)
        self._n_blocks = n_blocks
        self._token_weights = {
            one.name: torch.zeros(*shape, own_blocks, dtype=torch.float32, device=device)
            for one in linears
            if (own_blocks := n_token_blocks(one, n_blocks))
        }
        self.sequence = 0

    @contextmanager
    def collecting(self, layer: nn.Module) -> Iterator[None]:
        """Add up the gradients of every backward inside the body; `sequence` is the number of the one at work.

        What the layer's parameters held before, gradients included, is there again afterwards.
        """
        before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in layer.parameters()]
        with ExitStack() as stack:
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            stack.callback(_restore, before)
            if self._weighted:
                self._watch_weights(layer, stack)
            if self._token_weights:
                self._watch_outputs(layer, stack)
            yield

    def _watch_weights(self, layer: nn.Module, stack: ExitStack) -> None:
        split: set[str] = set()
        for (name, expert), linears in self._linears.items():
            if expert is None:
                parameter = layer.get_parameter(name).requires_grad_(True)
                views = [(one.name, one.in_module) for one in linears]
                stack.callback(parameter.register_post_accumulate_grad_hook(partial(self._take, views)).remove)
            elif name not in split:
                split.add(name)
                self._split_experts(layer, name, stack)
        if self._family.experts is not None and split:
            experts = layer.get_submodule(self._family.experts.module)
            stack.enter_context(observed(experts, self._count))

    def _split_experts(self, layer: nn.Module, name: str, stack: ExitStack) -> None:
        """Let the experts module find, in place of its 3-D parameter, one tensor per expert over the same memory."""
        path, _, own = name.rpartition(".")
        matrices = list(layer.get_parameter(name).detach().unbind(0))
        for expert, matrix in enumerate(matrices):
            views = [(one.name, replace(one.in_module, expert=None)) for one in self._linears.get((name, expert), ())]
            if views:
                matrix.requires_grad_(True).register_post_accumulate_grad_hook(partial(self._take, views))
        attributes = vars(layer.get_submodule(path))
        attributes[own] = matrices
        stack.callback(attributes.pop, own)

    def _take(self, views: Sequence[tuple[str, View]], parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        for name, view in views:
            g_OI = view.of(gradient)
            if g_OI.dtype != torch.float32:
                g_OI = g_OI.float()
            for kind, total in zip(self._kinds, self.sums[name].segment(), strict=True):
                if kind == "weight_grad_sq":
                    total.addcmul_(g_OI, g_OI)
                else:
                    total += g_OI.abs()
            if name not in self._experts:
                self.sums[name].n_segment += self._shape[1]

    def _count(self, name: str, expert: int, inputs: Tensor) -> None:
        assert self._family.experts is not None
        for linear in self._linears.get((f"{self._family.experts.module}.{name}", expert), ()):
            self.sums[linear.name].n_segment += inputs.shape[0]

    def _watch_outputs(self, layer: nn.Module, stack: ExitStack) -> None:
        for (name, expert), linears in self._linears.items():
            if expert is None:
                module = layer.get_submodule(name.removesuffix(".weight"))
                stack.callback(module.register_forward_hook(self._output_hook(linears)).remove)

    def _output_hook(self, linears: Sequence[Linear]) -> Callable[..., None]:
        def back(gradient: Tensor) -> None:
            g_TO = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            for linear in linears:
                rows = linear.in_module.rows
                mine_TO = g_TO if rows is None else g_TO[:, rows[0] : rows[1]]
                weights = self._token_weights[linear.name]
                for block, part in enumerate(mine_TO.tensor_split(weights.shape[-1], dim=1)):
                    weights[self.sequence, :, block] = part.square().mean(1)

        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(back)

        return forward

    def stats(self, n_sequences: int) -> dict[str, InputStats]:
        """By linear name: the gradient sums, with the scale taken out. Call it once; empty where none were asked for.

        Args:
            n_sequences: whose gradients were added up, in all processes together.
        """
        found = {}
        for linear in (one for linears in self._linears.values() for one in linears if self._weighted):
            kept = self.sums[linear.name]
            kept.close_segment()
            scales = {"weight_grad_abs": self._scale, "weight_grad_sq": self._scale**2}
            totals: dict[str, Any] = {
                kind: total.div_(scales[kind]) for kind, total in zip(self._kinds, kept.take(), strict=True)
            }
            found[linear.name] = InputStats(n_tokens=kept.n_total, **totals, n_grad_sequences=n_sequences)
        return found

    def token_weights(self) -> dict[str, Tensor]:
        """By linear name: fp32 (n_sequences, seq_len, n_blocks), with the scale taken out. Call it once."""
        return {name: weights.div_(self._scale**2) for name, weights in self._token_weights.items()}


def _restore(before: Sequence[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for parameter, requires_grad, gradient in before:
        parameter.requires_grad_(requires_grad)
        parameter.grad = gradient
