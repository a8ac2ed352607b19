"""A 2-D (out, in) view of every linear, however a model family stores it: plain, fused, transposed, 3-D experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from nmprune.architectures.base import Family
from nmprune.errors import InputError


@dataclass(frozen=True)
class View:
    """Where inside a stored tensor one linear's (out, in) matrix lies.

    Attributes:
        expert: index along the first axis of a 3-D tensor of experts; None for a 2-D tensor.
        rows: [start, stop) of the output features where several linears are fused along them; None for all.
        transposed: the matrix is stored (in, out), as GPT-2's Conv1D and gpt-oss's experts are.
    """

    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The (out, in) matrix inside `tensor`, sharing its memory: writing to it writes to the tensor."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        if self.transposed:
            matrix = matrix.T
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    @property
    def group_axis(self) -> Literal[-1, -2]:
        """The axis of the stored tensor along which N:M groups run: -1, or -2 where it is transposed."""
        return -2 if self.transposed else -1


@dataclass(frozen=True)
class Linear:
    """One prunable linear of one decoder layer.

    Attributes:
        name: unique in the model: the checkpoint tensor's name without ".weight"; for one expert of a 3-D tensor on
            disk, ".<expert>" is added.
        role: its place inside the decoder layer, without the expert's number (`mlp.up_proj`, `mlp.experts.down_proj`).
        shape: (out, in).
        shared_input: the name of the tensor that feeds it; linears with equal names read the same statistics.
        tensor: the checkpoint tensor that holds it on disk.
        on_disk: where in that tensor.
        parameter: the parameter of the decoder layer module that holds it in memory.
        in_module: where in that parameter.
    """

    name: str
    role: str
    shape: tuple[int, int]
    shared_input: str
    tensor: str
    on_disk: View
    parameter: str
    in_module: View


@dataclass(frozen=True)
class DenseLinear:
    """A linear that stays dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class ModuleLinear:
    """One linear as the decoder layer's module holds it in memory.

    Attributes:
        role: path inside the decoder layer (`mlp.up_proj`, `mlp.experts.gate_up_proj`).
        parameter: name of the parameter inside the decoder layer.
        view: where in that parameter.
        shape: (out, in).
        shared_input: role of the first linear that is fed by the same tensor; an expert's carries its number.
        module: path of the module whose input is observed.
    """

    role: str
    parameter: str
    view: View
    shape: tuple[int, int]
    shared_input: str
    module: str


def starred(name: str) -> str:
    """A name with layer and expert numbers as "*": "model.layers.3.mlp.up_proj" -> "model.layers.*.mlp.up_proj"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def linears_of_layer(layer: nn.Module, family: Family) -> tuple[list[ModuleLinear], dict[str, str]]:
    """Every prunable linear of a decoder layer in order of execution, and the roles that stay dense with their reasons.

    The weights may be on the meta device. Nothing is passed over in silence: a matrix that the family's table does not
    name is an error.

    Raises:
        InputError: the layer holds a matrix that the table does not know.
    """
    parameters = dict(layer.named_parameters())
    found = [*_plain(parameters, family), *_experts(parameters, family)]
    known = {linear.parameter for linear in found}
    matrices = {name: one for name, one in parameters.items() if one.dim() >= 2 and not name.endswith("bias")}
    dense = {role: reason for role, reason in family.dense.items() if f"{role}.weight" in matrices}
    for name, parameter in matrices.items():
        if name not in known and name.removesuffix(".weight") not in dense:
            raise InputError(
                f"{name} of shape {tuple(parameter.shape)} is not in the table of model_type "
                f"{'/'.join(family.model_types)} (src/nmprune/architectures). This variant stores weights that nmprune "
                "does not know; add the role to `shared_inputs`, or to `dense` with a reason."
            )
    return found, dense


def _plain(parameters: dict[str, nn.Parameter], family: Family) -> Iterator[ModuleLinear]:
    view = View(transposed=family.transposed)
    for roles in family.shared_inputs:
        present = [role for role in roles if f"{role}.weight" in parameters]
        for role in present:
            out_features, in_features = view.of(parameters[f"{role}.weight"]).shape
            yield ModuleLinear(role, f"{role}.weight", view, (out_features, in_features), present[0], role)


def _experts(parameters: dict[str, nn.Parameter], family: Family) -> Iterator[ModuleLinear]:
    if family.experts is None:
        return
    for name in family.experts.shared_inputs:
        role = f"{family.experts.module}.{name}"
        if role not in parameters:
            continue
        for expert in range(parameters[role].shape[0]):
            view = View(expert=expert, transposed=family.experts.transposed)
            out_features, in_features = view.of(parameters[role]).shape
            yield ModuleLinear(role, role, view, (out_features, in_features), f"{role}.{expert}", family.experts.module)
