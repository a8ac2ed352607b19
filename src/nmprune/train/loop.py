"""One loop for all methods that learn masks through the whole model: batches, loss, step, held-out judgement, snapshot.

Nothing random is carried along: the order of the sequences and all noise are functions of the seed and of the step, so that
a run that goes on from a snapshot does exactly what it would have done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmprune.distributed import ALONE, Processes
from nmprune.errors import InputError
from nmprune.methods.base import Course, LearnStep, State, WholeModel
from nmprune.train.adam import load_optimiser_state, optimiser_state
from nmprune.train.batches import Batches
from nmprune.train.checkpointing import checkpointed
from nmprune.train.judge import Judge, Learned
from nmprune.train.losses import Teacher, kl_loss, lm_loss, teacher
from nmprune.train.masked_linear import MaskedModel, Phase, Target, noise
from nmprune.train.rest import Rest
from nmprune.train.settings import TrainRecipe


@dataclass(frozen=True)
class Text:
    """What is learned from and what judges, int64 (n_sequences, seq_len) token ids.

    Attributes:
        train: sequences to learn from.
        held_out: sequences that judge; they take no part in learning.
    """

    train: Tensor
    held_out: Tensor


def learn(
    model: Any,
    layers: Sequence[nn.Module],
    targets: Sequence[Target],
    method: WholeModel,
    priors: Mapping[str, Tensor],
    text: Text,
    settings: TrainRecipe,
    seed: int,
    snapshot: State | None = None,
    processes: Processes = ALONE,
    shard: Callable[[], None] | None = None,
) -> Generator[LearnStep, None, Learned]:
    """Learn the masks of all targets; the model's weights are as they were when it ends, however it ends.

    Yields once before the first step, with what the prior masks are worth, and then after every step. Several processes
    share the micro-batches of a step, and the held-out sequences.

    Args:
        model: a causal language model in memory, in evaluation mode.
        layers: its decoder layers.
        targets: from `targets_of`.
        method: what learns.
        priors: linear name -> packed prior mask.
        text: token ids.
        settings: of the loop.
        seed: of the run; all randomness is derived from it.
        snapshot: what an earlier `LearnStep.snapshot` made: go on from there.
        processes: that share the run; all call this alike.
        shard: called once the masks are in the model and before the optimiser is made, to spread parameters over processes.

    Returns:
        Masks and what they are worth.

    Raises:
        InputError: the loss is not finite.
    """
    loop = _Loop(model, layers, targets, method, priors, text, settings, seed, processes)
    with loop.at_work(shard):
        if snapshot is not None:
            loop.load(snapshot)
        return (yield from loop.run(fresh=snapshot is None))


class _Loop:
    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        targets: Sequence[Target],
        method: WholeModel,
        priors: Mapping[str, Tensor],
        text: Text,
        settings: TrainRecipe,
        seed: int,
        processes: Processes,
    ) -> None:
        self.model, self.layers, self.method, self.processes = model, layers, method, processes
        self.text, self.settings, self.seed = text, settings, seed
        self.device = next(model.parameters()).device
        self.batches = Batches(len(text.train), settings.batch_size, settings.accumulation, seed)
        self.phase = Phase(course=Course(0, settings.steps))
        frozen = {id(p): p for one in targets for p in [one.layer.get_parameter(one.parameter)]}
        self.rest = Rest(model, frozen.values(), method.trains_rest)
        self.masked = MaskedModel(targets, method, self.phase, priors, seed)
        self.judge = Judge(self.masked, self.held_out_loss, priors, settings)
        self.carried = method.carried()
        # the prior masks' loss on each sequence, where the method compares with it; NaN until it was asked for
        self.prior_losses = torch.full((len(text.train),), math.nan, dtype=torch.float64)
        self.learned: dict[str, Tensor] = {}
        self.optimiser: torch.optim.AdamW | None = None

    @contextmanager
    def at_work(self, shard: Callable[[], None] | None) -> Iterator[None]:
        """The model masked inside the body, and as it was afterwards."""
        layers = checkpointed(self.layers, self.settings.activation_checkpointing)
        with self.rest.learning(), self.masked.installed(), layers:
            if shard is not None:
                shard()
            self.learned = {**self.masked.parameters(), **self.rest.parameters()}
            if self.method.learns_by == "gradient":
                self.optimiser = torch.optim.AdamW(list(self.learned.values()), lr=0.0)
            yield

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """Everything that `load` needs, on the CPU and copied."""
        found: State = {f"learned:{name}": value.detach() for name, value in self.learned.items()}
        found |= {f"carried:{name}": value for name, value in self.carried.items()}
        found |= {"step": torch.tensor(self.phase.course.step), "prior_losses": self.prior_losses}
        if self.optimiser is not None:
            found |= optimiser_state(self.optimiser, self.learned)
        found |= self.judge.state()
        return {name: value.cpu().clone() for name, value in found.items()}

    @torch.no_grad()
    def load(self, saved: State) -> None:
        """Go on from a snapshot."""
        for name, value in self.learned.items():
            value.copy_(saved[f"learned:{name}"])
        self.carried = {name: saved[f"carried:{name}"] for name in self.carried}
        self.prior_losses = saved["prior_losses"].clone()
        self.phase.course = Course(int(saved["step"]), self.settings.steps)
        if self.optimiser is not None:
            load_optimiser_state(self.optimiser, self.learned, saved)
        self.judge.load(saved)

    # -- the course ---------------------------------------------------------------------------------------------------

    def run(self, fresh: bool) -> Generator[LearnStep, None, Learned]:
        """All steps that are left."""
        total = self.settings.steps
        if fresh:
            yield LearnStep(0, total, self.judge.begin(), self.snapshot)
        while self.phase.course.step < total and not self.judge.out_of_patience:
            step = self.phase.course.step
            values = {**self._step(step), **self.method.values(self.phase.course)}
            self.phase.course = Course(step + 1, total)
            if (step + 1) % self.settings.eval_every == 0 or step + 1 == total:
                values |= self.judge.look(self.phase.course)
            yield LearnStep(step + 1, total, values, self.snapshot)
        return self.judge.verdict(self.batches.epochs(self.phase.course.step))

    def _step(self, step: int) -> dict[str, float]:
        micro_batches = self.batches.of(step)
        self.phase.kind = "learn"
        if self.method.learns_by == "score":
            return self._score_step(step, micro_batches)
        assert self.optimiser is not None
        self.optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for at in self.processes.mine(len(micro_batches)):
            self.phase.draw = self._draw(step, at)
            loss = self._losses(self.text.train[micro_batches[at]]).mean() / len(micro_batches)
            loss.backward()
            total += loss.item()
        (total,) = self.processes.sum_values([total])
        values = {"loss": self._finite(total, step)}
        self._sum_gradients()
        self.phase.draw = self._draw(step, 0)
        penalty = self._penalties()
        if penalty is not None:
            values["penalty"] = penalty
        values |= self._optimise()
        return values

    def _draw(self, step: int, at: int) -> int:
        if self.method.noise == "micro_batch":
            return step * self.settings.accumulation + at
        return step

    def _sum_gradients(self) -> None:
        """Over the processes; what no micro-batch of this one reached (an expert) has no gradient here."""
        if self.processes.alone:
            return
        for parameter in self.learned.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.sum_([parameter.grad for parameter in self.learned.values() if parameter.grad is not None])

    def _penalties(self) -> float | None:
        """What the method adds to the loss, one linear at a time; None where it adds nothing."""
        total = None
        for one in self.masked.targets:
            generator = noise(self.seed, one, self.phase.draw, self.device)
            state = self.masked.state(one.name)
            penalty = self.method.penalty(self.masked.weight(one), state, one.pattern, self.phase.course, generator)
            if penalty is not None:
                penalty.backward()
                total = (total or 0.0) + penalty.item()
        return total

    def _optimise(self) -> dict[str, float]:
        assert self.optimiser is not None
        how = self.method.optimiser(self.phase.course)
        for group in self.optimiser.param_groups:
            group |= {"lr": how.lr, "betas": how.betas, "eps": how.eps, "weight_decay": how.weight_decay}
        norm = nn.utils.clip_grad_norm_(list(self.learned.values()), how.clip or math.inf).item()
        self._finite(norm, self.phase.course.step, "gradient")
        self.optimiser.step()
        with torch.no_grad():
            for one in self.masked.targets:
                state = self.masked.state(one.name)
                self.method.after_step(self.masked.weight(one), state, one.pattern, self.phase.course)
        return {"gradient_norm": norm, "lr": how.lr}

    @torch.no_grad()
    def _score_step(self, step: int, micro_batches: Sequence[Tensor]) -> dict[str, float]:
        """Forwards only: the loss of the masks that are drawn against that of the prior masks, and the score."""
        self.phase.draw = step
        mine = [micro_batches[at] for at in self.processes.mine(len(micro_batches))]
        losses = sum(self._losses(self.text.train[one]).double().sum().item() for one in mine)
        sequences = torch.cat([torch.empty(0, dtype=torch.int64), *mine])
        missing = sequences[self.prior_losses[sequences].isnan()].unique()
        with self.judge.prior_masks():
            for one in missing.split(self.settings.batch_size) if len(missing) else ():
                self.prior_losses[one] = self._losses(self.text.train[one]).double().cpu()
        sums = self.processes.sum_values([losses, self.prior_losses[sequences].sum().item()])
        loss, prior = (self._finite(one / self.batches.per_step, step) for one in sums)
        advantage, self.carried = self.method.advantage(loss, prior, self.carried)
        for one in self.masked.targets:
            generator = noise(self.seed, one, step, self.device)
            state = self.masked.state(one.name)
            self.method.score_step(state, one.pattern, advantage, self.phase.course, generator)
        carried = {name: value.item() for name, value in self.carried.items()}
        return {"loss": loss, "prior_loss": prior, "advantage": advantage, **carried}

    def _finite(self, value: float, step: int, what: str = "loss") -> float:
        if math.isfinite(value):
            return value
        raise InputError(
            f"step {step + 1}: the {what} is {value}. The step size of {self.method.name} is too large, or the model overflows: "
            "lower method.lr, or compute in --dtype float32 without train.autocast."
        )

    # -- losses -------------------------------------------------------------------------------------------------------

    def _losses(self, token_ids: Tensor) -> Tensor:
        """(B,): the loss of each sequence with what the phase puts into the model."""
        token_ids = token_ids.to(self.device)
        dense = self._dense(token_ids)
        logits = self._logits(token_ids)
        return lm_loss(logits, token_ids) if dense is None else kl_loss(logits, dense)

    @torch.no_grad()
    def _dense(self, token_ids: Tensor) -> Teacher | None:
        if self.settings.loss == "lm":
            return None
        with self.phase.dense(), self.rest.original():
            return teacher(self._logits(token_ids), self.settings.top_k)

    def _logits(self, token_ids: Tensor) -> Tensor:
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.settings.autocast else nullcontext()
        with autocast:
            logits: Tensor = self.model(input_ids=token_ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def held_out_loss(self, bits: Mapping[str, Tensor] | None) -> float:
        """Mean loss of the held-out sequences: under packed masks on the original weights, or (None) of what is learned."""
        if bits is None:
            self.phase.kind = "learn"
            self.phase.draw = -1 - self.phase.course.step  # of its own: no step draws it
            return self._mean_held_out()
        with self.phase.fixed(bits), self.rest.original():
            return self._mean_held_out()

    def _mean_held_out(self) -> float:
        parts = self.text.held_out.split(self.settings.batch_size)
        mine = [parts[at] for at in self.processes.mine(len(parts))]
        (total,) = self.processes.sum_values([sum(self._losses(one).double().sum().item() for one in mine)])
        return total / len(self.text.held_out)
