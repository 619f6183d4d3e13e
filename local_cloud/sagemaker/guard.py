"""First process of a local container: starts the command in its own session and outlives it just long enough to clean up.

Run as ``python -I -S guard.py <command> [<argument> …]``. Standard input is the lifeline: the local cloud holds the other end of
the pipe, so when the cloud ends, however hard, the pipe closes and everything below is killed. ``PR_SET_PDEATHSIG`` is not used: it
follows the parent's *thread*, and reaches only the first child. SIGTERM is passed on to the command's process group. When the
command ends, whatever it left behind is killed, as the end of a container's first process would. The exit code is the command's;
128 + n when signal n ended it, 127 when it could not be started.

Only the standard library, and no import of the project: the guard must start in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def _adopt_orphans() -> None:
    """Linux: descendants that left the session stay below this process and are found by ``_descendants``."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _children(pid: int) -> list[int]:
    """Children of every thread of ``pid`` (empty where /proc does not exist)."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in listing.read_text().split()]
    return found


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for child in _children(pid):
        found += [child, *_descendants(child)]
    return found


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _kill_everything(group: int) -> None:
    """Kill the command's group and every descendant; twice, for those that were forking meanwhile."""
    _signal_group(group, signal.SIGKILL)
    for _ in range(2):
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _watch_lifeline(group: int) -> None:
    while os.read(0, 4096):
        pass
    _kill_everything(group)
    os._exit(137)


def main(command: list[str]) -> int:
    """Run ``command`` to its end."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if child is None:
            early.append(number)
        else:
            _signal_group(child.pid, number)

    # Before the command exists: a SIGTERM in between would end the guard alone and leave the command running.
    signal.signal(signal.SIGTERM, pass_on)
    _adopt_orphans()
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"exec {command[0]!r} failed: {error.strerror}", flush=True)
        return 127
    for number in early:
        _signal_group(child.pid, number)
    threading.Thread(target=_watch_lifeline, args=(child.pid,), daemon=True).start()
    code = child.wait()
    _kill_everything(child.pid)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
