"""How far a run is, told to whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal[
    "open",  # model and text are looked for
    "calibrate",  # token windows are cut
    "allocate",  # the dense model is measured for mixed patterns; counts decoder layers
    "permute",  # channels are reordered; counts decoder layers, twice where they are read again to judge
    "gradients",  # the loss is differentiated; counts forwards of a decoder layer over one sequence
    "layers",  # decoder layers are pruned; counts them
    "learn",  # masks are learned through the whole model; counts steps
    "masks",  # the mask file is written
    "model",  # the model is written; counts bytes
    "finetune",  # kept weights are trained; counts steps
    "analyze",  # a run's linears are looked at; counts decoder layers
    "regenerate",  # a run's network makes its masks again; counts decoder layers
    "verify",  # tensors are compared; counts bytes
    "dense",  # a run's dense model is measured; counts windows times layers
    "pruned",  # a run's pruned model is measured, likewise
    "measure",  # a model that belongs to no run is measured, likewise
    "done",
]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        stage: what is being done.
        done: parts finished, counted as the stage says; a layer in work is a fraction.
        total: of them; 0 where there is nothing to count.
        text: a line for a log, where something worth one happened; else empty.
        live: what a learner says of itself now, in a few words; a log needs it once in a while only.
    """

    stage: Stage
    done: float = 0
    total: float = 0
    text: str = ""
    live: str = ""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The report of a caller who wants none."""


def report_untied(names: Sequence[str], report: Report) -> None:
    """Say, where there are any, which parameters config.json ties and the checkpoint holds apart."""
    if names:
        report(
            Progress(
                "open",
                text=f"config.json ties {', '.join(names)} to the embedding, but the checkpoint holds other values for it: "
                "it is not tied, as in transformers. Set tie_word_embeddings to false to say so",
            )
        )
