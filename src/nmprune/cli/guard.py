"""From what goes wrong to what the user reads and the exit code.

0 = done, 1 = a bug of ours, 2 = something the user can put right, 3 = `verify` found something wrong, 130 = Ctrl-C,
141 = the reader of our output went away.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from nmprune.cli.console import BROKEN_PIPE, Output, say
from nmprune.errors import InputError

BUG, INPUT, INTERRUPTED = 1, 2, 130
ISSUES = "the project's issue tracker"


def guarded(
    command: Callable[..., int | None],
    resumable: bool = False,
    kept: str = "Finished decoder layers are kept.",
    shared: bool = False,
) -> Callable[..., None]:
    """`command` with its errors told in words and turned into an exit code.

    Args:
        command: a typer command with the flags `json` and `debug`; it returns its exit code, None for 0.
        resumable: after Ctrl-C the same command goes on where it stopped.
        kept: what it goes on from.
        shared: the processes that torchrun starts share its work; a command without this works in one.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        output, debug = Output(json=bool(kwargs.get("json"))), bool(kwargs.get("debug"))
        try:
            if not shared and os.environ.get("WORLD_SIZE", "1") != "1":
                raise InputError(
                    f"{command.__name__.rstrip('_')} works in one process, and torchrun started {os.environ['WORLD_SIZE']}. "
                    "Start it without torchrun; `nmprune prune` can share its work."
                )
            code = command(*args, **kwargs) or 0
            sys.stdout.flush()
        except InputError as error:
            code = _told(output, "input", str(error), INPUT, debug)
        except KeyboardInterrupt:
            code = INTERRUPTED
            say(output.stderr, "interrupted.", "bold red")
            if resumable:
                say(
                    output.stderr,
                    f"{kept} To go on where it stopped, run the same command again:",
                )
                say(output.stderr, f"  {shlex.join(['nmprune', *sys.argv[1:]])}")
        except BrokenPipeError:
            _close_stdout()
            code = BROKEN_PIPE
        except typer.Exit:
            raise
        except Exception as error:
            if _out_of_memory(error):
                code = _told(output, "input", _memory_words(error), INPUT, debug)
            else:
                words = f"{type(error).__name__}: {error}".rstrip(": ")
                code = _told(output, "bug", words, BUG, debug)
        raise typer.Exit(code)

    return run


def _out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had too little memory; torch is looked at only where a command has imported it."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (MemoryError, kind)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text and "allocate memory" in text


def _memory_words(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"too little memory: {reason}\nWays out: --set stream.batch_size=1 (evaluate: --batch-size 1; finetune: "
        "--set batch_size=1, --set activation_checkpointing=true, --lora 16); fewer or shorter "
        "sequences (--n-sequences, --seq-len); --device cpu where an accelerator was full. `nmprune plan` says what a run "
        "needs before it starts. A run that was begun with other settings wants another --out folder."
    )


def _told(output: Output, kind: str, message: str, code: int, debug: bool) -> int:
    """Say what went wrong: in words on stderr, with --json also as a document on stdout; returns `code`."""
    if debug:
        # The frames only: local values hold weights and text.
        Console(stderr=True, width=120).print_exception(show_locals=False)
    if output.json and _prints():
        output.result({"error": {"kind": kind, "message": message}})
    _tell_torchrun(f"{'error' if kind == 'input' else 'bug'}: {message}")
    if kind == "input":
        say(output.stderr, f"error: {message}", "red")
        return code
    say(output.stderr, f"bug: {message}", "bold red")
    if not debug:
        say(
            output.stderr,
            "This is a fault of nmprune, not of your input. Run the same command with --debug for the traceback,",
        )
        say(output.stderr, f"and report it with `nmprune --version` to {ISSUES}.")
    return code


def _prints() -> bool:
    """Whether stdout is this process's: of several that share a run, one prints."""
    from nmprune.distributed import is_main_process

    return is_main_process()


def _tell_torchrun(message: str) -> None:
    """Without torchrun nothing is imported: an error is said at once."""
    if "WORLD_SIZE" in os.environ:
        from nmprune.distributed import tell_torchrun

        tell_torchrun(message)


def _close_stdout() -> None:
    """Let what is still buffered go nowhere: Python would complain about it while exiting."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
