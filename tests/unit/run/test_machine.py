from __future__ import annotations

import pytest
import torch

from nmprune.errors import InputError
from nmprune.run.machine import Machine, PeakMemory, compute_words, describe


def test_auto_takes_an_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert Machine().resolve() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Machine().resolve() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Machine().resolve() == torch.device("cuda")


def test_a_device_with_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Machine(device="cuda:1").resolve() == torch.device("cuda", 1)
    with pytest.raises(InputError, match="'cuda:2' is not available: there are 2 cuda devices"):
        Machine(device="cuda:2").resolve()


@pytest.mark.parametrize("device", ["cuda", "mps", "cuda:0"])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"device '{device}' is not available: torch .* Use --device cpu"):
        Machine(device=device).resolve()


@pytest.mark.parametrize(
    ("device", "expected"), [("cuad", "Did you mean 'cuda'"), ("cpu:x", "cannot be read"), ("auto:1", "cannot be read")]
)
def test_a_device_that_is_no_device(device, expected):
    with pytest.raises(InputError, match=expected):
        Machine(device=device).resolve()


@pytest.mark.parametrize("name", ["hidden_budget", "threads"])
def test_negative_numbers(name):
    with pytest.raises(InputError, match=f"{name} is -1; expected 0 or more"):
        Machine(**{name: -1})


def test_threads_are_set_only_where_asked():
    before = torch.get_num_threads()
    Machine().set_threads()
    assert torch.get_num_threads() == before
    Machine(threads=before + 1).set_threads()
    assert torch.get_num_threads() == before + 1


def test_the_description_says_where_numbers_come_from():
    machine = describe(torch.device("cpu"), torch.bfloat16)
    assert machine["dtype"] == "bfloat16"
    assert compute_words(torch.float32, torch.device("cuda", 1)) == "float32 on cuda"
    assert machine["device"] == "cpu" and machine["processor"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__


def test_peak_memory_is_counted_from_where_it_starts(monkeypatch):
    marks = iter([1000, 1800])
    monkeypatch.setattr("nmprune.run.machine._peak_rss", lambda: next(marks))
    peak = PeakMemory(torch.device("cpu"))
    monkeypatch.setattr(peak, "_start", 900)
    assert peak.host() == 900
    assert peak.device() is None


def test_an_earlier_higher_mark_hides_the_peak(monkeypatch):
    monkeypatch.setattr("nmprune.run.machine._peak_rss", lambda: 1000)
    assert PeakMemory(torch.device("cpu")).host() is None
