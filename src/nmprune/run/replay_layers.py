"""A walk over a finished hyperprune run: its last network makes each layer's masks, and the run's own are put in.

So every layer meets the inputs that it met in the run. See run/regenerate.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from nmprune import masks
from nmprune.architectures import Linear
from nmprune.checkpoint import Checkpoint, MaskFile, read_masks
from nmprune.methods.base import LayerWork, LearnStep, PerLayer, Pruned, State
from nmprune.methods.hyperprune import HyperPrune
from nmprune.pattern import Pattern
from nmprune.run.analyze import masks_by_linear
from nmprune.run.folder import RunFolder
from nmprune.stream import LayerSelection
from nmprune.version import VERSION


@dataclass(frozen=True)
class RegeneratedLinear:
    """How far masks of one linear agree; shares of its groups that have the same mask in both, 0..1.

    Attributes:
        name: unique in the model.
        layer: 0-based decoder layer.
        role: its place in the decoder layer.
        groups: how many it has.
        agreement: the last network's mask and the run's.
        prior_run: the prior's mask and the run's; null without a prior.
        prior_network: the prior's mask and the last network's.
    """

    name: str
    layer: int
    role: str
    groups: int
    agreement: float
    prior_run: float | None
    prior_network: float | None


@dataclass(frozen=True)
class RegeneratedLayer:
    """The method's loss of one decoder layer on the held-out sequences, hard masks on the dense weights.

    Attributes:
        layer: 0-based number.
        accepted: whether the run took the learned masks here; null where the method had no guard.
        run_loss: of the run's masks; null where nothing was held out.
        network_loss: of the last network's.
        prior_loss: of the prior's; null without a prior.
    """

    layer: int
    accepted: bool | None
    run_loss: float | None
    network_loss: float | None
    prior_loss: float | None


class RunMasks:
    """What a run made of each linear, read when it is asked for.

    Args:
        folder: the run.
        moved: whether it moves weights.
        selections: what it pruned.
    """

    def __init__(self, folder: RunFolder, moved: bool, selections: Sequence[LayerSelection]) -> None:
        self._file = read_masks(folder.masks_file)
        self._mask_of = masks_by_linear(self._file)
        self._pruned = Checkpoint.open(folder.model) if moved else None
        self._linears = {linear.name: linear for selection in selections for linear in selection.prune}

    def of(self, name: str) -> Pruned:
        """Mask, and the moved weight where the run moves them."""
        linear = self._linears[name]
        mask = self._mask_of(linear).contiguous()
        if self._pruned is None:
            return Pruned(mask)
        return Pruned(mask, linear.on_disk.of(self._pruned.read(linear.tensor)).float().contiguous())

    def with_masks(self, packed: Mapping[str, Tensor]) -> MaskFile:
        """The run's mask file with other masks (packed, by linear) where there are some."""
        by_tensor: dict[str, list[Linear]] = {}
        for linear in self._linears.values():
            if linear.name in packed:
                by_tensor.setdefault(linear.tensor, []).append(linear)
        entries = {
            tensor: dataclasses.replace(entry, bits=self._bits(tensor, by_tensor.get(tensor, ()), packed))
            for tensor, entry in self._file.masks.items()
        }
        method = f"{self._file.method}, regenerated"
        return dataclasses.replace(self._file, masks=entries, method=method, nmprune_version=VERSION)

    def _bits(
        self, tensor: str, linears: list[Linear] | tuple[()], packed: Mapping[str, Tensor]
    ) -> Callable[[], Tensor]:
        def made() -> Tensor:
            mask = self._file.mask(tensor)
            for linear in linears:
                linear.on_disk.of(mask).copy_(masks.unpack(packed[linear.name], linear.shape))
            return masks.pack(mask)

        return made


