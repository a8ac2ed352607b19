from __future__ import annotations

import re


def flat(text):
    return re.sub(r"\s+", " ", text)


def test_a_permuted_run_from_the_command_line(call, document, base, tmp_path):
    words = (base, "--method", "wanda", "--n-sequences", 2, "--seq-len", 16)
    out = tmp_path / "run"
    done = call("prune", *words, "--permute", "ffn,residual", "--out", out)
    assert done.exit_code == 0, done.output
    assert "channels reordered before pruning" in done.stdout
    assert "ffn 2 of 2 reordered, score lost" in flat(done.stderr)
    assert document("verify", out)["ok"]
    planned = document("plan", *words, "--permute", "all", "--no-time")
    assert "permutation" in planned["memory"]


def test_a_kind_that_there_is_not(call, base):
    done = call("prune", base, "--permute", "fnn")
    assert done.exit_code == 2
    assert "permute 'fnn' is no kind of channels. Did you mean 'ffn'" in flat(done.stderr)
