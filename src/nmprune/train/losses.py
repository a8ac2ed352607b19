"""What is learned: the next token of the text, or the dense model's whole distribution of it. One number per sequence.

Legend: B sequences, T tokens, V vocabulary, K logits that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("lm", "kl")


def lm_loss(logits_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    """(B,): mean next-token cross-entropy of each sequence, in nats.

    Args:
        logits_BTV: any floating dtype; computed in fp32.
        token_ids_BT: int64, the tokens that went in.
    """
    predictions = logits_BTV[:, :-1].float().transpose(1, 2)
    return torch.nn.functional.cross_entropy(predictions, token_ids_BT[:, 1:], reduction="none").mean(-1)


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
    log_p = logits_BTV.float().log_softmax(-1)
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
    log_q = logits_BTV.float().log_softmax(-1)
    if dense.tokens is None:
        return (dense.log_p.exp() * (dense.log_p - log_q)).sum(-1).mean(-1)
    log_q = log_q.gather(-1, dense.tokens)
    p, q = dense.log_p.exp(), log_q.exp()
    kept = (p * (dense.log_p - log_q)).sum(-1)
    smallest = torch.finfo(p.dtype).eps  # what sums of probabilities are known to
    rest_p = (1 - p.sum(-1)).clamp(min=smallest)
    rest_q = (1 - q.sum(-1)).clamp(min=smallest)
    return (kept + rest_p * (rest_p.log() - rest_q.log())).mean(-1)
