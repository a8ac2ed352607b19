"""How far each linear of a pruned model is from its dense self, on text that nobody calibrated on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nmprune.architectures import Linear
from nmprune.checkpoint import Checkpoint
from nmprune.stats import InputStats, Statistic
from nmprune.stream import DecoderModel, LayerObserved, LayerSelection, StreamOptions, observe_layers
from nmprune.stream.per_linear import relative_error


def layer_errors(
    dense: Checkpoint,
    pruned: DecoderModel,
    selections: Sequence[LayerSelection],
    windows: Tensor,
    options: StreamOptions | None = None,
) -> dict[str, float]:
    """Linear name -> ||X (W' - W)^T||^2 / ||X W^T||^2, X its inputs in the pruned model; one streamed pass.

    Linears that saw no token, or whose dense output is zero, are left out.

    Args:
        dense: the dense model's tensors (in the pruned model's order of channels).
        pruned: the pruned model, opened from its folder.
        selections: its linears, from `select`; those under `prune` are compared.
        windows: int64 (n_sequences, seq_len) token ids.
        options: batch size and budget of the pass.
    """
    needs: frozenset[Statistic] = frozenset({"input_gram"})
    errors: dict[str, float] = {}
    for step in observe_layers(pruned, windows, selections, needs, options):
        if isinstance(step, LayerObserved):
            errors |= _of_layer(dense, pruned, selections[step.index].prune, step.layer, step.stats)
        del step  # Gram matrices must not stay while the next layer runs
    return errors


def _of_layer(
    dense: Checkpoint,
    pruned: DecoderModel,
    linears: Sequence[Linear],
    layer: nn.Module,
    stats: dict[str, InputStats],
) -> dict[str, float]:
    errors: dict[str, float] = {}
    for linear in linears:
        weight = pruned.weight(layer, linear)
        base = linear.on_disk.of(dense.read(linear.tensor)).to(weight)
        error = relative_error(weight - base, base, [stats[linear.shared_input].gram()])
        if error is not None:
            errors[linear.name] = error
    return errors
