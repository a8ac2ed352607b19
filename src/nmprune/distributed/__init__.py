"""Several processes that share one run, started by torchrun. The only room that knows ranks."""

from nmprune.distributed.error_file import tell_torchrun
from nmprune.distributed.processes import ALONE, Processes, ProcessLost, is_main_process, started

__all__ = ["ALONE", "ProcessLost", "Processes", "is_main_process", "started", "tell_torchrun"]
