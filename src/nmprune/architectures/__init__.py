"""Where a model family keeps its decoder layers and linears: a table per family, one line each here."""

from __future__ import annotations

from nmprune.architectures.base import Experts, Family
from nmprune.architectures.gpt2 import GPT2
from nmprune.architectures.gpt_neox import GPT_NEOX
from nmprune.architectures.gpt_oss import GPT_OSS
from nmprune.architectures.linears import DenseLinear, Linear, ModuleLinear, View, linears_of_layer, starred
from nmprune.architectures.llama import GEMMA3, LLAMA
from nmprune.architectures.mixtral import MIXTRAL
from nmprune.architectures.opt import OPT
from nmprune.architectures.phi3 import PHI3
from nmprune.architectures.qwen_moe import QWEN_MOE
from nmprune.errors import InputError, near_matches

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (LLAMA, GEMMA3, PHI3, OPT, GPT_NEOX, GPT2, MIXTRAL, QWEN_MOE, GPT_OSS)
    for model_type in family.model_types
}


def find_family(model_type: str) -> Family:
    """The table for `config.model_type`.

    Raises:
        InputError: there is none; the message says how to add one.
    """
    if model_type not in FAMILIES:
        raise InputError(
            f"model_type {model_type!r} has no table of decoder layers and linears. {near_matches(model_type, FAMILIES)} "
            "A new family is one short file in src/nmprune/architectures and one line in its __init__: see CONTRIBUTING.md."
        )
    return FAMILIES[model_type]


__all__ = [
    "FAMILIES",
    "DenseLinear",
    "Experts",
    "Family",
    "Linear",
    "ModuleLinear",
    "View",
    "find_family",
    "linears_of_layer",
    "starred",
]
