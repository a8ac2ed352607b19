"""What the benchmark commands share: the machine and the commit, kept rows, tables, measured child processes.

Only the standard library is imported at the top: the peers' virtual environment has no nmprune and uses this file too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEBI = 1 << 20
_PACKAGES = ("nmprune", "torch", "transformers", "safetensors", "llmcompressor", "compressed-tensors")


# -- the command line ---------------------------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with the flags that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    made.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    made.add_argument("--fresh", action="store_true", help="measure again what is measured already")
    return made


def add_device_flag(made: argparse.ArgumentParser) -> None:
    """A flag for benchmarks that can also work on an accelerator; one without it measures the CPU."""
    made.add_argument(
        "--device", default="auto", help="as nmprune's: auto (cuda, else mps, else cpu), cpu, cuda, cuda:N"
    )


def add_text_flags(made: argparse.ArgumentParser, n_sequences: int = 32, seq_len: int = 512) -> None:
    """Flags for what a method calibrates on."""
    made.add_argument("--model", default="smollm2-135m", help="HF folder, .gguf file, hub id, or smollm2-135m")
    made.add_argument("--n-sequences", type=int, default=n_sequences, help="calibration token windows")
    made.add_argument("--seq-len", type=int, default=seq_len, help="tokens per window")
    add_calibration_flags(made)


def add_calibration_flags(made: argparse.ArgumentParser) -> None:
    """Flags for where calibration tokens come from."""
    made.add_argument(
        "--calibration", default="auto", help="text source; auto: c4 where found, else builtin; or random"
    )
    made.add_argument("--seed", type=int, default=0, help="chooses the windows")


def device_of(arguments: argparse.Namespace) -> torch.device:
    """What --device means on this machine; the CPU where a benchmark has no such flag."""
    from nmprune.run import Machine

    return Machine(device=getattr(arguments, "device", "cpu")).resolve()


def device_name(arguments: argparse.Namespace) -> str:
    """The accelerator's name; "cpu" where there is none."""
    import torch

    device = device_of(arguments)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -- calibration tokens -------------------------------------------------------------------------------------------------


def find_data() -> None:
    """Point $NMPRUNE_DATA at the shared texts where they lie beside the project; nothing is downloaded."""
    beside = ROOT.parent / "shared" / "data"
    if "NMPRUNE_DATA" not in os.environ and beside.is_dir():
        os.environ["NMPRUNE_DATA"] = str(beside)


def token_windows(folder: Path, source: str, n_sequences: int, seq_len: int, seed: int) -> tuple[Tensor, str]:
    """Calibration token ids, int64 (n_sequences, seq_len), and the text's name."""
    import torch

    from nmprune.calibration import load_text, random_windows
    from nmprune.run.tokens import load_tokenizer

    if source == "random":
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (n_sequences, seq_len), generator=generator), "random token ids"
    text = load_text(text_source(source), "calibration")
    return random_windows(text, load_tokenizer(folder), n_sequences, seq_len, seed), f"{text.name}, {text.split}"


def text_source(given: str) -> str:
    """The text source that a --calibration flag means here."""
    find_data()
    if given != "auto":
        return given
    sample = Path(os.environ.get("NMPRUNE_DATA", "/nonexistent"), "calibration", "c4_sample.jsonl")
    return "c4" if sample.is_file() else "builtin"


def save_windows(windows: Tensor, origin: str, folder: Path) -> Path:
    """Token ids as the file that a recipe takes as its calibration source."""
    from nmprune.run.folder import RunFolder

    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    run.save_tokens(windows, {"source": origin, "split": "cut by a benchmark"})
    return run.tokens_file


# -- where and when -----------------------------------------------------------------------------------------------------


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of this interpreter and of those packages that are installed for it."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_state() -> tuple[str, bool]:
    """The commit, and whether tracked or new files differ from it (result files aside).

    A copy of the working tree without .git is told its commit by $NMPRUNE_BENCH_COMMIT.
    """
    if given := os.environ.get("NMPRUNE_BENCH_COMMIT"):
        return given, False

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    results = (HERE / "results").relative_to(ROOT)
    return git("rev-parse", "--short=12", "HEAD") or "unknown", bool(
        git("status", "--porcelain", "--", ".", f":!{results}")
    )


def provenance() -> dict[str, Any]:
    """What a row says about how it came to be."""
    commit, dirty = git_state()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "dirty": dirty,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "processor": processor(),
        "cores": cores(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
    }


# -- memory of one process ----------------------------------------------------------------------------------------------


class Peak:
    """Peak RSS from now on less the RSS now, bytes; mapped pages count.

    On Linux the mark is the process's own: ru_maxrss would also remember the parent that started it.
    """

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        self.start = _status("VmRSS") or _max_rss()

    def bytes(self) -> int:
        """So far."""
        return (_status("VmHWM") or _max_rss()) - self.start


