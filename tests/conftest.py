from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models gain nothing from more, and beside another busy process they would wait at barriers."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _thread_count_is_put_back() -> Iterator[None]:
    yield
    torch.set_num_threads(1)
