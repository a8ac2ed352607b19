"""Other libraries' bars and chatter, switched off through their own interfaces: they would tear ours apart."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Silence transformers, the hub's client and datasets, down to errors. Imports transformers."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    disable_progress_bars()
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # datasets is optional and slow to import; it reads this when it is imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
