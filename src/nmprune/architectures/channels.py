"""Which axis of which parameter carries which channels: what must be permuted together so that a model computes the same.

Three kinds of channel space can be permuted freely:

- `ffn`: the inputs of a down projection are an elementwise function of the outputs of gate and up, channel by channel.
- `heads`: the inputs of an output projection are, head by head, sums of value vectors: a permutation inside a head of the
  values is one inside every query head that reads it. Heads that share a key-value head share the permutation.
- `residual`: what embeddings and decoder layers write to and read from. Norms see every channel with its own weight, and
  their statistics do not depend on the order.

Everything is derived from a family's table and from shapes. A parameter that the derivation does not know is an error:
it might tell channels apart.

Legend: B blocks of a space, S channels of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nmprune.architectures.base import Family
from nmprune.errors import InputError

Kind = Literal["ffn", "heads", "residual"]
KINDS: tuple[Kind, ...] = ("ffn", "heads", "residual")
# How the channels of a space lie along an axis: in order (each block repeated for the query heads that read it); gate's
# then up's; gate's and up's alternating; as the last ones of fused q, k, v; as v in fused q, k, v of each head.
Arrangement = Literal["in order", "halves", "alternating", "last", "by head"]

RESIDUAL = "residual"
# Modules and parameters outside the decoder layers whose last axis (project_in: the one before) is the residual stream.
_OUTSIDE = {
    **dict.fromkeys(("embed_tokens", "embed_in", "wte", "wpe", "embed_positions"), -1),
    **dict.fromkeys(("norm", "ln_f", "final_layer_norm"), -1),
    **dict.fromkeys(("lm_head", "embed_out", "project_out", "mm_input_projection_weight"), -1),
    "project_in": -2,
}
_WORD_CHANNELS = ("embed_tokens", "lm_head")  # of OPT models whose words have fewer channels than the residual stream
_ELSEWHERE = ("vision_tower", "mm_soft_emb_norm")  # parts of a model that the residual stream does not reach
# Inside a decoder layer: norms of the residual stream, and what stands beside the channels that are permuted.
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("self_attn_layer_norm", "final_layer_norm", "ln_1", "ln_2"),
)
_BESIDE = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "sinks")


@dataclass(frozen=True)
class Space:
    """Channels that can be reordered inside their blocks.

    A permutation of a space is int64 (B, S), each row a permutation of 0..S-1: new channel s of block b is old channel
    `permutation[b, s]`.

    Attributes:
        name: "residual", or the full name of the linear whose inputs the channels are.
        kind: ffn, heads or residual.
        layer: 0-based decoder layer; None for the residual stream.
        shape: (B, S): one block, or one per expert or key-value head.
        experts: the blocks are experts, each a matrix of its own; else they lie side by side along an axis.
    """

    name: str
    kind: Kind
    layer: int | None
    shape: tuple[int, int]
    experts: bool = False


@dataclass(frozen=True)
class Carrier:
    """One axis of a parameter, and whose channels lie along it.

    Attributes:
        space: `Space.name`.
        axis: -1 or -2.
        arrangement: how.
    """

    space: str
    axis: int
    arrangement: Arrangement = "in order"


@dataclass(frozen=True)
class Channels:
    """The channel spaces of a model.

    Attributes:
        spaces: by name.
        carriers: parameter (its name in the state dict) -> the axes of it that carry a space.
        shapes: parameter -> its shape.
        layers: path of the decoder layers.
    """

    spaces: dict[str, Space]
    carriers: dict[str, tuple[Carrier, ...]]
    shapes: dict[str, tuple[int, ...]]
    layers: str

    def layer_prefix(self, index: int) -> str:
        """What the names of decoder layer `index` begin with."""
        return f"{self.layers}.{index}."

    def gathers(self, parameter: str, permutations: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
        """(axis, index) for every axis of `parameter` that the permutations move; see `take`."""
        return [
            (one.axis, self._index(one, self.shapes[parameter][one.axis], permutations[one.space]))
            for one in self.carriers.get(parameter, ())
            if one.space in permutations
        ]

    def _index(self, carrier: Carrier, length: int, permutation_BS: Tensor) -> Tensor:
        if self.spaces[carrier.space].experts:
            return torch.stack([_along(carrier, length, row_S[None]) for row_S in permutation_BS])
        return _along(carrier, length, permutation_BS)


def take(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """`tensor` reordered along `axis`: new position i holds what was at `index[i]`; an index of two axes is one per expert."""
    if index.dim() == 1:
        return tensor.index_select(axis, index.to(tensor.device))
    return torch.stack([take(one, axis, row) for one, row in zip(tensor, index, strict=True)])


def _along(carrier: Carrier, length: int, permutation_BS: Tensor) -> Tensor:
    """The index (length,) that a permutation means along an axis of that length."""
    n_blocks, size = permutation_BS.shape
    if carrier.arrangement == "by head":
        heads_B3S = torch.arange(length).view(n_blocks, 3, size)
        return torch.stack((*heads_B3S[:, :2].unbind(1), heads_B3S[:, 2].gather(1, permutation_BS)), 1).flatten()
    n_copies = length // (n_blocks * size) if carrier.arrangement == "in order" else 1
    blocks = permutation_BS.repeat_interleave(n_copies, 0)
    flat = (blocks + size * torch.arange(len(blocks))[:, None]).flatten()
    if carrier.arrangement == "halves":
        return torch.cat((flat, flat + len(flat)))
    if carrier.arrangement == "alternating":
        return torch.stack((2 * flat, 2 * flat + 1), 1).flatten()
    if carrier.arrangement == "last":
        return torch.cat((torch.arange(length - len(flat)), length - len(flat) + flat))
    return flat


def find_channels(shapes: Mapping[str, tuple[int, ...]], family: Family, n_heads: int, hidden_size: int) -> Channels:
    """The channel spaces of a model.

    Args:
        shapes: every parameter's shape by its name in the state dict, tied ones under each name.
        family: the model's table.
        n_heads: query heads of an attention.
        hidden_size: channels of the residual stream.

    Raises:
        InputError: a parameter that the derivation does not know.
    """
    finder = _Finder(dict(shapes), family, n_heads, hidden_size)
    finder.find()
    return Channels(
        finder.spaces, {name: tuple(found) for name, found in finder.carriers.items()}, finder.shapes, family.layers
    )


class _Finder:
    def __init__(self, shapes: dict[str, tuple[int, ...]], family: Family, n_heads: int, hidden_size: int) -> None:
        self.shapes, self.family, self.n_heads = shapes, family, n_heads
        self.spaces = {RESIDUAL: Space(RESIDUAL, "residual", None, (1, hidden_size))}
        self.carriers: defaultdict[str, list[Carrier]] = defaultdict(list)
        self._known: set[str] = set()

    def find(self) -> None:
        prefix = f"{self.family.layers}."
        layers: defaultdict[int, dict[str, str]] = defaultdict(dict)
        for name in self.shapes:
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                layers[int(number)][rest] = name
        for index, parameters in layers.items():
            self._layer(index, f"{prefix}{index}.", parameters)
        self._outside(name for name in self.shapes if not name.startswith(prefix))

    def _layer(self, index: int, prefix: str, parameters: dict[str, str]) -> None:
        pairs = zip(self.family.shared_inputs[::2], self.family.shared_inputs[1::2], strict=True)
        for number, (producers, consumers) in enumerate(pairs):
            present = [prefix + role for role in producers if f"{role}.weight" in parameters]
            if present:
                self._pair(index, present, prefix + consumers[0], attention=number == 0)
        if self.family.experts is not None:
            self._experts(index, prefix + self.family.experts.module)
        for role in self.family.dense:
            name = f"{prefix}{role}.weight"
            if role.rpartition(".")[2] not in _BESIDE and name in self.shapes:
                self._carry(name, RESIDUAL, -1)
                self._known.add(f"{prefix}{role}.bias")
        for rest, name in parameters.items():
            parts = rest.split(".")
            if name in self._known or any(part in _BESIDE for part in parts):
                continue
            if len(parts) < 2 or parts[-2] not in _NORMS:
                raise self._unknown(name)
            self._carry(name, RESIDUAL, -1)

    def _pair(self, index: int, producers: list[str], consumer: str, *, attention: bool) -> None:
        """Linears that read the residual stream, and the linear that reads what they make."""
        out, into = (-1, -2) if self.family.transposed else (-2, -1)
        width = self.shapes[f"{consumer}.weight"][into]
        n_out = self.shapes[f"{producers[-1]}.weight"][out]
        arrangement: Arrangement = "in order"
        if attention:
            head_dim = width // self.n_heads
            n_values = n_out
            if len(producers) == 1:  # q, k, v in one: as many q as the consumer reads, as many k as v
                arrangement = "by head" if self.family.qkv_by_head else "last"
                n_values = (n_out - width) // 2
            self.spaces[consumer] = Space(consumer, "heads", index, (n_values // head_dim, head_dim))
        else:
            self.spaces[consumer] = Space(consumer, "ffn", index, (1, width))
            arrangement = "in order" if n_out == width else "halves"
        for producer in producers:
            self._carry(f"{producer}.weight", RESIDUAL, into)
            self._known.add(f"{producer}.bias")
            if not attention or producer == producers[-1]:  # of q, k and v only v
                self._carry(f"{producer}.weight", consumer, out, arrangement)
                self._carry(f"{producer}.bias", consumer, -1, arrangement)
        self._carry(f"{consumer}.weight", consumer, into)
        self._carry(f"{consumer}.weight", RESIDUAL, out)
        self._carry(f"{consumer}.bias", RESIDUAL, -1)

    def _experts(self, index: int, module: str) -> None:
        experts = self.family.experts
        assert experts is not None
        first, last = (f"{module}.{name}" for name in experts.shared_inputs)
        if last not in self.shapes:
            return
        out, into = (-1, -2) if experts.transposed else (-2, -1)
        self.spaces[last] = Space(last, "ffn", index, (self.shapes[last][0], self.shapes[last][into]), experts=True)
        arrangement: Arrangement = "alternating" if experts.interleaved else "halves"
        self._carry(first, RESIDUAL, into)
        self._carry(first, last, out, arrangement)
        self._carry(f"{first}_bias", last, -1, arrangement)
        self._carry(last, last, into)
        self._carry(last, RESIDUAL, out)
        self._carry(f"{last}_bias", RESIDUAL, -1)

    def _outside(self, names: Iterator[str]) -> None:
        projected = any("project_in" in name.split(".") for name in self.shapes)
        for name in names:
            parts = name.split(".")
            place = parts[-1] if parts[-1] in _OUTSIDE else parts[-2] if len(parts) > 1 else ""
            if any(part in _ELSEWHERE for part in parts) or (projected and place in _WORD_CHANNELS):
                continue
            if place not in _OUTSIDE:
                raise self._unknown(name)
            if not (place in ("lm_head", "embed_out") and parts[-1] == "bias"):  # a word's bias, not a channel's
                self._carry(name, RESIDUAL, _OUTSIDE[place])

    def _carry(self, parameter: str, space: str, axis: int, arrangement: Arrangement = "in order") -> None:
        """Note a carrier, where the model has that parameter."""
        if parameter not in self.shapes:
            return
        self._known.add(parameter)
        n_blocks, size = self.spaces[space].shape
        channels = size if self.spaces[space].experts else n_blocks * size
        length = self.shapes[parameter][axis]
        expected = {
            "halves": length == 2 * channels,
            "alternating": length == 2 * channels,
            "by head": length == 3 * channels,
            "last": length > channels,
            # query heads that share a key-value head read it one after the other
            "in order": length == channels or (self.spaces[space].kind == "heads" and length % channels == 0),
        }
        if not expected[arrangement]:
            raise InputError(
                f"{parameter} of shape {self.shapes[parameter]}: {channels} channels of {space} do not lie along axis {axis} "
                f"as model_type {'/'.join(self.family.model_types)} has them ({arrangement}). {_WAY_OUT}"
            )
        self.carriers[parameter].append(Carrier(space, axis, arrangement))

    def _unknown(self, name: str) -> InputError:
        return InputError(
            f"{name} of shape {self.shapes[name]} is not known to the channels of model_type "
            f"{'/'.join(self.family.model_types)} (src/nmprune/architectures/channels.py): a permutation might change what the "
            f"model computes. {_WAY_OUT}"
        )


_WAY_OUT = "Prune it without --permute."
