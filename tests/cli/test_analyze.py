from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

WORDS = ("--text", "builtin", "--n-sequences", 4, "--seq-len", 16)


def test_it_shows_keeps_and_draws(call, document, run):
    result = call("analyze", run, *WORDS)
    assert result.exit_code == 0, result.output
    assert "14 linears under 5 masks each, on 4 x 16 tokens" in result.stderr and "saved:" in result.stderr
    assert "mlp.down_proj" in result.stdout and "largest errors on this text" in result.stdout
    assert "masks of a linear" in result.stdout
    found = document("analyze", run, *WORDS, "--quiet")
    saved = json.loads(Path(found["saved"]).read_text())
    assert all(found[key] == saved[key] for key in saved if key != "seconds")
    assert len(saved["linears"]) == 14 and saved["left_out"] == {}
    for one in saved["linears"]:
        assert [mask["mask"] for mask in one["masks"]] == [
            *("run", "magnitude", "wanda"),
            *("wanda, 50% random", "wanda, 100% random"),
        ]
        assert 0 < one["masks"][0]["error"] < one["masks"][-1]["error"]
        assert saved["calibration_errors"][one["name"]] is None  # wanda collects no Gram matrix
        assert one["n_tokens"] == 64
    drawing = ET.parse(found["picture"])
    dots = list(drawing.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 14 * 5 + 7 + 1  # and the legend's


def test_with_every_other_flag(document, base, run, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    moved = shutil.copytree(base, tmp_path / "moved")
    found = document(
        *("analyze", run, "--seq-len", 8, "--n-sequences", 2, "--mixed-masks", 0, "--base", moved),
        *("--device", "cpu", "--hidden-budget", "1KB", "--scratch", scratch, "--threads", 1),
    )
    assert found["n_windows"] == 2 and found["text"].endswith("help topics")  # the run was calibrated on them
    assert len(found["linears"][0]["masks"]) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seq-len", 1), "seq_len is 1; expected at least 2"),
        (("--mixed-masks", -1), "n_mixed is -1"),
        (("--text", "wikitxt2"), "Did you mean 'wikitext2'"),
        (("--text", "builtin", "--seq-len", 512), "more than the model's 64 positions"),
    ],
)
def test_bad_input(call, run, words, says):
    result = call("analyze", run, *words)
    assert result.exit_code == 2 and says in result.stderr


def test_no_run(call, base):
    result = call("analyze", base)
    assert result.exit_code == 2 and "is not a run folder" in result.stderr


def test_a_finetuned_run(call, document, run, tmp_path):
    """Its weights moved, whatever the method did: its mask is looked at with the dense weights, too."""
    steps = ("--minutes", 0, "--steps", 2, "--set", "seq_len=16", "--set", "n_held_out=2", "--set", "max_tokens=800")
    tuned = call(
        "finetune", run, "--out", tmp_path / "tuned", *steps, "--text", "builtin", "--device", "cpu", "--quiet"
    )
    assert tuned.exit_code == 0, tuned.output
    for one in document("analyze", tmp_path / "tuned", *WORDS, "--quiet")["linears"]:
        assert [mask["mask"] for mask in one["masks"]][:2] == ["run", "run's mask, dense weights"]
