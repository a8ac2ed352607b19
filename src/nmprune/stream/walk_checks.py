"""What a method asks of a walk, checked before any weight is read."""

from __future__ import annotations

from torch import Tensor

from nmprune.errors import InputError
from nmprune.methods import Method
from nmprune.refine import LayerChain
from nmprune.stats import GRADIENTS
from nmprune.stream.layer_done import StreamOptions


def check_walk(method: Method, windows: Tensor | None, options: StreamOptions, has_gradients: bool) -> None:
    """Raise InputError where a method cannot be run like this.

    Args:
        method: what prunes.
        windows: calibration token ids; None where there is no text.
        options: how hidden states flow.
        has_gradients: whether gradients of the loss are at hand.
    """
    if method.needs & GRADIENTS and not has_gradients:
        raise InputError(
            f"method {method.name} needs gradients of the loss: pass `gradients`, such as nmprune.prepare.gradients makes."
        )
    if method.runs_layers and windows is None:
        reads = f"reads {', '.join(sorted(method.needs))}" if method.needs else "learns from what the layers make of it"
        raise InputError(f"method {method.name} needs calibration text: it {reads}.")
    if options.true_sequential and options.propagate == "dense":
        raise InputError("--true-sequential observes pruned inputs inside a layer: it needs --propagate pruned.")
    if isinstance(method, LayerChain) and options.true_sequential:
        raise InputError(f"{method.name} learns all linears of a layer together: leave --true-sequential out.")
    if method.follows_dense and (options.true_sequential or options.propagate == "dense"):
        raise InputError(
            "comparing with the dense model's outputs needs --propagate pruned, and no --true-sequential: a layer's dense "
            "weights are there only until its first linear is pruned."
        )
    if "held_out_gram" in method.needs and windows is not None and not 0 < options.n_held_out < len(windows):
        raise InputError(
            f"method {method.name} holds sequences out; of {len(windows)}, {options.n_held_out} is no number to hold out. "
            "Give --n-sequences 2 or more, and hold out fewer than all."
        )


def n_held_out(method: Method, n_sequences: int, options: StreamOptions) -> int:
    """How many of the last sequences are held out: none where nothing asks for it; a learner leaves one to learn from."""
    if "held_out_gram" in method.needs:
        return options.n_held_out
    return min(options.n_held_out, n_sequences - 1) if isinstance(method, LayerChain) else 0
