"""Verify a run: its model against its masks and its dense model, and its files against each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nmprune.checkpoint import Checkpoint, MaskFile, checksum, read_masks
from nmprune.errors import InputError
from nmprune.evaluate.verify import VerifyReport, verify
from nmprune.prepare.allocation import budget_of
from nmprune.prepare.choices import name_of
from nmprune.results import Results
from nmprune.run import allocation_file
from nmprune.run.allocate import facts_of
from nmprune.run.base import find_base, wrong_base
from nmprune.run.folder import RunFolder
from nmprune.run.permuted_base import permutation_faults, permuted_base
from nmprune.run.progress import Progress, Report, silent
from nmprune.run.recipe import Recipe
from nmprune.run.verify_finetuned import finetune_faults, may_change, parent_words

_T = TypeVar("_T")


@dataclass(frozen=True)
class Verdict:
    """What verifying a run found.

    Attributes:
        run: the run folder.
        base: the dense model's folder.
        faults: what is wrong with the run as a whole: files that cannot be read or contradict each other.
        report: the comparison tensor by tensor; None where masks or model cannot be read.
        parent: of a finetuned run, what its masks were compared with; else empty.
        dense: linears that stayed dense.
        beside: of a finetuned run, tensors without a mask that were trained; they need only be finite.
    """

    run: str
    base: str
    faults: tuple[str, ...]
    report: VerifyReport | None
    parent: str = ""
    dense: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.faults and self.report is not None and self.report.ok


def verify_run(out: Path, base: str | None = None, report: Report = silent) -> Verdict:
    """Verify the finished run in `out`.

    A damaged or altered file of the run is a finding. What the user can put right is an error.

    Args:
        out: the run folder.
        base: where the dense model is now; None = where the recipe says.
        report: called at every sign of life.

    Raises:
        InputError: no finished run, the dense model is not there, or it is another model.
    """
    folder = RunFolder(out)
    results, recipe = folder.read_results(), folder.read_recipe()
    report(Progress("verify", text=f"verifying {out}"))
    dense = Checkpoint.open(find_base(folder, recipe.model, base))
    faults: list[str] = []
    masks = _or_fault(faults, lambda: read_masks(folder.masks_file))
    pruned = _or_fault(faults, lambda: Checkpoint.open(folder.model))
    fingerprint = dense.fingerprint()
    if fingerprint not in (results.model_fingerprint, masks.fingerprint if masks else ""):
        raise wrong_base(dense.folder, fingerprint, results.model_fingerprint)
    as_pruned = _or_fault(faults, lambda: permuted_base(folder, recipe, dense)) if recipe.permute else dense
    if masks is None or pruned is None or as_pruned is None:
        return Verdict(str(out), str(dense.folder), tuple(faults), None)
    faults += _contradictions(folder, recipe, results, masks, pruned, fingerprint)
    beside = may_change(recipe, dense, masks)
    faults += finetune_faults(folder, recipe, results, pruned.config.get("nmprune"), beside)
    moves = recipe.pruner.updates_weights or recipe.finetune is not None
    done = 0

    def compared(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report(Progress("verify", done, dense.nbytes))

    try:
        found = verify(as_pruned, pruned, masks, moves, beside, compared)
    except InputError as error:  # a file that changes or breaks while it is read
        return Verdict(str(out), str(dense.folder), (*faults, str(error)), None)
    names = tuple(one.name for one in results.dense)
    return Verdict(
        str(out), str(dense.folder), tuple(faults), found, parent_words(recipe), names, tuple(sorted(beside))
    )


def _or_fault(faults: list[str], make: Callable[[], _T]) -> _T | None:
    try:
        return make()
    except InputError as error:
        faults.append(str(error))
        return None


def _contradictions(
    folder: RunFolder, recipe: Recipe, results: Results, masks: MaskFile, pruned: Checkpoint, fingerprint: str
) -> Iterator[str]:
    """Where recipe, results, masks and the model's own description do not say the same."""
    for name, said in (("masks.safetensors", masks.fingerprint), ("results.json", results.model_fingerprint)):
        if said != fingerprint:
            yield f"{name} names the dense model {said[:12] or 'nothing'}; the one compared with is {fingerprint[:12]}."
    digest = checksum(folder.masks_file)
    key = pruned.config.get("nmprune")
    in_config = str(key.get("mask_checksum", "")) if isinstance(key, dict) else ""
    for name, said in (
        ("results.json", results.mask_checksum),
        ("model/config.json", in_config.removeprefix("sha256:")),
    ):
        if said != digest:
            yield f"{name} holds the mask checksum {said[:12] or '(none)'}; masks.safetensors has {digest[:12]}."
    method, in_masks = str(results.method.get("name")), ", ".join(map(str, masks.patterns()))
    pattern = str(recipe.pattern)
    if recipe.choices and set(masks.patterns()) <= set(recipe.patterns):
        pattern = in_masks  # the recipe's set holds every pattern that occurs; _allocation_faults looks at each linear
    for what, values in (
        ("method", (recipe.pruner.name, method, masks.method)),
        ("pattern", (pattern, results.pattern, in_masks)),
    ):
        if len(set(values)) > 1:
            said_by = zip(("recipe.yaml", "results.json", "masks.safetensors"), values, strict=True)
            yield f"the {what} is not the same everywhere: {', '.join(f'{who} {value}' for who, value in said_by)}."
    yield from _uncovered(results, masks)
    yield from permutation_faults(folder, recipe, results, masks, key, fingerprint)
    if recipe.choices:
        yield from _allocation_faults(folder, recipe, results, masks)


