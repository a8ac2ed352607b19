"""A decoder model whose layers are brought into memory one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from nmprune.architectures import DenseLinear, Family, Linear, ModuleLinear, find_family, linears_of_layer
from nmprune.checkpoint.names import NameMap, Piece, shapes_on_disk
from nmprune.checkpoint.reader import Checkpoint
from nmprune.errors import InputError
from nmprune.heap import give_back
from nmprune.stream.calls import LayerCalls, last_logits, record_layer_calls
from nmprune.stream.config import DTypeName, check_config, compute_dtype, empty_model, load_config
from nmprune.stream.hidden_states import HiddenStates, batches
from nmprune.stream.on_disk import dense_outside, on_disk
from nmprune.stream.ties import untie_different
from nmprune.stream.weights import check_dtypes, entry, move_buffers, put, random_weights, zeros


class DecoderModel:
    """A causal language model, its decoder layers reachable one by one.

    Opened from a folder, it holds no weights: `layer(i)` brings in one decoder layer and drops it afterwards. Made from a
    model in memory, `layer(i)` is simply that layer. Everything else (embeddings, rotary embeddings, masks, final norm,
    head) is the model's own code.

    Attributes:
        config: the model's config.
        family: the table of its decoder layers and linears.
        layers: the decoder layers, on the meta device unless loaded or in memory.
        n_layers: number of decoder layers.
        device: where layers run.
        dtype: compute dtype.
        checkpoint: the folder's tensors; None for a model in memory.
        untied: parameters that config.json ties although the checkpoint holds them apart, with other values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.config: PretrainedConfig = model.config
        self.family: Family = find_family(model.config.model_type)
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.layers = _decoder_layers(model, self.family)
        self.n_layers = len(self.layers)
        self.untied: tuple[str, ...] = ()
        self._names: NameMap | None = None
        if checkpoint is not None:
            self._names = NameMap(model, checkpoint.shapes())
            check_dtypes(model, self._names, checkpoint)
            self.untied = untie_different(model, self._names, checkpoint, dtype)
        elif all(parameter.is_meta for parameter in model.parameters()):
            self._names = NameMap(model, shapes_on_disk(model))
        self._fp32_names = tuple(model._get_dtype_plan(dtype))
        self._state_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.eval()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: DTypeName = "auto",
        trust_remote_code: bool = False,
        allow_sparse: bool = False,
    ) -> Self:
        """Open an HF folder without reading its weights.

        Args:
            folder: config.json and safetensors.
            device: where layers run.
            dtype: compute dtype; "auto" is fp32 on the CPU, elsewhere the checkpoint's own by its config or, where that
                does not say, the one that most of its bytes are in.
            trust_remote_code: run Python code from the folder, where its config names some.
            allow_sparse: take a model that says it is pruned already (to measure it).

        Raises:
            InputError: the folder, its config or its tensors cannot be used; quantised, encoder-only or unknown models.
        """
        checkpoint = Checkpoint.open(folder)
        config = load_config(folder, trust_remote_code, allow_sparse)
        place = torch.device(device)
        compute = compute_dtype(dtype, place, config, checkpoint)
        return cls(_empty(config, place, compute, trust_remote_code), checkpoint, place, compute)

    @classmethod
    def from_model(cls, model: PreTrainedModel, *, allow_sparse: bool = False) -> Self:
        """A model that is in memory whole; pruning changes its weights in place. It is put into evaluation mode.

        Args:
            model: a `...ForCausalLM`.
            allow_sparse: take a model whose config says that it is pruned already.

        Raises:
            InputError: its family is unknown, it is quantised or sparse already, or some of its weights are on the meta
                device.
        """
        check_config(model.config, "the model", allow_sparse)
        parameters = list(model.parameters())
        if any(parameter.is_meta for parameter in parameters):
            raise InputError("the model has weights on the meta device (offloaded or empty): pass its folder instead.")
        return cls(model, None, parameters[0].device, parameters[0].dtype)

    def twin(self, trust_remote_code: bool = False) -> Self:
        """Another model of the same checkpoint, without weights: for a use that leaves it changed.

        Args:
            trust_remote_code: as for `open`.
        """
        model = _empty(self.config, self.device, self.dtype, trust_remote_code)
        return type(self)(model, self.checkpoint, self.device, self.dtype)

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Checkpoint tensors that belong to no part of the model (buffers that older versions saved); never read."""
        return self._names.unused if self._names else ()

    @property
    def pieces(self) -> Mapping[str, tuple[Piece, ...]]:
        """Parameter -> the checkpoint tensors that it is made of; empty for a model in memory."""
        return self._names.pieces if self._names else {}

    @classmethod
    def from_config(
        cls,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: DTypeName = "auto",
        trust_remote_code: bool = False,
        allow_sparse: bool = False,
    ) -> Self:
        """The model as its config.json describes it, without any weights: for plans.

        Raises:
            InputError: config.json cannot be used.
        """
        config = load_config(folder, trust_remote_code, allow_sparse)
        place = torch.device(device)
        compute = compute_dtype(dtype, place, config)
        return cls(_empty(config, place, compute, trust_remote_code), None, place, compute)

    # -- linears ------------------------------------------------------------------------------------------------------

    def linears(self, index: int) -> tuple[list[Linear], list[DenseLinear]]:
        """The prunable linears of decoder layer `index` in order of execution, and those that stay dense by the table."""
        layer = self.layers[index]
        found, dense = linears_of_layer(layer, self.family)
        prefix = f"{self.family.layers}.{index}."
        linears = [linear for one in found for linear in on_disk(one, self._stored_as(prefix + one.parameter))]
        shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in layer.named_parameters()}
        return linears, [DenseLinear(prefix + role, shapes[role], reason) for role, reason in dense.items()]

    def module_linears(self, index: int) -> list[ModuleLinear]:
        """The prunable linears of decoder layer `index` as its module holds them."""
        return linears_of_layer(self.layers[index], self.family)[0]

    def stored_dtype(self, linear: Linear) -> torch.dtype:
        """The dtype of the checkpoint tensor that holds a linear."""
        return self.dtype if self.checkpoint is None else self.checkpoint.info(linear.tensor).dtype

    def weight(self, layer: nn.Module, linear: Linear) -> Tensor:
        """A copy of a linear's dense weight, fp32 (out, in) on the compute device.

        Taken from the loaded layer, or read from disk again where the compute dtype holds less than the checkpoint's.
        """
        parameter = layer.get_parameter(linear.parameter)
        stored = self.stored_dtype(linear)
        if torch.promote_types(parameter.dtype, stored) == parameter.dtype or self.checkpoint is None:
            return linear.in_module.of(parameter).detach().float().clone().contiguous()
        return linear.on_disk.of(self.checkpoint.read(linear.tensor)).to(self.device).float().contiguous()

    def dense_outside(self) -> list[DenseLinear]:
        """The head, the embeddings and whatever else holds a matrix outside the decoder layers: all stay dense."""
        return dense_outside(self.model, self.family.layers)

    # -- weights ------------------------------------------------------------------------------------------------------

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights in memory inside the body; dropped after it when streamed."""
        layer = self.layers[index]
        with self._loaded(layer, f"{self.family.layers}.{index}."):
            yield layer

    def bring_in(self, index: int | None) -> None:
        """Load decoder layer `index`, or (None) all that lies outside the decoder layers, and leave it in memory."""
        give_back()
        if index is not None:
            layer, prefix = self.layers[index], f"{self.family.layers}.{index}."
            self._load(layer, prefix, self._entries(layer, prefix))
            return
        outside = self._entries(self.model, "", self._inside_layers() | frozenset(self.model.all_tied_weights_keys))
        self._load(self.model, "", outside)
        self.model.tie_weights(recompute_mapping=False)

    def _entries(self, module: nn.Module, prefix: str, skip: frozenset[str] = frozenset()) -> list[str]:
        """The state of `module` that the checkpoint holds and whose names (under `prefix`) are not in `skip`."""
        return [name for name in module.state_dict() if prefix + name not in skip and self._pieces(prefix + name)]

    def _load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        for name in names:
            put(module, name, self._read(prefix + name))

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str, skip: frozenset[str] = frozenset()) -> Iterator[None]:
        """Bring in the state of `module` whose names (under `prefix`) are not in `skip`."""
        if self.checkpoint is None:
            yield
            return
        names = self._entries(module, prefix, skip)
        try:
            self._load(module, prefix, names)
            yield
        finally:
            for name in names:
                put(module, name, entry(module, name).to("meta"))
            give_back()

    def _stored_as(self, key: str) -> tuple[Piece, ...]:
        """The checkpoint tensors of a parameter; of a model in memory, a tensor of its own name."""
        return self._names.pieces[key] if self._names else (Piece(key),)

    def _pieces(self, key: str) -> tuple[Piece, ...]:
        return self._names.pieces.get(key, ()) if self._names else ()

    def _read(self, key: str) -> Tensor:
        assert self.checkpoint is not None
        keep_fp32 = any(name in key for name in self._fp32_names)
        dtype = torch.float32 if keep_fp32 else self.dtype
        pieces = self._pieces(key)
        if pieces[0].region is None:
            tensor = self.checkpoint.read(pieces[0].tensor)
            return tensor.to(self.device, dtype if tensor.is_floating_point() else tensor.dtype)
        whole = torch.empty(self._state_shapes[key], dtype=dtype, device=self.device)
        for piece in pieces:
            assert piece.region is not None
            piece.region.of(whole).copy_(self.checkpoint.read(piece.tensor))
        return whole

    @contextmanager
    def random_layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with random weights inside the body: for timing a model of which only the config is here."""
        with random_weights(self.layers[index], self.dtype, self.device):
            yield self.layers[index]

    def stand_in(self) -> AbstractContextManager[None]:
        """Zeros that take no memory for everything outside the decoder layers: what `calls` needs to be asked."""
        return zeros(self.model, self.dtype, self.device, self._inside_layers())

    # -- the model's own ends -----------------------------------------------------------------------------------------

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Everything before the decoder layers in memory: what `calls` needs."""
        with self._loaded(self.model, "", self._inside_layers() | self._head_only()):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Everything but the decoder layers in memory: what `logits` needs."""
        tied = frozenset(self.model.all_tied_weights_keys)
        try:
            with self._loaded(self.model, "", self._inside_layers() | tied):
                if self.checkpoint is not None:
                    self.model.tie_weights(recompute_mapping=False)
                yield
        finally:
            if self.checkpoint is not None:
                # back to the meta device as well: a tied name would keep the whole embedding in memory
                self.model.tie_weights(recompute_mapping=False)
                give_back()

    def _inside_layers(self) -> frozenset[str]:
        return frozenset(key for key in self._state_shapes if key.startswith(f"{self.family.layers}."))

    def _head_only(self) -> frozenset[str]:
        head = self.model.get_output_embeddings()
        if head is None:
            return frozenset()
        name = next(name for name, module in self.model.named_modules() if module is head)
        own = frozenset(f"{name}.{part}" for part in head.state_dict())
        tied = frozenset(self.model.all_tied_weights_keys)
        return own & tied if tied else own

    def embed(
        self,
        windows: Tensor,
        batch_size: int,
        hidden_budget: int,
        scratch: Path | None = None,
        n_apart: int = 0,
    ) -> tuple[HiddenStates, dict[int, LayerCalls]]:
        """The first layer's inputs for all windows, and how the model calls its layers, by batch size.

        Args:
            windows: int64 (n_sequences, seq_len).
            batch_size: sequences per forward; the last batch may be smaller.
            hidden_budget: bytes kept in RAM; past it the hidden states live in a file in `scratch`.
            scratch: folder for that file; None = the system's temporary folder.
            n_apart: the last so many sequences get batches of their own.
        """
        hidden: HiddenStates | None = None
        calls_of: dict[int, LayerCalls] = {}
        with self.embedding():
            for batch in batches(windows.shape[0], batch_size, n_apart):
                calls = self.calls(windows[batch])
                # the arguments (rotary tables, masks) are the same for every batch of that size
                calls_of.setdefault(batch.stop - batch.start, replace(calls, hidden=calls.hidden.new_empty(0)))
                if hidden is None:
                    shape = (*windows.shape, calls.hidden.shape[-1])
                    hidden = HiddenStates(shape, calls.hidden.dtype, self.device, hidden_budget, scratch)
                hidden.put(batch, calls.hidden)
        assert hidden is not None
        return hidden, calls_of

    def calls(self, token_ids: Tensor) -> LayerCalls:
        """How the model itself calls its decoder layers for a batch: first hidden states and every layer's arguments.

        Args:
            token_ids: (batch, seq_len). To be called inside `embedding()`.
        """
        return record_layer_calls(self.model, self.layers, token_ids.to(self.device))

    def logits(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """The model's logits (batch, seq_len, vocabulary) for the last layer's output. To be called inside `head()`."""
        return last_logits(self.model, self.layers, hidden, token_ids.to(self.device))


def _empty(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with its weights on the meta device and its computed buffers on `device`."""
    model = empty_model(config, dtype, trust_remote_code)
    move_buffers(model, device)
    return model


def _decoder_layers(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    try:
        return cast(nn.ModuleList, model.get_submodule(family.layers))
    except AttributeError as error:
        raise InputError(
            f"{type(model).__name__} has no {family.layers}: a causal language model is needed, such as "
            "AutoModelForCausalLM.from_pretrained gives."
        ) from error
