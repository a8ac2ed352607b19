"""Learned masks from one common prior at equal tokens: every learner beside that prior and the one-shot methods."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from measurement import (
    Ledger,
    Table,
    add_device_flag,
    device_of,
    device_peak,
    find_data,
    mebibytes,
    parser,
    run_child,
    save_windows,
    verdict,
)
from own_text import STORIES, model_folder, windows_of
from torch import Tensor

from nmprune.evaluate.streamed import streamed_nlls
from nmprune.methods import METHODS
from nmprune.methods.base import PerLayer, WholeModel
from nmprune.run import RunFolder
from nmprune.run.apply import apply_masks
from nmprune.run.regenerate import MASKS_FILE, regenerate
from nmprune.stream import DecoderModel

LEARNERS = ("maskllm", "maskllm:best", "proxsparse", "maskpro", "hyperprune")
ONE_SHOT = ("magnitude", "wanda", "descent", "sparsegpt")
TARGET = 0.03  # less perplexity than the common prior's
OWN_PRIOR = "own"
# What differs from a method's defaults: the papers' step sizes are for weights of 0.02 and for 10,000 steps. --set goes before.
SETTINGS: dict[str, dict[str, Any]] = {
    "proxsparse": {"lr": 1e-3},
    "maskpro": {"flip_share": 0.01, "lr": 5.0},
}


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    find_data()
    ledger = Ledger("learners", arguments)
    folder = model_folder(arguments.model)
    texts = {
        name: windows_of(folder, name, "evaluation", arguments.windows, arguments.seq_len)[0]
        for name in arguments.texts
    }
    of_all = {"model": arguments.model, "pattern": arguments.pattern, "texts": " ".join(arguments.texts)}
    of_all |= {"seq_len": arguments.seq_len, "windows": arguments.windows}
    with tempfile.TemporaryDirectory(prefix="nmprune-learners-", dir=arguments.folder) as place:
        bench = Bench(Path(place), folder, arguments, texts)
        ledger.row({**of_all, "what": "dense"}, lambda: {"nlls": bench.nlls(folder)})
        for tokens in arguments.tokens:
            for seed in arguments.seeds:
                key = {**of_all, "text": arguments.text, "tokens": tokens, "seed": seed}
                for method in arguments.one_shot:
                    ledger.row({**key, "what": method}, partial(bench.one_shot, method, tokens, seed))
                if arguments.prior != OWN_PRIOR:
                    what = {"what": "prior", "prior": arguments.prior, "held_out": arguments.held_out}
                    ledger.row({**key, **what}, partial(bench.prior, tokens, seed))
                for spec in arguments.methods:
                    recipe = bench.recipe(spec, seed)
                    settings = {"method": recipe["method"], "train": recipe.get("train")}
                    what = {"what": spec, "prior": arguments.prior, "held_out": arguments.held_out}
                    ledger.row(
                        {**key, **what, "settings": json.dumps(settings)}, partial(bench.learned, recipe, tokens, seed)
                    )
    show(ledger)


def read_arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    add_device_flag(made)
    made.add_argument("--model", default=STORIES, help="stories260k, smollm2-135m, or what nmprune prune takes")
    made.add_argument(
        "--text", default="own", help="calibration text; own: sampled from the model; or c4, auto, a file"
    )
    made.add_argument("--texts", nargs="+", default=["own"], help="texts to evaluate on, such as wikitext2 c4")
    made.add_argument("--windows", type=int, default=128, help="windows of each text")
    made.add_argument("--methods", nargs="*", default=list(LEARNERS), help="learners; METHOD:PRESET,KEY=VALUE,...")
    made.add_argument("--one-shot", nargs="*", default=list(ONE_SHOT), help="rows beside them")
    made.add_argument("--prior", default="wanda", help="of all learners: a method or a mask file; own: as each says")
    made.add_argument("--pattern", default="2:4", help="N kept of M")
    made.add_argument("--tokens", nargs="+", type=int, default=[65536], help="calibration tokens; one row each")
    made.add_argument("--seq-len", type=int, default=128, help="tokens per window, of both texts")
    made.add_argument("--held-out", type=float, default=1 / 16, help="share of the calibration windows that judge")
    made.add_argument("--steps", type=int, default=400, help="of learners of the whole model")
    made.add_argument("--batch-size", type=int, default=8, help="windows per step")
    made.add_argument("--eval-every", type=int, default=20, help="steps between judgements")
    made.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="METHOD.KEY=VALUE",
        help="maskpro.lr=1, maskllm.train.steps=800, all.train.loss=kl",
    )
    made.add_argument(
        "--regenerate", action="store_true", help="what the last network makes of all layers (hyperprune)"
    )
    made.add_argument("--seeds", nargs="+", type=int, default=[0], help="of text and run; one row each")
    made.add_argument("--folder", type=Path, help="where runs are written (a temporary folder, deleted afterwards)")
    found = made.parse_args()
    unknown = [spec for spec in found.methods if spec.split(",")[0].partition(":")[0] not in METHODS]
    if unknown:
        made.error(f"no such method: {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if found.prior not in (OWN_PRIOR, *METHODS) and not Path(found.prior).is_file():
        made.error(f"--prior {found.prior}: neither {OWN_PRIOR}, nor a mask file, nor one of {', '.join(METHODS)}")
    if wrong := [one for one in found.set if "." not in one.partition("=")[0] or "=" not in one]:
        made.error(f"--set takes METHOD.KEY=VALUE, not {', '.join(wrong)}")
    return found


class Bench:
    """Runs recipes in fresh processes and measures what they made.

    Args:
        place: for runs.
        model: folder of the dense model.
        arguments: of the command.
        texts: evaluation windows by text.
    """

    def __init__(self, place: Path, model: Path, arguments: argparse.Namespace, texts: dict[str, Tensor]) -> None:
        self.place, self.model, self.arguments, self.texts = place, model, arguments, texts

    def nlls(self, folder: Path) -> dict[str, list[float]]:
        """Text -> mean cross-entropy of each window."""
        model = DecoderModel.open(folder, allow_sparse=True, device=device_of(self.arguments))
        return {name: streamed_nlls(model, windows).tolist() for name, windows in self.texts.items()}

    def windows(self, tokens: int, seed: int) -> tuple[Tensor, str, int]:
        """Calibration windows, what they are, and how many of them judge."""
        n = max(2, tokens // self.arguments.seq_len)
        windows, origin = windows_of(self.model, self.arguments.text, "calibration", n, self.arguments.seq_len, seed)
        return windows, origin, max(1, round(n * self.arguments.held_out))

    def recipe(self, spec: str, seed: int) -> dict[str, Any]:
        """A recipe without its text. The guard is off where the whole model is learned: both outcomes come from one run."""
        named, *changes = spec.split(",")
        name, _, preset = named.partition(":")
        method = METHODS[name]
        settings: dict[str, Any] = {"name": name, **({"preset": preset} if preset else SETTINGS.get(name, {}))}
        train = {key: getattr(self.arguments, key) for key in ("steps", "batch_size", "eval_every")} | {"guard": False}
        learns = issubclass(method, WholeModel | PerLayer)
        if learns and self.arguments.prior != OWN_PRIOR:
            settings["prior"] = self.arguments.prior
        for given in [*self.arguments.set, *(f"{name}.{change}" for change in changes)]:
            where, _, value = given.partition("=")
            owner, key = where.split(".", 1)
            if owner in (named, name, "all"):
                to, key = (train, key.removeprefix("train.")) if key.startswith("train.") else (settings, key)
                to[key] = yaml.safe_load(value)
        made = {"model": str(self.model), "method": settings, "pattern": self.arguments.pattern, "seed": seed}
        return {**made, "train": train} if issubclass(method, WholeModel) else made

    def one_shot(self, spec: str, tokens: int, seed: int) -> dict[str, Any]:
        """A method that learns nothing, on all windows."""
        windows, origin, _ = self.windows(tokens, seed)
        return self._run({**self.recipe(spec, seed), "train": None}, windows, origin)

    def prior(self, tokens: int, seed: int) -> dict[str, Any]:
        """What all learners start from: masks of a file, or of a method on the windows that the learners learn from."""
        if Path(self.arguments.prior).is_file():
            apply_masks(Path(self.arguments.prior), str(self.model), self.place / "prior")
            values = {"nlls": self.nlls(self.place / "prior")}
            shutil.rmtree(self.place / "prior")
            return values
        windows, origin, n_held_out = self.windows(tokens, seed)
        return self._run(self.recipe(self.arguments.prior, seed), windows[:-n_held_out], origin)

    def learned(self, recipe: dict[str, Any], tokens: int, seed: int) -> dict[str, Any]:
        """A learner."""
        windows, origin, n_held_out = self.windows(tokens, seed)
        return self._run(recipe, windows, origin, n_held_out)

    def _run(self, recipe: dict[str, Any], windows: Tensor, origin: str, n_held_out: int = 0) -> dict[str, Any]:
        file = save_windows(windows, origin, self.place / "tokens")
        calibration = {"source": str(file), "n_sequences": len(windows), "seq_len": windows.shape[1]}
        written = {key: value for key, value in recipe.items() if value is not None}
        written["calibration"] = {**calibration, "n_held_out": n_held_out}
        (self.place / "recipe.yaml").write_text(yaml.safe_dump(written))
        run = self.place / "run"
        words = ["prune", "--model", self.model, "--recipe", self.place / "recipe.yaml", "--out", run]
        words += ["--device", self.arguments.device]
        measured = run_child(sys.executable, "nmprune_run.py", words, self.arguments.threads)
        values = {"nlls": self.nlls(run / "model"), "run": measured, "calibration": origin, "n_windows": len(windows)}
        results = json.loads((run / "results.json").read_text())
        values |= {key: results[key] for key in ("learning", "learned_layers") if results.get(key)}
        if (metrics := run / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            values["curve"] = [one for one in lines if "held_out_loss" in one]
        values["recipe"] = RunFolder(run).read_recipe().to_dict()
        if self.arguments.regenerate and RunFolder(run).learned_file.is_file():
            values["regenerated"] = self._regenerated(run)
        shutil.rmtree(run)
        return values

    def _regenerated(self, run: Path) -> dict[str, Any]:
        """The masks that the last network makes by itself: how far they agree with the run's, and what they are worth."""
        found, _ = regenerate(run)
        apply_masks(run / MASKS_FILE, str(self.model), run / "regenerated")
        losses = [
            [one for layer in found.layers if (one := getattr(layer, name)) is not None]
            for name in ("run_loss", "network_loss", "prior_loss")
        ]
        first = [one for one in found.linears if one.layer == found.layers[0].layer]
        return {
            "agreement": found.agreement,
            "first_layer": sum(one.agreement * one.groups for one in first) / sum(one.groups for one in first),
            "prior_run": found.prior_run,
            "losses": [sum(one) / len(one) if one else None for one in losses],
            "nlls": self.nlls(run / "regenerated"),
        }


