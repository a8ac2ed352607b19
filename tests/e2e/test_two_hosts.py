"""Two hosts, each a network namespace of this machine, share a run started by torchrun. Opt in: NMPRUNE_TEST_HOSTS=1, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_runs
from runs import output

HOSTS = ("10.213.77.1", "10.213.77.2")
ARGUMENTS = ("--method", "sparsegpt", "--n-sequences", "8", "--seq-len", "16", "--set", "stream.batch_size=1")

pytestmark = [
    pytest.mark.skipif(os.environ.get("NMPRUNE_TEST_HOSTS") != "1", reason="opt in with NMPRUNE_TEST_HOSTS=1"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs the command ip (iproute2)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces whose only way to each other is a cable."""
    names = [f"nmprune-{os.getpid()}-{number}" for number in range(2)]
    made: list[str] = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
            made.append(name)
        ends = [f"nm{os.getpid()}e{number}"[:15] for number in range(2)]
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, HOSTS, strict=True):
            ip("-n", name, "link", "set", end, "name", "cable")
            ip("-n", name, "addr", "add", f"{address}/30", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def prune(name: str, rank: int, model: Path, out: Path) -> subprocess.Popen[str]:
    """torchrun on one host."""
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr", HOSTS[0], "--master-port", "29511"]
    command += ["-m", "nmprune", "prune", str(model), *ARGUMENTS, "--out", str(out)]
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(runs: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = []
    for run in runs:
        out, err = run.communicate(timeout=180)
        found.append((run.returncode, out, err))
    return found


def test_two_hosts_find_what_one_process_finds(hosts, tmp_path):
    model = tiny_runs.model(tmp_path / "base", num_hidden_layers=4)
    several = ended([prune(name, rank, model, tmp_path / "several") for rank, name in enumerate(hosts)])
    assert [code for code, _, _ in several] == [0, 0], several
    assert "sparsegpt" in several[0][1] and several[1][1] == "", "process 0 prints, and nobody else"
    alone = [sys.executable, "-m", "nmprune", "prune", str(model), *ARGUMENTS, "--out", str(tmp_path / "alone")]
    subprocess.run(alone, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert output(tmp_path / "several") == output(tmp_path / "alone")


def test_a_cable_that_is_cut_ends_the_run_on_both_hosts(hosts, tmp_path):
    model = tiny_runs.model(tmp_path / "base", num_hidden_layers=40)
    out = tmp_path / "run"
    runs = [prune(name, rank, model, out) for rank, name in enumerate(hosts)]
    first = out / "progress" / "layer_00001.safetensors"
    for _ in range(1200):
        if first.exists() or any(run.poll() is not None for run in runs):
            break
        time.sleep(0.05)
    assert first.exists()
    cut = time.monotonic()
    ip("-n", hosts[1], "link", "set", "cable", "down")
    found = ended(runs)
    assert time.monotonic() - cut < 120
    assert all(code not in (0, None) for code, _, _ in found)
    for _, _, err in found:
        assert "of 2 was lost" in err and "Run the same command again" in err
