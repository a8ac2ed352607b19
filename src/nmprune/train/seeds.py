"""Seeds as a function of where the run is: nothing random is carried from one moment to the next."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*where: int | str) -> int:
    """A seed for one moment of a run, 0 <= seed < 2^63; other arguments give another one.

    Args:
        where: the run's seed, then what tells this moment from all others (a purpose, a linear's number, a step).
    """
    digest = hashlib.sha256("\0".join(map(repr, where)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_of(*where: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `seed_of(*where)`."""
    return torch.Generator(device).manual_seed(seed_of(*where))
