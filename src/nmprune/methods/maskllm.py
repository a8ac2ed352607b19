"""MaskLLM: a distribution over each group's masks, learned end to end through Gumbel-softmax (Fang et al. 2024).

Legend: O out_features, I in_features, G groups per row, M group, K candidates, N kept of M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nmprune import masks, ranking, sampling
from nmprune.errors import InputError
from nmprune.methods.base import AdamStep, Course, State, WholeModel, option
from nmprune.pattern import Pattern

MAX_LISTED = 128  # candidates that get a logit each; past it, each slot of a group has one
FORMS = ("auto", "candidate", "slot")


@dataclass(frozen=True)
class MaskLLM(WholeModel):
    """Logits of every group's masks, learned through soft random masks; the weights stay frozen.

    A group's soft mask is softmax((kappa * logits + Gumbel noise) / tau) @ candidates. Both schedules are linear in the share
    of the run: tau falls and kappa grows, so that masks become hard. The final mask is the likeliest one.

    With `form` "slot" a group has M logits instead of C(M, N): a candidate's logit is the sum of its kept slots' logits, and
    noise comes per slot, which makes the hard limit a draw without replacement. Past 128 candidates it is the only form.

    Source: MaskLLM, arXiv 2409.17481, equations 4 to 10; constants from its LLaMA-2 scripts.

    Raises:
        InputError: a hyper-parameter is out of range.
    """

    name: ClassVar[str] = "maskllm"
    summary: ClassVar[str] = "Gumbel-softmax over every group's masks, learned end to end; frozen weights."
    paper: ClassVar[str] = "Fang et al. 2024, arXiv 2409.17481"
    noise = "micro_batch"
    train_defaults: ClassVar[dict[str, Any]] = {"loss": "lm"}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "best": {
            "prior": "descent",
            "form": "slot",
            "tau_first": 2.0,
            "sparse_reg": 0.0,
            "lr": 1e-3,
            "lr_last": 1e-4,
            "eps": 1e-12,
            "weight_decay": 0.0,
        }
    }
    preset_train: ClassVar[dict[str, dict[str, Any]]] = {"best": {"loss": "kl"}}

    form: str = option("auto", "logits per group: candidate, slot, or auto (candidate up to 128 candidates)")
    prior_strength: float = option(3.0, "alpha: how far the prior mask's logits stand out at the start, in gate_std")
    gate_std: float = option(0.01, "standard deviation of the logits at the start")
    kappa_first: float = option(100.0, "scale of the logits against the noise at the start")
    kappa_last: float = option(500.0, "the same at the end; linear between")
    tau_first: float = option(4.0, "temperature at the start")
    tau_last: float = option(0.05, "temperature at the end; linear between")
    hard: bool = option(False, "straight-through: the forward sees hard masks (the paper found soft ones better)")
    sparse_reg: float = option(1e-5, "reward for the energy of kept weights, fading linearly to 0")
    lr: float = option(5e-4, "AdamW step on the logits at the start; cosine to lr_last")
    lr_last: float = option(5e-5, "AdamW step at the end")
    warmup: float = option(0.0, "share of the steps over which the step size rises from 0")
    beta1: float = option(0.9, "AdamW: decay of the mean of gradients")
    beta2: float = option(0.95, "AdamW: decay of the mean of their squares")
    eps: float = option(1e-5, "AdamW: damps tiny gradients")
    weight_decay: float = option(0.1, "AdamW: draws logits to uniform")
    clip: float = option(1.0, "largest norm of all gradients together; 0 = no limit")

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"maskllm.form is {self.form!r}; expected one of {', '.join(FORMS)}.")
        for key in ("kappa_first", "kappa_last", "tau_first", "tau_last", "eps"):
            if not getattr(self, key) > 0:
                raise InputError(f"maskllm.{key} is {getattr(self, key)}; expected more than 0.")
        for key in ("prior_strength", "gate_std", "sparse_reg", "lr", "lr_last", "weight_decay", "clip"):
            if not getattr(self, key) >= 0:
                raise InputError(f"maskllm.{key} is {getattr(self, key)}; expected 0 or more.")
        for key in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"maskllm.{key} is {getattr(self, key)}; expected 0 or more and less than 1.")

    def why_not(self, pattern: Pattern) -> str | None:
        """Patterns with too many candidates cannot have a logit each."""
        if self.form == "candidate" and pattern.n_candidates > MAX_LISTED:
            return (
                f"a group has {pattern.n_candidates:,} candidate masks, and listing stops at {MAX_LISTED}. Say form slot "
                "or auto."
            )
        return None

    def tau(self, course: Course) -> float:
        """Temperature, linear in the share of the run."""
        return self.tau_first + (self.tau_last - self.tau_first) * course.share

    def kappa(self, course: Course) -> float:
        """Scale of the logits against the noise, linear in the share of the run."""
        return self.kappa_first + (self.kappa_last - self.kappa_first) * course.share

    def begin(self, weight_OI: Tensor, prior_OI: Tensor, pattern: Pattern, generator: torch.Generator) -> State:
        """Random logits of standard deviation `gate_std`, and the prior on top."""
        width = pattern.group if self._by_slot(pattern) else pattern.n_candidates
        shape = (prior_OI.shape[0], prior_OI.shape[1] // pattern.group, width)
        noise_OGK = torch.randn(shape, generator=generator, device=generator.device).to(weight_OI.device)
        return {"logits": self.with_prior(self.gate_std * noise_OGK, prior_OI, pattern)}

    def with_prior(self, logits: Tensor, prior_OI: Tensor, pattern: Pattern) -> Tensor:
        """The logits with the prior mask's lifted: alpha * std * (overlap with the prior mask - 1), as in the paper's code.

        Per slot it is alpha * std where the prior keeps the slot, which gives the candidates the same differences. Where
        `gate_std` is 0 the strength is in logits.
        """
        prior_OGM = prior_OI.unflatten(-1, (-1, pattern.group)).to(logits)
        strength = self.prior_strength * (float(logits.std()) if self.gate_std else 1.0)
        if self._by_slot(pattern):
            return logits + strength * prior_OGM
        overlap_OGK = prior_OGM @ masks.candidates(pattern).to(logits).T
        return logits + strength * (overlap_OGK - 1)

    def effective(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor:
        """The weights times a soft random mask; see the class."""
        return weight_OI * self.random_mask(state, pattern, course, generator)

    def random_mask(self, state: State, pattern: Pattern, course: Course, generator: torch.Generator) -> Tensor:
        """(out, in): the soft mask of one draw of the noise; hard in value where `hard` says so."""
        logits = state["logits"]
        noise = sampling.gumbel(logits.shape, generator, logits.device)
        return self.mask_of(logits, pattern, course, noise)

    def mask_of(self, logits: Tensor, pattern: Pattern, course: Course, noise: Tensor) -> Tensor:
        """(out, in): the soft mask for given Gumbel noise, of the shape of the logits."""
        tau, scaled = self.tau(course), self.kappa(course) * logits
        if not self._by_slot(pattern):
            soft_OGM = sampling.soft_mask(scaled, masks.candidates(pattern).to(logits), tau, noise)
        elif pattern.n_candidates <= MAX_LISTED:
            candidates_KM = masks.candidates(pattern).to(logits)
            soft_OGM = sampling.soft_mask((scaled + noise) @ candidates_KM.T, candidates_KM, tau)
        else:
            soft_OGM = sampling.soft_top(scaled, pattern.kept, tau, noise)
        if self.hard:
            hard_OGM = self._likeliest(scaled.detach() + noise, pattern)
            soft_OGM = sampling.straight_through(soft_OGM, hard_OGM)
        return soft_OGM.flatten(-2)

    def hard_mask(self, weight_OI: Tensor, state: State, pattern: Pattern) -> Tensor:
        """The likeliest mask of each group; among equals the first candidate, or the lower index."""
        return self._likeliest(state["logits"], pattern).flatten(-2)

    def penalty(
        self, weight_OI: Tensor, state: State, pattern: Pattern, course: Course, generator: torch.Generator
    ) -> Tensor | None:
        """Minus the energy of the masked weights, so that gradients do not die out: -lambda (1 - t/T) ||W * M||^2."""
        strength = self.sparse_reg * (1 - course.share)
        if not strength:
            return None
        return -strength * self.effective(weight_OI, state, pattern, course, generator).square().sum()

    def optimiser(self, course: Course) -> AdamStep:
        """Cosine from lr to lr_last, after a linear warm-up where there is one."""
        rise = min(1.0, (course.step + 1) / (self.warmup * course.total)) if self.warmup else 1.0
        half_wave = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * course.share, dtype=torch.float64)).item())
        lr = rise * (self.lr_last + (self.lr - self.lr_last) * half_wave)
        return AdamStep(lr, (self.beta1, self.beta2), self.eps, self.weight_decay, self.clip)

    def values(self, course: Course) -> dict[str, float]:
        """The two schedules."""
        return {"tau": self.tau(course), "kappa": self.kappa(course)}

    def state_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """Logits, their gradients and two moments, fp32."""
        return 16 * self._n_logits(n_weights, pattern)

    def forward_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """Noise, scaled logits and their softmax; the soft mask and the masked weight. fp32."""
        listed = n_weights // pattern.group * min(pattern.n_candidates, MAX_LISTED)
        return 12 * max(listed, self._n_logits(n_weights, pattern)) + 8 * n_weights

    def _n_logits(self, n_weights: int, pattern: Pattern) -> int:
        return n_weights if self._by_slot(pattern) else n_weights // pattern.group * pattern.n_candidates

    def _by_slot(self, pattern: Pattern) -> bool:
        return self.form == "slot" or (self.form == "auto" and pattern.n_candidates > MAX_LISTED)

    def _likeliest(self, logits: Tensor, pattern: Pattern) -> Tensor:
        """bool (..., M): of the candidates' or the slots' logits."""
        if self._by_slot(pattern):
            return ranking.top(logits, pattern.kept)
        return masks.candidates(pattern).to(logits.device)[logits.argmax(-1)]
