"""The masks that a learner starts from, read from a mask file or a run folder, linear by linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from nmprune.checkpoint import MaskFile, read_masks, read_npz
from nmprune.errors import InputError
from nmprune.methods.base import WholeModel
from nmprune.pattern import Pattern
from nmprune.refine import LayerChain
from nmprune.refine.layer_chain import one_shot_prior
from nmprune.run.compare import mask_path
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel, LayerSelection


class PriorMasks:
    """The masks of a file, of the linears that are to be pruned.

    Args:
        place: our mask file, a run folder, or an npz in MaskLLM's form.
        model: the dense model.
        selections: what is to be pruned.
        pattern: of the linears that have none of their own.

    Raises:
        InputError: no such file, another model's or another pattern's, or a linear without a mask.
    """

    def __init__(self, place: str, model: DecoderModel, selections: Sequence[LayerSelection], pattern: Pattern) -> None:
        self._place, self._selections, self._pattern = place, selections, pattern
        self._file = _read(Path(place), model, pattern)
        if self._file.permutation:
            raise InputError(
                f"prior {place}: its masks are of a model whose channels were reordered. Take masks of the model as it is, or "
                "a one-shot method."
            )
        for index in range(len(selections)):
            self.of_layer(index)

    def of_layer(self, index: int) -> dict[str, Tensor]:
        """Linear name -> bool (out, in) of decoder layer `index`."""
        return dict(self._masks(self._selections[index]))

    def _masks(self, selection: LayerSelection) -> Iterator[tuple[str, Tensor]]:
        for linear in selection.prune:
            wanted = selection.patterns.get(linear.name, self._pattern)
            entry = self._file.masks.get(linear.tensor)
            if entry is None:
                raise InputError(
                    f"prior {self._place} has no mask for {linear.tensor}. Exclude {linear.name} here, too, or name a one-shot "
                    "method as the prior."
                )
            if entry.pattern != wanted:
                raise InputError(
                    f"prior {self._place}: the mask of {linear.tensor} is {entry.pattern}, and {wanted} is wanted here. Choose "
                    "that pattern, or another prior."
                )
            mask = linear.on_disk.of(entry.unpack())
            if tuple(mask.shape) != linear.shape:
                raise InputError(
                    f"prior {self._place}: the mask of {linear.tensor} is {tuple(mask.shape)}; {linear.name} is {linear.shape}. "
                    "It belongs to another model."
                )
            yield linear.name, mask.contiguous()


def _read(place: Path, model: DecoderModel, pattern: Pattern) -> MaskFile:
    path = mask_path(place)
    if path.suffix != ".npz":
        found = read_masks(path)
    elif model.checkpoint is None:
        raise InputError(
            f"prior {place}: an npz names tensors of a folder, and this model is in memory. Convert it first."
        )
    else:
        found = read_npz(path, model.checkpoint.shapes(), pattern)
    fingerprint = model.checkpoint.fingerprint() if model.checkpoint is not None else ""
    if found.fingerprint and fingerprint and found.fingerprint != fingerprint:
        raise InputError(
            f"prior {place} belongs to other weights (fingerprint {found.fingerprint[:12]}); this model's is {fingerprint[:12]}. "
            "Take masks of this model, or a one-shot method."
        )
    return found


def check_prior(recipe: Recipe, model: DecoderModel, selections: Sequence[LayerSelection]) -> None:
    """Raise InputError where a learner's prior is a mask file that does not fit; of mixed patterns that is known later."""
    pruner, place = recipe.pruner, None
    if isinstance(pruner, LayerChain):
        place = pruner.prior_file
    elif isinstance(pruner, WholeModel) and one_shot_prior(pruner) is None:
        place = Path(pruner.prior)
    if place is not None and not recipe.choices:
        PriorMasks(str(place), model, selections, recipe.pattern)
