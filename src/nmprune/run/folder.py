"""A run on disk: atomic writes, one progress file per finished layer, resume.

Layout: recipe.yaml, calibration.safetensors, allocation.json (only where patterns are mixed), masks.safetensors, model/,
results.json (last, by rename), README.md, progress/ (until the run is finished), base/ (only where a model in memory was
pruned). docs/formats.md is the law.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmprune import masks
from nmprune.checkpoint.durable import asking, atomic_file, flush_folder, refusal, writing
from nmprune.checkpoint.permutation_file import PERMUTATION_FILE
from nmprune.distributed import ALONE, Processes
from nmprune.errors import InputError
from nmprune.methods import Pruned
from nmprune.methods.base import State
from nmprune.results import LearnedLayerResult, LinearResult, Results
from nmprune.run.recipe import Recipe
from nmprune.stream import LayerDone, Restart

# Hidden states are kept at most this often: a resume recomputes at most about this much forward work.
HIDDEN_INTERVAL_SECONDS = 120.0
_STATE = "state:"  # before the names of a learner's tensors


class RunFolder:
    """One run's folder.

    Args:
        path: runs/NAME. Nothing is made or checked until a method is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.tokens_file = self.path / "calibration.safetensors"
        self.allocation_file = self.path / "allocation.json"
        self.masks_file = self.path / "masks.safetensors"
        self.permutation_file = self.path / PERMUTATION_FILE
        self.model = self.path / "model"
        self.base = self.path / "base"
        self.results_file = self.path / "results.json"
        self.card = self.path / "README.md"
        self.metrics_file = self.path / "metrics.jsonl"
        self.learned_file = self.path / "learned.safetensors"
        self.progress = self.path / "progress"
        self.gradients = self.progress / "gradients"
        self._sessions_file = self.progress / "sessions.json"
        self.permute_seconds = self.progress / "permute_seconds"
        self._hidden_saved = time.monotonic()

    @property
    def is_run(self) -> bool:
        """Whether this is a run's folder; a model's folder may hold another program's recipe.yaml."""
        with asking(self.path):
            return self.recipe_file.is_file() and not (self.path / "config.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether the run is complete: results.json is written last."""
        with asking(self.path):
            return self.results_file.is_file()

    def check(self, recipe: Recipe) -> None:
        """Raise InputError where the folder holds another run, or something that is no run. Nothing is written."""
        with asking(self.path):
            there = self.recipe_file.read_text() if self.recipe_file.is_file() else None
            foreign = there is None and self.path.exists() and (not self.path.is_dir() or bool(self._foreign()))
        if there is not None and there != recipe.to_yaml():
            raise InputError(
                f"{self.path} holds another run:\n{_differences(there, recipe)}\n"
                "Choose another --out folder, or delete this one."
            )
        if foreign:
            raise InputError(f"{self.path} exists and is not a run of nmprune. Choose another --out folder.")

    def _foreign(self) -> set[str]:
        """What lies here besides the traces of a run that was killed before its recipe was written."""
        ours = {self.progress.name, self.base.name, _partial(self.base).name, _partial(self.recipe_file).name}
        return {file.name for file in self.path.iterdir()} - ours

    @contextmanager
    def working(self, recipe: Recipe) -> Iterator[None]:
        """Hold the folder for this process inside the body, as the run of `recipe`.

        Raises:
            InputError: another process is working on it, it holds another run or something else, or cannot be written.
        """
        self.check(recipe)
        with self._locked():
            self.check(recipe)
            self._clear_partial()
            if not self.recipe_file.is_file():
                write_text(self.recipe_file, recipe.to_yaml())
            yield

    def _clear_partial(self) -> None:
        """Delete what a killed session was writing; model.partial and base.partial are their writers' to replace."""
        ours = (
            self.recipe_file,
            self.tokens_file,
            self.allocation_file,
            self.masks_file,
            self.permutation_file,
            self.results_file,
            self.card,
            self.metrics_file,
            self.learned_file,
        )
        for left in (*(_partial(file) for file in ours), *self.progress.rglob("*.partial")):
            with writing(left, 0):
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.progress / "lock"
        with writing(self.path, 0):
            self.progress.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            if not _takes(descriptor, path):
                raise InputError(
                    f"another process is working on {self.path}. Wait for it, or choose another --out folder."
                )
            yield
        finally:
            os.close(descriptor)

    # -- calibration tokens -------------------------------------------------------------------------------------------

    def saved_tokens(self) -> tuple[Tensor, dict[str, Any]] | None:
        """The run's token ids, int64 (n_sequences, seq_len), and where they came from; None before they are saved."""
        return read_tokens(self.tokens_file) if self.tokens_file.is_file() else None

    def save_tokens(self, windows: Tensor, origin: Mapping[str, Any]) -> None:
        """Keep the token ids, so that the run can be repeated exactly."""
        metadata = {"format": "nmprune-tokens", "origin": json.dumps(dict(origin))}
        write_tensors(self.tokens_file, {"token_ids": windows.contiguous()}, metadata)

    # -- progress -----------------------------------------------------------------------------------------------------

    def count_session(self, fingerprint: str, compute: str) -> int:
        """Note that the run was started once more; returns how often by now.

        Args:
            fingerprint: of the dense checkpoint.
            compute: dtype of the forward passes and kind of device, such as "float32 on cpu".

        Raises:
            InputError: earlier sessions worked on another checkpoint, or computed in another dtype or on another device.
        """
        n_before = 0
        if self._sessions_file.is_file():
            before = json.loads(self._sessions_file.read_text())
            n_before = before["sessions"]
            if before["fingerprint"] != fingerprint:
                raise InputError(
                    f"{self.path} was begun on other weights: the model has changed since. Bring the old weights back, or "
                    "choose another --out folder."
                )
            if before["compute"] != compute:
                raise InputError(
                    f"{self.path} was begun in {before['compute']}; here it would go on in {compute}, and its layers would "
                    f"not belong together. Go on with --device {before['compute'].rpartition(' ')[2]}, or choose another "
                    "--out folder; a new run may say what every device computes in, such as --dtype float32."
                )
        session = {"sessions": n_before + 1, "fingerprint": fingerprint, "compute": compute}
        write_text(self._sessions_file, json.dumps(session))
        return n_before + 1

    def layer_file(self, index: int) -> Path:
        """Where a finished layer is kept."""
        return self.progress / f"layer_{index:05d}.safetensors"

    def save_layer(self, done: LayerDone, processes: Processes = ALONE) -> None:
        """Keep a finished layer: masks bit-packed, moved weights as they will be stored, and the record.

        Process 0 writes it. Now and then each process keeps its share of the hidden states, all at the same layer.
        """
        if processes.is_main:
            tensors = {}
            for one in done.linears:
                tensors[f"{one.name}:mask"] = masks.pack(one.pruned.mask.cpu())
                if one.pruned.weight is not None:
                    tensors[f"{one.name}:weight"] = one.pruned.weight.cpu().contiguous()
            tensors |= {f"{_STATE}{name}": value.contiguous().clone() for name, value in (done.state or {}).items()}
            record: dict[str, Any] = {
                "linears": [dataclasses.asdict(one) for one in done.records()],
                "seconds": done.seconds,
            }
            if done.learned is not None:
                record["learned"] = dataclasses.asdict(done.learned)
            write_tensors(self.layer_file(done.index), tensors, {"record": json.dumps(record)})
        due = processes.tell(time.monotonic() - self._hidden_saved >= HIDDEN_INTERVAL_SECONDS)
        if done.hidden is not None and due:
            kept = {"hidden": done.hidden}
            if done.dense_hidden is not None:
                kept["dense"] = done.dense_hidden
            write_tensors(self._hidden_file(processes), kept, {"layer": str(done.index + 1)})
            self._hidden_saved = time.monotonic()

    def _hidden_file(self, processes: Processes) -> Path:
        """Where a process keeps its share of the hidden states; the shares of another number of processes are others."""
        share = "" if processes.alone else f"_{processes.rank}_of_{processes.world_size}"
        return self.progress / f"hidden{share}.safetensors"

    def layer(self, index: int) -> SavedLayer | None:
        """A finished layer of an interrupted run; None where it is not finished."""
        return SavedLayer(self.layer_file(index)) if self.layer_file(index).is_file() else None

    def state_before(self, index: int) -> State | None:
        """What the last finished layer before `index` carries on, for a method that learns layers; None where none does."""
        files = sorted(file for file in self.progress.glob("layer_*.safetensors") if file < self.layer_file(index))
        return next((state for file in reversed(files) if (state := SavedLayer(file).state())), None)

    def saved_hidden(self, processes: Processes = ALONE) -> Restart | None:
        """A layer's input hidden states, where an interrupted run kept them and all layers before it.

        With several processes each has its own share, and there is a restart only where all shares are of one layer.
        """
        file = self._hidden_file(processes)
        layer = -1
        if file.is_file():
            with open_tensors(file) as tensors:
                layer = int(tensors.metadata()["layer"])
        found = {layer for (layer,) in processes.gather_counts([layer])}
        whole = len(found) == 1 and all(self.layer_file(index).is_file() for index in range(layer))
        if layer < 0 or not processes.tell(whole):
            return None
        with open_tensors(file) as tensors:
            dense = tensors.get_tensor("dense") if "dense" in tensors.keys() else None  # noqa: SIM118  no mapping
            return Restart(layer, tensors.get_tensor("hidden"), dense)

    def finish(self, results: Results) -> None:
        """Write results.json, then give the progress files' space back."""
        write_text(self.results_file, results.to_json())
        self.clean()

    def clean(self) -> None:
        """Delete the progress files of a finished run."""
        if self.finished:
            shutil.rmtree(self.progress, ignore_errors=True)

    def read_recipe(self) -> Recipe:
        """The recipe of an existing run.

        Raises:
            InputError: the folder is no run.
        """
        if not self.is_run:
            raise InputError(f"{self.path} is not a run folder: it has no recipe.yaml. Make one with `nmprune prune`.")
        return Recipe.from_yaml(self.recipe_file)

    def read_results(self) -> Results:
        """The results of a finished run.

        Raises:
            InputError: the folder is no run, or the run is not finished.
        """
        self.read_recipe()
        if not self.finished:
            raise InputError(
                f"the run {self.path} is not finished. Run its prune command again: it goes on where it stopped."
            )
        return Results.read(self.results_file)


class SavedLayer:
    """The progress file of one finished layer; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_tensors(path) as file:
            record = json.loads((file.metadata() or {}).get("record", "null"))
        if record is None:
            raise InputError(f"{path} is damaged: it has no record. Delete it and run the command again.")
        self.linears = tuple(LinearResult(**{**one, "shape": tuple(one["shape"])}) for one in record["linears"])
        self.seconds: dict[str, float] = record["seconds"]
        learned = record.get("learned")
        self.learned = None if learned is None else LearnedLayerResult(**learned)

    def state(self) -> State | None:
        """What the layer's learner carries on; None for other methods, and for a layer without anything to prune."""
        with open_tensors(self._path) as file:
            names = [name for name in file.keys() if name.startswith(_STATE)]  # noqa: SIM118  no mapping
            return {name.removeprefix(_STATE): file.get_tensor(name).clone() for name in names} or None

    def pruned(self) -> dict[str, Pruned]:
        """Linear name -> mask and moved weight."""
        with open_tensors(self._path) as file:
            stored = set(file.keys())
            return {
                one.name: Pruned(
                    masks.unpack(file.get_tensor(f"{one.name}:mask"), one.shape),
                    file.get_tensor(f"{one.name}:weight").clone() if f"{one.name}:weight" in stored else None,
                    one.notes,
                )
                for one in self.linears
            }


def read_tokens(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Token ids that a run saved, int64 (n_sequences, seq_len), and where they came from.

    Raises:
        InputError: not such a file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file. Give the calibration.safetensors of a run, or a text source.")
    with open_tensors(path) as file:
        if (file.metadata() or {}).get("format") != "nmprune-tokens":
            raise InputError(f"{path} holds no calibration tokens of nmprune.")
        return file.get_tensor("token_ids").clone(), json.loads(file.metadata()["origin"])


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file; InputError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}. Delete it and run the command again.") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all.

    Raises:
        InputError: the disk is full or not writable.
    """
    content = text.encode()
    with writing(path, len(content)), atomic_file(path) as file:
        file.write(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that it is there whole or not at all.

    Raises:
        InputError: the disk is full or not writable.
    """
    # A folder: save_file writes under a temporary name of its own choice, which a kill would leave behind unknown.
    partial = _partial(path)
    try:
        partial.mkdir(exist_ok=True)
        file = partial / path.name
        save_file(dict(tensors), file, metadata=dict(metadata))
        file.chmod(partial.stat().st_mode & 0o666)  # save_file gives 0600; any new file has what the umask leaves
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        file.replace(path)
        flush_folder(path.parent)
        shutil.rmtree(partial)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        why = refusal(error) if isinstance(error, OSError) else error
        raise InputError(
            f"cannot write {path} ({size / 2**20:.0f} MiB): {why}. What was finished is kept: free some space and run the same "
            "command again."
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _takes(descriptor: int, path: Path) -> bool:
    """Whether the lock is ours now; it is not where the process that held it has finished and deleted the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _differences(there: str, recipe: Recipe) -> str:
    mine = recipe.to_yaml().splitlines()
    theirs = there.splitlines()
    lines = [f"  there: {line}" for line in theirs if line not in mine] + [
        f"  here:  {line}" for line in mine if line not in theirs
    ]
    return "\n".join(lines)