def _status(key: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _max_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- child processes ----------------------------------------------------------------------------------------------------


_STARTED = "NMPRUNE_BENCH_STARTED"
_ANSWER = "answer: "


def since_started() -> float:
    """In a measured child: seconds since its parent started it, so with interpreter and imports."""
    return time.time() - float(os.environ[_STARTED])


def child_environment(threads: int) -> dict[str, str]:
    """For a measured process: threads set on purpose, nothing fetched."""
    same = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **same, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", _STARTED: str(time.time())}


def run_child(python: Path | str, script: str, arguments: Sequence[object], threads: int) -> dict[str, Any]:
    """Run a script of this folder in a fresh process; what it reports, and its wall clock as `wall_seconds`.

    The script gets `--report FILE` and `--threads N` and writes JSON there.
    """
    with tempfile.TemporaryDirectory(prefix="nmprune-bench-") as place:
        report = Path(place) / "report.json"
        words = [str(python), str(HERE / script), *map(str, arguments)]
        words += ["--report", str(report), "--threads", str(threads)]
        start = time.perf_counter()
        done = subprocess.run(words, env=child_environment(threads), cwd=place, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{shlex.join(words)} failed with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        return {**json.loads(report.read_text()), "wall_seconds": seconds}


def answer(values: dict[str, Any]) -> None:
    """In a worker: answer the line it was sent; whatever else is printed (a library's log) is not taken for it."""
    print(_ANSWER + json.dumps(values), flush=True)


class Worker:
    """A child process that does one thing again at every line it is sent, and answers each by `answer`."""

    def __init__(self, python: Path | str, script: str, arguments: Sequence[object], threads: int) -> None:
        self._words = [str(python), str(HERE / script), *map(str, arguments), "--threads", str(threads)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        self._process = subprocess.Popen(
            self._words,
            env=child_environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        for printed in self._process.stdout:
            if printed.startswith(_ANSWER):
                return json.loads(printed.removeprefix(_ANSWER))
        self._errors.seek(0)
        sys.exit(f"{shlex.join(self._words)} ended early:\n{self._errors.read()[-4000:]}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


# -- numbers and tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; `note` says what a reader must know to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """As Markdown."""
        lines = [f"## {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([*lines, *map(_line, self.rows), *(["", self.note] if self.note else []), ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def median_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, with the smallest and largest value where there is more than one."""
    text = f"{statistics.median(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def mebibytes(n_bytes: float) -> str:
    """Bytes as MiB."""
    return f"{n_bytes / MEBI:,.0f}"


def device_peak(run: dict[str, Any]) -> str:
    """What a run took on its accelerator at most, MiB; nothing on a CPU, and in rows from before it was noted."""
    taken = run.get("device_peak_memory")
    return "" if taken is None else mebibytes(taken)


def verdict(met: bool) -> str:
    """How a target came out."""
    return "met" if met else "MISSED"


class Ledger:
    """The rows of one benchmark, kept in NAME.json as soon as each is measured, shown in NAME.md.

    A row is known by its key: the settings that make it what it is, among them the processor and the threads. A row whose key
    is there already is not measured again, whatever the commit; each row names its own.

    Args:
        name: of the benchmark.
        arguments: of `parser`.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
        self._name, self._fresh = name, arguments.fresh
        self._common = {"processor": processor(), "threads": arguments.threads}
        if (device := device_name(arguments)) != "cpu":
            self._common["device"] = device
        arguments.results.mkdir(parents=True, exist_ok=True)
        self._json = arguments.results / f"{name}.json"
        self._markdown = arguments.results / f"{name}.md"
        self.rows: list[dict[str, Any]] = json.loads(self._json.read_text())["rows"] if self._json.is_file() else []

    def row(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless it is there."""
        whole = {**key, **{name: value for name, value in self._common.items() if name not in key}}
        label = ", ".join(f"{name} {value}" for name, value in key.items())
        before = next((row for row in self.rows if row["key"] == whole), None)
        if before is not None and not self._fresh:
            when = f"{before['measured']['date']}, commit {before['measured']['commit']}"
            self.console.print(f"kept: {label} (measured {when}; --fresh measures again)")
            return
        self.console.print(f"measuring: {label}")
        measured = provenance()
        row = {"key": whole, "values": measure(), "measured": measured}
        self.rows = [other for other in self.rows if other["key"] != whole] + [row]
        _write(self._json, json.dumps({"benchmark": self._name, "rows": self.rows}, indent=1) + "\n")

    def show(self, title: str, tables: Sequence[Table], notes: Sequence[str] = ()) -> None:
        """Print the tables and write NAME.md."""
        from rich.table import Table as RichTable

        for table in tables:
            made = RichTable(
                title=table.title, title_justify="left", caption=table.note or None, caption_justify="left"
            )
            for number, column in enumerate(table.columns):
                made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
            for row in table.rows:
                made.add_row(*row)
            self.console.print(made)
        origin = self._origin()
        self.console.print("\n".join([*notes, *origin]), markup=False)
        parts = [f"# {title}", "", *(table.markdown() for table in tables)]
        parts += [f"- {line}" for line in [*notes, *origin]]
        _write(self._markdown, "\n".join(parts) + "\n")
        self.console.print(f"written: {self._json} and {self._markdown.name}", markup=False)

    def _origin(self) -> list[str]:
        """Hardware, commit, date, command, versions of the rows; one line each where they differ."""
        lines: dict[str, None] = {}
        for row in self.rows:
            measured = row["measured"]
            where = f"{measured['processor']}, {measured['cores']} cores, threads {row['key']['threads']}"
            lines[f"hardware: {', '.join([where, *filter(None, [row['key'].get('device')])])}"] = None
        for row in self.rows:
            measured = row["measured"]
            tree = "with uncommitted changes" if measured["dirty"] else "clean"
            packages = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
            commit = f"measured {measured['date'].partition(' ')[0]} at commit {measured['commit']} ({tree})"
            lines[f"{commit} by `{measured['command']}`; {packages}"] = None
        return list(lines)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