# -- tables -------------------------------------------------------------------------------------------------------------


def show(ledger: Ledger) -> None:
    rows = ledger.rows
    tables = [results(model, rows) for model in dict.fromkeys(row["key"]["model"] for row in rows)]
    texts = list(
        dict.fromkeys(name for row in rows if "regenerated" in row["values"] for name in row["values"]["nlls"])
    )
    tables += [curves(rows), one_network(rows, texts)]
    origins = sorted({row["values"]["calibration"] for row in rows if "calibration" in row["values"]})
    notes = [
        "Token perplexity: exp of the mean over windows, +- standard error; less than the prior: with the standard error of the "
        "paired difference, window by window.",
        "Learned masks are the best of the run by held-out loss, without the guard; with the guard the prior masks stay where "
        "the held-out loss of the learned ones is no lower. hyperprune's guard is per layer, and is on.",
        "prior: the common prior, from the windows that learners learn from; a learner's held-out windows are among its tokens.",
        *(f"Calibrated on {one}." for one in origins),
    ]
    ledger.show("Learners at equal tokens", tables, notes)


def results(model: str, rows: list[dict[str, Any]]) -> Table:
    """All rows of a model."""
    rows = [row for row in rows if row["key"]["model"] == model]
    texts = list(dict.fromkeys(name for row in rows for name in row["values"]["nlls"]))
    heads = [
        "masks",
        "prior",
        "calibrated on",
        "tokens",
        "seed",
        "device",
        *(f"token perplexity, {name}" for name in texts),
    ]
    heads += [f"less than the prior, {name}" for name in texts]
    heads += ["with the guard", "groups flipped", "steps", "epochs", "run (s)", "peak (MiB)"]
    heads += ["device peak (MiB)", f"{TARGET:.0%} target"]
    return Table(f"Learned masks beside their prior, {model}", heads, [cells(row, rows, texts) for row in rows])


