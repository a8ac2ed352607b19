from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nmprune.train.finetune_settings import FinetuneRecipe


def test_the_defaults_are_sound():
    assert FinetuneRecipe().faults() == []


def test_all_faults_at_once():
    found = FinetuneRecipe(
        minutes=0, batch_size=0, lr=0, warm_up=1.5, loss="kll", autocast="maybe", also=("norm",), patience=-1
    ).faults()
    text = " ".join(found)
    assert len(found) == 8
    assert "minutes and steps are both 0" in text and "batch_size is 0; expected at least 1." in text
    assert "lr is 0; expected more than 0." in text and "warm_up is 1.5; expected 0 to 1." in text
    assert "loss is 'kll'. Did you mean 'kl'?" in text and "autocast is 'maybe'" in text
    assert "also: 'norm'. Did you mean 'norms'?" in text and "patience is -1; expected at least 0." in text


@pytest.mark.parametrize(
    ("minutes", "steps", "expected"), [(0, 10, 0.5), (2, 0, 0.25), (2, 10, 0.5), (0.5, 10, 1.0), (0.1, 0, 1.0)]
)
def test_whichever_budget_ends_first(minutes, steps, expected):
    assert FinetuneRecipe(minutes=minutes, steps=steps).share(5, 30.0) == pytest.approx(expected)


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    settings = FinetuneRecipe(warm_up=0.2, final_lr=0.1)
    assert [settings.rate(share) for share in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    assert FinetuneRecipe(warm_up=0.0).rate(0.0) == 1.0
    assert FinetuneRecipe(warm_up=1.0).rate(1.0) == pytest.approx(1.0)


def test_the_page_has_every_setting():
    page = (Path(__file__).resolve().parents[3] / "docs" / "finetuning.md").read_text()
    for field in dataclasses.fields(FinetuneRecipe):
        default = repr(field.default) if field.default not in ("", ()) else ""
        assert f"| `{field.name}` | {default} | {field.metadata['help']} |" in page, field.name
