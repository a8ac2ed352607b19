"""What is learned: the next token of the text, or the dense model's whole distribution of it. One number per sequence.

Legend: B sequences, T tokens, V vocabulary, K logits that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOSSES = ("lm", "kl")
_NOTHING = -100
# Logits that are worked on together: on the CPU what its cache holds, elsewhere what keeps the device busy.
_ON_CPU, _ELSEWHERE = 1 << 20, 1 << 26


def lm_loss(logits_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    """(B,): mean next-token cross-entropy of each sequence, in nats.

    Args:
        logits_BTV: any floating dtype; computed in fp32.
        token_ids_BT: int64, the tokens that went in.
    """
    # the last token predicts nothing that is there: told so, its logits need not be cut off, which would copy all others
    wanted_BT = torch.nn.functional.pad(token_ids_BT[:, 1:], (0, 1), value=_NOTHING)
    flat = logits_BTV.float().flatten(0, 1), wanted_BT.flatten()
    losses = torch.nn.functional.cross_entropy(*flat, reduction="none", ignore_index=_NOTHING)
    return losses.view(wanted_BT.shape).sum(-1) / (wanted_BT.shape[1] - 1)


@dataclass(frozen=True)
class Teacher:
    """The dense model's next-token distributions.

    Attributes:
        log_p: fp32 (B, T, V) log-probabilities; (B, T, K) of the K likeliest tokens where `tokens` names them.
        tokens: int64 (B, T, K); None where all are there.
    """

    log_p: Tensor
    tokens: Tensor | None = None


@torch.no_grad()
def teacher(logits_BTV: Tensor, top_k: int = 0) -> Teacher:
    """What is to be matched.

    Args:
        logits_BTV: the dense model's.
        top_k: keep so many tokens per position, to save memory; 0 = all.
    """
    log_p = logits_BTV.log_softmax(-1, dtype=torch.float32)
    if not 0 < top_k < log_p.shape[-1]:
        return Teacher(log_p)
    best = log_p.topk(top_k, dim=-1)
    return Teacher(best.values, best.indices)


def kl_loss(logits_BTV: Tensor, dense: Teacher) -> Tensor:
    """(B,): mean over tokens of KL(dense || model), in nats.

    With top-k, all tokens that are not kept count as one: a lower bound, which is 0 only where the kept ones agree.

    Args:
        logits_BTV: the model's; computed in fp32.
        dense: what the dense model said of the same tokens.
    """
    if dense.tokens is None:
        divergence_BT: Tensor = _Divergence.apply(logits_BTV, dense.log_p)
        return divergence_BT.mean(-1)
    log_q = logits_BTV.log_softmax(-1, dtype=torch.float32).gather(-1, dense.tokens)
    p, q = dense.log_p.exp(), log_q.exp()
    kept = (p * (dense.log_p - log_q)).sum(-1)
    smallest = torch.finfo(p.dtype).eps  # what sums of probabilities are known to
    rest_p = (1 - p.sum(-1)).clamp(min=smallest)
    rest_q = (1 - q.sum(-1)).clamp(min=smallest)
    return (kept + rest_p * (rest_p.log() - rest_q.log())).mean(-1)


class _Divergence(torch.autograd.Function):
    """(B, T): KL(p || softmax(logits)) of every token; the gradient with respect to the logits is softmax(logits) - p.

    Some tokens at a time, and the gradient while their softmax is there: written as plain operations it goes through memory a
    dozen times, and tables of tokens times vocabulary are the largest that there are.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, log_p_BTV: Tensor) -> Tensor:
        logits_NV, log_p_NV = logits_BTV.flatten(0, 1), log_p_BTV.flatten(0, 1)
        n_together = max(1, (_ON_CPU if logits_NV.device.type == "cpu" else _ELSEWHERE) // logits_NV.shape[1])
        divergence_N = log_p_NV.new_empty(len(logits_NV))
        gradient_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits_NV), n_together):
            here = slice(start, start + n_together)
            log_q = logits_NV[here].log_softmax(-1, dtype=torch.float32)
            p = log_p_NV[here].exp()
            divergence_N[here] = (log_p_NV[here] - log_q).mul_(p).sum(-1)
            if gradient_NV is not None:
                gradient_NV[here] = log_q.exp_().sub_(p)
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV.view(logits_BTV.shape))
        return divergence_N.view(logits_BTV.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient_BTV,) = ctx.saved_tensors
        return gradient_BTV * grads[0].unsqueeze(-1).to(gradient_BTV.dtype), None
