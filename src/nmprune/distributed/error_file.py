"""What torchrun says last: after its own traceback it prints what the process that failed first left in a file for it."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "TORCHELASTIC_ERROR_FILE"


def tell_torchrun(message: str) -> None:
    """Have torchrun end its own message with ours; without torchrun nothing is done.

    The form of the file is that of torch.distributed.elastic.multiprocessing.errors, without a traceback of ours.

    Args:
        message: why this process ends.
    """
    place = os.environ.get(VARIABLE)
    if not place:
        return
    told = {"message": {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}}
    with suppress(OSError):  # torchrun then says its own words alone
        Path(place).write_text(json.dumps(told))
