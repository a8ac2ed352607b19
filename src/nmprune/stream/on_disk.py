"""The linears of a module as the checkpoint stores them, and the matrices that are no linears of a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from nmprune.architectures import DenseLinear, Linear, ModuleLinear, View
from nmprune.checkpoint.names import Piece


def on_disk(one: ModuleLinear, pieces: tuple[Piece, ...]) -> Iterator[Linear]:
    """The linears that a module's linear is on disk: itself, or several where the parameter is assembled from tensors.

    Args:
        one: as the module holds it.
        pieces: the checkpoint tensors of its parameter.
    """
    for piece in pieces:
        if piece.region is None:
            name = piece.tensor.removesuffix(".weight")
            name = name if one.view.expert is None else f"{name}.{one.view.expert}"
            yield Linear(name, one.role, one.shape, one.shared_input, piece.tensor, one.view, one.parameter, one.view)
        elif piece.region.expert == one.view.expert:
            start, stop = piece.region.rows or (0, one.shape[0])
            name = piece.tensor.removesuffix(".weight")
            yield Linear(
                name=name,
                role=f"{one.role.rpartition('.')[0]}.{name.rpartition('.')[2]}",
                shape=(stop - start, one.shape[1]),
                shared_input=one.shared_input,
                tensor=piece.tensor,
                on_disk=View(),
                parameter=one.parameter,
                in_module=piece.region,
            )


def dense_outside(model: PreTrainedModel, layers: str) -> list[DenseLinear]:
    """The head, the embeddings and whatever else holds a matrix outside the decoder layers: all stay dense.

    Args:
        model: a `...ForCausalLM`.
        layers: where its decoder layers are, such as "model.layers".
    """
    tied = bool(model.all_tied_weights_keys)
    reasons = {
        id(model.get_output_embeddings()): "head, tied with the embedding: always dense" if tied else "head: dense",
        id(model.get_input_embeddings()): "embedding, tied with the head: always dense" if tied else "embedding: dense",
    }
    # a tied weight stands under each of its names
    parameters = model.named_parameters(remove_duplicate=False)
    matrices = {name: one for name, one in parameters if one.dim() >= 2 and not name.endswith("bias")}
    return [
        DenseLinear(
            name.removesuffix(".weight"),
            tuple(one.shape),
            reasons.get(id(model.get_submodule(name.rpartition(".")[0])), "outside the decoder layers: dense"),
        )
        for name, one in matrices.items()
        if not name.startswith(f"{layers}.")
    ]
