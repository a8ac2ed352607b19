"""The shared network while it learns: parameters, their moments, gradients in pieces, and the memory of earlier layers.

Legend: F features, G groups, K outputs of the head, H hidden, N cached groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmprune.methods import adamw, hypernetwork
from nmprune.methods.base import State
from nmprune.methods.group_features import n_features
from nmprune.methods.hypernetwork import Hypernetwork, Parameters
from nmprune.methods.hyperprune_settings import HyperPruneSettings
from nmprune.methods.mask_logits import MaskLogits
from nmprune.pattern import Pattern


def form(settings: HyperPruneSettings, pattern: Pattern) -> Hypernetwork:
    """The network that the settings ask for."""
    return Hypernetwork(
        n_features(settings.features, pattern.group),
        settings.outputs(pattern),
        settings.hidden,
        settings.depth,
        settings.layer_width,
        settings.component_width,
        settings.depth_features,
        settings.zero_start,
    )


class SharedNetwork:
    """The network in one layer: it is told groups and gradients, and keeps what it needs to go on.

    Args:
        settings: of the method.
        logits: the arithmetic of the pattern, for the continual term.
        state: as the layer before left it; not modified.
        index: the layer's number.
        device: where the layer lies.
        finished: the layer has been learned before: its embedding is not a new start.
    """

    def __init__(
        self,
        settings: HyperPruneSettings,
        logits: MaskLogits,
        state: State,
        index: int,
        device: torch.device,
        finished: bool = False,
    ) -> None:
        self._settings, self._logits, self._index, self._device = settings, logits, index, device
        self._form = form(settings, logits.pattern)
        values = {name: value.to(device, copy=True) for name, value in _under(state, "network.").items()}
        self._role_names = state["roles"]
        if settings.warm_layer and index > 0 and not finished:
            values["layer"][index] = values["layer"][index - 1]
        self._cache = {name: value.to(device) for name, value in _under(state, "cache.").items()}
        self._take(values)

    def _take(self, values: Parameters) -> None:
        self._parameters = {name: value.requires_grad_() for name, value in values.items()}
        self._first = {name: torch.zeros_like(value) for name, value in values.items()}
        self._second = {name: torch.zeros_like(value) for name, value in values.items()}
        self._count = 0
        self._folded: dict[int, Tensor] = {}

    @torch.no_grad()
    def outputs(self, features_FG: Tensor, role: int) -> Tensor:
        """(K, G): what the head makes of groups of this layer."""
        return self._form.forward(self._parameters, features_FG, self._fold(role))

    def _fold(self, role: int) -> Tensor:
        if role not in self._folded:
            with torch.no_grad():
                self._folded[role] = self._fold_anew(role)
        return self._folded[role]

    def _fold_anew(self, role: int) -> Tensor:
        here = torch.tensor([self._index], device=self._device)
        return self._form.fold(self._parameters, here, torch.tensor([role], device=self._device))

    def gather(self, features_FG: Tensor, role: int, gradient_KG: Tensor) -> None:
        """Add a piece to the gradient: the outputs of these groups are made again, with a graph, and pulled back."""
        with torch.enable_grad():
            outputs_KG = self._form.forward(self._parameters, features_FG, self._fold_anew(role))
            outputs_KG.backward(gradient_KG)

    def gather_terms(self) -> float:
        """Add the gradient of the continual term and of the embeddings' norms; returns the continual term."""
        settings, value = self._settings, 0.0
        with torch.enable_grad():
            if settings.lambda2 and self._cache["layers"].numel():
                change = self._change()
                (settings.lambda2 * change).backward()
                value = change.item()
            if settings.embedding_norm and (settings.layer_width or settings.component_width):
                norm = self._parameters["layer"][self._index].square().sum()
                norm = norm + self._parameters["component"].square().sum()
                (settings.embedding_norm * norm).backward()
        return value

    def _change(self) -> Tensor:
        """Equation 9: how far the outputs on the cached groups are from what they were; the mean over groups."""
        now_KN, then_KN = self._cached_outputs(), self._cache["outputs"]
        if self._settings.continual == "squared":
            return (now_KN - then_KN).square().sum(0).mean()
        now_KN, then_KN = self._log_probabilities(now_KN), self._log_probabilities(then_KN)
        return (then_KN.exp() * (then_KN - now_KN)).sum(0).mean()

    def _cached_outputs(self) -> Tensor:
        # the embeddings of earlier layers are finished: the gradient goes through the network and the components
        parameters = {**self._parameters, "layer": self._parameters["layer"].detach()}
        folded_HN = self._form.fold(parameters, self._cache["layers"], self._cache["roles"])
        return self._form.forward(self._parameters, self._cache["features"], folded_HN)

    def _log_probabilities(self, outputs_KN: Tensor) -> Tensor:
        """Of the candidates; where there are too many of them, of the slots as if one were drawn."""
        if self._settings.head == "slots" and self._logits.listed:
            outputs_KN = self._logits.candidate_logits(outputs_KN)
        return outputs_KN.log_softmax(0)

    def continual_value(self) -> float:
        """The continual term as it stands."""
        with torch.no_grad():
            return self._change().item() if self._cache["layers"].numel() else 0.0

    @torch.no_grad()
    def update(self, lr: float, frozen_component: bool = False) -> None:
        """One step of AdamW with the gradient gathered since the last one.

        Args:
            lr: learning rate of everything but the embeddings.
            frozen_component: the component embedding stands still.
        """
        gradients = {name: value.grad for name, value in self._parameters.items() if value.grad is not None}
        if self._settings.clip and gradients:
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
            for gradient in gradients.values():
                gradient.mul_(min(1.0, self._settings.clip / max(norm, 1e-30)))
        self._count += 1
        for name, gradient in gradients.items():
            value = self._parameters[name]
            if not (frozen_component and name == "component"):
                scaled = lr * (self._settings.component_lr if hypernetwork.is_embedding(name) else 1.0)
                decay = self._settings.weight_decay if hypernetwork.is_matrix(name) else 0.0
                adamw.step(value.data, gradient, self._first[name], self._second[name], self._count, scaled, decay)
            value.grad = None
        self._folded.clear()

    def restart(self) -> None:
        """Forget the moments: another objective begins."""
        self._take({name: value.detach() for name, value in self._parameters.items()})

    def gradients(self) -> Parameters:
        """What has been gathered since the last update."""
        return {name: value.grad.clone() for name, value in self._parameters.items() if value.grad is not None}

    def snapshot(self) -> State:
        """Copies of what changes inside a layer."""
        groups = {"network": self._parameters, "first": self._first, "second": self._second}
        flat = {
            f"{group}.{name}": value.detach().clone() for group, held in groups.items() for name, value in held.items()
        }
        return {**flat, "network_count": torch.tensor(self._count)}

    def restore(self, snapshot: State) -> None:
        """Go on from `snapshot`."""
        self._take({name: value.to(self._device, copy=True) for name, value in _under(snapshot, "network.").items()})
        self._first = {name: value.to(self._device, copy=True) for name, value in _under(snapshot, "first.").items()}
        self._second = {name: value.to(self._device, copy=True) for name, value in _under(snapshot, "second.").items()}
        self._count = int(snapshot["network_count"])

    @torch.no_grad()
    def state(self, features_FN: Tensor, roles_N: Tensor) -> State:
        """What the next layer starts from, with these groups of this layer in the cache.

        Args:
            features_FN: of the groups that are to be remembered.
            roles_N: int64, their components.
        """
        here_N = torch.full_like(roles_N, self._index)
        new = {"features": features_FN, "layers": here_N, "roles": roles_N}
        old = self._cache
        self._cache = {name: torch.cat([old[name], value], -1) for name, value in new.items()}
        outputs_KN = self._cached_outputs()
        n_old = old["outputs"].shape[1]
        if self._settings.anchor == "finished":
            outputs_KN[:, :n_old] = old["outputs"]
        self._cache["outputs"] = outputs_KN
        parameters = {f"network.{name}": value.detach() for name, value in self._parameters.items()}
        return {
            "roles": self._role_names,
            **parameters,
            **{f"cache.{name}": value for name, value in self._cache.items()},
        }


def start(
    settings: HyperPruneSettings, pattern: Pattern, n_layers: int, roles: list[str], generator: torch.Generator
) -> State:
    """The state before the first layer: fresh parameters, the components' names as UTF-8, and an empty cache."""
    network = form(settings, pattern)
    parameters = network.start(n_layers, len(roles), settings.component_noise, generator)
    empty = torch.zeros(0, dtype=torch.int64)
    return {
        "roles": torch.tensor(list("\n".join(roles).encode()), dtype=torch.uint8),
        **{f"network.{name}": value for name, value in parameters.items()},
        "cache.features": torch.zeros(network.n_features, 0),
        "cache.outputs": torch.zeros(network.n_outputs, 0),
        "cache.layers": empty,
        "cache.roles": empty.clone(),
    }


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
