from __future__ import annotations

import shutil
from pathlib import Path

WORDS = ("--text", "builtin", "--seq-len", 16, "--max-windows", 2)


def test_a_run_dense_beside_pruned(call, document, run):
    result = call("evaluate", run, *WORDS)
    assert result.exit_code == 0, result.output
    assert "(held-out part), 2 windows of 16 tokens" in result.stdout
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.split()}
    assert {"dense", "pruned"} <= rows.keys()
    assert rows["dense"][2] == "±"
    assert "saved:" in result.stderr
    found = document("evaluate", run, *WORDS)
    assert [one["what"] for one in found["models"]] == ["dense", "pruned"]
    assert f"{found['models'][0]['perplexity']['value']:.3f}" == rows["dense"][1]
    assert Path(found["saved"]).is_file()
    assert "measured before" in call("evaluate", run, *WORDS).stderr


def test_one_model_with_every_flag(document, base, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("Some words of a text. " * 40)
    found = document(
        *("evaluate", base, "--text", text, "--seq-len", 8, "--max-windows", 5, "--batch-size", 2),
        *("--device", "cpu", "--dtype", "bfloat16", "--hidden-budget", "1KB", "--scratch", scratch, "--threads", 1),
        *("--trust-remote-code", "--quiet"),
    )
    assert (found["text"], found["split"], found["seq_len"], found["n_windows"]) == ("text.txt", "all", 8, 5)
    assert (found["dtype"], found["device"]) == ("bfloat16", "cpu")
    assert found["models"][0]["perplexity"]["kind"] == "token"


def test_a_moved_base(call, document, base, run, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    assert document("evaluate", run, *WORDS, "--base", moved)["models"][0]["model"] == str(moved)
    assert "has no meaning" in call("evaluate", base, *WORDS, "--base", moved).stderr


def test_bad_input(call, base, tmp_path):
    for words, says in (
        (("evaluate", base, "--text", "wikitxt2"), "Did you mean 'wikitext2'"),
        (("evaluate", base, *WORDS[:-1], 0), "max_windows is 0"),
        (("evaluate", base, "--text", "builtin", "--seq-len", 512), "more than the model's 64 positions"),
        (("evaluate", tmp_path), "config.json"),
    ):
        result = call(*words)
        assert result.exit_code == 2, words
        assert says in result.stderr