@dataclass(frozen=True)
class Replay(PerLayer):
    """Stands in for the run's method: asks its last network for masks, notes what they have in common with the run's, and
    returns the run's.

    Attributes:
        made_by: the run's method.
        last: its last state.
        of_run: what the run made of each linear.
        linears: filled in on the way.
        layers: likewise.
        packed: likewise: linear name -> bits of the last network's mask.
    """

    name: ClassVar[str] = "regenerate"
    summary: ClassVar[str] = "What the last network of a run makes of every layer."
    paper: ClassVar[str] = "see hyperprune"

    made_by: HyperPrune = field(default_factory=HyperPrune)
    last: State = field(default_factory=dict)
    of_run: RunMasks | None = None
    linears: list[RegeneratedLinear] = field(default_factory=list)
    layers: list[RegeneratedLayer] = field(default_factory=list)
    packed: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", self.made_by.needs)  # what a method declares depends on its settings here

    def start(self, roles: list[str], n_layers: int, pattern: Pattern, generator: torch.Generator) -> State:
        """Nothing is carried: the network is the last one throughout."""
        return {}

    def distance(self, output_BTD: Tensor, target_BTD: Tensor, input_BTD: Tensor) -> Tensor:
        """The method's."""
        return self.made_by.distance(output_BTD, target_BTD, input_BTD)

    def learn(
        self, work: LayerWork, state: State, seed: int, snapshot: State | None = None
    ) -> Generator[LearnStep, None, tuple[dict[str, Pruned], State]]:
        """No step is made."""
        yield from ()
        assert self.of_run is not None
        pruned = {name: self.of_run.of(name) for name in work.weights}
        taken = {name: one.mask.to(work.weights[name].device) for name, one in pruned.items()}
        made = self.made_by.regenerate(work, self.last)
        for name, mask in made.items():
            self._compare(work, name, mask, taken[name])
            self.packed[name] = masks.pack(mask.cpu())
        losses = [_loss(work, one) for one in (taken, made, work.priors)]
        self.layers.append(RegeneratedLayer(work.index, None, *losses))
        return {name: Pruned(taken[name], one.weight) for name, one in pruned.items()}, {}

    def _compare(self, work: LayerWork, name: str, mask: Tensor, taken: Tensor) -> None:
        pattern, prior = work.patterns[name], work.priors.get(name)
        self.linears.append(
            RegeneratedLinear(
                name,
                work.index,
                work.roles[name],
                mask.numel() // pattern.group,
                _same(mask, taken, pattern),
                None if prior is None else _same(prior, taken, pattern),
                None if prior is None else _same(prior, mask, pattern),
            )
        )

    def words(self, index: int, n_layers: int) -> str:
        """A finished layer in a line."""
        own = [one for one in self.linears if one.layer == index]
        share = (
            "nothing to compare" if not own else f"{mean_over_groups(own, 'agreement'):.1%} of the groups as in the run"
        )
        return f"decoder layer {index + 1}/{n_layers}: {share}"

    def state_bytes(self, roles: list[str], n_layers: int, pattern: Pattern) -> int:
        """None of its own."""
        return 0

    def learner_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """The method's."""
        return self.made_by.learner_bytes(n_weights, pattern)


def _same(one_OI: Tensor, other_OI: Tensor, pattern: Pattern) -> float:
    """Share of the groups that have the same mask in both."""
    return 1.0 - masks.density((one_OI != other_OI).unflatten(1, (-1, pattern.group)).any(-1))


def _loss(work: LayerWork, found: Mapping[str, Tensor]) -> float | None:
    """On the held-out sequences, of masks on the dense weights; None without them."""
    if not found or not len(work.held_out):
        return None
    return work.loss(work.held_out, {name: work.weights[name] * mask for name, mask in found.items()})


def mean_over_groups(linears: list[RegeneratedLinear], key: str) -> float | None:
    """Over groups; None where one is unknown."""
    values = [getattr(one, key) for one in linears]
    if not values or None in values:
        return None
    return sum(value * one.groups for value, one in zip(values, linears, strict=True)) / sum(o.groups for o in linears)
