"""How many CPUs there are to use, and the memory beside them. Imports nothing heavy: some ask before anything else is loaded."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MOST = 2**31 - 1


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """From now on this process keeps the memory that it frees instead of giving it back to the system.

    A pass through a network on a CPU asks for the same hundreds of megabytes each time. Given back and asked for again, every
    page of them is a page fault: almost half of a training step on 224 pixels was seen to go there. The process stays as large as
    it ever was: good for a job, which ends, not for a server. Where the C library is not glibc nothing happens.

    Source: mallopt(3), https://man7.org/linux/man-pages/man3/mallopt.3.html.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MOST)
        mallopt(_M_MMAP_THRESHOLD, _MOST)
