"""The dense model as it was pruned, where its channels were reordered first: for verify and apply."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmprune.checkpoint import Checkpoint, MaskFile, checksum
from nmprune.checkpoint.permutation_file import PermutationFile, read_permutation
from nmprune.errors import InputError
from nmprune.results import Results
from nmprune.run.folder import RunFolder
from nmprune.run.permute import permute_as
from nmprune.run.recipe import Recipe
from nmprune.stream import DecoderModel


def permuted_base(folder: RunFolder, recipe: Recipe, base: Checkpoint) -> Checkpoint:
    """A run's dense model seen through the run's permutations.

    Which axes they move is found out from the model again, and not taken from the file.

    Raises:
        InputError: the permutation file is absent, damaged, holds something else than permutations or does not fit the model.
    """
    found = read_permutation(folder.permutation_file)
    model = DecoderModel.open(base.folder, trust_remote_code=recipe.trust_remote_code, allow_sparse=recipe.allow_sparse)
    try:
        permute_as(model, found)
    except InputError as error:
        raise error.located(str(folder.permutation_file)) from error
    assert model.checkpoint is not None
    return model.checkpoint


def permutation_faults(
    folder: RunFolder, recipe: Recipe, results: Results, masks: MaskFile, key: Any, fingerprint: str
) -> Iterator[str]:
    """Where recipe, permutation file, results, masks and the model's own description do not say the same.

    Args:
        folder: the run.
        recipe: its recipe.
        results: its results.
        masks: its masks.
        key: the `nmprune` key of the pruned model's config.json.
        fingerprint: of the dense model that is compared with.
    """
    if not recipe.permute:
        if masks.permutation or results.permutation:
            yield "masks.safetensors or results.json say that channels were reordered; recipe.yaml asks for nothing such."
        return
    name = folder.permutation_file.name
    try:
        found = read_permutation(folder.permutation_file)
    except InputError:
        return  # the comparison says so
    digest = checksum(folder.permutation_file) if found.permutations else ""
    told = key.get("permutation") if isinstance(key, dict) else None
    in_config = str(told.get("checksum", "")) if isinstance(told, dict) else ""
    for who, said in (
        ("masks.safetensors", masks.permutation),
        ("model/config.json", in_config.removeprefix("sha256:")),
    ):
        if said != digest:
            yield f"{who} holds the permutation checksum {said[:12] or '(none)'}; {name} has {digest[:12] or '(none)'}."
    if found.results != results.permutation:
        yield f"{name} and results.json do not say the same of the permutations."
    if found.kinds != recipe.permute or found.pattern != str(recipe.pattern):
        asked = f"{', '.join(recipe.permute)} for {recipe.pattern}"
        yield f"{name} is of {', '.join(found.kinds)} for {found.pattern}; recipe.yaml asks for {asked}."
    if found.fingerprint != fingerprint:
        yield f"{name} names the dense model {found.fingerprint[:12] or 'nothing'}; the one compared with is {fingerprint[:12]}."


def read_permutation_for(path: Path, wanted: str, masks: Path) -> PermutationFile:
    """The permutation file that masks were made with.

    Args:
        path: where it should be.
        wanted: its sha256, from the mask file.
        masks: the mask file, for the error.

    Raises:
        InputError: it is not there, or another one is.
    """
    if not path.is_file():
        raise InputError(
            f"{masks}: its masks belong to a model whose channels were reordered first; the order is in {path.name}, which is "
            f"not beside it. Without it the masks would fall on other weights: bring {path} back."
        )
    if checksum(path) != wanted:
        raise InputError(
            f"{path}: is not the file that {masks} was made with (sha256 {checksum(path)[:12]}, expected {wanted[:12]}). Bring "
            "that one back."
        )
    return read_permutation(path)
