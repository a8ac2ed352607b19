"""What learning masks came to, as facts: whose masks were taken, what they are worth on held-out text, and what it took."""

from __future__ import annotations

from collections.abc import Sequence

from nmprune.report.layout import Table, facts
from nmprune.report.quantities import duration, mean
from nmprune.results import LearnedLayerResult, LearningResult, Results


def learning_table(results: Results) -> Table | None:
    """For a method that learns masks, through the whole model or layer by layer; None for others."""
    if results.learning is not None:
        found = _whole(results.learning)
    elif results.learned_layers:
        found = _layers(results, results.learned_layers)
    else:
        return None
    seconds = results.seconds.get("learn")
    return facts("learning", {**found, "time of learning": "" if seconds is None else duration(seconds)})


def _whole(found: LearningResult) -> dict[str, str]:
    loss = {"kl": "KL from the dense model", "lm": "next token"}[found.loss]
    taken = f"the learned ones after step {found.best_step}"
    if found.guarded:
        taken = "the prior's: no learned ones were better (the guard)"
    change = f" ({found.best_loss / found.prior_loss - 1:+.1%})" if found.prior_loss > 0 else ""
    return {
        "masks taken": taken,
        f"held-out loss ({loss}, nats per token)": f"{found.prior_loss:.4f} with the prior's masks, "
        f"{found.best_loss:.4f} learned{change}, {found.held_out_loss:.4f} with those taken",
        "groups with another mask than the prior's": f"{found.best_flips:.1%} of the best masks, "
        f"{found.last_flips:.1%} after the last step",
        "learned from": f"{found.n_tokens:,} tokens in {found.steps:,} steps, {found.epochs:.2f} epochs; judged on "
        f"{found.held_out_tokens:,} held-out tokens",
    }


def _layers(results: Results, layers: Sequence[LearnedLayerResult]) -> dict[str, str]:
    steps = [one.steps for one in layers]
    each = f"{steps[0]:,} each" if len(set(steps)) == 1 else f"{min(steps):,} to {max(steps):,} each"
    tokens = ""
    if results.calibration:
        c = results.calibration
        tokens = f" on {c['n_sequences']} x {c['seq_len']} calibration tokens, those that judge among them"
    flips = mean(one.flips for one in layers)
    return {
        "masks taken": _taken(layers),
        "held-out loss, learned / prior's": _ratios([_ratio(one.loss, one.prior_loss) for one in layers]),
        "the same after the steps that follow": _ratios([_ratio(one.final_loss, one.prior_loss) for one in layers]),
        "groups with another mask than the prior's": "" if flips is None else f"{flips:.1%}, mean over decoder layers",
        "learned in": f"{sum(steps):,} steps in {len(layers)} decoder layers ({each}){tokens}",
    }


def _taken(layers: Sequence[LearnedLayerResult]) -> str:
    if all(one.loss is None for one in layers):
        return "the learned ones; nothing was held out, so they were not judged"
    refused = sum(one.accepted is False for one in layers)
    others = ", the prior's in the others (the guard)" if refused else ""
    return f"the learned ones in {len(layers) - refused} of {len(layers)} decoder layers{others}"


def _ratio(loss: float | None, prior: float | None) -> float | None:
    return loss / prior if loss is not None and prior else None


def _ratios(ratios: Sequence[float | None]) -> str:
    """Losses of different layers have different scales: only what each is of its own prior's can be put together."""
    found = [one for one in ratios if one is not None]
    if not found:
        return ""
    return f"{sum(found) / len(found):.3f}, mean over decoder layers ({min(found):.3f} to {max(found):.3f})"
