"""The `finetune` section of a recipe: how the kept weights of a finished run are trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nmprune.errors import near_matches
from nmprune.train.losses import LOSSES
from nmprune.train.parts import PARTS

AUTOCAST = ("auto", "yes", "no")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything that decides what finetuning finds."""

    parent: str = _option("", "the run folder that it starts from")
    parent_masks: str = _option("", "sha256 of that run's masks.safetensors; filled in")
    text: str = _option("", "builtin, wikitext2, c4, hf:DATASET, or a file; empty = what the run was calibrated on")
    seq_len: int = _option(512, "tokens per window")
    max_tokens: int = _option(16_000_000, "of the text, tokens that are used at most")
    n_held_out: int = _option(8, "windows that are judged by and not trained on")
    minutes: float = _option(30.0, "of training, held-out evaluations included; 0 = until the steps are done")
    steps: int = _option(0, "at most so many; 0 = until the time is used up")
    batch_size: int = _option(2, "windows per forward")
    accumulation: int = _option(1, "forwards per step")
    loss: str = _option("kl", "kl: from the dense model's next-token distribution; lm: the text's next token")
    top_k: int = _option(0, "of the dense model's logits, per token; 0 = all")
    lr: float = _option(0.001, "share of a tensor's root mean square that a weight may move in one step")
    warm_up: float = _option(0.05, "share of the budget over which the rate rises")
    final_lr: float = _option(0.05, "share of lr that the cosine ends at")
    weight_decay: float = _option(0.0, "AdamW's")
    clip: float = _option(1.0, "norm of the gradient at most; 0 = no limit")
    lora: int = _option(0, "rank of masked low-rank deltas; 0 = all kept weights are trained")
    also: tuple[str, ...] = _option((), "norms, embeddings: what is trained beside the pruned linears")
    autocast: str = _option("auto", "bfloat16 forwards: yes, no, auto = where the processor is fast at it")
    activation_checkpointing: bool = _option(False, "compute activations twice instead of keeping them")
    evaluations: int = _option(12, "how often the held-out windows are looked at")
    patience: int = _option(4, "evaluations without a gain until it stops; 0 = never")
    seed: int = _option(0, "order of documents and windows")

    def share(self, step: int, seconds: float) -> float:
        """How much of the budget so many steps and seconds of training use up, 0..1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate(self, share: float) -> float:
        """What lr is multiplied with when a share of the budget is used up: up in a line, down in a cosine."""
        if share < self.warm_up:
            return share / self.warm_up
        down = (share - self.warm_up) / max(1.0 - self.warm_up, 1e-12)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * down))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the YAML holds it."""
        return {**asdict(self), "also": list(self.also)}

    def faults(self) -> list[str]:
        """What is wrong with the values, in sentences."""
        at_least = {
            "seq_len": 2, "max_tokens": 2, "n_held_out": 1, "minutes": 0, "steps": 0, "batch_size": 1, "accumulation": 1,
            "top_k": 0, "weight_decay": 0, "clip": 0, "lora": 0, "evaluations": 1, "patience": 0, "seed": 0,
        }  # fmt: skip
        found = [
            f"{name} is {value}; expected at least {least}."
            for name, least in at_least.items()
            if (value := getattr(self, name)) < least
        ]
        if not self.minutes and not self.steps:
            found.append("minutes and steps are both 0: give one of them.")
        if not self.lr > 0:
            found.append(f"lr is {self.lr}; expected more than 0.")
        shares = {"warm_up": self.warm_up, "final_lr": self.final_lr}
        found += [f"{name} is {value}; expected 0 to 1." for name, value in shares.items() if not 0 <= value <= 1]
        for name, value, known in (("loss", self.loss, LOSSES), ("autocast", self.autocast, AUTOCAST)):
            if value not in known:
                found.append(f"{name} is {value!r}. {near_matches(value, known)}")
        found += [f"also: {part!r}. {near_matches(part, PARTS)}" for part in self.also if part not in PARTS]
        return found
