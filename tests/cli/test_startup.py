"""A command imports what it needs and no more: nobody waits for torch to read a help text."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

import tiny_runs

CODE = """
import sys
from nmprune.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(",".join(name for name in ("torch", "transformers", "datasets") if name in sys.modules), file=sys.stderr)
"""


def imported(*words: object) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    return done.stderr.strip().splitlines()[-1].split(",") if done.stderr.strip() else []


def test_help_is_quick_and_imports_neither_torch_nor_transformers():
    best = 100.0
    for _ in range(3):
        start = time.perf_counter()
        assert imported("prune", "--help") == []
        best = min(best, time.perf_counter() - start)
    assert best < 1.5
    assert imported("--version") == []


@pytest.mark.parametrize("words", [("list", "--json")])
def test_lists_do_not_import_transformers(words):
    assert imported(*words) == ["torch"]


def test_validate_does_not_import_transformers(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nmethod: wanda\n")
    assert imported("validate", tmp_path / "r.yaml") == ["torch"]


def test_diff_does_not_import_transformers(tmp_path):
    run = tiny_runs.finished(tiny_runs.model(tmp_path / "m"), tmp_path / "run", "magnitude")
    assert imported("diff", run, run) == ["torch"]
