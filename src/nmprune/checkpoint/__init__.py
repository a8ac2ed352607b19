"""HF folders on disk, a tensor at a time: find, read, write; and the masks beside them."""

from nmprune.checkpoint.bits import apply_mask, as_integers
from nmprune.checkpoint.gguf import dequantise_gguf
from nmprune.checkpoint.header import TensorInfo
from nmprune.checkpoint.locate import DEMO_MODEL, display_name, locate, locate_config
from nmprune.checkpoint.mask_diff import MaskDiff, TensorDiff, diff
from nmprune.checkpoint.mask_file import MaskFile, TensorMask, as_rows, checksum, read_masks, write_masks
from nmprune.checkpoint.maskllm_npz import read_npz, write_npz
from nmprune.checkpoint.reader import Checkpoint, read_config
from nmprune.checkpoint.writer import write_checkpoint

__all__ = [
    "DEMO_MODEL",
    "Checkpoint",
    "MaskDiff",
    "MaskFile",
    "TensorDiff",
    "TensorInfo",
    "TensorMask",
    "apply_mask",
    "as_integers",
    "as_rows",
    "checksum",
    "dequantise_gguf",
    "diff",
    "display_name",
    "locate",
    "locate_config",
    "read_config",
    "read_masks",
    "read_npz",
    "write_checkpoint",
    "write_masks",
    "write_npz",
]
