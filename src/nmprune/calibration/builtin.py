"""Source `builtin`: the help texts of Python itself (`pydoc_data.topics`), there without a download.

About 90,000 tokens of dry technical English. Good for a first run and for tests; a real run calibrates on real text.
"""

from __future__ import annotations

import platform
import re

from nmprune.calibration.text import Purpose, Text
from nmprune.errors import InputError

_LONG = 60  # characters; shorter paragraphs (headings, "Note:") may repeat without giving anything away
_HELD_OUT = (2, 5)  # the third of every five topics, longest first, so that the held-out part gets long ones too


def load(argument: str, purpose: Purpose) -> Text:
    """The calibration part or the held-out part; no paragraph of 60 characters or more is in both.

    The text depends on the Python version, so the name says it.

    Raises:
        InputError: `argument` is not empty: this source has nothing to choose.
    """
    if argument:
        raise InputError(f"text source builtin:{argument}: builtin takes no argument. Write it as builtin.")
    topics = _topics_without_repeats()
    position, of = _HELD_OUT
    held_out = {name for i, name in enumerate(topics) if i % of == position}
    wanted = sorted(name for name in topics if (name in held_out) != (purpose == "calibration"))
    split = "calibration part" if purpose == "calibration" else "held-out part"
    return Text(f"Python {_python_version()} help topics", split, tuple(topics[name] for name in wanted))


def _python_version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _topics_without_repeats() -> dict[str, str]:
    """Topic name -> text, longest first, with each long paragraph in one topic only.

    Some topics are chapters that hold others word for word ("specialnames" holds "customization"): parts made of whole
    topics would overlap. A topic that is mostly a repeat is left out; single repeated paragraphs are cut.
    """
    from pydoc_data.topics import topics  # 0.5 MB of text: read on use, not on import

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = re.split(r"\n[ \t]*\n", topics[name].strip("\n"))
        keys = [" ".join(paragraph.split()) for paragraph in paragraphs]
        long = [key for key in keys if len(key) >= _LONG]
        repeated = {key for key in long if key in seen}
        if 2 * len(repeated) > len(long):
            continue
        seen.update(long)
        kept[name] = "\n\n".join(
            paragraph for paragraph, key in zip(paragraphs, keys, strict=True) if key not in repeated
        )
    return kept
