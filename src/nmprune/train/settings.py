"""The recipe's `train` section: how a whole-model method learns, apart from what its paper says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nmprune.errors import near_matches
from nmprune.train.losses import LOSSES


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainRecipe:
    """The loop of a whole-model method; other methods do not read it."""

    steps: int = _option(200, "optimiser steps")
    batch_size: int = _option(1, "sequences per micro-batch")
    accumulation: int = _option(1, "micro-batches per step")
    loss: str = _option("lm", "lm: next-token cross-entropy; kl: distillation from the dense model")
    top_k: int = _option(0, "kl: the dense model's so many likeliest tokens, the rest as one; 0 = all")
    autocast: bool = _option(False, "forwards in bfloat16; learned state and masks stay fp32")
    activation_checkpointing: bool = _option(False, "decoder layers are run again on the way back and keep less memory")
    shard: bool = _option(
        False, "several processes: each holds its share of weights and learned state, not all (FSDP2)"
    )
    eval_every: int = _option(20, "steps between two judgements of the hard masks on held-out sequences")
    patience: int = _option(0, "judgements without a better mask before it stops; 0 = never")
    guard: bool = _option(True, "the prior masks stay where no learned ones have a lower held-out loss")

    def faults(self) -> list[str]:
        """What is out of range, in words."""
        least = {"steps": 1, "batch_size": 1, "accumulation": 1, "top_k": 0, "eval_every": 1, "patience": 0}
        found = [
            f"train.{key} is {value}; expected at least {minimum}."
            for key, minimum in least.items()
            if (value := getattr(self, key)) < minimum
        ]
        if self.loss not in LOSSES:
            found.append(f"train.loss is {self.loss!r}. {near_matches(self.loss, LOSSES)}")
        return found
