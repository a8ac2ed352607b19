"""MaskPro's central claim: variance of the vanilla, the residual and the residual + tracker gradient on the same masks."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from functools import partial
from typing import Any

import torch
from measurement import Ledger, Table, parser
from own_text import STORIES, in_memory, model_folder, windows_of
from torch import Tensor

import nmprune
from nmprune import masks
from nmprune.methods.maskpro import MaskPro
from nmprune.pattern import Pattern
from nmprune.train.score_variance import ESTIMATORS, score_variance

PAPER = 3 * math.exp(-10)  # share of groups that the paper's C = 10 takes off the prior in 2:4


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    ledger = Ledger("maskpro_variance", arguments)
    for share in arguments.flip_shares:
        for batch_size in arguments.batch_sizes:
            key = {"model": arguments.model, "pattern": arguments.pattern, "prior": arguments.prior}
            key |= {
                "flip_share": share,
                "score": arguments.score,
                "batch_size": batch_size,
                "seq_len": arguments.seq_len,
            }
            key |= {"n_sequences": arguments.n_sequences, "draws": arguments.draws, "run_in": arguments.run_in}
            ledger.row({**key, "text": arguments.text, "seed": arguments.seed}, partial(measure, key, arguments))
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--model", default=STORIES, help="stories260k, HF folder, or what nmprune prune takes")
    made.add_argument("--text", default="own", help="own: sampled from the model; or a text source")
    made.add_argument("--pattern", default="2:4", help="N kept of M")
    made.add_argument("--prior", default="wanda", help="one-shot method whose masks are the start")
    made.add_argument(
        "--flip-shares", nargs="+", type=float, default=[PAPER, 0.001, 0.01, 0.1], help="one row each; sets C"
    )
    made.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32], help="sequences per draw; one row each")
    made.add_argument("--score", default="auto", help="of the method: auto, set or ordered")
    made.add_argument("--n-sequences", type=int, default=512, help="calibration token windows")
    made.add_argument("--seq-len", type=int, default=128, help="tokens per window")
    made.add_argument("--draws", type=int, default=400, help="masks that count")
    made.add_argument("--run-in", type=int, default=200, help="masks before them that only move the tracker")
    made.add_argument("--seed", type=int, default=0, help="of masks and batches")
    return made.parse_args()


def measure(key: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw, and compare."""
    folder, pattern = model_folder(key["model"]), Pattern.parse(key["pattern"])
    windows, origin = windows_of(
        folder, arguments.text, "calibration", key["n_sequences"], key["seq_len"], arguments.seed
    )
    priors = prior_masks(folder, key["prior"], pattern, windows)
    model, _, targets = in_memory(folder, pattern)
    method = MaskPro(flip_share=key["flip_share"], score=key["score"])
    start = time.perf_counter()
    found = score_variance(
        model, targets, method, priors, windows, key["batch_size"], key["draws"], key["run_in"], arguments.seed
    )
    made = {"seconds": time.perf_counter() - start, "prior_logit": method.start(pattern), "calibration": origin}
    return {
        **dataclasses.asdict(found),
        **made,
        "groups": sum(math.prod(one.shape) for one in targets) // pattern.group,
    }


def prior_masks(folder: Any, method: str, pattern: Pattern, windows: Tensor) -> dict[str, Tensor]:
    """Linear name -> packed mask, made on the first of the windows."""
    model, _, _ = in_memory(folder, pattern)
    found = nmprune.prune(model, method, pattern, calibration=windows[:64])
    return {name: masks.pack(mask) for name, mask in found.masks.items()}


def show(ledger: Ledger) -> None:
    rows = []
    for row in ledger.rows:
        key, values = row["key"], row["values"]
        variance, weight = values["variance"], values["weight"]
        rows.append(
            [
                key["pattern"],
                f"{values['prior_logit']:.2f}",
                f"{values['flips'] * values['groups']:,.1f} of {values['groups']:,}",
                str(key["batch_size"]),
                str(values["draws"]),
                *(f"{weight[name][0]:+.3f} +- {weight[name][1]:.3f}" for name in ESTIMATORS),
                *(f"{variance[name]:.3g}" for name in ESTIMATORS),
                *(f"{variance['vanilla'] / variance[name]:,.1f}" for name in ESTIMATORS[1:]),
                f"{values['mean_sq_norm']['residual'] / variance['residual']:.1e}",
                f"{values['seconds']:,.0f}",
            ]
        )
    columns = ["pattern", "C", "groups off the prior", "batch", "draws", "loss", "residual r", "r - tracker"]
    columns += [f"variance, {name}" for name in ESTIMATORS]
    columns += ["vanilla / residual", "vanilla / tracker", "signal to noise", "seconds"]
    origins = {row["values"]["calibration"] for row in ledger.rows}
    notes = [
        "Variance: E ||g - E g||^2 of the gradient of all logits, g = weight x score, the three weights on the same masks and "
        "sequences; weight: mean +- standard deviation over the draws. All three have the same expectation.",
        "Logits stay where MaskPro begins; the tracker has run in. Signal to noise: ||E g||^2 / variance of the residual's "
        "gradient from one draw, unbiased (below 0: not to be told from 0 with so many draws).",
        *(f"Text: {origin}." for origin in sorted(origins)),
    ]
    ledger.show("Variance of MaskPro's gradient", [Table("Three estimators", columns, rows)], notes)


if __name__ == "__main__":
    main()
