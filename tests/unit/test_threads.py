import pytest
import torch

from nmprune.threads import one_thread


def test_one_thread_inside_and_the_old_count_after():
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_the_count_comes_back_after_an_error():
    torch.set_num_threads(2)
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2
