"""What a run would do, need and take, as tables."""

from __future__ import annotations

from dataclasses import dataclass

from nmprune.report.layout import Table, facts
from nmprune.report.quantities import duration, shape, size


@dataclass(frozen=True)
class RolePlan:
    """The linears of one role.

    Attributes:
        role: place in the decoder layer.
        count: how many, all layers (and experts) together.
        shape: (out, in).
        weights: of all of them.
    """

    role: str
    count: int
    shape: tuple[int, int]
    weights: int


class Needs:
    """What every plan says of memory, disk and time; the fields are those of the plan."""

    memory: dict[str, dict[str, int]]
    peak_memory: int
    limit: int
    disk: dict[str, int]
    seconds: dict[str, float] | None

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the limit."""
        return self.peak_memory <= self.limit

    @property
    def total_seconds(self) -> float | None:
        """All phases together."""
        return None if self.seconds is None else sum(self.seconds.values())

    def need_tables(self) -> list[Table]:
        """Memory by stage and part, disk, and time where it is known."""
        rows = tuple((stage, part, size(n)) for stage, parts in self.memory.items() for part, n in parts.items())
        tables = [Table("memory, by stage (the largest stage is the peak)", ("stage", "what", "size>"), rows)]
        tables.append(_amounts("disk", {part: size(n_bytes) for part, n_bytes in self.disk.items()}))
        if self.seconds is not None:
            tables.append(_amounts("time", {phase: duration(value) for phase, value in self.seconds.items()}))
        return tables


@dataclass(frozen=True)
class Plan(Needs):
    """What a run will need.

    Attributes:
        model: as the user named it.
        method: its name.
        pattern: "N kept of M".
        parameters: of the whole model, tied ones once.
        n_layers: decoder layers.
        linears: to be pruned, by role and shape.
        dense: to stay dense: name with layer numbers as *, count, reason.
        global_sparsity: share of all parameters that will be zero, 0..1.
        calibration: sequences, tokens per sequence, sequences per forward; None for a method without calibration.
        layer_passes: forwards of a decoder layer, each over all calibration tokens.
        memory: stage -> part -> bytes: what is in memory at the worst moment of each stage.
        peak_memory: bytes of the worst stage, beyond what Python and its imports take.
        limit: bytes that may be used: of the device that was asked about, or this machine's memory.
        device_memory: bytes of a device that is not here; None = this machine.
        disk: part -> bytes.
        seconds: phase -> seconds; None where nothing was timed.
        notes: what a user should know before starting.
    """

    model: str
    method: str
    pattern: str
    parameters: int
    n_layers: int
    linears: tuple[RolePlan, ...]
    dense: tuple[tuple[str, int, str], ...]
    global_sparsity: float
    calibration: tuple[int, int, int] | None
    layer_passes: int
    memory: dict[str, dict[str, int]]
    peak_memory: int
    limit: int
    device_memory: int | None
    disk: dict[str, int]
    seconds: dict[str, float] | None
    notes: tuple[str, ...]


def plan_tables(plan: Plan) -> list[Table]:
    """The plan in a few facts, then linears, what stays dense, memory, disk and time."""
    calibration = "none needed: no forward at all"
    if plan.calibration is not None:
        n_sequences, seq_len, batch = plan.calibration
        calibration = (
            f"{n_sequences} x {seq_len} = {n_sequences * seq_len:,} tokens, {batch} sequences a forward, "
            f"{plan.layer_passes} decoder-layer passes"
        )
    where = "this machine" if plan.device_memory is None else f"a device of {size(plan.device_memory)}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    overview = facts(
        "",
        {
            "model": f"{plan.model}: {plan.n_layers} decoder layers, {plan.parameters:,} parameters",
            "will do": f"{plan.method}, {plan.pattern}: {plan.global_sparsity:.1%} of all parameters become zero",
            "calibration": calibration,
            "peak memory": f"{size(plan.peak_memory)}: {verdict} {where} ({size(plan.limit)} may be used)",
            "time": "not estimated" if plan.total_seconds is None else f"about {duration(plan.total_seconds)}",
            **{("note" if i == 0 else " " * i): note for i, note in enumerate(plan.notes)},
        },
    )
    rows = tuple((one.role, f"{one.count:,}", shape(one.shape), f"{one.weights:,}") for one in plan.linears)
    tables = [overview, Table("to be pruned", ("role", "count>", "out x in", "weights>"), rows)]
    dense = tuple((name, f"{count:,}", reason) for name, count, reason in plan.dense)
    tables.append(Table("to stay dense", ("name", "count>", "why"), dense))
    tables += plan.need_tables()
    return tables


def _amounts(title: str, parts: dict[str, str]) -> Table:
    """Name -> amount, in words."""
    return Table(title, ("", ">"), tuple(parts.items()))
