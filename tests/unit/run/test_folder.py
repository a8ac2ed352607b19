from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nmprune.errors import InputError
from nmprune.methods import Pruned, Wanda
from nmprune.pattern import Pattern
from nmprune.run import folder as folder_module
from nmprune.run.folder import RunFolder, read_tokens, write_tensors, write_text
from nmprune.run.recipe import Recipe
from nmprune.stream import LayerDone, LinearDone

RECIPE = Recipe("m", Wanda(), Pattern(2, 4))
CPU = "float32 on cpu"


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path)
    with folder.working(RECIPE):
        pass
    return folder


def done(index: int, *, moved: bool = False, hidden: torch.Tensor | None = None) -> LayerDone:
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    weight = torch.tensor([[1.5, 0, 0, 2], [0, 3, 4, 0]]).bfloat16() if moved else None
    linear = LinearDone(
        f"layers.{index}.up", "up", f"layers.{index}.up.weight", Pruned(mask, weight, {"damping": 0.1}), 64, 0.5
    )
    return LayerDone(index, (linear,), (), {"solve": 0.5}, hidden=hidden)


def test_a_new_folder_holds_the_recipe(tmp_path):
    folder = begun(tmp_path / "deep" / "run")
    assert folder.recipe_file.read_text() == RECIPE.to_yaml()
    assert folder.read_recipe() == RECIPE
    assert not folder.finished


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"exists and is not a run of nmprune. Choose another --out"):
        begun(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(InputError, match="is not a run of nmprune"):
        begun(tmp_path / "run")


def test_an_empty_folder_and_what_a_killed_begin_leaves_are_taken(tmp_path):
    begun(tmp_path)
    killed = tmp_path / "killed"
    (killed / "progress").mkdir(parents=True)
    (killed / "recipe.yaml.partial").write_text("mod")
    assert begun(killed).read_recipe() == RECIPE


def test_another_recipe_is_refused_with_the_lines_that_differ(tmp_path):
    folder = begun(tmp_path)
    with pytest.raises(InputError) as error, folder.working(replace(RECIPE, seed=5, exclude=("*.up_proj",))):
        pass
    text = str(error.value)
    assert "  there: seed: 0\n" in text and "  here:  seed: 5\n" in text and "*.up_proj" in text
    assert "pattern" not in text
    assert folder.read_recipe() == RECIPE


def test_an_unwritable_folder(tmp_path, monkeypatch):
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot be written: permission denied.*Choose another place"):
        begun(tmp_path / "run")


def test_below_a_file_nothing_can_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a part of the path is a file"):
        begun(tmp_path / "file" / "run")


# what RunFolder does, without the seconds of importing torch; tests/e2e/test_resume.py lets two whole runs race
HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_to_wait(tmp_path):
    begun(tmp_path)
    lock = tmp_path / "progress" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"another process is working on {tmp_path}"):
            begun(tmp_path)
        other.kill()
    begun(tmp_path)  # the system gives a dead process's lock back


def test_a_lock_that_was_deleted_under_us_is_not_ours(tmp_path, monkeypatch):
    def taken(descriptor: int, operation: int) -> None:
        (tmp_path / "progress" / "lock").unlink()

    monkeypatch.setattr(folder_module.fcntl, "flock", taken)
    with pytest.raises(InputError, match="another process is working"):
        begun(tmp_path)


def test_sessions_are_counted_and_the_weights_must_stay(tmp_path):
    folder = begun(tmp_path)
    assert [folder.count_session("abc", CPU), folder.count_session("abc", CPU)] == [1, 2]
    with pytest.raises(InputError, match="begun on other weights: the model has changed since"):
        folder.count_session("def", CPU)


@pytest.mark.parametrize("other", ["bfloat16 on cuda", "float32 on mps", "bfloat16 on cpu"])
def test_sessions_compute_alike(other, tmp_path):
    folder = begun(tmp_path)
    folder.count_session("abc", CPU)
    with pytest.raises(InputError, match=rf"begun in {CPU}; here it would go on in {other}.*--device cpu.*--dtype"):
        folder.count_session("abc", other)
    assert folder.count_session("abc", CPU) == 2


def test_tensor_files_have_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a", {"x": torch.ones(3)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


WRITE = """
import os, sys
from pathlib import Path
import torch
from nmprune.run import folder
def killed(*args, **kwargs):
    (args[1].parent / ".tmpAbCdEf").write_bytes(b"half")
    os.kill(os.getpid(), 9)
folder.save_file = killed
folder.write_tensors(Path(sys.argv[1]), {"x": torch.ones(3)}, {})
"""


