from __future__ import annotations

import io

import pytest
from rich.console import Console

from nmprune.cli.console import Output
from nmprune.cli.progress import ProgressView
from nmprune.run import Progress

SIGNS = [
    Progress("open", text="opening [m]"),
    Progress("layers", 0.0, 2),
    Progress("layers", 0.5, 2),
    Progress("layers", 1, 2, "decoder layer 1/2"),
    Progress("layers", 1.25, 2),
]


def view(in_terminal: bool, quiet: bool = False) -> tuple[ProgressView, io.StringIO]:
    output = Output(quiet=quiet)
    stream = io.StringIO()
    output.stderr = Console(file=stream, force_terminal=in_terminal, width=100)  # type: ignore[assignment]
    return ProgressView(output), stream


def test_without_a_terminal_there_are_plain_lines():
    shown, stream = view(in_terminal=False)
    with shown:
        for sign in SIGNS:
            shown.show(sign)
    assert stream.getvalue() == "opening [m]\ndecoder layer 1/2\n"


def test_quiet_shows_nothing():
    for in_terminal in (False, True):
        shown, stream = view(in_terminal, quiet=True)
        with shown:
            for sign in SIGNS:
                shown.show(sign)
        assert stream.getvalue() == ""


def test_a_bar_for_the_run_and_one_for_the_layer_in_work():
    shown, stream = view(in_terminal=True)
    with shown:
        for sign in SIGNS:
            shown.show(sign)
        assert shown._bars is not None
        tasks = {task.description: task for task in shown._bars.tasks}
        assert tasks.keys() == {"decoder layers", "layer 2"}
        assert (tasks["decoder layers"].completed, tasks["decoder layers"].total) == (1.25, 2)
        assert tasks["layer 2"].completed == pytest.approx(0.25)
        shown.show(Progress("layers", 2, 2, "decoder layer 2/2"))
        assert [task.description for task in shown._bars.tasks] == ["decoder layers"]
        shown.show(Progress("model", 1 << 20, 4 << 20))
        shown.show(Progress("done", 1, 1, "finished"))
        assert [task.description for task in shown._bars.tasks] == ["decoder layers", "writing the model"]
        shown._bars.refresh()
    text = stream.getvalue()
    assert "1/4 MiB" in text
    assert "2/2" in text
    assert "ETA" in text
    assert "opening [m]" in text


def test_what_another_stage_is_called():
    shown, _ = view(in_terminal=True)
    with shown:
        shown.show(Progress("dense", 1, 4))
        shown.show(Progress("verify", 1, 4))
        shown.show(Progress("measure", 1, 4))
        shown.show(Progress("strange", 1, 4))  # type: ignore[arg-type]
        assert shown._bars is not None
        assert [task.description for task in shown._bars.tasks] == [
            "dense model",
            "comparing tensors",
            "measuring",
            "strange",
        ]
