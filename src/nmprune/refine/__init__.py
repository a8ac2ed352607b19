"""What can follow any method on a linear: another look at its mask, other weights on its mask."""

from nmprune.refine.chain import Chain
from nmprune.refine.layer_chain import LayerChain
from nmprune.refine.polish import Polish
from nmprune.refine.reconstruct import Reconstruct

__all__ = ["Chain", "LayerChain", "Polish", "Reconstruct"]
