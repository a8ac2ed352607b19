from __future__ import annotations

import re

import pytest

from nmprune.calibration import load_text
from nmprune.errors import InputError


def _long_paragraphs(documents: tuple[str, ...]) -> list[str]:
    paragraphs = (" ".join(p.split()) for document in documents for p in re.split(r"\n\s*\n", document))
    return [p for p in paragraphs if len(p) >= 60]


def test_the_two_parts_share_no_paragraph():
    calibration = _long_paragraphs(load_text("builtin", "calibration").documents)
    held_out = _long_paragraphs(load_text("builtin", "evaluation").documents)
    assert not set(calibration) & set(held_out)


def test_both_parts_are_long_enough_for_a_run():
    # 4 characters a token: 128 x 512 to calibrate would be 262,144; 16 x 512 to evaluate 32,768
    assert len(load_text("builtin", "calibration").joined) > 262_144
    assert len(load_text("builtin", "evaluation").joined) > 2 * 32_768


def test_chapters_are_kept_and_the_topics_they_repeat_are_not():
    calibration, held_out = load_text("builtin", "calibration"), load_text("builtin", "evaluation")
    both = calibration.documents + held_out.documents
    assert sum(document.startswith("Basic customization") for document in both) == 0  # inside "Special method names"
    assert sum(document.startswith("Special method names") for document in both) == 1


def test_repeated_paragraphs_are_cut_and_mostly_repeated_topics_dropped(monkeypatch):
    a, b, c, d = (letter * 70 for letter in "abcd")
    topics = {
        "chapter": f"Chapter\n\n{a}\n\n{b}\n",
        "nested": f"Nested\n\n{a}",
        "near": f"Near\n\n   {b}\n\n{c}",
        "far": d,
    }
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    assert load_text("builtin", "calibration").documents == (f"Chapter\n\n{a}\n\n{b}", f"Near\n\n{c}")
    assert load_text("builtin", "evaluation").documents == (d,)  # the third longest of what is left


def test_same_every_time_and_named_with_the_version_of_python():
    first, second = load_text("builtin", "calibration"), load_text("builtin", "calibration")
    assert first == second
    assert re.fullmatch(r"Python 3\.\d+ help topics \(calibration part\)", first.label)


def test_it_takes_no_argument():
    with pytest.raises(InputError, match="builtin takes no argument"):
        load_text("builtin:train", "calibration")
