"""HyperPrune in one decoder layer: masks are built, the layer says what they cost, and the logits learn from it.

The gradient is exact and taken in two phases. First all masks are built without a graph, block after block of groups, and
the layer runs forward and backward once, for dL/dW' of the masked weights W' = W * M. Then each block's logits are made
again, with the noise of the same seed, and dL/dM = dL/dW' * W is pulled back through them; the network's part goes through
a graph of that block alone. Memory beside the layer is that of one block, and of the free scores where they are on.

Legend: O out_features, I in_features, G groups, M group, K outputs of the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from nmprune import sampling
from nmprune.methods import adamw
from nmprune.methods.base import LayerWork, State
from nmprune.methods.hyperprune_settings import HyperPruneSettings
from nmprune.methods.linear_masks import Block, LinearMasks
from nmprune.methods.mask_logits import SoftMask, rows
from nmprune.methods.shared_network import SharedNetwork

Masks = dict[str, Tensor]


def seeded(*parts: int | str) -> torch.Generator:
    """A generator whose stream follows from `parts` alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class MaskLearner:
    """The masks of one decoder layer, from their start to their end.

    Args:
        settings: of the method.
        work: the layer.
        linears: what is learned, in order.
        network: the shared network in this layer; None = free scores alone.
        seed: of this layer.
        resting: what the prior adds to the slot scores at all times, where no free scores start from it.
    """

    def __init__(
        self,
        settings: HyperPruneSettings,
        work: LayerWork,
        linears: list[LinearMasks],
        network: SharedNetwork | None,
        seed: int,
        resting: float = 0.0,
    ) -> None:
        self.settings, self.work, self.linears, self.network, self.seed = settings, work, linears, network, seed
        self._resting = resting
        self.step = 0
        self._caches = network is not None and settings.network_every > 1
        self.refill()

    def refill(self) -> None:
        """Run the network on all groups, where its outputs are kept, and set every masked weight to its hard mask."""
        if self.network is not None and self._caches:
            for linear in self.linears:
                parts = [self._outputs_now(linear, block) for block in linear.blocks]
                linear.outputs_KG = torch.cat([part for part in parts if part is not None], 1)
        if self.settings.sample_share < 1:
            for linear in self.linears:
                for block in linear.blocks:
                    self._write(linear, block, self.hard(linear, block))

    def advance(self) -> dict[str, float]:
        """One step; returns what is worth recording."""
        step, settings = self.step, self.settings
        chosen = {linear.name: self._choose(linear, settings.sample_share, "share") for linear in self.linears}
        for linear in self.linears:
            for block in chosen[linear.name]:
                self._write(linear, block, self._soft(linear, block).mask)
        loss, gradients = self.work.gradients(self._batch(), {one.name: one.masked_OI for one in self.linears})
        with_network = self.network is not None and step % settings.network_every == 0
        lr = settings.residual_lr * settings.lr_factor(step)
        self.pull(gradients, chosen, with_network, lambda linear, block, g: self._move(linear, block, g, lr))
        values = {
            "loss": loss,
            "temperature": settings.temperature_at(step),
            "gamma": settings.gamma_at(step),
        }
        if with_network and self.network is not None:
            values["continual"] = self.network.gather_terms()
            frozen = step < settings.component_freeze * settings.steps
            self.network.update(settings.network_lr * settings.lr_factor(step), frozen)
        self.step += 1
        if with_network and self._caches:
            self.refill()
        elif settings.sample_share < 1:
            for linear in self.linears:
                for block in chosen[linear.name]:
                    self._write(linear, block, self.hard(linear, block))
        return values

    def pull(
        self,
        gradients: Masks,
        chosen: dict[str, list[Block]],
        with_network: bool,
        move: Callable[[LinearMasks, Block, Tensor], None],
    ) -> None:
        """The second phase: from dL/dW' to the gradients of the logits.

        Args:
            gradients: dL/dW' by linear.
            chosen: the blocks that learn.
            with_network: whether the network gathers its gradient, too.
            move: takes a block's gradient with respect to its slot scores, (M, G).
        """
        temperature = self.settings.temperature_at(self.step)
        for linear in self.linears:
            blocks = chosen[linear.name]
            shown = self._shown(linear, blocks) if with_network else []
            for block in blocks:
                soft = self._soft(linear, block)
                along_MG = linear.along(gradients[linear.name], block, self.settings.lambda1)
                slots_MG, candidates_KG = linear.logits.pull(soft, along_MG, temperature)
                if block in shown and self.network is not None and linear.features is not None:
                    gradient = slots_MG if self.settings.head == "slots" else candidates_KG
                    assert gradient is not None
                    gradient = gradient * (len(blocks) / len(shown))
                    self.network.gather(linear.features.of(block.start, block.stop), linear.role, gradient)
                if self.settings.residual:
                    move(linear, block, slots_MG)

    def _shown(self, linear: LinearMasks, blocks: list[Block]) -> list[Block]:
        """The blocks of those that learn that the network's update looks at."""
        share = self.settings.network_share
        return blocks if share >= 1 else self._pick(linear, blocks, share, "shown")

    def _choose(self, linear: LinearMasks, share: float, why: str) -> list[Block]:
        return linear.blocks if share >= 1 else self._pick(linear, linear.blocks, share, why)

    def _pick(self, linear: LinearMasks, blocks: list[Block], share: float, why: str) -> list[Block]:
        order = torch.randperm(len(blocks), generator=seeded(self.seed, why, self.step, linear.name))
        return [blocks[i] for i in sorted(order[: max(1, round(share * len(blocks)))].tolist())]

    def _batch(self) -> Tensor:
        """The sequences of this step: all of them in turn, in an order that is drawn anew each time."""
        n, size = len(self.work.train), self.settings.sequences
        first = self.step * size
        places = [self._place(first + i, n) for i in range(min(size, n))]
        return self.work.train[torch.tensor(places)]

    def _place(self, number: int, n: int) -> int:
        return int(torch.randperm(n, generator=seeded(self.seed, "order", number // n))[number % n])

    def _move(self, linear: LinearMasks, block: Block, gradient_MG: Tensor, lr: float) -> None:
        """One step of Adam on a block's free scores."""
        linear.counts_B[block.number] += 1
        where = (slice(None), block.groups)
        adamw.step(
            linear.residual_MG[where],
            gradient_MG,
            linear.first_MG[where],
            linear.second_MG[where],
            int(linear.counts_B[block.number]),
            lr,
        )

    def _outputs(self, linear: LinearMasks, block: Block) -> Tensor | None:
        """(K, G): the network's outputs for a block; None without a network."""
        kept = linear.outputs_KG
        return self._outputs_now(linear, block) if kept is None else kept[:, block.groups]

    def _outputs_now(self, linear: LinearMasks, block: Block) -> Tensor | None:
        if self.network is None or linear.features is None:
            return None
        return self.network.outputs(linear.features.of(block.start, block.stop), linear.role)

    def block_logits(self, linear: LinearMasks, block: Block) -> tuple[Tensor, Tensor | None]:
        """The slot scores of a block, prior included, and its candidates' own logits."""
        outputs_KG = self._outputs(linear, block)
        slots_MG = linear.residual_MG[:, block.groups] if self.settings.residual else None
        if self.settings.head == "slots" and outputs_KG is not None:
            slots_MG = outputs_KG if slots_MG is None else slots_MG + outputs_KG
        return self._with_prior(linear, block, slots_MG), outputs_KG if self.settings.head == "candidates" else None

    def _with_prior(self, linear: LinearMasks, block: Block, slots_MG: Tensor | None) -> Tensor:
        """Equation 38: beta times the cosine of two masks of N ones is beta / N times the slots that they share."""
        settings = self.settings
        strength = settings.gamma_at(self.step)
        if settings.prior_form == "mask":
            strength *= settings.beta / linear.logits.pattern.kept
        strength += self._resting
        prior_MG = linear.prior_slots(settings.prior_form, block.start, block.stop) if strength else None
        if slots_MG is None:
            n_groups = block.groups.stop - block.groups.start
            slots_MG = linear.weight_OI.new_zeros(linear.logits.pattern.group, n_groups)
        return slots_MG if prior_MG is None else prior_MG.mul_(strength).add_(slots_MG)

    def _soft(self, linear: LinearMasks, block: Block, quiet: bool = False) -> SoftMask:
        """The masks of a block in this step; `quiet`: soft ones without noise."""
        slots_MG, own_KG = self.block_logits(linear, block)
        scale = 0.0 if quiet else self.settings.noise_at(self.step)
        noise = self._noise(linear, block, scale) if scale else None
        hard = self.settings.is_hard(self.step) and not quiet
        return linear.logits.soft(slots_MG, own_KG, self.settings.temperature_at(self.step), noise, hard)

    def _noise(self, linear: LinearMasks, block: Block, scale: float) -> Tensor:
        generator = seeded(self.seed, "noise", self.step, linear.name, block.number)
        n_groups = block.groups.stop - block.groups.start
        noise = sampling.gumbel((linear.logits.n_noise, n_groups), generator, linear.weight_OI.device)
        return noise.mul_(scale)

    def hard(self, linear: LinearMasks, block: Block) -> Tensor:
        """fp32 (M, G), 1 where kept: the masks of a block as they would be taken now."""
        return linear.logits.hard(*self.block_logits(linear, block))

    def hard_masks(self) -> Masks:
        """bool (O, I) by linear: the masks as they would be taken now."""
        return {linear.name: self._whole(linear, self.hard).bool() for linear in self.linears}

    def soft_masks(self) -> Masks:
        """fp32 (O, I) by linear: soft masks without noise."""
        return {linear.name: self._whole(linear, self._soft_quietly) for linear in self.linears}

    def _soft_quietly(self, linear: LinearMasks, block: Block) -> Tensor:
        return self._soft(linear, block, quiet=True).mask

    def _whole(self, linear: LinearMasks, make: Callable[[LinearMasks, Block], Tensor]) -> Tensor:
        return torch.cat([rows(make(linear, block), linear.weight_OI.shape[1]) for block in linear.blocks])

    def _write(self, linear: LinearMasks, block: Block, mask_MG: Tensor) -> None:
        group = linear.logits.pattern.group
        rows_of = slice(block.start, block.stop)
        weight_GM = linear.weight_OI[rows_of].reshape(-1, group)
        torch.mul(weight_GM, mask_MG.T, out=linear.masked_OI[rows_of].view(-1, group))

    def refresh(self) -> None:
        """Take the features anew at the current hard masks."""
        found = self.hard_masks()
        for linear in self.linears:
            if linear.features is not None:
                linear.features.refresh(found[linear.name])
        self.refill()

    def snapshot(self) -> State:
        """Copies of what changes from step to step."""
        parts = [linear.snapshot() for linear in self.linears]
        if self.network is not None:
            parts.append(self.network.snapshot())
        return {"step": torch.tensor(self.step), **{name: value for part in parts for name, value in part.items()}}

    def restore(self, state: State) -> None:
        """Go on from `state`, as `snapshot` made it."""
        self.step = int(state["step"])
        for linear in self.linears:
            linear.restore(state)
        if self.network is not None:
            self.network.restore(state)
        self.refill()
        for linear in self.linears:
            linear.restore_standing(state)
