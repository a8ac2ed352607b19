"""One decoder layer as a learner sees it: its loss on some sequences with other weights in it, and the gradients of those.

Autograd goes through this one layer, a few sequences at a time; everything in it but the given weights is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nmprune.architectures import Linear
from nmprune.distributed import ALONE, Processes
from nmprune.pattern import Pattern
from nmprune.stats import InputStats
from nmprune.stream.calls import LayerCalls
from nmprune.stream.hidden_states import HiddenStates

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


class LayerRun:
    """See `LayerWork`, whose attributes it has.

    Args:
        index: 0-based number of the decoder layer.
        n_layers: of the model.
        layer: its module; not modified, whatever weights it is asked about.
        linears: those that are learned.
        weights: linear name -> fp32 (out, in), dense.
        patterns: linear name -> N kept of M.
        priors: linear name -> bool (out, in); empty where there are none.
        stats: linear name -> statistics of its input.
        inputs: the layer's inputs, of all sequences.
        targets: what its outputs are compared with, likewise.
        calls_of: batch size -> how the model calls its layers.
        batch_size: sequences that go through the layer together, at most.
        n_sequences: of the run.
        n_held_out: the last so many sequences are held out.
        distance: (outputs, targets, inputs) -> (B,), differentiable in the outputs.
        processes: those that share the run.
        local: numbers of sequences -> where in `inputs` and `targets` those of them lie that are this process's.
    """

    def __init__(
        self,
        index: int,
        n_layers: int,
        layer: nn.Module,
        linears: Sequence[Linear],
        *,
        weights: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern],
        priors: Mapping[str, Tensor],
        stats: Mapping[str, InputStats],
        inputs: HiddenStates,
        targets: HiddenStates,
        calls_of: Callable[[int], LayerCalls],
        batch_size: int,
        n_sequences: int,
        n_held_out: int,
        distance: Distance,
        processes: Processes = ALONE,
        local: Callable[[Tensor], Tensor] = torch.Tensor.cpu,
    ) -> None:
        self.index, self.n_layers = index, n_layers
        self.weights, self.patterns, self.priors, self.stats = weights, patterns, priors, stats
        self.roles: Mapping[str, str] = {linear.name: linear.role for linear in linears}
        self.train = torch.arange(n_sequences - n_held_out)
        self.held_out = torch.arange(n_sequences - n_held_out, n_sequences)
        self._layer, self._linears = layer, list(linears)
        self._inputs, self._targets = inputs, targets
        self._calls_of, self._batch_size, self._distance = calls_of, batch_size, distance
        self._processes, self._local = processes, local

    def loss(self, sequences: Tensor, weights: Mapping[str, Tensor]) -> float:
        """See `LayerWork.loss`."""
        total = 0.0
        with torch.no_grad():
            parameters = self._parameters(weights)
            for part in self._parts(sequences):
                total += self._distances(part, parameters).double().sum().item()
        return self._processes.sum_values([total])[0] / len(sequences)

    def gradients(self, sequences: Tensor, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """See `LayerWork.gradients`; the same bits in every process."""
        parameters = self._parameters(weights)
        own = dict.fromkeys(linear.parameter for linear in self._linears if linear.name in weights)
        leaves = {name: parameters[name].requires_grad_() for name in own}
        parameters |= leaves
        total, sums = 0.0, dict[str, Tensor]()
        for part in self._parts(sequences):
            with torch.enable_grad():
                distances = self._distances(part, parameters)
                found = torch.autograd.grad(
                    distances.sum() / len(sequences), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            total += distances.detach().double().sum().item()
            for name, gradient in zip(leaves, found, strict=True):
                sums[name] = sums[name].add_(gradient) if name in sums else gradient.float()
            del distances, found
        if not sums:  # none of the sequences is this process's
            sums = {
                name: torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False) for name, leaf in leaves.items()
            }
        self._processes.sum_(sums.values())
        (total,) = self._processes.sum_values([total])
        return total / len(sequences), {
            linear.name: linear.in_module.of(sums[linear.parameter]).contiguous()
            for linear in self._linears
            if linear.name in weights
        }

    def _parts(self, sequences: Tensor) -> Iterator[Tensor]:
        """This process's sequences that go through the layer together, as places in its store."""
        if not len(sequences):
            raise ValueError("a loss over no sequences")
        own = self._local(sequences)
        yield from own.split(self._batch_size) if len(own) else ()

    def _distances(self, sequences: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """(B,): the distance of each sequence's outputs from their targets."""
        inputs = self._inputs.rows(sequences)

        def layer(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
            return functional_call(self._layer, dict(parameters), (hidden, *args), kwargs)

        output = self._calls_of(len(sequences)).run(self.index, layer, inputs)
        return self._distance(output, self._targets.rows(sequences), inputs)

    def _parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters of the layer, detached, with `weights` put into those that hold them.

        A parameter that is one linear as it is, in fp32, is the given tensor itself; others are copies in their own dtype.
        """
        parameters = {name: parameter.detach() for name, parameter in self._layer.named_parameters()}
        copied: set[str] = set()
        for linear in self._linears:
            if linear.name not in weights:
                continue
            given, stored = weights[linear.name].detach(), parameters[linear.parameter]
            view = linear.in_module
            if stored.dtype == given.dtype and stored.shape == given.shape and not view.transposed:
                parameters[linear.parameter] = given
                continue
            if linear.parameter not in copied:
                copied.add(linear.parameter)
                parameters[linear.parameter] = stored.clone()
            view.of(parameters[linear.parameter]).copy_(given)
        return parameters