def test_what_a_killed_session_was_writing_is_deleted_by_the_next(tmp_path):
    folder = begun(tmp_path)
    for file in (folder.tokens_file, folder.layer_file(0)):
        assert subprocess.run([sys.executable, "-c", WRITE, file], check=False).returncode == -9
    (tmp_path / "masks.safetensors.partial").write_bytes(b"half")
    (folder.progress / "sessions.json.partial").write_bytes(b"half")
    (tmp_path / "notes.partial").write_text("the user's")
    assert (tmp_path / "calibration.safetensors.partial").exists()
    begun(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.partial", "progress", "recipe.yaml"]
    assert [file.name for file in folder.progress.iterdir()] == ["lock"]


def test_tokens_are_kept(tmp_path):
    folder = begun(tmp_path)
    assert folder.saved_tokens() is None
    windows = torch.arange(6).reshape(2, 3)
    folder.save_tokens(windows, {"source": "builtin"})
    saved = folder.saved_tokens()
    assert saved is not None and torch.equal(saved[0], windows) and saved[1] == {"source": "builtin"}


def test_a_file_that_holds_no_tokens(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds no calibration tokens of nmprune"):
        read_tokens(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no such file"):
        read_tokens(tmp_path / "b.safetensors")


@pytest.mark.parametrize("moved", [False, True])
def test_a_layer_comes_back_bit_for_bit(moved, tmp_path):
    folder, layer = begun(tmp_path), done(3, moved=moved)
    assert folder.layer(3) is None
    folder.save_layer(layer)
    saved = folder.layer(3)
    assert saved is not None
    assert saved.linears == layer.records() and saved.seconds == {"solve": 0.5}
    (name, one), *rest = saved.pruned().items()
    assert name == "layers.3.up" and not rest
    expected = layer.linears[0].pruned
    assert torch.equal(one.mask, expected.mask) and one.notes == expected.notes
    assert (one.weight is None) if not moved else torch.equal(one.weight, expected.weight)
    assert [file.name for file in folder.progress.iterdir()].count("layer_00003.safetensors") == 1


@pytest.mark.parametrize("damage", ["cut", "no record", "text"])
def test_a_damaged_progress_file_is_named_with_a_way_out(damage, tmp_path):
    folder = begun(tmp_path)
    folder.save_layer(done(0))
    file = folder.layer_file(0)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "text":
        file.write_text("hello")
    else:
        save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=rf"{file} is damaged: .*Delete it and run the command again"):
        folder.layer(0)


def test_hidden_states_are_kept_by_interval_and_only_with_all_layers_before(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: now[0])
    folder = begun(tmp_path)
    hidden = [torch.full((1, 2, 3), float(i)) for i in range(4)]

    def saved() -> tuple[int, float] | None:
        kept = folder.saved_hidden()
        return None if kept is None else (kept.index, kept.hidden[0, 0, 0].item())

    folder.save_layer(done(0, hidden=hidden[0]))
    assert saved() is None
    now[0] += folder_module.HIDDEN_INTERVAL_SECONDS
    folder.save_layer(done(1, hidden=hidden[1]))
    assert saved() == (2, 1.0)
    folder.save_layer(done(2, hidden=hidden[2]))
    assert saved() == (2, 1.0)
    now[0] += folder_module.HIDDEN_INTERVAL_SECONDS
    folder.save_layer(done(3))  # the last layer feeds none
    assert saved() == (2, 1.0)
    folder.layer_file(1).unlink()  # the user deleted a damaged one
    assert saved() is None


@pytest.mark.parametrize("follows_dense", [False, True])
def test_hidden_states_of_both_models_are_kept_where_the_run_follows_both(follows_dense, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "HIDDEN_INTERVAL_SECONDS", 0.0)
    folder = begun(tmp_path)
    pruned, dense = torch.full((1, 2, 3), 1.0), torch.full((1, 2, 3), 2.0)
    folder.save_layer(replace(done(0, hidden=pruned), dense_hidden=dense if follows_dense else None))
    kept = folder.saved_hidden()
    assert kept is not None and kept.index == 1 and torch.equal(kept.hidden, pruned)
    assert torch.equal(kept.dense, dense) if follows_dense else kept.dense is None


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")
    write_tensors(tmp_path / "b", {"x": torch.ones(3)}, {})
    before = (tmp_path / "b").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        write_text(tmp_path / "a", "new")
    with pytest.raises(InputError, match=r"cannot write .*free some space and run the same"):
        write_tensors(tmp_path / "b", {"x": torch.zeros(3)}, {})
    assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "b").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_an_unfinished_run_has_no_results(tmp_path):
    folder = begun(tmp_path)
    with pytest.raises(InputError, match=r"is not finished. Run its prune command again"):
        folder.read_results()
    with pytest.raises(InputError, match=r"is not a run folder: it has no recipe.yaml"):
        RunFolder(tmp_path / "nowhere").read_results()


def test_only_a_finished_run_is_cleaned(tmp_path):
    folder = begun(tmp_path)
    folder.clean()
    assert folder.progress.is_dir()
    folder.results_file.write_text(json.dumps({}))
    folder.clean()
    assert not folder.progress.exists()
