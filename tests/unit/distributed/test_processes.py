"""What processes tell each other, with two and three of them on this machine."""

from __future__ import annotations

import json
import math
import signal
import socket
import time
from contextlib import suppress

import pytest
import torch

import process_groups
from nmprune.distributed import ALONE, ProcessLost, is_main_process, started
from nmprune.distributed.lifeline import Lifeline
from nmprune.errors import InputError


def test_one_process_is_no_distributed_run(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with started(torch.device("cpu")) as processes:
        assert processes is ALONE and processes.alone and processes.is_main
    tensor = torch.ones(2)
    ALONE.sum_([tensor])
    ALONE.broadcast_(tensor)
    ALONE.pass_(tensor, 0, (0,))
    ALONE.barrier()
    assert tensor.tolist() == [1, 1] and ALONE.sum_values([0.5]) == [0.5] and ALONE.tell({"a": 1}) == {"a": 1}
    assert ALONE.gather_counts([3]) == [[3]] and list(ALONE.mine(3)) == [0, 1, 2]
    assert is_main_process() and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "2"}, r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set. Start .* with torchrun"),
        ({"RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "must be whole numbers"),
    ],
)
def test_an_environment_that_cannot_be_used(variables, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=expected), started(torch.device("cpu")):
        pass


def test_several_processes_need_cpu_or_cuda(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cpu or cuda, not on mps"), started(torch.device("mps")):
        pass


def test_talking(tmp_path):
    assert process_groups.end(process_groups.start(3, process_groups.in_each, "talk", tmp_path)) == [0, 0, 0]
    found = [json.loads((tmp_path / f"found_{rank}").read_text()) for rank in range(3)]
    for same in ("sums", "values", "counts", "broadcast", "told"):
        assert found[0][same] == found[1][same] == found[2][same], same
    assert found[0]["sums"][1:] == [[[3, 3], [3, 3]], 3]
    assert found[0]["sums"][0] == pytest.approx([0.6] * 3)
    assert found[0]["values"] == [0.1 + 0.2 + 0.1 * 3, math.inf] and found[0]["counts"] == [[0, 7], [1, 7], [2, 7]]
    assert found[0]["broadcast"] == [1, 1] and found[0]["told"] == {"from": 1, "text": "é"}
    assert [one["passed"] for one in found] == [[2, 2], [1, 1], [2, 2]]
    assert [one["mine"] for one in found] == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_process_that_dies_ends_the_others_in_seconds(tmp_path):
    start = time.monotonic()
    group = process_groups.start(3, process_groups.in_each, "one_dies", tmp_path)
    assert process_groups.end(group, 50) == [2, -signal.SIGKILL, 2]
    assert time.monotonic() - start < 40
    for rank in (0, 2):
        assert (tmp_path / f"error_{rank}").read_text() == (
            "ProcessLost: process 1 of 3 was lost (killed, out of memory, or its host is gone). Run the same command again: "
            "it goes on after decoder layer 3 of 8."
        )


def test_an_error_of_one_process_is_told_by_all(tmp_path):
    group = process_groups.start(2, process_groups.in_each, "one_fails", tmp_path)
    assert process_groups.end(group, 50) == [2, 2]
    assert (tmp_path / "error_1").read_text() == "InputError: layer 3: not finite."
    assert (tmp_path / "error_0").read_text() == (
        "ProcessLost: process 1 of 2 stopped: layer 3: not finite. Run the same command again: it goes on where it stopped."
    )


def test_a_lost_process_is_no_linears_fault():
    lost = ProcessLost("process 1 of 2 was lost")
    assert lost.located("decoder layer 3") is lost


def test_strangers_are_not_let_in():
    port: list[int] = []

    def tell(value):
        port.append(value[0])
        stranger = socket.create_connection(("127.0.0.1", value[0]))
        stranger.sendall(b'{"token": "guess", "rank": 1}\n')
        other = socket.create_connection(("127.0.0.1", value[0]))
        other.sendall(b"GET / HTTP/1.1\r\n\r\n")
        friend = socket.create_connection(("127.0.0.1", value[0]))
        friend.sendall(json.dumps({"token": value[1], "rank": 1}).encode() + b"\n")
        sockets.extend((stranger, other, friend))
        return value

    sockets: list[socket.socket] = []
    lifeline = Lifeline.open(0, 2, "127.0.0.1", tell)
    lifeline.say({"hello": 1})
    stranger, other, friend = sockets
    assert friend.recv(100) == b'{"hello": 1}\n'
    for one in (stranger, other):
        with suppress(ConnectionResetError):
            assert one.recv(100) == b""
    lifeline.close()
    for one in sockets:
        one.close()
