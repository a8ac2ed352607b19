"""One loop for all methods that learn masks through the whole model: batches, loss, step, held-out judgement, snapshot.

Nothing random is carried along: the order of the sequences and all noise are functions of the seed and of the step, so that
a run that goes on from a snapshot does exactly what it would have done.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nmprune.distributed import ALONE, Processes
from nmprune.errors import InputError
from nmprune.heap import keep_freed
from nmprune.methods.base import Course, LearnStep, State, WholeModel
from nmprune.train.adam import load_optimiser_state, optimiser_state
from nmprune.train.batches import Batches
from nmprune.train.checkpointing import checkpointed
from nmprune.train.descent_round import InputSums, LossTerms, choose, revised
from nmprune.train.judge import Judge, Learned
from nmprune.train.losses import Teacher, kl_loss, lm_loss, teacher
from nmprune.train.masked_linear import MaskedModel, Phase, Target, noise
from nmprune.train.rest import Rest
from nmprune.train.settings import TrainRecipe
from nmprune.train.sharding import (
    Sharding,
    clip_gradients,
    in_one_piece,
    is_sharded,
    local,
    own_rows,
    own_share,
    whole,
)

_Part = TypeVar("_Part")


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
    snapshot: Mapping[str, Tensor] | None = None,
    processes: Processes = ALONE,
    sharding: Sharding | None = None,
    inputs: InputSums | None = None,
) -> Generator[LearnStep, None, Learned]:
    """Learn the masks of all targets; the model's weights are as they were when it ends, however it ends.

    Yields once before the first step, with what the prior masks are worth, and then after every step. Several processes
    share the micro-batches of a step, and the held-out sequences. With `sharding` they share the model too: it is used up,
    and `LearnStep.snapshot` is to be called by all of them; what it returns is whole in process 0 and empty elsewhere.

    Args:
        model: a causal language model in memory, in evaluation mode; with `sharding` on the meta device.
        layers: its decoder layers.
        targets: from `targets_of`.
        method: what learns.
        priors: linear name -> packed prior mask.
        text: token ids.
        settings: of the loop.
        seed: of the run; all randomness is derived from it.
        snapshot: what an earlier `LearnStep.snapshot` made: go on from there.
        processes: that share the run; all call this alike.
        sharding: brings in the model's weights, and leaves each process its share of them and of what is learned; not for
            methods that learn by descent.
        inputs: of the targets; for methods that learn by descent.

    Returns:
        Masks and what they are worth.

    Raises:
        InputError: the loss is not finite.
    """
    loop = _Loop(model, layers, targets, method, priors, text, settings, seed, processes, sharding, inputs)
    with loop.at_work():
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
        sharding: Sharding | None,
        inputs: InputSums | None,
    ) -> None:
        self.inputs = inputs
        self.model, self.layers, self.method, self.processes = model, layers, method, processes
        self.text, self.settings, self.seed, self.sharding = text, settings, seed, sharding
        self.device = next(model.parameters()).device if sharding is None else sharding.device
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
    def at_work(self) -> Iterator[None]:
        """The model masked inside the body."""
        # what is gathered for a layer and dropped is no loop's: a sharded run would hold all of the model after all
        memory = keep_freed() if self.sharding is None else nullcontext()
        with memory, self._masked(), checkpointed(self.layers, self.settings.activation_checkpointing):
            self.learned = {**self.masked.parameters(), **self.rest.parameters()}
            if self.method.learns_by == "gradient":
                # torch cannot step sharded and whole tensors in one go
                together = None if self.sharding is None else False
                self.optimiser = torch.optim.AdamW(list(self.learned.values()), lr=0.0, foreach=together)
            yield

    @contextmanager
    def _masked(self) -> Iterator[None]:
        if self.sharding is None:
            with self.rest.learning(), self.masked.installed():
                yield
            return

        def loaded(part: nn.Module) -> None:
            self.masked.install(part)
            self.rest.unfreeze()

        with self.processes.in_a_library():
            self.sharding.spread(self.model, self.layers, loaded)
            self.rest.keep()
            yield

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """Everything that `load` needs, on the CPU and copied; of a sharded model in process 0 alone."""
        found: State = {f"learned:{name}": value.detach() for name, value in self.learned.items()}
        found |= {f"carried:{name}": value for name, value in self.carried.items()}
        found |= {"step": torch.tensor(self.phase.course.step), "prior_losses": self.prior_losses}
        if self.optimiser is not None:
            found |= optimiser_state(self.optimiser, self.learned)
        found |= self.judge.state()
        kept: State = {}
        for name, value in found.items():
            gathered = whole(value)
            if self.sharding is None or self.processes.is_main:
                kept[name] = gathered.cpu().clone()
        return kept

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot."""
        for name, value in self.learned.items():
            local(value).copy_(own_rows(saved[f"learned:{name}"], value))
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
            due = (step + 1) % self.settings.eval_every == 0 or step + 1 == total
            if due and self.method.learns_by != "descent":
                values |= self.judge.look(self.phase.course)
            yield LearnStep(step + 1, total, values, self.snapshot)
        return self.judge.verdict(self.batches.epochs(self.phase.course.step))

    def _step(self, step: int) -> dict[str, float]:
        micro_batches = self.batches.of(step)
        self.phase.kind = "learn"
        if self.method.learns_by == "score":
            return self._score_step(step, micro_batches)
        if self.method.learns_by == "descent":
            return self._descent_step(step, micro_batches)
        assert self.optimiser is not None
        self.optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for at, counts in self._in_step(self.processes.mine(len(micro_batches)), 0):
            self.phase.draw = self._draw(step, at)
            loss = counts * self._losses(self.text.train[micro_batches[at]]).mean() / len(micro_batches)
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

    def _in_step(self, mine: Sequence[_Part], other: _Part) -> list[tuple[_Part, int]]:
        """This process's parts, each of which counts 1.

        A sharded model is gathered by all processes for every forward: one that has fewer parts than another one runs
        `other`, which counts 0. It is some process's own part, so that what is no number there is none anywhere else.
        """
        parts = [(part, 1) for part in mine]
        if self.sharding is None:
            return parts
        most = max(n for (n,) in self.processes.gather_counts([len(mine)]))
        return parts + [(other, 0)] * (most - len(mine))

    def _draw(self, step: int, at: int) -> int:
        if self.method.noise == "micro_batch":
            return step * self.settings.accumulation + at
        return step

    def _sum_gradients(self) -> None:
        """Over the processes; what no micro-batch of this one reached (an expert) has no gradient here.

        Those of what is sharded were added up on the way back.
        """
        if self.processes.alone:
            return
        own = [parameter for parameter in self.learned.values() if not is_sharded(parameter)]
        for parameter in own:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.sum_([parameter.grad for parameter in own if parameter.grad is not None])

    def _penalties(self) -> float | None:
        """What the method adds to the loss, one linear at a time; None where it adds nothing."""
        total = None
        for one, weight, lying in self.masked.linears():
            generator = noise(self.seed, one, self.phase.draw, self.device)
            with in_one_piece(lying) as state:
                penalty = self.method.penalty(weight, state, one.pattern, self.phase.course, generator)
                if penalty is None:
                    return None
                penalty.backward()
                total = (total or 0.0) + penalty.item()
        return total

    def _optimise(self) -> dict[str, float]:
        assert self.optimiser is not None
        how = self.method.optimiser(self.phase.course)
        for group in self.optimiser.param_groups:
            group |= {"lr": how.lr, "betas": how.betas, "eps": how.eps, "weight_decay": how.weight_decay}
        learned, most = list(self.learned.values()), how.clip or math.inf
        if self.sharding is None:
            norm = nn.utils.clip_grad_norm_(learned, most).item()
        else:
            norm = clip_gradients(learned, most, self.processes)
        self._finite(norm, self.phase.course.step, "gradient")
        self.optimiser.step()
        if type(self.method).after_step is not WholeModel.after_step:  # or else nothing need be gathered
            self._after_step()
        return {"gradient_norm": norm, "lr": how.lr}

    @torch.no_grad()
    def _after_step(self) -> None:
        """One linear at a time, and of a sharded one the rows that lie here: rows do not depend on each other."""
        for one, weight, lying in self.masked.linears():
            rows, state = own_share(weight, lying)
            if len(rows):
                self.method.after_step(rows, state, one.pattern, self.phase.course)

    @torch.no_grad()
    def _score_step(self, step: int, micro_batches: Sequence[Tensor]) -> dict[str, float]:
        """Forwards only: the loss of the masks that are drawn against that of the prior masks, and the score."""
        self.phase.draw = step
        mine = [micro_batches[at] for at in self.processes.mine(len(micro_batches))]
        losses = self._sum_of_losses(self.text.train, mine, micro_batches[0])
        sequences = torch.cat([torch.empty(0, dtype=torch.int64), *mine])
        missing = sequences[self.prior_losses[sequences].isnan()].unique()
        parts = missing.split(self.settings.batch_size) if len(missing) else ()
        with self.judge.prior_masks():
            for one, counts in self._in_step(parts, micro_batches[0]):
                found = self._losses(self.text.train[one]).double().cpu()
                if counts:
                    self.prior_losses[one] = found
        sums = self.processes.sum_values([losses, self.prior_losses[sequences].sum().item()])
        loss, prior = (self._finite(one / self.batches.per_step, step) for one in sums)
        advantage, self.carried = self.method.advantage(loss, prior, self.carried)
        for one in self.masked.targets:
            generator = noise(self.seed, one, step, self.device)
            with in_one_piece(self.masked.state(one.name)) as state:
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

    def _descent_step(self, step: int, micro_batches: Sequence[Tensor]) -> dict[str, float]:
        """A round: slopes and curvature at the masks of now, and the next masks, where held-out text likes any better."""
        assert self.inputs is not None
        terms, total = LossTerms(self.masked, self.inputs), 0.0
        for at in self.processes.mine(len(micro_batches)):
            loss = self._losses(self.text.train[micro_batches[at]], self.inputs).mean()
            loss.backward()
            terms.add()
            total += loss.item() / len(micro_batches)
        (total,) = self.processes.sum_values([total])
        self._finite(total, step)
        n_tokens = self.settings.batch_size * self.text.train.shape[1]
        found = terms.take(self.processes, len(micro_batches), n_tokens)
        before, standing = self.masked.hard_bits(), self.judge.standing
        masks_of = partial(revised, self.masked, found)
        choice, damping = choose(masks_of, self.held_out_loss, before, standing, self.carried["damping"].item())
        self.carried = {"damping": torch.tensor(damping, dtype=torch.float64)}
        if choice is not None:
            self.masked.put_masks(choice.bits)
        bits, held_out = (before, standing) if choice is None else (choice.bits, choice.loss)
        judged = self.judge.take(Course(step + 1, self.settings.steps), bits, held_out, held_out)
        return {"loss": total, "damping": damping, **judged}

    # -- losses -------------------------------------------------------------------------------------------------------

    def _losses(self, token_ids: Tensor, inputs: InputSums | None = None) -> Tensor:
        """(B,): the loss of each sequence with what the phase puts into the model, whose forward `inputs` watches."""
        token_ids = token_ids.to(self.device)
        dense = self._dense(token_ids)
        with nullcontext() if inputs is None else inputs.watching():
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
        if self.sharding is not None and not torch.is_grad_enabled():
            self.sharding.forget_forward()
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
        parts = torch.arange(len(self.text.held_out)).split(self.settings.batch_size)
        mine = [parts[at] for at in self.processes.mine(len(parts))]
        (total,) = self.processes.sum_values([self._sum_of_losses(self.text.held_out, mine, parts[0])])
        return total / len(self.text.held_out)

    def _sum_of_losses(self, token_ids: Tensor, mine: Sequence[Tensor], other: Tensor) -> float:
        """Of the sequences of these batches; forwards only. `other` as for `_in_step`."""
        batches = self._in_step(mine, other)
        return sum(counts * self._losses(token_ids[one]).double().sum().item() for one, counts in batches)
