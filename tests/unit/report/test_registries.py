from __future__ import annotations

import dataclasses

from nmprune.architectures import FAMILIES
from nmprune.calibration import FILES, SOURCES
from nmprune.methods import METHODS
from nmprune.methods.wanda import Wanda
from nmprune.report import registries


def test_every_method_with_every_hyper_parameter():
    found = {one["name"]: one for one in registries.methods()}
    assert found.keys() == METHODS.keys()
    for name, method in METHODS.items():
        fields = dataclasses.fields(method)
        assert [one["name"] for one in found[name]["hyper_parameters"]] == [one.name for one in fields]
        assert all(one["help"] for one in found[name]["hyper_parameters"])
    assert [row[0] for row in registries.methods_table().rows] == list(METHODS)
    settings = [row[0] for row in registries.hyper_parameters_table().rows]
    assert "--set method.damping=0.01" in settings


def test_a_pattern_that_a_method_refuses_is_told(monkeypatch):
    monkeypatch.setattr(Wanda, "why_not", lambda self, pattern: "2:4 only" if str(pattern) != "2:4" else None)
    refused = next(one for one in registries.methods() if one["name"] == "wanda")["patterns_not_supported"]
    assert refused == {"4:8": "2:4 only", "1:4": "2:4 only", "3:4": "2:4 only", "8:16": "2:4 only"}
    assert "4:8: 2:4 only" in registries.methods_table().markdown()


def test_every_model_type_and_every_text_source():
    types = [name for one in registries.architectures() for name in one["model_types"]]
    assert sorted(types) == sorted(FAMILIES)
    assert [one["spelling"] for one in registries.texts()] == [one.spelling for one in (*SOURCES.values(), FILES)]
    assert "experts: down_proj" in registries.architectures_table().markdown()
    assert FILES.summary in registries.texts_table().markdown()


def test_reasons_against_patterns_are_joined_without_full_stops():
    cells = [cell for row in registries.methods_table().rows for cell in row]
    assert any("4:8: its penalty is that of 2:4" in cell for cell in cells)
    assert not any(".;" in cell for cell in cells)
