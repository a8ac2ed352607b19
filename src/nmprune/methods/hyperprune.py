"""HyperPrune: one small network, shared by all layers, makes the masks of a decoder layer from its groups of weights.

Source: Sun and Sakuma 2026, HyperPrune, Algorithm 1 and equations 5 to 12 and 37 to 39. The
defaults are ours: features that say what a group's columns are worth, a free score per weight of the layer in work, a loss
per token, hard masks at the end, and a guard. The paper is a preset; see docs/methods/hyperprune.md.

Legend: B sequences, T tokens, D hidden size, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import network_alone, shared_network
from nmprune.methods.base import LayerWork, LearnStep, Pruned, State
from nmprune.methods.descent import descend_to, needed
from nmprune.methods.held_out import HeldOut
from nmprune.methods.hyperprune_settings import HyperPruneSettings
from nmprune.methods.linear_masks import LinearMasks
from nmprune.methods.mask_learner import MaskLearner
from nmprune.methods.mask_logits import MaskLogits
from nmprune.methods.norms import checked_squared_norms
from nmprune.methods.shared_network import SharedNetwork
from nmprune.pattern import Pattern
from nmprune.stats import Statistic

_POLISH_SHRINKAGE = 0.5  # descent's own default
_FIRST_TOKEN_CAP = 1.0


@dataclass(frozen=True)
class HyperPrune(HyperPruneSettings):
    """See the top of the file."""

    name: ClassVar[str] = "hyperprune"
    summary: ClassVar[str] = (
        "A network shared by all layers, and free scores for the layer in work, learn each layer's masks."
    )
    paper: ClassVar[str] = "Sun and Sakuma 2026, HyperPrune, OpenReview lqjQs2lVNm"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"input_gram"})
    published: ClassVar[Mapping[tuple[int, int], str]] = MappingProxyType(
        {
            (4096, 32): "15.46 GB and 7 GPU hours (Llama-2 7B)",
            (5120, 40): "21.63 GB and 15 GPU hours (Llama-2 13B)",
            (8192, 80): "33.74 GB (Llama-2 70B)",
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted: set[Statistic] = set()
        if self.network and self.features == "first_order":
            wanted.add("input_gram")
        elif self.lambda1 or self.prior_form == "scores" or (self.network and self.features == "activations"):
            wanted.add("input_sq_norm")
        if self.descend:
            wanted |= needed(self.target)
            wanted.discard("input_sq_norm")
        object.__setattr__(self, "needs", frozenset(wanted))  # what a method declares depends on its settings here

    def why_not(self, pattern: Pattern) -> str | None:
        """Candidates have to be listed for a head that gives each a logit."""
        if self.network and self.head == "candidates" and not MaskLogits(pattern).listed:
            return f"head=candidates gives each of a group's {pattern.n_candidates:,} candidates a logit; set method.head=slots"
        return None

    def distance(self, output_BTD: Tensor, target_BTD: Tensor, input_BTD: Tensor) -> Tensor:
        """(B,): "sum" is equation 5; "relative" divides by the layer's own update; "normalised" does so token by token.

        The first token of a sequence, which often carries huge activations, counts 1 at most in "normalised".
        """
        error_BT = (output_BTD - target_BTD).float().square().sum(-1)
        if self.loss == "sum":
            return error_BT.sum(-1)
        update_BT = (target_BTD - input_BTD).float().square().sum(-1)
        if self.loss == "relative":
            return error_BT.sum(-1) / update_BT.sum(-1).clamp(min=1e-30)
        floor_B1 = self.loss_floor * update_BT.median(-1, keepdim=True).values
        ratio_BT = error_BT / (update_BT + floor_B1).clamp(min=1e-30)
        return torch.cat([ratio_BT[:, :1].clamp(max=_FIRST_TOKEN_CAP), ratio_BT[:, 1:]], -1).mean(-1)

    def start(self, roles: list[str], n_layers: int, pattern: Pattern, generator: torch.Generator) -> State:
        """Fresh parameters, an empty cache, and the names of the components."""
        return shared_network.start(self, pattern, n_layers, roles, generator) if self.network else {}

    def learn(
        self, work: LayerWork, state: State, seed: int, snapshot: State | None = None
    ) -> Generator[LearnStep, None, tuple[dict[str, Pruned], State]]:
        """Algorithm 1 for one layer; every step of it is exact to continue."""
        learner = self._learner(work, state, seed)
        judge = HeldOut(
            (lambda weights: work.loss(work.held_out, weights)) if len(work.held_out) else None,
            work.weights,
            self.keep_best,
        )
        if snapshot is not None:
            learner.restore(snapshot)
            judge.restore(snapshot)
        elif work.priors:
            judge.prior = judge.of(work.priors)
        while learner.step < self.steps and not 0 < self.patience <= judge.since_best:
            values = learner.advance()
            if learner.step % self.check_every == 0 or learner.step == self.steps:
                values |= self._look(learner, judge)
            if learner.step in self._refresh_steps():
                learner.refresh()
            yield LearnStep(learner.step, self.steps, values, lambda: {**learner.snapshot(), **judge.snapshot()})
        return self._finish(learner, judge)

    def _refresh_steps(self) -> set[int]:
        """The steps after which first-order features are taken anew, evenly spread."""
        if not self.network or self.features != "first_order":
            return set()
        return {round(self.steps * (i + 1) / (self.refreshes + 1)) for i in range(self.refreshes)}

    def _look(self, learner: MaskLearner, judge: HeldOut) -> dict[str, float]:
        """Hard masks, judged; what is worth recording of them."""
        found = learner.hard_masks()
        flips = [_changed(found[one.name], one.first_mask(), one.logits.pattern) for one in learner.linears]
        values = {"flips": sum(flips) / len(flips)}
        hard_loss = judge.of(found)
        judge.show(found, hard_loss, learner.step)
        if len(learner.work.held_out):
            values["hard_loss"] = hard_loss
            values["gap"] = hard_loss - judge.of(learner.soft_masks())
        return values

    def _finish(self, learner: MaskLearner, judge: HeldOut) -> tuple[dict[str, Pruned], State]:
        """The masks that are taken, and the state for the next layer."""
        work = learner.work
        chosen, notes = judge.masks, _known({"held_out_prior": judge.prior, "held_out_learned": judge.best})
        notes["best_step"] = judge.best_step
        if self.descend:
            polished = self._polished(work, chosen)
            loss = judge.of(polished)
            notes |= {"polished": int(not loss >= judge.best), **_known({"held_out_polished": loss})}
            if notes["polished"]:
                chosen, judge.best = polished, loss
        if self.guard and (not work.priors or not len(work.held_out)):
            notes["guard"] = "off: nothing held out" if work.priors else "off: no prior"
        accepted = not (self.guard and work.priors) or not judge.best >= judge.prior
        if not accepted:
            chosen = {name: work.priors[name] for name in chosen}
        pruned = {}
        for linear in learner.linears:
            flips = _changed(chosen[linear.name], linear.first_mask(), linear.logits.pattern)
            pruned[linear.name] = Pruned(
                chosen[linear.name], None, {"accepted": int(accepted), "flips": flips, **notes}
            )
        if learner.network is None:
            return pruned, {}
        if self.distil:
            network_alone.distil(network_alone.without_scores(learner), chosen, self.distil)
        return pruned, network_alone.remembered(learner, self.cache_size)

    def _polished(self, work: LayerWork, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Descent from the learned masks, linear by linear."""
        return {
            name: descend_to(
                work.weights[name],
                work.stats[name],
                mask_OI,
                work.patterns[name],
                _POLISH_SHRINKAGE,
                self.target,
                self.descend,
            )[0].mask
            for name, mask_OI in chosen.items()
        }

    def regenerate(self, work: LayerWork, state: State) -> dict[str, Tensor]:
        """The masks of one layer from the network alone, as a run's last state holds it: one network for all masks.

        The free scores of a layer are gone; the prior stands where they started. With first-order features the masks are
        made in rounds, from the prior's (or Wanda's) to the network's own; in one round after `distil`.

        Args:
            work: the layer; neither its losses nor its sequences are used.
            state: what the last layer returned.

        Raises:
            InputError: the method ran without a network, or the state belongs to another model or pattern.
        """
        if not self.network:
            raise InputError("hyperprune ran with network=false: there is no network to make masks from.")
        learner = self._learner(work, state, 0, finished=True)
        return network_alone.regenerate(network_alone.without_scores(learner))

    def _learner(self, work: LayerWork, state: State, seed: int, finished: bool = False) -> MaskLearner:
        """The layer with its linears checked."""
        roles = self._roles(work, state)
        arithmetic: dict[Pattern, MaskLogits] = {}
        linears = []
        for name, weight_OI in work.weights.items():
            pattern = work.patterns[name]
            pattern.check_divides(weight_OI.shape[1])
            if self.needs:
                checked_squared_norms(work.stats[name], weight_OI)
            if not masks.all_finite(weight_OI):
                raise InputError("a weight is NaN or infinite: check the checkpoint.").located(name)
            if pattern not in arithmetic:
                arithmetic[pattern] = MaskLogits(pattern, weight_OI.device)
            linears.append(LinearMasks(self, work, name, roles.get(work.roles[name], 0), arithmetic[pattern]))
        network = None
        if self.network:
            device = linears[0].weight_OI.device
            network = SharedNetwork(self, linears[0].logits, state, work.index, device, finished)
        return MaskLearner(self, work, linears, network, seed)

    def _roles(self, work: LayerWork, state: State) -> dict[str, int]:
        """Component -> its number in the state; the state is checked against the layer."""
        if not self.network:
            return {}
        roles = {role: i for i, role in enumerate(bytes(state["roles"].tolist()).decode().split("\n"))}
        unknown = sorted(set(work.roles.values()) - set(roles))
        if unknown or len(state["network.layer"]) != work.n_layers:
            raise InputError(
                f"the network's state knows {len(state['network.layer'])} layers and the components {', '.join(roles)}; "
                f"this model has {work.n_layers} layers{' and ' + ', '.join(unknown) if unknown else ''}: it belongs to "
                "another model."
            )
        sizes = {pattern.group for pattern in work.patterns.values()}
        if self.head == "candidates":
            sizes = {pattern.n_candidates for pattern in work.patterns.values()}
        n_outputs = len(state[f"network.weight{self.depth}"])
        if sizes != {n_outputs}:
            raise InputError(
                f"the network makes {n_outputs} {self.head} for a group, but the layer's patterns are "
                f"{', '.join(sorted(str(pattern) for pattern in set(work.patterns.values())))}. "
                "One network serves one group size (head=slots) or one pattern (head=candidates)."
            )
        return roles

    def state_bytes(self, roles: list[str], n_layers: int, pattern: Pattern) -> int:
        """Parameters, and the cache when all layers are in it."""
        if not self.network:
            return 0
        form = shared_network.form(self, pattern)
        cached = n_layers * len(roles) * self.cache_size
        return 4 * form.n_parameters(n_layers, len(roles)) + cached * (4 * (form.n_features + form.n_outputs) + 16)

    def learner_bytes(self, n_weights: int, pattern: Pattern) -> int:
        """W' and its gradient; free scores with two moments; the network's outputs and pulls where kept; one block."""
        per_weight = 8.0 + 12.0 * self.residual + 1.0 / 4  # bits of the best masks and of the masks being judged
        n_outputs, n_planes = self.outputs(pattern), max(pattern.group, MaskLogits(pattern).n_noise)
        per_group = 4.0 * (4 * n_planes + 6 * pattern.group)
        if self.network:
            form = shared_network.form(self, pattern)
            per_weight += 4.0 * n_outputs / pattern.group if self.network_every > 1 else 0.0
            per_weight += 5.0 if self.features == "first_order" else 0.0
            per_group += 4.0 * (2 * form.n_features + 3 * form.hidden * form.depth)
        return int(per_weight * n_weights + per_group * min(self.block, n_weights // pattern.group + 1))


def _changed(mask_OI: Tensor, start_OI: Tensor, pattern: Pattern) -> float:
    """Share of the groups whose mask is not the one at the start."""
    return 1.0 - network_alone.agreement(mask_OI, start_OI, pattern)


def _known(values: Mapping[str, float]) -> dict[str, float | int | str]:
    """Without those that are NaN: nothing was held out, or there is no prior."""
    return {name: value for name, value in values.items() if value == value}
