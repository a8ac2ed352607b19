from __future__ import annotations

import json
from pathlib import Path

import pytest

from nmprune.cli.console import Output, plain
from nmprune.cli.options import parse_size
from nmprune.cli.quiet_libraries import quiet_libraries
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.report import RoleFacts, facts


def test_plain_is_what_json_holds():
    role = RoleFacts("up", 1, (2, 4), "gate", "t")
    found = plain({"a": Path("x"), "b": Pattern(2, 4), "c": [float("inf"), float("nan"), 1.5], "d": role, 3: None})
    assert found == {
        "a": "x",
        "b": "2:4",
        "c": [None, None, 1.5],
        "d": {"role": "up", "count": 1, "shape": [2, 4], "shared_input": "gate", "tensor": "t"},
        "3": None,
    }


def test_json_has_stdout_for_itself(capsys):
    output = Output(json=True)
    output.note("a note")
    output.hints({"cmd": "does"})
    output.result({"long": "word " * 200}, [facts("", {"a": "b"})])
    out, err = capsys.readouterr()
    assert json.loads(out) == {"long": "word " * 200}
    assert err == "a note\n"


def test_tables_go_to_stdout_and_words_to_stderr(capsys):
    output = Output()
    output.note("x" * 300)
    output.hints({"nmprune verify r": "prove it"})
    output.result({}, [facts("", {"a": "b"})])
    out, err = capsys.readouterr()
    assert out.split() == ["a", "b"]
    assert err == "x" * 300 + "\nwhat next:\n  nmprune verify r  # prove it\n"


def test_quiet_leaves_only_the_result(capsys):
    output = Output(quiet=True)
    output.note("a")
    output.hints({"b": "c"})
    output.result({}, [facts("", {"a": "b"})])
    out, err = capsys.readouterr()
    assert out.split() == ["a", "b"]
    assert err == ""


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("8GB", 8 * 10**9), ("512 MiB", 512 << 20), ("1.5k" + "B", 1500), ("1000", 1000), ("0", 0)]
)
def test_sizes(text, n_bytes):
    assert parse_size("--hidden-budget", text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 apples", "8e9"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match=r"--hidden-budget .*expected a size such as 8GB"):
        parse_size("--hidden-budget", text)


def test_other_libraries_are_silenced_through_their_own_interfaces():
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    quiet_libraries()
    assert are_progress_bars_disabled()
    assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.ERROR
