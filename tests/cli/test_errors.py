"""What goes wrong, as the user sees it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from nmprune.cli.guard import guarded
from nmprune.errors import InputError


def flat(text: str) -> str:
    """Words on one line, however they were wrapped."""
    return re.sub(r"\s+", " ", text)


def run(error: BaseException | None, *, json: bool = False, debug: bool = False, resumable: bool = False) -> int:
    def command(json: bool, debug: bool) -> None:
        if error is not None:
            raise error

    with pytest.raises(typer.Exit) as caught:
        guarded(command, resumable)(json=json, debug=debug)
    return caught.value.exit_code


def test_exit_codes():
    assert run(None) == 0
    assert run(InputError("x")) == 2
    assert run(ValueError("x")) == 1
    assert run(KeyboardInterrupt()) == 130


def test_the_users_error_is_words_alone(capsys):
    run(InputError("pattern [5:4] is wrong"))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: pattern [5:4] is wrong\n")


def test_our_bug_says_so_and_how_to_get_the_traceback(capsys):
    run(RuntimeError("mask lost"))
    err = capsys.readouterr().err
    assert err.startswith("bug: RuntimeError: mask lost\n")
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [InputError("given"), RuntimeError("ours")])
def test_debug_shows_the_traceback(capsys, error):
    run(error, debug=True)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert str(error) in err


def test_with_json_the_error_is_a_document_too(capsys):
    run(InputError("given"), json=True)
    assert json.loads(capsys.readouterr().out) == {"error": {"kind": "input", "message": "given"}}
    run(RuntimeError("ours"), json=True)
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "bug"


def test_an_interrupt_tells_how_to_go_on_only_where_one_can(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nmprune", "prune", "my model"])
    run(KeyboardInterrupt(), resumable=True)
    assert "  nmprune prune 'my model'\n" in capsys.readouterr().err
    run(KeyboardInterrupt())
    assert capsys.readouterr().err == "interrupted.\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_the_users_to_put_right(error, capsys):
    assert run(error) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: too little memory: ") and "GPU 0" not in err
    for way_out in ("--set stream.batch_size=1", "--n-sequences, --seq-len", "--device cpu", "`nmprune plan`"):
        assert way_out in err


def test_the_allocators_own_words_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert run(caught.value) == 2


def test_an_error_does_not_import_torch():
    code = (
        "import sys, typer\nfrom nmprune.cli.guard import guarded\ndef broken(): raise RuntimeError('x')\n"
        "try: guarded(broken)()\nexcept typer.Exit as done: print(done.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -c 'from nmprune.cli import main; main()' list --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""


def test_a_bug_inside_a_command(call, base, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("nmprune.run.inspect.inspect", broken)
    result = call("inspect", base)
    assert result.exit_code == 1
    assert "bug: ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback" in call("inspect", base, "--debug").stderr


OUTS = {
    "refused by the kernel": "/proc/nowhere/run",
    "below a file": "/etc/passwd/run",
    "too long": "x" * 300,
}
COMMANDS = {
    "prune": ("{base}", "--method", "magnitude"),
    "finetune": ("{run}", "--steps", 1, "--minutes", 0, "--set", "seq_len=16", "--text", "builtin"),
    "apply": ("{run}", "{base}"),
    "plan": ("{base}", "--method", "magnitude"),
}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("out", OUTS)
def test_a_place_that_cannot_be_written_is_the_users_to_change(out, command, call, base, run):
    if (out, command) == ("below a file", "plan"):
        pytest.skip("the disk that is timed is that of the nearest folder, /etc")
    words = [str(word).format(base=base, run=run) for word in COMMANDS[command]]
    result = call(command, *words, "--out", OUTS[out])
    assert result.exit_code == 2, result.output
    told = flat(result.stderr)
    assert "Choose another place" in told and "bug" not in told, told
    assert {"refused": "no folder can be made there", "below": "a part of the path is a file", "too": "too long"}[
        out.split()[0]
    ] in told


def test_a_command_that_cannot_be_shared_says_so_under_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(None) == 2
    assert "command works in one process, and torchrun started 2. Start it without torchrun" in capsys.readouterr().err


def test_torchruns_last_words_are_ours(capsys, monkeypatch, tmp_path):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(InputError("layer 3: not finite.")) == 2
    capsys.readouterr()
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file=str(file))
    told = ChildFailedError("nmprune", {1: failure}).format_msg()
    assert "traceback : error: layer 3: not finite." in told.splitlines()[-2]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert run(RuntimeError("ours")) == 1


def test_of_several_processes_one_prints_the_error_document(capsys, monkeypatch):
    for rank, expected in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert run(InputError("x"), json=True) == 2
        out, err = capsys.readouterr()
        assert bool(out) == expected and "error: x" in err
