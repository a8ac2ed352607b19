"""Names on disk <-> parameters in memory, both ways, through transformers' own conversion mapping.

They differ: GPT-NeoX's head has two names, a Mixtral expert's w1 and w3 are 2-D tensors on disk and rows of one 3-D
parameter in memory. Where the mapping merges tensors, its operations are run once on 1 x 2 stand-ins that carry their own
number, and the result tells which region of the parameter each tensor on disk becomes. No weight is moved for that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from nmprune.architectures.linears import View
from nmprune.errors import InputError


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor's place in a parameter.

    Attributes:
        tensor: name on disk.
        region: where in the parameter; None = the whole parameter, stored as it is.
    """

    tensor: str
    region: View | None = None


def shapes_on_disk(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape as a checkpoint of this model would hold them: for a model of which only the config is here."""
    # the same mapping backwards; on meta tensors its operations move nothing
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


class NameMap:
    """Which checkpoint tensors make up which entry of a model's state dict.

    Args:
        model: the model, weights on the meta device.
        shapes: name -> shape of every tensor of the checkpoint.

    Raises:
        InputError: a tensor's shape does not fit the parameter, a parameter has no tensor and is not tied to one that has,
            or the mapping's operations do more than place matrices side by side.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self._shapes = shapes
        self._state = model.state_dict()
        self.pieces: dict[str, tuple[Piece, ...]] = {}
        self.unused: tuple[str, ...] = ()
        self._map()
        self._give_tied_sources_a_piece()
        self._check_complete()

    def _map(self) -> None:
        transforms = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        merged: dict[str, list[tuple[str, str]]] = defaultdict(list)
        unused = []
        prefix = self._model.base_model_prefix
        for tensor in sorted(self._shapes, key=dot_natural_key):
            key, pattern = rename_source_key(tensor, renamings, converters, prefix, self._state)
            if key not in self._state and tensor in self._state:
                key, pattern = tensor, None
            if key not in self._state:
                unused.append(tensor)
            elif pattern is None:
                self._check_shape(tensor, key)
                if key in self.pieces:
                    raise InputError(
                        f"checkpoint tensors {self.pieces[key][0].tensor} and {tensor} are both {key}. Remove one of them."
                    )
                self.pieces[key] = (Piece(tensor),)
            else:
                merged[key].append((tensor, pattern))
        for key, sources in merged.items():
            self.pieces[key] = self._trace(key, sources, deepcopy(by_pattern[sources[0][1]]))
        self.unused = tuple(unused)

    def _check_shape(self, tensor: str, key: str) -> None:
        given, expected = tuple(self._shapes[tensor]), tuple(self._state[key].shape)
        if given != expected:
            raise InputError(
                f"checkpoint tensor {tensor} has shape {given}; config.json makes {key} {expected}. "
                "The weights and config.json belong to different models: fetch both again."
            )

    def _trace(self, key: str, sources: list[tuple[str, str]], converter: WeightConverter) -> tuple[Piece, ...]:
        """Run the converter on 1 x 2 stand-ins [2k+1, 2k+2] and read off where each ends up."""
        self._check_covered(key, sources)
        for k, (tensor, pattern) in enumerate(sources):
            stand_in = torch.tensor([[2 * k + 1, 2 * k + 2]])
            converter.add_tensor(key, tensor, pattern, lambda stand_in=stand_in: stand_in)
        try:
            traced = converter.convert(key, model=self._model, config=self._model.config)[key]
            result: Tensor = traced[0] if isinstance(traced, list) else traced
            pieces = tuple(self._locate(key, tensor, k, result, sources) for k, (tensor, _) in enumerate(sources))
        except (RuntimeError, KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"{key} is assembled from {len(sources)} checkpoint tensors (such as {sources[0][0]}) in a way that nmprune "
                f"does not follow ({type(error).__name__}: {error}). Convert the checkpoint to one tensor per linear first."
            ) from error
        return pieces

    def _check_covered(self, key: str, sources: list[tuple[str, str]]) -> None:
        covered = sum(torch.Size(self._shapes[tensor]).numel() for tensor, _ in sources)
        if covered != self._state[key].numel():
            raise InputError(
                f"{key} of shape {tuple(self._state[key].shape)} needs {self._state[key].numel():,} weights; the "
                f"{len(sources)} checkpoint tensors found for it (such as {sources[0][0]}) hold {covered:,}. "
                "Tensors are missing, or config.json belongs to another model: fetch both again."
            )

    def _locate(self, key: str, tensor: str, k: int, result: Tensor, sources: list[tuple[str, str]]) -> Piece:
        """The rows of one expert that stand-in `k` became; the rows above it belong to tensors of known height."""
        if result.dim() != 3:
            raise ValueError(f"it has {result.dim()} axes, not (expert, out, in)")
        expert, row, _ = (result == 2 * k + 1).nonzero()[0].tolist()
        if result[expert, row].tolist() != [2 * k + 1, 2 * k + 2]:
            raise ValueError("a matrix is cut up or transposed")
        above = (result[expert, :row, 0] - 1) // 2
        start = sum(self._shapes[sources[j][0]][0] for j in above.tolist())
        region = View(expert, (start, start + self._shapes[tensor][0]))
        place = tuple(region.of(self._state[key]).shape)
        if place != tuple(self._shapes[tensor]):
            raise ValueError(f"{tensor} {tuple(self._shapes[tensor])} meets a place of shape {place}")
        return Piece(tensor, region)

    def _give_tied_sources_a_piece(self) -> None:
        """A file may hold a tied weight under its partner's name alone, such as the head's and not the embedding's."""
        for target, source in self._model.all_tied_weights_keys.items():
            if source not in self.pieces and target in self.pieces:
                self.pieces[source] = self.pieces[target]

    def _check_complete(self) -> None:
        tied = self._model.all_tied_weights_keys
        missing = [key for key in self._state if key not in self.pieces and tied.get(key) not in self.pieces]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise InputError(
                f"the checkpoint holds no tensor for {shown}. It is incomplete, or config.json belongs to another model."
            )