def cells(row: dict[str, Any], rows: list[dict[str, Any]], texts: list[str]) -> list[str]:
    """One line of the table."""
    key, values = row["key"], row["values"]
    prior = prior_of(row, rows)
    learning = values.get("learning")
    shown = [perplexity(values["nlls"].get(name)) for name in texts]
    gains = [gain(values["nlls"].get(name), prior["nlls"].get(name) if prior else None) for name in texts]
    guarded = flips = steps = epochs = target = ""
    if learning:
        stays = not learning["best_loss"] < learning["prior_loss"]
        guarded = "prior" if stays else "learned"
        flips, steps, epochs = f"{learning['best_flips']:.1%}", str(learning["steps"]), f"{learning['epochs']:.1f}"
    elif "learned_layers" in values:
        accepted = [one["accepted"] for one in values["learned_layers"] if one["accepted"] is not None]
        guarded = f"{sum(accepted)} of {len(accepted)} layers"
        found = [one["flips"] for one in values["learned_layers"] if one["flips"] is not None]
        flips = f"{sum(found) / len(found):.1%}" if found else ""
        steps = str(sum(one["steps"] for one in values["learned_layers"]))
    if guarded and prior:
        target = verdict(all(one is not None and one[0] >= TARGET for one in gains))
    run = values.get("run")
    cost = [f"{run['run_seconds']:,.0f}", mebibytes(run["peak_memory"]), device_peak(run)] if run else [""] * 3
    less = [f"{one[0]:+.1%} +- {one[1]:.1%}" if one else "" for one in gains]
    where = [
        key.get("prior", ""),
        key.get("text", ""),
        f"{key['tokens']:,}" if "tokens" in key else "",
        str(key.get("seed", "")),
        key.get("device", "cpu"),
    ]
    return [key["what"], *where, *shown, *less, guarded, flips, steps, epochs, *cost, target]


