from __future__ import annotations

import pytest

from nmprune.architectures import FAMILIES, find_family
from nmprune.errors import InputError


def test_each_model_type_finds_its_table():
    for model_type, family in FAMILIES.items():
        assert find_family(model_type) is family
        assert model_type in family.model_types


def test_an_unknown_family_names_near_matches_and_how_to_add_one():
    with pytest.raises(InputError) as error:
        find_family("qwen4")
    text = str(error.value)
    assert text.startswith("model_type 'qwen4' has no table of decoder layers and linears. Did you mean 'qwen")
    assert "Known: cohere, cohere2, gemma, gemma2, gemma3, gemma3_text, gpt2," in text
    assert "src/nmprune/architectures" in text and "CONTRIBUTING.md" in text


def test_every_role_that_stays_dense_has_a_reason():
    assert all(reason for family in FAMILIES.values() for reason in family.dense.values())
