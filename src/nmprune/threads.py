"""Threads on purpose: small operations in a loop, and factorisations, run on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body on one CPU thread, then restore the thread count.

    Two reasons: a Cholesky factor differs in its last bits between one thread and two, and a loop of small operations
    with several threads beside another busy process spends its time waiting at barriers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
