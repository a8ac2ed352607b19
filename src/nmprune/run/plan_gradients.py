"""What the gradient pass of a run would need and take: hidden states of all layers, gradient sums, four forwards' time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nmprune.architectures import Linear
from nmprune.prepare.gradients import BACKWARD_PASSES
from nmprune.prepare.layer_sums import n_token_blocks
from nmprune.run.probe import Rates, signature
from nmprune.stats import GRADIENTS, Statistic
from nmprune.stream import DecoderModel, LayerSelection

# What autograd keeps of one sequence in a decoder layer, in inputs and outputs of its linears: norms, activations and
# attention add as much again, and gradients are made beside.
_AUTOGRAD = 2.5
_LOGITS = 4  # fp32 tensors as large as the logits that the loss and its gradient take at the worst moment


@dataclass(frozen=True)
class GradientSizes:
    """Bytes and operation counts of the gradient pass.

    Attributes:
        model: made from its config.
        selections: one per layer.
        needs: what the method reads.
        shape: (n_sequences, seq_len).
        hidden_size: width of the hidden states.
        vocabulary: entries of the head.
        hidden_budget: bytes of hidden states that may stay in RAM.
        token_blocks: blocks of output rows of loss-aware token weights; 0 = no such weights.
    """

    model: DecoderModel
    selections: Sequence[LayerSelection]
    needs: frozenset[Statistic]
    shape: tuple[int, int]
    hidden_size: int
    vocabulary: int
    hidden_budget: int
    token_blocks: int = 0

    @property
    def passes(self) -> int:
        """Forwards of a decoder layer over all sequences; one run back counts as three."""
        n_layers = self.model.n_layers
        return n_layers + BACKWARD_PASSES * (n_layers - self._lowest)

    @property
    def _lowest(self) -> int:
        return min(index for index, one in enumerate(self.selections) if one.prune)

    @property
    def _store(self) -> int:
        """Bytes of one layer's hidden states."""
        return math.prod(self.shape) * self.hidden_size * self.model.dtype.itemsize

    @property
    def _stores(self) -> tuple[int, int]:
        """How many are kept: in RAM, and in files past the budget."""
        n_stores = self.model.n_layers - self._lowest + 1
        in_memory = min(n_stores, self.hidden_budget // self._store)
        return in_memory, n_stores - in_memory

    def sums_of(self, linears: Sequence[Linear]) -> int:
        """Bytes of the gradient sums of some linears, as they are kept."""
        return 4 * len(self.needs & GRADIENTS) * sum(math.prod(one.shape) for one in linears)

    def token_weights_of(self, linears: Sequence[Linear]) -> int:
        """Bytes of the token weights of some linears."""
        return 4 * math.prod(self.shape) * sum(n_token_blocks(one, self.token_blocks) for one in linears)

    def memory(self, hidden: bool, outside_weights: int) -> dict[str, dict[str, int]]:
        """Stage -> part -> bytes.

        Args:
            hidden: count the hidden states, which lie in the process's memory.
            outside_weights: weights outside the decoder layers, the head among them.
        """
        size = self.model.dtype.itemsize
        kept = {"hidden states of all layers": self._stores[0] * self._store} if hidden else {}
        worst = max(self.selections, key=lambda one: self.sums_of(one.prune) + self.token_weights_of(one.prune))
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in self.model.layers)
        widths = {one.shared_input: one.shape[1] for one in worst.prune if one.in_module.expert in (None, 0)}
        outputs = sum(one.shape[0] for one in worst.prune if one.in_module.expert in (None, 0))
        activations = self.shape[1] * (sum(widths.values()) + outputs + 4 * self.hidden_size) * size
        largest = max((math.prod(one.shape) for one in worst.prune), default=0)
        logits = self.shape[1] * self.vocabulary * 4
        found = {
            "gradient sums, and those of a segment": 2 * self.sums_of(worst.prune),
            "token weights": self.token_weights_of(worst.prune),
            "one gradient": largest * (size + 4) if self.needs & GRADIENTS else 0,
        }
        return {
            "gradients, layers": {
                "decoder layer": layer * size,
                **{part: n_bytes for part, n_bytes in found.items() if n_bytes},
                "one sequence in autograd": int(_AUTOGRAD * activations),
                **kept,
            },
            "gradients, head": {
                "embedding and head": outside_weights * size,
                "logits of one sequence and their gradient": _LOGITS * logits,
                **kept,
            },
        }

    @property
    def _kept(self) -> int:
        """Bytes of what the pass finds."""
        return sum(self.sums_of(one.prune) + self.token_weights_of(one.prune) for one in self.selections)

    def disk(self) -> dict[str, int]:
        """Part -> bytes."""
        past_budget = self._stores[1] * self._store
        return {
            "gradients (given back)": self._kept + self._store,
            **({"hidden states of the gradients past the budget (given back)": past_budget} if past_budget else {}),
        }

    def seconds(self, rates: Rates, stored: int) -> float:
        """Of the whole pass.

        Args:
            rates: measured on this machine.
            stored: bytes of the checkpoint, which is read twice.
        """
        layers = self.model.layers
        there = sum(rates.gradient_seconds[signature(layer)][0] for layer in layers)
        back = sum(rates.gradient_seconds[signature(layer)][1] for layer in layers[self._lowest :])
        computed = self.shape[0] * (there + back + rates.head_seconds)
        return computed + 2 * stored * rates.read_seconds + self._kept * rates.write_seconds
