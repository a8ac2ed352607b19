"""Parameters outside the masked linears that a method may train along, and their original values."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nmprune.train.sharding import local


class Rest:
    """Embeddings, norms, biases and head while they learn; the original values come back wherever masks are judged.

    Args:
        model: before its parameters are masked; its weights may be on the meta device still.
        masked: parameters that are masked; they stay frozen.
        learns: False: nothing learns, and nothing is copied.
    """

    def __init__(self, model: nn.Module, masked: Collection[nn.Parameter], learns: bool) -> None:
        taken = set(map(id, masked))
        self._model = model
        self._names = [
            name
            for name, parameter in model.named_parameters()
            if learns and id(parameter) not in taken and parameter.is_floating_point()
        ]
        self._original: dict[str, Tensor] = {}

    def parameters(self) -> dict[str, Tensor]:
        """ "rest:<name>" -> the parameter itself, as the model holds it now."""
        return {f"rest:{name}": self._model.get_parameter(name) for name in self._names}

    def unfreeze(self) -> None:
        """Let these of the model's parameters get gradients."""
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def keep(self) -> None:
        """Remember the values of now as the original ones."""
        self._original = {name: value.detach().clone() for name, value in self.parameters().items()}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Only these of the model's parameters get gradients inside the body; after it the original values are back."""
        model = list(self._model.parameters())
        before = [parameter.requires_grad for parameter in model]
        for parameter in model:
            parameter.requires_grad_(False)
        self.unfreeze()
        self.keep()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, learned in self.parameters().items():
                    learned.grad = None
                    learned.copy_(self._original[name])
            for parameter, flag in zip(model, before, strict=True):
                parameter.requires_grad_(flag)

    @contextmanager
    @torch.no_grad()
    def original(self) -> Iterator[None]:
        """The original values inside the body."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        # by value: of a sharded parameter torch keeps another view of the same memory
        for name, parameter in self.parameters().items():
            other = self._original[name]
            values = local(parameter).clone()
            local(parameter).copy_(local(other))
            local(other).copy_(values)
