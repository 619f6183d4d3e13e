"""Where the files of a profile lie and whose they are; shared by those who write them and those who read them.

``system/incremental/YYYYMMDDHH/<10-digit s>.<node>.json``            system metrics, JSON lines (system_metrics.py)
``framework/pevents/YYYYMMDDHH/<µs>_<rank>-<node>_pythontimeline.json``  step phases, Chrome trace (step_timeline.py)
``framework/operators/<rank>-<node>_operators.jsonl``, ``…_trace.gz``  the torch.profiler window (operator_window.py)
``overhead.json``                                                      what the watching cost

The first two are the managed profiler's, smdebug's readers take them; those take every ``*.json`` and ``*.json.gz`` under
``framework`` for a timeline, hence the other endings of the window's files.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

from classifier.files import replace_text

PHASES = ("DataLoading", "Forward", "Backward", "Optimizer")


def node_id() -> str:
    """``algo-1`` …, as SageMaker names hosts; elsewhere ``algo-1``."""
    host = os.environ.get("SM_CURRENT_HOST", "algo-1")
    return host if host.startswith("algo-") else "algo-1"


def worker_id() -> str:
    """``<rank>-<node>``; smdebug reads it as process and node."""
    return f"{os.environ.get('RANK', '0')}-{node_id()}"


def hour(seconds: float) -> str:
    """The folder of a moment, in UTC."""
    return time.strftime("%Y%m%d%H", time.gmtime(seconds))


def _overhead_file(root: Path) -> Path:
    """One file for each node: all nodes upload to the same prefix."""
    node = node_id()
    return root / ("overhead.json" if node == "algo-1" else f"overhead-{node}.json")


def write_overhead(root: Path, **shares: float) -> None:
    """Merge shares of the training time (0 to 1) such as ``hook_share`` into the profile's ``overhead.json``."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".overhead.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = _overhead_file(root)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        replace_text(path, json.dumps({**known, **{name: round(share, 6) for name, share in shares.items()}}) + "\n")


def read_overhead(root: Path) -> dict[str, float]:
    """Shares of the training time by name, of several nodes the largest; empty where nothing was measured."""
    found: dict[str, float] = {}
    for path in sorted(root.glob("overhead*.json")):
        for name, share in json.loads(path.read_text(encoding="utf-8")).items():
            found[name] = max(share, found.get(name, 0.0))
    return found
