"""How a process that uses torch is set up: seeds, threads, memory allocator, warnings."""

import ctypes
import ctypes.util
import os
import sys
import warnings

from clear.config import Config

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def apply_runtime(config: Config) -> None:
    """Seed every generator and set threads; called first in every stage that uses torch."""
    import torch

    _keep_freed_memory()
    torch.set_num_threads(config.runtime.threads or os.cpu_count() or 1)
    torch.manual_seed(config.seed)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks instead of returning them to the system.

    Activations of some ten MiB are freed and allocated again at every step; paging them in anew makes attention on
    CPU twice as slow. Elsewhere than on glibc nothing is changed.
    """
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
