"""The shared network: features of a group, an embedding of the layer and one of the component -> logits of its masks.

Source: HyperPrune (Sun and Sakuma), section 4.1 and appendix D.4. Parameters are plain tensors by name, so that the state
between layers is plain data. Layer and component are the same for all groups of a linear: what the first layer makes of
them is folded into its bias, once per linear.

Legend: G groups, F features, H hidden, C context (both embeddings and the depth), K outputs of the head (candidates or slots).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_DEPTH_FEATURES = 3
_FIRST_LAYER_STD = 0.1  # appendix D.3: variance 0.01

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Hypernetwork:
    """The form of the network; its parameters are kept apart, by name.

    Attributes:
        n_features: F.
        n_outputs: logits of a group.
        hidden: width of the hidden layers.
        depth: hidden layers.
        layer_width: of the layer embedding; 0 = none.
        component_width: of the component embedding; 0 = none.
        depth_features: the layer's place in the model as three fixed numbers beside its embedding.
        zero_start: the last layer starts at zero, so that the first mask is the prior's.
    """

    n_features: int
    n_outputs: int
    hidden: int
    depth: int
    layer_width: int
    component_width: int
    depth_features: bool
    zero_start: bool

    @property
    def n_context(self) -> int:
        """Width of what layer and component add to the input."""
        return self.layer_width + self.component_width + _DEPTH_FEATURES * self.depth_features

    def n_parameters(self, n_layers: int, n_roles: int) -> int:
        """Numbers in all parameters, embeddings included."""
        widths = [self.n_features + self.n_context, *[self.hidden] * self.depth, self.n_outputs]
        network = sum((i + 1) * o for i, o in itertools.pairwise(widths))
        return network + n_layers * self.layer_width + n_roles * self.component_width

    def start(self, n_layers: int, n_roles: int, noise: float, generator: torch.Generator) -> Parameters:
        """Fresh parameters.

        Component c starts at the unit vector c plus noise (appendix D.4); components beyond the width of the embedding at a
        random direction of length about 1. Layers start at N(0, 0.01).

        Args:
            n_layers: of the model.
            n_roles: components.
            noise: standard deviation of the noise.
            generator: the source of randomness.
        """

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        parameters = {
            "layer": normal(n_layers, self.layer_width, std=_FIRST_LAYER_STD),
            "component": normal(n_roles, self.component_width, std=noise),
            "context": normal(self.hidden, self.n_context, std=math.sqrt(2 / (self.n_features + self.n_context))),
        }
        within = min(n_roles, self.component_width)
        parameters["component"][:within] += torch.eye(within, self.component_width)
        if n_roles > within > 0:
            parameters["component"][within:] += normal(
                n_roles - within, self.component_width, std=self.component_width**-0.5
            )
        fan_in = self.n_features + self.n_context
        width = self.n_features
        for number in range(self.depth):
            parameters[f"weight{number}"] = normal(self.hidden, width, std=math.sqrt(2 / fan_in))
            parameters[f"bias{number}"] = torch.zeros(self.hidden)
            width = fan_in = self.hidden
        std = 0.0 if self.zero_start else math.sqrt(1 / self.hidden)
        parameters[f"weight{self.depth}"] = normal(self.n_outputs, self.hidden, std=std)
        parameters[f"bias{self.depth}"] = torch.zeros(self.n_outputs)
        return parameters

    def fold(self, parameters: Mapping[str, Tensor], layers_B: Tensor, roles_B: Tensor) -> Tensor:
        """(H, B): the first layer's bias for these layers and components, differentiable.

        Args:
            parameters: of the network.
            layers_B: int64, decoder layers.
            roles_B: int64, components.
        """
        parts = [parameters["layer"][layers_B], parameters["component"][roles_B]]
        if self.depth_features:
            n_layers = len(parameters["layer"])
            depth_B = layers_B.to(parameters["bias0"]) / n_layers
            parts.append(torch.stack([depth_B, (math.pi * depth_B).sin(), (math.pi * depth_B).cos()], 1))
        return torch.addmm(parameters["bias0"].unsqueeze(1), parameters["context"], torch.cat(parts, 1).T)

    def forward(self, parameters: Mapping[str, Tensor], features_FG: Tensor, folded_HB: Tensor) -> Tensor:
        """(K, G): logits of groups.

        Args:
            parameters: of the network.
            features_FG: of the groups.
            folded_HB: as `fold` made it: one column for all groups, or one for each.
        """
        values = torch.addmm(folded_HB, parameters["weight0"], features_FG).relu_()
        for number in range(1, self.depth):
            values = torch.addmm(
                parameters[f"bias{number}"].unsqueeze(1), parameters[f"weight{number}"], values
            ).relu_()
        last = self.depth
        return torch.addmm(parameters[f"bias{last}"].unsqueeze(1), parameters[f"weight{last}"], values)


def is_matrix(name: str) -> bool:
    """Whether weight decay applies to the parameter: to matrices, not to biases and embeddings."""
    return name.startswith("weight") or name == "context"


def is_embedding(name: str) -> bool:
    """Whether the parameter is an embedding, with a learning rate of its own."""
    return name in ("layer", "component")
