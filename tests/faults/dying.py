"""Runs a program that dies at a chosen moment of a write, as hard as a power cut. ``python dying.py <plan> <script> [argument] …``

The plan is JSON: ``event`` (a Python audit event: ``open`` or ``os.rename``), ``path`` (regular expression for its first argument),
``nth`` (which of those, from 1), and ``bytes``: from then on the kernel ends the process at its first write beyond so many bytes of
any file (RLIMIT_FSIZE with SIGXFSZ as it comes); null kills it on the spot. Both leave no time for any handler. ``mark`` is a file
that is made when the moment has come.
"""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def arm(plan: dict[str, Any]) -> None:
    """Wait for the moment."""
    seen = 0
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it and raises OSError instead

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != plan["event"] or not values or not isinstance(values[0], str | os.PathLike):
            return
        if event == "open" and not set("wxa+") & set(str(values[1] or "r")):
            return
        if re.search(plan["path"], os.fspath(values[0])):
            seen += 1
            if seen == plan["nth"]:
                os.close(os.open(plan["mark"], os.O_CREAT))
                if plan["bytes"] is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], resource.RLIM_INFINITY))

    sys.addaudithook(hook)


if __name__ == "__main__":
    arm(json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