def prior_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The values of the prior that a learner started from."""
    if row["key"]["what"] == "prior" or "prior" not in row["key"]:
        return None
    wanted = {key: value for key, value in row["key"].items() if key != "settings"} | {"what": "prior"}
    return next((other["values"] for other in rows if other["key"] == wanted), None)


def perplexity(nlls: list[float] | None) -> str:
    """With its standard error."""
    if not nlls:
        return ""
    value = math.exp(sum(nlls) / len(nlls))
    return f"{value:,.2f} +- {value * standard_error(nlls):,.2f}"


def gain(nlls: list[float] | None, before: list[float] | None) -> tuple[float, float] | None:
    """Share of the prior's perplexity that is gone, and the standard error of that."""
    if not nlls or not before:
        return None
    differences = [one - other for one, other in zip(nlls, before, strict=True)]
    ratio = math.exp(sum(differences) / len(differences))
    return 1 - ratio, ratio * standard_error(differences)


def standard_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((one - mean) ** 2 for one in values) / max(1, len(values) - 1) / len(values))


def curves(rows: list[dict[str, Any]]) -> Table:
    """Held-out loss of the hard masks at quarters of the run."""
    shares = (0.25, 0.5, 0.75, 1.0)
    body = []
    for row in rows:
        learning, curve = row["values"].get("learning"), row["values"].get("curve")
        if not learning or not curve:
            continue
        last = curve[-1]["step"]
        at = [min(curve, key=lambda one, share=share: abs(one["step"] - share * last)) for share in shares]
        losses = [f"{one['held_out_loss']:.3f}" for one in at]
        gap = f"{at[-1]['soft_hard_gap']:+.3f}"
        best = f"{learning['best_loss']:.3f} ({learning['best_step']})"
        key = row["key"]
        what = [key["what"], key["model"], key["prior"], f"{key['tokens']:,}", str(key["seed"])]
        body.append([*what, learning["loss"], f"{learning['prior_loss']:.3f}", *losses, gap, best])
    heads = [
        "masks",
        "model",
        "prior",
        "tokens",
        "seed",
        "loss",
        "prior masks",
        *(f"{share:.0%} of the steps" for share in shares),
    ]
    note = "hard - soft: held-out loss of the hard masks less that of what the last step trains."
    return Table("Held-out loss along the run", [*heads, "hard - soft", "best (step)"], body, note)


def one_network(rows: list[dict[str, Any]], texts: list[str]) -> Table:
    """What the last network makes of all layers, beside the masks that were taken on the way."""
    body = []
    for row in rows:
        found = row["values"].get("regenerated")
        if found is None:
            continue
        shares = [found["agreement"], found["first_layer"], found["prior_run"]]
        losses = ["" if one is None else f"{one:.4f}" for one in found["losses"]]
        scores = [perplexity(row["values"]["nlls"].get(name)) for name in texts]
        scores += [perplexity(found["nlls"].get(name)) for name in texts]
        body.append([row["key"]["what"], *("" if one is None else f"{one:.1%}" for one in shares), *losses, *scores])
    heads = ["masks", "network = run", "in the first layer", "prior = run"]
    heads += [f"held-out layer loss, {name}" for name in ("run", "network", "prior")]
    heads += [f"token perplexity of {whose}, {name}" for whose in ("the run", "the network") for name in texts]
    note = "Shares of groups with the same mask in both; losses: means over the decoder layers (nmprune regenerate)."
    return Table("One network for all masks", heads, body, note)


if __name__ == "__main__":
    main()
