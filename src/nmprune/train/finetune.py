"""Train the kept weights of a pruned model: mini-batches, a cosine schedule, a held-out judge, snapshots that go on exactly.

The loss is that of the language model, or the KL divergence from the dense model's next-token distribution (Hinton et al.
2015, arXiv 1503.02531): a distribution per token says far more than one token does, and a budget of some hundred thousand
tokens asks for that. A learning rate is relative: the share of a tensor's root mean square by which AdamW may move a weight
in one step, so that it means the same for weights of any size.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmprune.errors import InputError
from nmprune.heap import keep_freed
from nmprune.methods.base import LearnStep, State
from nmprune.train.adam import load_optimiser_state, optimiser_state
from nmprune.train.batches import Batches
from nmprune.train.checkpointing import checkpointed
from nmprune.train.finetune_settings import FinetuneRecipe
from nmprune.train.held_masks import HeldMasks
from nmprune.train.losses import Teacher, kl_loss, lm_loss, teacher
from nmprune.train.masked_low_rank import is_low_rank, root_mean_square

BETAS = (0.9, 0.95)
LEAST_SCALE = 0.01  # of a tensor that is all zero at the start, such as a bias
HELD_OUT_TOP_K = 256  # of the dense model's distribution on held-out text, which is kept and not computed again
EVALUATE_ONE = 1  # windows per held-out forward


@dataclass
class Standing:
    """Where training stands, and what it ends with.

    Attributes:
        step: steps done.
        seconds: of training so far, sessions added up.
        best: parameter -> its best values so far by held-out loss, in the dtype they will be stored in, on the CPU.
        best_step: when that was; 0 = the start.
        best_loss: held-out loss there.
        start_loss: held-out loss at the start.
        start_nll: held-out language-model loss at the start, nats per token.
        since_best: evaluations since.
        evaluations: how many, the start included.
    """

    step: int = 0
    seconds: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = math.inf
    start_loss: float = math.inf
    start_nll: float = math.inf
    since_best: int = 0
    evaluations: int = 0


_NUMBERS = ("step", "seconds", "best_step", "best_loss", "start_loss", "start_nll", "since_best", "evaluations")


class Finetuning:
    """A student, perhaps a teacher, and an optimiser.

    Args:
        student: pruned, fp32; only `trained` may require gradients.
        dense: the dense model; None where the language model's loss is enough.
        trained: name -> parameter of the student that is trained.
        masks: what holds the masks; None where the masked tensors themselves do not move (low-rank deltas).
        layers: the student's decoder layers.
        stored: dtype in which a parameter's values will be written.
        windows: int64 (n_windows, seq_len), to train on.
        held_out: int64 (n, seq_len), to judge by.
        settings: how.
        autocast: forwards in bfloat16; weights and moments stay fp32.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        dense: PreTrainedModel | None,
        trained: Mapping[str, nn.Parameter],
        masks: HeldMasks | None,
        layers: Sequence[nn.Module],
        stored: Callable[[str], torch.dtype],
        windows: Tensor,
        held_out: Tensor,
        settings: FinetuneRecipe,
        autocast: bool,
    ) -> None:
        self._student, self._dense, self._trained, self._layers = student, dense, dict(trained), layers
        self._stored, self._windows, self._judged = stored, windows, held_out
        self._settings, self._autocast = settings, autocast
        self._distil = settings.loss == "kl"
        self._device = next(student.parameters()).device
        self._batches = Batches(len(windows), settings.batch_size, settings.accumulation, settings.seed)
        self._optimiser = self._adamw(masks)
        if masks is not None:
            masks.watch(self._optimiser)
        self._judged_targets: list[Teacher] = []
        digest = hashlib.sha256(torch.cat((held_out, windows)).numpy().tobytes()).digest()
        self._text = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        self.standing = Standing()

    def _adamw(self, masks: HeldMasks | None) -> torch.optim.AdamW:
        groups = []
        for name, parameter in self._trained.items():
            values = parameter.detach()
            # of what is not pruned; a low-rank delta carries its matrix's scale already
            scale = 1.0 if is_low_rank(name) else max(root_mean_square(values[values != 0]), LEAST_SCALE)
            groups.append({"params": [parameter], "top_lr": self._settings.lr * scale})
        decay = self._settings.weight_decay
        return torch.optim.AdamW(groups, lr=self._settings.lr, betas=BETAS, weight_decay=decay, fused=True)

    # -- the loop -------------------------------------------------------------------------------------------------------

    def run(self, saved: Mapping[str, Tensor] | None = None) -> Generator[LearnStep, None, Standing]:
        """Train until the budget is used up or the held-out loss has stopped falling; then the best values are put in.

        Args:
            saved: what a `snapshot` of an earlier session gave; of the same model, windows and settings.

        Raises:
            InputError: the loss is no longer a number.
            MaskBroken: a masked weight moved.
        """
        with keep_freed(), checkpointed(self._layers, self._settings.activation_checkpointing):
            if saved is not None:
                self._restore(saved)
            begun = time.monotonic() - self.standing.seconds
            if saved is None:
                yield self._sign(self._judge())
            while not self._over():
                values = self._step()
                self.standing.seconds = time.monotonic() - begun
                if self._due():
                    values |= self._judge()
                    self.standing.seconds = time.monotonic() - begun
                yield self._sign(values)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self.standing.best[name])
        return self.standing

    def _share(self) -> float:
        return self._settings.share(self.standing.step, self.standing.seconds)

    def _over(self) -> bool:
        tired = 0 < self._settings.patience <= self.standing.since_best
        return tired or self._share() >= 1.0

    def _due(self) -> bool:
        """Evaluations are spread evenly over the budget; the last one is at its end."""
        return self._share() * self._settings.evaluations >= self.standing.evaluations

    def _sign(self, values: dict[str, float]) -> LearnStep:
        share = self._share()
        total = self._settings.steps if not share else round(self.standing.step / share)
        return LearnStep(self.standing.step, max(total, self.standing.step), values, self.snapshot)

    def _step(self) -> dict[str, float]:
        settings = self._settings
        rate = settings.rate(settings.share(self.standing.step + 1, self.standing.seconds))
        for group in self._optimiser.param_groups:
            group["lr"] = group["top_lr"] * rate
        self._optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for index in self._batches.of(self.standing.step):
            windows = self._windows[index].to(self._device)
            loss = self._losses(windows).mean() / settings.accumulation
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise InputError(
                f"the training loss is {total} at step {self.standing.step + 1}: the steps are too large, or the model's values "
                f"overflow. Lower the rate (--set lr={settings.lr / 4:g}), or compute in float32 (--set autocast=no)."
            )
        norm = nn.utils.clip_grad_norm_(self._trained.values(), settings.clip or math.inf)
        self._optimiser.step()
        self.standing.step += 1
        return {"loss": total, "rate": settings.lr * rate, "gradient_norm": norm.item()}

    def _losses(self, windows: Tensor) -> Tensor:
        """The training loss of each window."""
        if not self._distil:
            return lm_loss(self._logits(self._student, windows), windows)
        return kl_loss(self._logits(self._student, windows), self._targets(windows, self._settings.top_k))

    @torch.no_grad()
    def _targets(self, windows: Tensor, top_k: int) -> Teacher:
        assert self._dense is not None
        return teacher(self._logits(self._dense, windows), top_k)

    def _logits(self, model: PreTrainedModel, windows: Tensor) -> Tensor:
        with self._precision():
            return model(input_ids=windows, use_cache=False).logits

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()

    # -- the judge ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Held-out losses of the student as it is: of training, and the language model's."""
        windows = self._judged.to(self._device).split(EVALUATE_ONE)
        if self._distil and not self._judged_targets:
            self._judged_targets = [self._targets(one, HELD_OUT_TOP_K) for one in windows]
        losses, nlls = [], []
        for number, one in enumerate(windows):
            logits = self._logits(self._student, one)
            nlls.append(lm_loss(logits, one))
            losses.append(kl_loss(logits, self._judged_targets[number]) if self._distil else nlls[-1])
        return {"held_out_loss": torch.cat(losses).mean().item(), "held_out_nll": torch.cat(nlls).mean().item()}

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """Held-out losses now; the values are kept where they are the best so far."""
        found = self.held_out()
        loss, standing = found["held_out_loss"], self.standing
        standing.since_best += 1
        if not standing.evaluations:
            standing.start_loss, standing.start_nll = loss, found["held_out_nll"]
        if loss < standing.best_loss or not standing.evaluations:
            standing.best_loss, standing.best_step, standing.since_best = loss, standing.step, 0
            standing.best = {
                name: one.detach().to("cpu", self._stored(name), copy=True) for name, one in self._trained.items()
            }
        standing.evaluations += 1
        return found

    # -- going on later -------------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """Everything that `run` needs to go on from here as if it had not stopped."""
        numbers = [float(getattr(self.standing, name)) for name in _NUMBERS]
        return {
            **{f"value:{name}": one.detach().cpu() for name, one in self._trained.items()},
            **{f"best:{name}": one for name, one in self.standing.best.items()},
            **optimiser_state(self._optimiser, self._trained),
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "step": torch.tensor(self.standing.step),
            "text": self._text,
        }

    @torch.no_grad()
    def _restore(self, saved: Mapping[str, Tensor]) -> None:
        if not torch.equal(saved["text"], self._text):
            raise InputError(
                "the checkpoint that is there was made on other text: the text source has changed since. Bring it back, or "
                "choose another --out folder."
            )
        for name, parameter in self._trained.items():
            parameter.copy_(saved[f"value:{name}"])
            self.standing.best[name] = saved[f"best:{name}"]
        load_optimiser_state(self._optimiser, self._trained, saved)
        for name, value in zip(_NUMBERS, saved["numbers"].tolist(), strict=True):
            setattr(self.standing, name, type(getattr(self.standing, name))(value))
