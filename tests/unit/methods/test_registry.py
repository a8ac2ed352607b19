import pytest

from nmprune import methods
from nmprune.errors import InputError
from nmprune.methods.sparsegpt import SparseGPT


def test_find_and_create():
    assert methods.find("sparsegpt") is SparseGPT
    assert methods.create("sparsegpt", {"damping": "0.05", "block_size": "64"}) == SparseGPT(
        damping=0.05, block_size=64
    )
    assert methods.create("sparsegpt").hyper_parameters() == {"damping": 0.01, "block_size": 128}


def test_unknown_names_list_near_matches():
    with pytest.raises(InputError, match=r"no method 'wnada'\. Did you mean 'wanda'\? Known: .*magnitude"):
        methods.find("wnada")
    with pytest.raises(InputError, match=r"sparsegpt has no hyper-parameter 'dampning'\. Did you mean 'damping'"):
        methods.create("sparsegpt", {"dampning": 1})
    with pytest.raises(InputError, match=r"magnitude has no hyper-parameter 'damping'\. It has none"):
        methods.create("magnitude", {"damping": 1})


@pytest.mark.parametrize("value", ["many", "1.5", 1.5, None, float("inf"), float("nan"), "inf"])
def test_a_value_of_the_wrong_type(value):
    with pytest.raises(InputError, match=r"sparsegpt\.block_size is .*; expected a int such as 128"):
        methods.create("sparsegpt", {"block_size": value})
