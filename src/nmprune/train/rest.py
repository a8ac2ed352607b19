"""Parameters outside the masked linears that a method may train along, and their original values."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Rest:
    """Embeddings, norms, biases and head while they learn; the original values come back wherever masks are judged.

    Args:
        model: before its parameters are masked.
        masked: parameters that are masked; they stay frozen.
        learns: False: nothing learns, and nothing is copied.
    """

    def __init__(self, model: nn.Module, masked: Collection[nn.Parameter], learns: bool) -> None:
        taken = set(map(id, masked))
        self._all = list(model.parameters())
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if learns and id(parameter) not in taken and parameter.is_floating_point()
        }
        self._original = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def parameters(self) -> dict[str, Tensor]:
        """ "rest:<name>" -> the parameter itself."""
        return {f"rest:{name}": parameter for name, parameter in self._parameters.items()}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Only these of the model's parameters get gradients inside the body; after it the original values are back."""
        before = [parameter.requires_grad for parameter in self._all]
        for parameter in self._all:
            parameter.requires_grad_(False)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.grad = None
                parameter.data = self._original[name]
            for parameter, flag in zip(self._all, before, strict=True):
                parameter.requires_grad_(flag)

    @contextmanager
    @torch.no_grad()
    def original(self) -> Iterator[None]:
        """The original values inside the body."""
        learned = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._original[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = learned[name]
