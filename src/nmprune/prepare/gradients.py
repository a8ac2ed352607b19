"""Gradients of the language-model loss, streamed: no moment holds more than one decoder layer's weights or gradients.

Forward through the layers, keeping each layer's input; the loss and its gradient at the head; then the layers from last
to first, each run once more with autograd. In all about four forwards, and hidden states of all layers instead of one.

The loss is, for each sequence by itself, the mean next-token cross-entropy of the dense model. It is multiplied by a power
of two before it is differentiated, which 16-bit gradients need (a token's part of the mean is tiny) and which leaves no
trace in the results.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nmprune import masks
from nmprune.distributed import ALONE, Processes
from nmprune.errors import InputError
from nmprune.heap import give_back
from nmprune.prepare.layer_sums import LayerSums
from nmprune.stats import GRADIENTS, InputStats, Statistic
from nmprune.stream import DecoderModel, LayerSelection
from nmprune.stream.calls import LayerCalls
from nmprune.stream.experts import observable_experts
from nmprune.stream.hidden_states import HiddenStates
from nmprune.stream.phases import Phases
from nmprune.stream.shares import close_turn, share_of

BACKWARD_PASSES = (
    3  # what one decoder layer costs on the way back, in forwards: the layer again, then two products each
)


@dataclass(frozen=True)
class GradientStep:
    """A sign of life, for progress bars.

    Attributes:
        phase: what is being done.
        done: work finished, in forwards of one decoder layer over one sequence.
        total: of all of it.
    """

    phase: Literal["forward", "head", "backward"]
    done: int
    total: int


@dataclass(frozen=True)
class LayerGradients:
    """One decoder layer's gradients.

    Attributes:
        index: 0-based number of the decoder layer; layers come last to first.
        stats: linear name -> `n_tokens`, `weight_grad_abs`, `weight_grad_sq`, `n_grad_sequences`, on the compute device;
            empty in other processes than process 0, and so are the token weights.
        token_weights: linear name -> fp32 (n_sequences, seq_len, n_blocks): per token and block of output rows the mean
            square of the loss's gradient with respect to the linear's outputs. Not available for experts.
        seconds: since the last LayerGradients, or since the start; the forward counts with the first.
        input_gradient: (n_sequences, seq_len, hidden), what a later call takes as `restart`. Valid until the generator
            goes on. None where several processes have a share of it each.
    """

    index: int
    stats: dict[str, InputStats]
    input_gradient: Tensor | None
    token_weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def layer_gradients(
    model: DecoderModel,
    windows: Tensor,
    selections: Sequence[LayerSelection],
    needs: frozenset[Statistic],
    *,
    token_blocks: int = 0,
    hidden_budget: int = 8 << 30,
    finished: Callable[[int], bool] = lambda index: False,
    restart: tuple[int, Tensor] | None = None,
    scratch: Path | None = None,
    n_segments: int = 8,
    processes: Processes = ALONE,
) -> Generator[GradientStep | LayerGradients, None, None]:
    """Gradient sums of the linears that are to be pruned; yields a LayerGradients per decoder layer, last to first.

    The model stays as it is. Sequences go one at a time: each has a gradient of its own.

    Args:
        model: streamed from a folder, or in memory.
        windows: int64 (n_sequences, seq_len) calibration token ids.
        selections: from `select`, one per layer.
        needs: of GRADIENTS, what to add up; the rest is ignored.
        token_blocks: blocks of output rows for token weights (a linear with fewer rows has as many blocks as rows);
            0 = no token weights.
        hidden_budget: bytes of hidden states kept in RAM; layer inputs beyond it live in disk-backed files.
        finished: layers that an interrupted run has already; they are only run through where a layer before them is not.
        restart: (layer, its `input_gradient`) of an interrupted run; that layer and all later ones are finished.
        scratch: folder for hidden states past the budget.
        n_segments: sums are taken over so many segments of the sequences, and the segments' sums added in order.
        processes: those that share the run; each has the hidden states of its own sequences, and process 0 gets the sums.

    Raises:
        InputError: the loss or its gradient is not finite, or there is no room for the hidden states.
    """
    left = [index for index, one in enumerate(selections) if one.prune and not finished(index)]
    if not left:
        return
    wanted = GRADIENTS & needs
    with observable_experts(model.config), ExitStack() as stack:
        walk = _Backward(
            model,
            windows,
            selections,
            wanted,
            token_blocks,
            hidden_budget,
            finished,
            scratch,
            n_segments,
            processes,
        )
        stack.callback(walk.close)
        yield from walk.run(min(left), restart)


class _Backward:
    def __init__(
        self,
        model: DecoderModel,
        windows: Tensor,
        selections: Sequence[LayerSelection],
        needs: frozenset[Statistic],
        token_blocks: int,
        hidden_budget: int,
        finished: Callable[[int], bool],
        scratch: Path | None,
        n_segments: int,
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.shares = [
            share_of(len(windows), 1, 0, n_segments, replace(processes, rank=rank))
            for rank in range(processes.world_size)
        ]
        self.share = self.shares[processes.rank]
        self.n_sequences = len(windows)
        windows = windows[self.share.sequences]
        self.model, self.windows, self.selections, self.needs = model, windows, selections, needs
        self.token_blocks, self.finished, self.scratch = token_blocks, finished, scratch
        self.budget = hidden_budget
        self.inputs: dict[int, HiddenStates] = {}
        self.gradient: HiddenStates | None = None
        self.sequences = self.share.batches
        self.scale = 2.0 ** (windows.shape[1] - 1).bit_length()
        self.phases = Phases(model.device)
        self.counted = 0.0
        self.done = self.total = 0

    def close(self) -> None:
        """Give memory and files of all hidden states back."""
        for kept in (*self.inputs.values(), *([self.gradient] if self.gradient else [])):
            kept.close()

    def run(self, lowest: int, restart: tuple[int, Tensor] | None) -> Iterator[GradientStep | LayerGradients]:
        """Layers from the last, or from before the restart, down to `lowest`."""
        top = self.model.n_layers if restart is None else restart[0]
        if lowest >= top:
            raise ValueError(f"restart at layer {top}, but layer {lowest} is not finished")
        last_forward = top if restart is None else top - 1  # the output of the layer before a restart is not needed
        n_sequences = len(self.sequences)
        self.total = n_sequences * (last_forward + (restart is None) + BACKWARD_PASSES * (top - lowest))
        yield from self._forward(lowest, last_forward)
        if restart is None:
            yield from self._head()
        else:
            self._take_over(restart[1])
            del restart
        for index in range(top - 1, lowest - 1, -1):
            yield from self._layer(index)

    def _step(self, phase: Literal["forward", "head", "backward"], work: int = 1) -> GradientStep:
        self.done += work
        return GradientStep(phase, self.done, self.total)

    def _store(self, dtype: torch.dtype, hidden_size: int) -> HiddenStates:
        """Room for one layer's inputs: in RAM as long as the budget lasts."""
        shape = (*self.windows.shape, hidden_size)
        store = HiddenStates((shape[0], shape[1], shape[2]), dtype, self.model.device, self.budget, self.scratch)
        self.budget -= 0 if store.on_disk else store.all.nbytes
        return store

    def _forward(self, lowest: int, stop: int) -> Iterator[GradientStep]:
        """Keep the inputs of layers `lowest` to `stop` - 1 and what comes out of the last one that runs."""
        with self.phases("gradients"):
            current, calls = self.model.embed(self.windows, 1, self.budget, self.scratch)
            self.calls: LayerCalls = calls[1]
        self.budget -= 0 if current.on_disk else current.all.nbytes
        self.inputs[0] = current
        for index in range(stop):
            following = self._store(current.all.dtype, current.all.shape[-1]) if index >= lowest else current
            self.inputs[index + 1] = following
            if following is current:
                del self.inputs[index]
            with ExitStack() as stack:
                with self.phases("gradients"):
                    layer = stack.enter_context(self.model.layer(index))
                for sequence in self.sequences:
                    with self.phases("gradients"), torch.no_grad():
                        following.put(sequence, self.calls.run(index, layer, current.get(sequence)))
                    yield self._step("forward")
            current = following
        give_back()

    def _head(self) -> Iterator[GradientStep]:
        """Replace the last layer's outputs by the loss's gradient with respect to them."""
        self.gradient = store = self.inputs.pop(self.model.n_layers)
        with ExitStack() as stack:
            with self.phases("gradients"):
                stack.enter_context(self.model.head())
            for number, sequence in enumerate(self.sequences):
                with self.phases("gradients"):
                    ids = self.windows[sequence].to(self.model.device)
                    hidden = store.get(sequence).detach().requires_grad_()
                    with torch.enable_grad():
                        logits = self.model.logits(hidden, ids)[0, :-1].float()
                        loss = nn.functional.cross_entropy(logits, ids[0, 1:]) * self.scale
                    (gradient,) = torch.autograd.grad(loss, hidden)
                    del logits
                    if not masks.all_finite(gradient):
                        raise InputError(
                            f"the loss of calibration sequence {self.share.sequences[number]} is "
                            f"{loss.item() / self.scale:g}, or its gradient is not finite: check the checkpoint, or use "
                            "--dtype float32."
                        )
                    store.put(sequence, gradient)
                yield self._step("head")
        give_back()

    def _take_over(self, gradient: Tensor) -> None:
        kept = next(iter(self.inputs.values()))
        if gradient.shape != kept.all.shape:
            raise ValueError(f"restart from {tuple(gradient.shape)}, expected {tuple(kept.all.shape)}")
        self.gradient = self._store(gradient.dtype, gradient.shape[-1])
        self.gradient.all.copy_(gradient)

    def _layer(self, index: int) -> Iterator[GradientStep | LayerGradients]:
        """Run one layer back: the gradient of its output becomes that of its input."""
        assert self.gradient is not None
        linears = () if self.finished(index) else self.selections[index].prune
        shape = (self.windows.shape[0], self.windows.shape[1])
        device = self.model.device
        inputs = self.inputs.pop(index)
        sums = LayerSums(self.model.family, linears, self.needs, self.token_blocks, shape, self.scale, device)
        with ExitStack() as stack:
            stack.callback(inputs.close)
            with self.phases("gradients"):
                layer = stack.enter_context(self.model.layer(index))
                stack.enter_context(sums.collecting(layer))
            for turn in self.share.turns:
                for sequence in turn.batches:
                    sums.sequence = sequence.start
                    with self.phases("gradients"):
                        hidden = inputs.get(sequence).detach().requires_grad_()
                        self.gradient.put(
                            sequence, back_through(self.calls, index, layer, hidden, self.gradient.get(sequence))
                        )
                    yield self._step("backward", BACKWARD_PASSES)
                with self.phases("gradients"):
                    close_turn([(one, (0,)) for one in sums.sums.values()], turn, self.processes)
        give_back()
        if linears:
            with self.phases("gradients"):
                token_weights = self._gathered(sums.token_weights())
                stats = sums.stats(self.n_sequences) if self.processes.is_main else {}
            seconds = self.phases.seconds["gradients"]
            kept = self.gradient.all if self.processes.alone else None
            yield LayerGradients(index, stats, kept, token_weights, seconds - self.counted)
            self.counted = seconds

    def _gathered(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Token weights of all sequences, in process 0."""
        if self.processes.alone:
            return own
        found = {}
        for name, mine in own.items():
            every = mine.new_empty(self.n_sequences, *mine.shape[1:])
            for rank, share in enumerate(self.shares):
                part = mine if rank == self.processes.rank else mine.new_empty(len(share.sequences), *mine.shape[1:])
                self.processes.pass_(part, rank, (0,))
                every[share.sequences] = part
            if self.processes.is_main:
                found[name] = every
        return found


def back_through(calls: LayerCalls, index: int, layer: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The loss's gradient with respect to a decoder layer's input, from that with respect to its output.

    Args:
        calls: how the model calls its layers, for one sequence.
        index: which layer.
        layer: its module, weights in memory; parameters that want gradients get them.
        hidden: (1, seq_len, hidden), the layer's input, wanting a gradient.
        gradient: (1, seq_len, hidden), of the layer's output.
    """
    with torch.enable_grad():
        output = calls.run(index, layer, hidden)
    output.backward(gradient)
    assert hidden.grad is not None
    return hidden.grad
