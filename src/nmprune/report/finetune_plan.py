"""What a finetuning would do, need and take, as tables."""

from __future__ import annotations

from dataclasses import dataclass

from nmprune.report.layout import Table, facts
from nmprune.report.plan import Needs
from nmprune.report.quantities import duration, size


@dataclass(frozen=True)
class FinetunePlan(Needs):
    """What a finetuning will need.

    Attributes:
        run: the folder of the run that would be finetuned.
        model: as its recipe names it.
        pattern: "N kept of M".
        parameters: of the whole model, tied ones once.
        n_layers: decoder layers.
        trained: values that the optimiser moves; pruned weights among them, which stay zero.
        what: what is trained, in words.
        loss: what is learned, in words.
        compute: what forwards are computed in, and where.
        text: what is trained on.
        windows: to train on, tokens in each, windows per forward, forwards per step.
        steps: that the budget allows; None where they are given by a time that nothing was measured for.
        memory: stage -> part -> bytes: what is in memory at the worst moment of each stage.
        peak_memory: bytes of the worst stage, beyond what Python and its imports take.
        limit: bytes that may be used.
        disk: part -> bytes.
        seconds: phase -> seconds; None where nothing was timed.
        notes: what a user should know before starting.
    """

    run: str
    model: str
    pattern: str
    parameters: int
    n_layers: int
    trained: int
    what: str
    loss: str
    compute: str
    text: str
    windows: tuple[int, int, int, int]
    steps: int | None
    memory: dict[str, dict[str, int]]
    peak_memory: int
    limit: int
    disk: dict[str, int]
    seconds: dict[str, float] | None
    notes: tuple[str, ...]


def finetune_plan_tables(plan: FinetunePlan) -> list[Table]:
    """The plan in a few facts, then memory, disk and time."""
    n_windows, seq_len, batch_size, accumulation = plan.windows
    per_step = batch_size * accumulation
    budget = "until the time is up"
    if plan.steps is not None:
        epochs = plan.steps * per_step / n_windows
        budget = f"{plan.steps:,} steps, {plan.steps * per_step * seq_len:,} tokens, {epochs:.2f} epochs"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    overview = facts(
        "",
        {
            "run": f"{plan.run}: {plan.model}, {plan.pattern}; {plan.n_layers} decoder layers, "
            f"{plan.parameters:,} parameters",
            "will train": f"{plan.what}: {plan.trained:,} values; masks are held",
            "loss": f"{plan.loss}; forwards in {plan.compute}",
            "text": f"{plan.text}: {n_windows:,} windows of {seq_len} tokens, {batch_size} a forward, "
            f"{accumulation} forward{'s' if accumulation > 1 else ''} a step",
            "budget": budget,
            "peak memory": f"{size(plan.peak_memory)}: {verdict} this machine ({size(plan.limit)} may be used)",
            "time": "not estimated" if plan.total_seconds is None else f"about {duration(plan.total_seconds)}",
            **{("note" if i == 0 else " " * i): note for i, note in enumerate(plan.notes)},
        },
    )
    return [overview, *plan.need_tables()]
