"""Which models can be streamed, told from their config alone; and the model that a config makes, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from nmprune.architectures import find_family
from nmprune.checkpoint.reader import Checkpoint
from nmprune.errors import InputError
from nmprune.stream.weights import commonest_float

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


def load_config(folder: Path, trust_remote_code: bool = False, allow_sparse: bool = False) -> PretrainedConfig:
    """The config of a decoder model that can be pruned.

    Raises:
        InputError: config.json cannot be read, or it describes a quantised, already sparse, encoder or unknown model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' validators raise whatever the bad value leads to
        raise InputError(f"{folder}/config.json cannot be used: {' '.join(str(error).split())[:300]}") from error
    check_config(config, str(folder), allow_sparse)
    return config


def check_config(config: PretrainedConfig, where: str, allow_sparse: bool = False) -> None:
    """Raise InputError unless this is the config of a dense, unquantised decoder of a known family."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else type(quantised).__name__
        raise InputError(
            f"{where} is quantised already ({kind}). N:M masks are found on unquantised weights: start from the fp16 or bf16 "
            "checkpoint, prune it, then quantise the result."
        )
    if not allow_sparse and (getattr(config, "nmprune", None) or getattr(config, "sparsity_config", None)):
        raise InputError(
            f"{where} is sparse already: its config.json says so. Pruning it again would choose among what is left: start "
            "from the dense checkpoint, or say --allow-sparse."
        )
    architectures = config.architectures or []
    is_encoder = config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{where} is a {config.model_type} model ({', '.join(architectures) or 'no architecture named'}), not a "
            "decoder-only language model. nmprune streams decoder layers; encoders and encoder-decoders are not supported."
        )
    find_family(config.model_type)


def empty_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with all parameters on the meta device and its small computed buffers (rotary tables) real.

    Raises:
        InputError: the numbers of the config do not make a model.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise InputError(
            f"config.json of this {config.model_type} model makes no model ({type(error).__name__}: {error}). Fetch it again."
        ) from error
    model.tie_weights()
    return model


def compute_dtype(
    name: DTypeName, device: torch.device, config: PretrainedConfig, checkpoint: Checkpoint | None = None
) -> torch.dtype:
    """What "auto" means: fp32 on a CPU; elsewhere what config.json says, or else what most of the weights are stored in."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return (commonest_float(checkpoint) if checkpoint else None) or torch.float32
