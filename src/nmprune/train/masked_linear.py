"""Put learned masks into a model: each prunable parameter becomes a function of its frozen weight and of learned state.

It is a parametrisation of the stored parameter, so that plain linears, GPT-2's transposed ones, fused rows and 3-D experts
are masked alike, and every forward of the model's own code sees the masked weight. The mask is made when the weight is
asked for: where weights and state are sharded by rows, that is after they were gathered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmprune import masks
from nmprune.architectures import Linear, View
from nmprune.methods.base import Course, State, WholeModel
from nmprune.pattern import Pattern
from nmprune.train.seeds import generator_of
from nmprune.train.sharding import in_one_piece, whole


@dataclass(frozen=True)
class Target:
    """One linear whose mask is learned.

    Attributes:
        number: among all targets of the model, from 0; seeds its noise.
        name: `Linear.name`.
        shape: (out, in).
        pattern: N kept of M.
        layer: the decoder layer that holds it.
        parameter: its parameter's name inside that layer.
        view: where in that parameter.
    """

    number: int
    name: str
    shape: tuple[int, int]
    pattern: Pattern
    layer: nn.Module
    parameter: str
    view: View


def targets_of(layers: Sequence[nn.Module], linears: Sequence[Sequence[tuple[Linear, Pattern]]]) -> list[Target]:
    """The targets of a model, numbered in order of execution.

    Args:
        layers: decoder layers.
        linears: of each layer, what is to be pruned and to which pattern.
    """
    found: list[Target] = []
    for layer, of_layer in zip(layers, linears, strict=True):
        for one, pattern in of_layer:
            place = (layer, one.parameter, one.in_module)
            found.append(Target(len(found), one.name, one.shape, pattern, *place))
    return found


@dataclass
class Phase:
    """What the masked parameters of a model give at the moment; shared by all of them.

    Attributes:
        kind: "learn": the method's effective weights; "fixed": weights under the masks in `bits`; "dense": as they are.
        course: where the run is.
        draw: number of the noise: of the step, or of the micro-batch.
        bits: linear name -> packed mask, for "fixed".
    """

    kind: Literal["learn", "fixed", "dense"] = "dense"
    course: Course = field(default_factory=lambda: Course(0, 1))
    draw: int = 0
    bits: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def fixed(self, bits: Mapping[str, Tensor]) -> Iterator[None]:
        """Masks from outside inside the body."""
        before = self.kind, self.bits
        self.kind, self.bits = "fixed", bits
        try:
            yield
        finally:
            self.kind, self.bits = before

    @contextmanager
    def dense(self) -> Iterator[None]:
        """No masks inside the body."""
        before, self.kind = self.kind, "dense"
        try:
            yield
        finally:
            self.kind = before


class MaskedParameter(nn.Module):
    """The parametrisation of one stored parameter.

    Attributes:
        targets: the linears that it holds.
        states: for each of them, what is learned.
    """

    def __init__(
        self, targets: Sequence[Target], states: Sequence[State], method: WholeModel, phase: Phase, seed: int
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        learns = method.learns_by != "score"
        self.states = nn.ModuleList(
            nn.ParameterDict({key: nn.Parameter(value, requires_grad=learns) for key, value in state.items()})
            for state in states
        )
        self._method, self._phase, self._seed = method, phase, seed

    def state(self, at: int) -> State:
        """What is learned for the linear at that place of `targets`: the parameters themselves."""
        entries: Any = self.states[at]
        return dict(entries.items())

    def forward(self, stored: Tensor) -> Tensor:
        """What the model's forward uses in place of the stored parameter."""
        if self._phase.kind == "dense":
            return stored
        with torch.autocast(stored.device.type, enabled=False):
            view = self.targets[0].view
            if len(self.targets) == 1 and view.expert is None and view.rows is None:
                weight = self._weight(0, view.of(stored))
                return weight.T if view.transposed else weight
            whole = stored.clone()
            for at, target in enumerate(self.targets):
                target.view.of(whole).copy_(self._weight(at, target.view.of(stored)))
            return whole

    def _weight(self, at: int, stored_OI: Tensor) -> Tensor:
        target, phase = self.targets[at], self._phase
        if phase.kind == "fixed":
            return stored_OI * masks.unpack(phase.bits[target.name].to(stored_OI.device), target.shape)
        generator = noise(self._seed, target, phase.draw, stored_OI.device)
        state = self.state(at)
        weight = self._method.effective(stored_OI.float(), state, target.pattern, phase.course, generator)
        return weight.to(stored_OI.dtype)


def noise(seed: int, target: Target, draw: int, device: torch.device) -> torch.Generator:
    """The generator of a linear for one draw: asked again, it gives the same numbers again."""
    return generator_of(seed, "noise", target.number, draw, device=device)


