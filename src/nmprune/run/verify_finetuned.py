"""What verifying a finetuned run asks on top: its masks are its parent's, and only what was to be trained may have moved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmprune.checkpoint import Checkpoint, MaskFile, checksum
from nmprune.results import Results
from nmprune.run.folder import RunFolder
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel
from nmprune.train.parts import masked_parameters, trained_parameters, unmasked_tensors


def may_change(recipe: Recipe, base: Checkpoint, masks: MaskFile) -> set[str]:
    """The tensors without a mask that the recipe's finetuning trains; found from the model again, not from what the run says."""
    if recipe.finetune is None or not recipe.finetune.also:
        return set()
    model = DecoderModel.open(base.folder, trust_remote_code=recipe.trust_remote_code, allow_sparse=True)
    masked = masked_parameters(model.pieces, masks)
    trained = trained_parameters(model.model, model.family.layers, masked, recipe.finetune.also)
    return unmasked_tensors(model.model, model.pieces, trained, masks)


def finetune_faults(folder: RunFolder, recipe: Recipe, results: Results, key: Any, changed: set[str]) -> Iterator[str]:
    """Where recipe, parent, results and the model's own description do not say the same of a finetuning.

    Args:
        folder: the run.
        recipe: its recipe.
        results: its results.
        key: the `nmprune` key of the model's config.json.
        changed: what `may_change` found.
    """
    told = key.get("finetuned") if isinstance(key, dict) else None
    settings = recipe.finetune
    if settings is None:
        if results.finetune is not None or told is not None:
            yield "results.json or model/config.json say that the run was finetuned; recipe.yaml does not."
        return
    if results.finetune is None:
        yield "recipe.yaml says that the run was finetuned; results.json does not."
    elif results.finetune.parent != settings.parent:
        yield f"recipe.yaml names the parent {settings.parent}, results.json {results.finetune.parent}."
    elif set(results.finetune.tensors) != changed:
        n_wrong = len(set(results.finetune.tensors) ^ changed)
        yield f"results.json and the recipe's also: do not name the same tensors beside the masked ones: {n_wrong} differ."
    if told != {**settings.to_dict(), "beside_masked": sorted(changed)}:
        yield "model/config.json does not say the same of the finetuning as recipe.yaml."
    digest = checksum(folder.masks_file)
    if digest != settings.parent_masks:
        yield f"the masks are not the parent's: sha256 {digest[:12]}, the parent had {settings.parent_masks[:12] or '(none)'}."
    parent = _parent_masks(recipe)
    if parent is not None and checksum(parent) != digest:
        yield f"{parent} holds other masks (sha256 {checksum(parent)[:12]}) than this run (sha256 {digest[:12]})."


def parent_words(recipe: Recipe) -> str:
    """What the masks were compared with."""
    if recipe.finetune is None:
        return ""
    if _parent_masks(recipe) is not None:
        return f"the masks of {recipe.finetune.parent}, byte for byte"
    return f"the checksum of the masks of {recipe.finetune.parent}, which is not there any more"


def _parent_masks(recipe: Recipe) -> Path | None:
    assert recipe.finetune is not None
    file = RunFolder(Path(recipe.finetune.parent)).masks_file
    return file if file.is_file() else None
