"""How many CPUs there are to use. Imports nothing heavy: some ask before anything else is loaded."""

from __future__ import annotations

import os


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
