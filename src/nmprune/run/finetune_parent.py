"""What is finetuned: a finished run, opened and checked, and the dense model that it was made from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from nmprune.checkpoint import Checkpoint, MaskFile, checksum, read_masks
from nmprune.errors import InputError
from nmprune.results import Results
from nmprune.run.base import find_base, wrong_base
from nmprune.run.folder import RunFolder
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.masked_low_rank import check_rank
from nmprune.train.parts import masked_parameters


@dataclass
class Parent:
    """A finished run, and its description without weights.

    Attributes:
        folder: the run.
        recipe: its recipe.
        results: what it found.
        masks: its masks.
        model: its pruned model, fp32.
        dense: folder of the dense model.
    """

    folder: RunFolder
    recipe: Recipe
    results: Results
    masks: MaskFile
    model: DecoderModel
    dense: Path

    @property
    def checkpoint(self) -> Checkpoint:
        """The pruned model's tensors."""
        assert self.model.checkpoint is not None
        return self.model.checkpoint


def open_parent(parent: Path, base: str | None) -> Parent:
    """Open a run that is to be finetuned.

    Args:
        parent: its folder.
        base: where the dense model is now; None = where its recipe says.

    Raises:
        InputError: it is not finished, its masks are not those that it names, or the dense model is another one.
    """
    folder = RunFolder(parent)
    results, recipe = folder.read_results(), folder.read_recipe()
    masks = read_masks(folder.masks_file)
    if checksum(folder.masks_file) != results.mask_checksum:
        raise InputError(
            f"{folder.masks_file} is not the file that the run's results.json names. `nmprune verify {parent}` says more."
        )
    dense = find_base(folder, recipe.model, base)
    fingerprint = Checkpoint.open(dense).fingerprint()
    if fingerprint != results.model_fingerprint:
        raise wrong_base(dense, fingerprint, results.model_fingerprint)
    trust = recipe.trust_remote_code
    model = DecoderModel.open(folder.model, dtype="float32", trust_remote_code=trust, allow_sparse=True)
    return Parent(folder, recipe, results, masks, model, dense)


def finetune_recipe(origin: Parent, settings: FinetuneRecipe) -> Recipe:
    """The parent's recipe with the finetuning in it: the new run says all that led to it."""
    parent = str(origin.folder.path.resolve())
    filled = dataclasses.replace(settings, parent=parent, parent_masks=origin.results.mask_checksum)
    return dataclasses.replace(origin.recipe, finetune=filled)


def check_low_rank(origin: Parent, settings: FinetuneRecipe) -> None:
    """Raise InputError where low-rank deltas are asked for that these tensors cannot have."""
    if settings.lora:
        parameters = origin.model.model.state_dict()
        masked = masked_parameters(origin.model.pieces, origin.masks)
        check_rank({name: tuple(parameters[name].shape) for name in parameters if name in masked}, settings.lora)


def uses_autocast(wanted: str, device: torch.device) -> bool:
    """Whether forwards are in bfloat16; "auto": where the processor has units for it (AMX, AVX-512 BF16, a GPU)."""
    if wanted != "auto":
        return wanted == "yes"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, lambda: False)() for check in checks)
