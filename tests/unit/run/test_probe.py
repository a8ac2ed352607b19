"""What takes long is timed on less of it."""

from __future__ import annotations

import torch

import tiny_models
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.run import probe
from nmprune.stream import DecoderModel


def test_what_takes_long_is_timed_once(monkeypatch):
    runs: list[int] = []
    cpu = torch.device("cpu")
    assert probe._median(lambda: runs.append(1), cpu) >= 0 and len(runs) == 1 + probe._REPEATS
    monkeypatch.setattr(probe, "_LONG_SECONDS", -1.0)
    runs.clear()
    assert probe._median(lambda: runs.append(1), cpu) > 0 and len(runs) == 1


def test_a_long_batch_is_told_from_one_sequence_and_a_long_sum_from_fewer_tokens(monkeypatch, tmp_path):
    model = DecoderModel.from_config(tiny_models.save("llama", tmp_path / "base"))
    batches: list[tuple[int, int]] = []
    tokens: list[int] = []
    calls, add = probe.random_calls, probe.StatsAccumulator.add
    monkeypatch.setattr(probe, "random_calls", lambda *given: batches.append(given[1]) or calls(*given))
    monkeypatch.setattr(probe.StatsAccumulator, "add", lambda *given: tokens.append(len(given[1])) or add(*given))

    def measure() -> probe.Rates:
        batches.clear()
        tokens.clear()
        return probe.measure(model, create("sparsegpt"), Pattern(2, 4), (6, 40), tmp_path)

    measure()
    assert batches == [(1, 40), (6, 40)] and max(tokens) == 240
    monkeypatch.setattr(probe, "_LONG_SECONDS", -1.0)
    monkeypatch.setattr(probe, "_LARGEST_PROBED_SUMS", 1)
    found = measure()
    assert batches == [(1, 40)] and max(tokens) == 64
    assert min(*found.layer_seconds.values(), *found.statistics_seconds.values()) > 0
