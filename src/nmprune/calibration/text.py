"""What a text source hands over: documents, how they are joined, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Purpose = Literal["calibration", "choose", "evaluation"]
"""What a text is for, which decides the split: to calibrate, to choose settings by, or to be measured on."""

BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Text:
    """Documents of one split of one data set.

    Attributes:
        name: the data set, as reports write it, e.g. "wikitext2".
        split: which part of it, e.g. "test" or "documents 0-999"; "all" for a user's own file.
        documents: the documents in the order of the data set; none is blank.
        joiner: what stands between two documents; the field joins by a blank line.
    """

    name: str
    split: str
    documents: tuple[str, ...]
    joiner: str = BLANK_LINE

    @property
    def label(self) -> str:
        """Data set and split in one phrase, for messages and tables: "wikitext2 (test)"."""
        return f"{self.name} ({self.split})"

    @property
    def joined(self) -> str:
        """The whole text."""
        return self.joiner.join(self.documents)
