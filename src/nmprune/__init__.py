"""nmprune: N:M semi-structured sparsity for large language models.

`prune` is the one door to a whole run. Below it lie pure functions for those who bring their own loop: a method from
`nmprune.methods` called on one weight and its `InputStats`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from nmprune.methods import METHODS, PerLinear, Pruned, create
    from nmprune.run.api import PruneResult, prune
    from nmprune.stats import InputStats, StatsAccumulator

# Loaded at first use: `import nmprune` stays quick and does not import transformers.
_LAZY = {
    "METHODS": "nmprune.methods",
    "InputStats": "nmprune.stats",
    "PerLinear": "nmprune.methods",
    "PruneResult": "nmprune.run.api",
    "Pruned": "nmprune.methods",
    "StatsAccumulator": "nmprune.stats",
    "create": "nmprune.methods",
    "prune": "nmprune.run.api",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nmprune' has no attribute {name!r}")


__all__ = [
    "METHODS",
    "InputError",
    "InputStats",
    "Pattern",
    "PerLinear",
    "PruneResult",
    "Pruned",
    "StatsAccumulator",
    "__version__",
    "create",
    "prune",
]
