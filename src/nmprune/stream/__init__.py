"""The layer walker: hidden states through decoder layers, one layer's weights in memory at a time."""

from nmprune.stream.already_sparse import refuse_sparse
from nmprune.stream.config import DTypeName
from nmprune.stream.layer_done import LayerDone, LayerStep, LinearDone, StreamOptions
from nmprune.stream.model import DecoderModel
from nmprune.stream.selection import LayerSelection, select
from nmprune.stream.walker import default_batch_size, prune_layers

__all__ = [
    "DTypeName",
    "DecoderModel",
    "LayerDone",
    "LayerSelection",
    "LayerStep",
    "LinearDone",
    "StreamOptions",
    "default_batch_size",
    "prune_layers",
    "refuse_sparse",
    "select",
]
