"""What the layer walker yields, and what steers it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from nmprune import masks
from nmprune.architectures.linears import DenseLinear
from nmprune.methods.base import LearnStep, Pruned, State
from nmprune.pattern import Pattern
from nmprune.results import LearnedLayerResult, LinearResult


@dataclass(frozen=True)
class StreamOptions:
    """How hidden states flow; none of these belong to a method.

    Attributes:
        propagate: which layer feeds the next: "pruned" (the field's usual way) or "dense".
        true_sequential: observe each shared input only after the linears before it in the layer were pruned.
        batch_size: sequences per forward; 0 = chosen from the sequence length.
        hidden_budget: bytes of hidden states kept in RAM; beyond it they live in a disk-backed file.
        min_expert_tokens: an expert that saw fewer tokens is pruned by magnitude, and the record says so.
        n_held_out: the last so many calibration sequences are held out, where the method asks for such statistics.
        sum_segments: statistics are added up over so many segments of the sequences, and the segments' sums in order: as
            many processes can share the run, and find the same.
    """

    propagate: Literal["pruned", "dense"] = "pruned"
    true_sequential: bool = False
    batch_size: int = 0
    hidden_budget: int = 8 << 30
    min_expert_tokens: int = 32
    n_held_out: int = 0
    sum_segments: int = 8


@dataclass(frozen=True)
class Restart:
    """Where an interrupted run can go on: the inputs of a layer, (n_sequences, seq_len, hidden).

    Attributes:
        index: the layer; all before it are finished.
        hidden: its inputs in the pruned model.
        dense: its inputs in the dense model, where the run follows both.
    """

    index: int
    hidden: Tensor
    dense: Tensor | None = None


@dataclass(frozen=True)
class LinearDone:
    """One pruned linear.

    Attributes:
        name: `Linear.name`.
        role: `Linear.role`.
        tensor: the checkpoint tensor it belongs to.
        pruned: the mask, and the moved weight rounded to the checkpoint's dtype (still (out, in)).
        n_tokens: calibration tokens it saw.
        seconds: time in the method.
        output_error: ||X (W' - W)^T||^2 / ||X W^T||^2 on the calibration tokens, where the Gram matrix was collected.
        held_out_error: the same on the held-out tokens alone, where they were collected.
        pattern: what it was pruned to; None where it was taken over from an interrupted run, whose record says it.
    """

    name: str
    role: str
    tensor: str
    pruned: Pruned
    n_tokens: int
    seconds: float
    output_error: float | None = None
    held_out_error: float | None = None
    pattern: Pattern | None = None


@dataclass(frozen=True)
class LayerStep:
    """A sign of life inside a decoder layer, for progress bars.

    Attributes:
        index: 0-based number of the decoder layer.
        phase: "observe", "solve", "learn" or "forward".
        done: parts of the layer's work finished; `total` of them make the layer.
        total: batches and linears of the layer, all phases together; learning counts nine times as much as the rest.
        learned: what the learner said, where it was one that gave the sign. Its snapshot can be taken until the walk goes on.
    """

    index: int
    phase: str
    done: int
    total: int
    learned: LearnStep | None = None


@dataclass(frozen=True)
class LayerDone:
    """One finished decoder layer.

    Attributes:
        index: 0-based number of the decoder layer.
        linears: what was pruned, in the order of the layer.
        dense: what stayed dense, with reasons.
        seconds: by phase: read, forward, statistics, solve, measure.
        reused: True where the masks came from a finished layer of an interrupted run.
        hidden: (n_sequences, seq_len, hidden) inputs of the next layer, for a run folder that keeps them; None after the
            last layer and where no forward was needed. Valid until the generator goes on.
        dense_hidden: the same in the dense model, where the method compares with it.
        learned: what learning came to, for a method that learns layers; None where the layer was taken over.
        state: what such a method carries to the next layer; None likewise.
    """

    index: int
    linears: tuple[LinearDone, ...]
    dense: tuple[DenseLinear, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    reused: bool = False
    hidden: Tensor | None = None
    dense_hidden: Tensor | None = None
    learned: LearnedLayerResult | None = None
    state: State | None = None

    def records(self) -> tuple[LinearResult, ...]:
        """What results.json keeps of each linear."""
        return tuple(
            LinearResult(
                name=one.name,
                layer=self.index,
                role=one.role,
                tensor=one.tensor,
                shape=(one.pruned.mask.shape[0], one.pruned.mask.shape[1]),
                density=masks.density(one.pruned.mask),
                n_tokens=one.n_tokens,
                seconds=one.seconds,
                output_error=one.output_error,
                held_out_error=one.held_out_error,
                notes=one.pruned.notes,
                pattern=str(one.pattern or ""),
            )
            for one in self.linears
        )