def _allocation_faults(folder: RunFolder, recipe: Recipe, results: Results, masks: MaskFile) -> Iterator[str]:
    """Where allocation.json, results.json and the masks do not say the same of a linear, or too much is kept."""
    try:
        found, _ = allocation_file.read(folder.allocation_file)
    except InputError as error:
        yield str(error)
        return
    if facts_of(found) != results.allocation:
        yield "allocation.json and results.json do not say the same of the allocation."
    chosen = found.by_linear
    for one in results.linears:
        said = name_of(chosen[one.name]) if one.name in chosen else "nothing"
        rules = str(masks.masks[one.tensor].pattern) if one.tensor in masks.masks else "nothing"
        if len({said, one.pattern, rules}) > 1:
            yield (
                f"{one.name} is not pruned to the same everywhere: allocation.json {said}, results.json {one.pattern}, its mask "
                f"{rules}."
            )
    dense = {one.name for one in results.dense}
    listed = {one.name for one in results.linears}
    for name in sorted(name for name, choice in chosen.items() if name not in (dense if choice is None else listed)):
        yield f"allocation.json gives {name} {name_of(chosen[name])}, and results.json does not."
    kept_dense = sum(math.prod(one.shape) for one in results.dense if chosen.get(one.name, recipe.pattern) is None)
    kept = kept_dense + sum(entry.n_groups * entry.pattern.kept for entry in masks.masks.values())
    budget = budget_of(recipe.density, kept_dense + sum(math.prod(one.shape) for one in results.linears))
    if kept > budget or kept != found.kept:
        yield (
            f"masks and dense linears keep {kept:,} weights; allocation.json says {found.kept:,}, and the recipe's density "
            f"{recipe.density:g} allows {budget:,}."
        )


def _uncovered(results: Results, masks: MaskFile) -> Iterator[str]:
    """Linears that results.json calls pruned and no mask covers, and the other way round."""
    pruned_rows: defaultdict[str, int] = defaultdict(int)
    for linear in results.linears:
        pruned_rows[linear.tensor] += linear.shape[0]
    for tensor, n_rows in pruned_rows.items():
        if tensor not in masks.masks:
            yield f"results.json says that {tensor} was pruned, and it has no mask."
            continue
        entry = masks.masks[tensor]
        masked_rows = entry.n_rows - sum(stop - start for start, stop in entry.dense_rows)
        if masked_rows != n_rows:
            yield f"{tensor}: results.json lists {n_rows} pruned output features, its mask rules {masked_rows}."
    for tensor in sorted(masks.masks.keys() - pruned_rows.keys()):
        yield f"{tensor} has a mask, and results.json lists no pruned linear in it."
    n_weights = sum(math.prod(linear.shape) for linear in results.linears)
    if n_weights != results.weights_in_linears:
        yield f"results.json counts {results.weights_in_linears:,} weights in linears and lists {n_weights:,}."
