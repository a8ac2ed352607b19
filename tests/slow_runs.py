"""Runs in processes of their own that are slow enough to be killed at a chosen moment.

The processes are forked from a server that has imported everything once, so each starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import nmprune
import tiny_models
from nmprune.methods import Method
from nmprune.run import api, folder, learn_layers
from nmprune.run import prune as prune_module

N_LAYERS = 8


def context() -> ForkServerContext:
    """Where the processes come from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["slow_runs", "nmprune.run.api"])
    return found


def work(
    model: str, out: str, pause: dict[str, float], keep_hidden: bool, method: str | Method, settings: dict[str, Any]
) -> None:
    """Prune, pausing at every report of a stage; exits 2 with the text in `<out>.error` on an InputError.

    Args:
        model: the folder.
        out: the run folder.
        pause: stage -> seconds; "card" is the moment between the finished model and results.json.
        keep_hidden: keep hidden states after every layer, and a learner's snapshot after every step.
        method: what prunes.
        settings: other arguments of `nmprune.prune`.
    """
    torch.set_num_threads(1)
    if keep_hidden:
        folder.HIDDEN_INTERVAL_SECONDS = 0.0
        learn_layers.SNAPSHOT_SECONDS = 0.0
    card = prune_module.model_card

    def slow_card(*args: object) -> str:
        time.sleep(pause.get("card", 0))
        return card(*args)  # type: ignore[arg-type]

    prune_module.model_card = slow_card
    try:
        api.prune(
            model,
            method,
            "2:4",
            tiny_models.windows(),
            out,
            report=lambda one: time.sleep(pause.get(one.stage, 0)),
            **settings,
        )
    except nmprune.InputError as error:
        Path(f"{out}.error").write_text(str(error))
        sys.exit(2)


def start(
    model: Path,
    out: Path,
    pause: dict[str, float] | None = None,
    *,
    keep_hidden: bool = False,
    method: str | Method = "sparsegpt",
    **settings: Any,
) -> BaseProcess:
    """`work` in a process of its own."""
    process = context().Process(target=work, args=(str(model), str(out), pause or {}, keep_hidden, method, settings))
    process.start()
    return process


def wait_for(moment: Callable[[], bool], process: BaseProcess) -> None:
    """Until the moment has come; fails when the process ends before."""
    for _ in range(60_000):
        if moment():
            return
        assert process.is_alive(), f"the run ended (exit code {process.exitcode}) before the moment came"
        time.sleep(0.001)
    raise AssertionError("the moment did not come within a minute")
