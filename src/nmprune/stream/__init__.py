"""The layer walker: hidden states through decoder layers, one layer's weights in memory at a time."""

from nmprune.stream.already_sparse import refuse_sparse
from nmprune.stream.config import DTypeName
from nmprune.stream.dense_pass import LayerObserved, observe_layers
from nmprune.stream.layer_done import LayerDone, LayerStep, LinearDone, Restart, StreamOptions
from nmprune.stream.model import DecoderModel
from nmprune.stream.selection import LayerSelection, select
from nmprune.stream.walker import default_batch_size, prune_layers

__all__ = [
    "DTypeName",
    "DecoderModel",
    "LayerDone",
    "LayerObserved",
    "LayerSelection",
    "LayerStep",
    "LinearDone",
    "Restart",
    "StreamOptions",
    "default_batch_size",
    "observe_layers",
    "prune_layers",
    "refuse_sparse",
    "select",
]
