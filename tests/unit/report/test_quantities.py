from __future__ import annotations

import pytest

from nmprune.report.quantities import duration, error, mean, settings, shape, size


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_size(n_bytes, text):
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.314, "0.31 s"), (12, "12.0 s"), (185, "3 min 05 s"), (3599.6, "1 h 00 min"), (7800, "2 h 10 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_shape_and_error():
    assert shape((576, 1536)) == "576 x 1536"
    assert (error(None), error(0.12345)) == ("", "0.1235")


def test_means_leave_out_what_was_not_measured():
    assert mean([0.1, None, 0.3]) == pytest.approx(0.2)
    assert mean([None]) is None and mean([]) is None


def test_settings_of_steps_are_written_flat():
    assert settings({"damping": 0.1, "polish": {"sweeps": 2, "a": {"b": 1}}}) == [
        *("damping 0.1", "polish.sweeps 2", "polish.a.b 1"),
    ]
    assert settings({}) == []