class MaskedModel:
    """The masked parameters of a model, and what is learned in them. Weights and states may be sharded once they are there.

    Args:
        targets: what is masked.
        method: whose states these are.
        phase: shared by all of them.
        priors: linear name -> packed prior mask.
        seed: of the run.
    """

    def __init__(
        self, targets: Sequence[Target], method: WholeModel, phase: Phase, priors: Mapping[str, Tensor], seed: int
    ) -> None:
        self.targets, self.method, self.phase = tuple(targets), method, phase
        self._priors, self._seed = priors, seed
        self._places: list[tuple[nn.Module, str, MaskedParameter]] = []
        self._at: dict[str, tuple[MaskedParameter, int]] = {}
        self._forwards: list[tuple[nn.Module, Any]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model's forwards go through the masked parameters inside the body; after it the model is as it was."""
        try:
            for layer in dict.fromkeys(target.layer for target in self.targets):
                self.install(layer)
            yield
        finally:
            for owner, own in reversed(self._forwards):
                owner.__dict__.pop("forward", None)
                if own is not None:
                    owner.forward = own
            for owner, leaf, _ in self._places:
                if parametrize.is_parametrized(owner, leaf):
                    parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)

    def install(self, layer: nn.Module) -> None:
        """Mask the parameters of one decoder layer, whose weights are in memory; their states begin here."""
        by_parameter: defaultdict[str, list[Target]] = defaultdict(list)
        for target in self.targets:
            if target.layer is layer:
                by_parameter[target.parameter].append(target)
        for together in by_parameter.values():
            owner, leaf = _owner(together[0])
            stored = getattr(owner, leaf).detach()
            states = [_begin(one, stored, self.method, self._priors[one.name], self._seed) for one in together]
            masked = MaskedParameter(together, states, self.method, self.phase, self._seed)
            self._places.append((owner, leaf, masked))
            self._at |= {one.name: (masked, at) for at, one in enumerate(together)}
            parametrize.register_parametrization(owner, leaf, masked, unsafe=True)
            if any(target.view.expert is not None for target in together):
                self._forwards.append((owner, owner.__dict__.get("forward")))
                owner.forward = partial(_once, owner.forward)

    def state(self, name: str) -> State:
        """What is learned for a linear: the parameters themselves."""
        masked, at = self._at[name]
        return masked.state(at)

    def parameters(self) -> dict[str, Tensor]:
        """ "<linear>:<entry>" -> every learned tensor, the parameters themselves."""
        return {
            f"{target.name}:{key}": value for target in self.targets for key, value in self.state(target.name).items()
        }

    def linears(self) -> Iterator[tuple[Target, Tensor, State]]:
        """Each linear with its dense weight, fp32 (out, in) and whole, and with its state as it lies.

        One stored parameter is gathered at a time; collective where the model is sharded.
        """
        for owner, leaf, masked in self._places:
            parametrized: Any = owner.parametrizations
            stored = whole(parametrized[leaf].original)
            for at, target in enumerate(masked.targets):
                yield target, target.view.of(stored).float(), masked.state(at)

    @torch.no_grad()
    def put_masks(self, bits: Mapping[str, Tensor]) -> None:
        """Where the states are masks: set them to packed ones."""
        for one in self.targets:
            mask = self.state(one.name)["mask"]
            mask.copy_(masks.unpack(bits[one.name].to(mask.device), one.shape))

    @torch.no_grad()
    def hard_bits(self) -> dict[str, Tensor]:
        """Linear name -> packed mask that its state stands for, on the CPU; all of them in every process."""
        found = {}
        for one, weight, lying in self.linears():
            with in_one_piece(lying) as state:
                found[one.name] = masks.pack(self.method.hard_mask(weight, state, one.pattern)).cpu()
        return found


def _begin(target: Target, stored: Tensor, method: WholeModel, prior: Tensor, seed: int) -> State:
    weight = target.view.of(stored).float()
    generator = generator_of(seed, "begin", target.number)
    mask = masks.unpack(prior, target.shape).to(weight.device)
    state = method.begin(weight, mask, target.pattern, generator)
    # a contiguous copy of its own: it will be changed in place, and must not be the weight
    return {
        key: value.detach().to(weight.device, torch.float32).clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }


def _owner(target: Target) -> tuple[nn.Module, str]:
    path, _, leaf = target.parameter.rpartition(".")
    return target.layer.get_submodule(path), leaf


def _once(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Experts ask for their weights one by one: what one forward asks for is made once."""
    with parametrize.cached():
        return forward(*args, **kwargs)
