from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Only tests/gpu may see a GPU: elsewhere `auto` would be that, and tests of processes fork after CUDA has begun."""
    asked = config.option.markexpr == "gpu" or any("tests/gpu" in str(given) for given in config.args)
    if not asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models gain nothing from more, and beside another busy process they would wait at barriers."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _thread_count_is_put_back() -> Iterator[None]:
    yield
    torch.set_num_threads(1)
