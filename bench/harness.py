"""Interleaved timing of named peers, a JSON record of it, and the Markdown table made from the record.

A peer is a function without arguments that does one round of work and returns how many things it did. Peers take turns
(A B C A B C ...), so that a busy machine is busy for all of them; a ratio is taken inside each round, and the median of the
rounds' ratios is what a record states. Absolute figures move with the machine, ratios much less.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

Peer = Callable[[], int]
Json = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "nvidia-dali-cuda130", "onnxruntime", "openvino")


def interleave(peers: Mapping[str, Peer], *, rounds: int = 5, warmup: int = 1, title: str = "") -> dict[str, list[float]]:
    """Things per second of every peer, one figure a round. The ``warmup`` rounds before are not counted."""
    from rich.console import Console
    from rich.progress import Progress

    rates: dict[str, list[float]] = {name: [] for name in peers}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=(rounds + warmup) * len(peers))
        for number in range(rounds + warmup):
            for name, peer in peers.items():
                progress.update(task, description=f"{title} {name}".strip())
                started = time.perf_counter()
                done = peer()
                seconds = time.perf_counter() - started
                if done < 1:
                    raise ValueError(f"peer {name!r} did {done} things in a round: there is nothing to time")
                if number >= warmup:
                    rates[name].append(done / seconds)
                progress.advance(task)
    return rates


def summarise(rates: Mapping[str, list[float]], against: str) -> Json:
    """Median, least and greatest rate of every peer, and its ratio to ``against``: the median of the rounds' ratios."""
    if against not in rates:
        raise ValueError(f"no peer is called {against!r}; there are {', '.join(map(repr, rates))}")
    base = rates[against]
    return {
        name: {
            "median": statistics.median(row),
            "min": min(row),
            "max": max(row),
            "ratio": statistics.median(one / other for one, other in zip(row, base, strict=True)),
            "rates": row,
        }
        for name, row in rates.items()
    }


def compare(peers: Mapping[str, Peer], *, against: str, rounds: int = 5, warmup: int = 1, title: str = "") -> Json:
    """Interleave, then summarise: one case of a record."""
    if against not in peers:
        raise ValueError(f"no peer is called {against!r}; there are {', '.join(map(repr, peers))}")
    return summarise(interleave(peers, rounds=rounds, warmup=warmup, title=title), against)


def machine() -> Json:
    """What the figures depend on: processor, cores, memory and versions; nothing that names the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": _cpu(), "cores": cores, "load": load, "python": platform.python_version(), "versions": versions}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def record(name: str, cases: Mapping[str, Json], *, against: str, unit: str = "pictures/s", **facts: Any) -> Json:
    """A benchmark's record: ``cases`` are columns of the table, each from ``compare``; ``facts`` are kept beside."""
    date = datetime.now(UTC).date().isoformat()
    return {"name": name, "date": date, "machine": machine(), "unit": unit, "against": against, **facts, "cases": dict(cases)}


def write(found: Json, folder: Path = RESULTS) -> Path:
    """Write a record to ``<folder>/<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['name']}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(name: str, folder: Path = RESULTS) -> Json:
    """Read a record back; ``training/input`` is the section ``input`` of training.json. Raises FileNotFoundError or KeyError."""
    file, _, section = name.partition("/")
    found: Json = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
    return found["sections"][section] if section else found


def plain(columns: list[str], rows: list[list[Any]], **facts: Any) -> Json:
    """A record that is a table already: texts and numbers, a row each."""
    date = datetime.now(UTC).date().isoformat()
    return {"columns": columns, "rows": rows, "date": date, "machine": machine(), **facts}


def table(found: Json) -> str:
    """The record as Markdown: a row a peer, two columns a case (or the rows of a plain one); a line on the machine below."""
    if "rows" in found:
        lines = [_row(found["columns"]), _row(["---", *["---:"] * (len(found["columns"]) - 1)])]
        lines += [_row([_plain_cell(cell) for cell in row]) for row in found["rows"]]
        return "\n".join([*lines, "", _foot(found, "Measured")])
    cases, unit = found["cases"], found["unit"]
    head = [unit, *(title for case in cases for title in (case, "ratio"))]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for peer in dict.fromkeys(peer for case in cases.values() for peer in case):
        cells = [cell for case in cases.values() for cell in _cells(case.get(peer))]
        lines.append(_row([peer, *cells]))
    return "\n".join([*lines, "", _foot(found, "Medians of interleaved rounds")])


def _foot(found: Json, how: str) -> str:
    """How, when and where it was measured."""
    where = found["machine"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "torchvision") if name in where["versions"])
    return f"{how}, {found['date']}; {where['cpu']}, {where['cores']} cores; {versions}.".replace("; .", ".")


def _plain_cell(value: Any) -> str:
    """Numbers with what a reader needs of them."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cells(peer: Json | None) -> tuple[str, str]:
    if peer is None:
        return "–", "–"
    median, ratio = peer["median"], peer["ratio"]
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}", f"{ratio:.2f}×"
