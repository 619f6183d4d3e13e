"""Preparation as the number of pictures grows: time, processors kept busy, peak memory.

Runs prepare.py as a child on 1, 4 and 16 times the same number of generated pictures and, where real pictures are at hand
(``$REAL_DATA``), on dogs-120 and on twice as many (each picture and its mirror image).

Columns: ``cpu``, the share of all processors that the job used; ``ready``, the share that it used or would have used, had
nothing else been running here (from the kernel's time in the run queue); memory of the whole process tree, shared pages
counted once (PSS).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
from PIL import Image, ImageOps

PROJECT = Path(__file__).resolve().parent.parent
REAL_DATA = (PROJECT / os.environ.get("REAL_DATA", "../shared")).resolve()
RESULTS = PROJECT / "bench" / "results" / "preparation.json"
CLASSES = 10
SAMPLE_S = 0.1
CPUS = len(os.sched_getaffinity(0))


def generated(seed: int) -> bytes:
    """A JPEG of 320x240: blurred colours under a little noise, which compresses and decodes like a photograph."""
    random = np.random.default_rng(seed)
    colours = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    noise = random.integers(-12, 13, (240, 320, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(colours, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_generated(folder: Path, first: int, count: int) -> None:
    """Pictures ``first`` to ``first + count`` in class folders."""
    for number in range(first, first + count):
        target = folder / f"class_{number % CLASSES}" / f"{number:07d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(generated(number))


def generate(folder: Path, count: int) -> None:
    """``write_generated`` on all processors."""
    step = 500
    with ProcessPoolExecutor(CPUS) as pool:
        for done in [pool.submit(write_generated, folder, at, min(step, count - at)) for at in range(0, count, step)]:
            done.result()


def part(whole: Path, folder: Path, count: int) -> None:
    """The first ``count`` pictures of ``whole`` as hard links."""
    for path in whole.rglob("*.jpg"):
        if int(path.stem) < count:
            target = folder / path.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)


def mirror(whole: Path, folder: Path) -> None:
    """Every picture and its mirror image: twice as many, none like another."""
    for path in whole.rglob("*.jpg"):
        target = folder / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        with Image.open(path) as picture:
            ImageOps.mirror(picture).save(target.with_name(f"mirror-{path.name}"), quality=75)


def _tree_memory(root: psutil.Process) -> int:
    """Bytes of a process and all below it, shared pages counted once."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def _note_times(root: psutil.Process, seen: dict[tuple[str, str], tuple[int, int]]) -> None:
    """Note how long each thread of the tree has run and has waited for a processor so far, in nanoseconds."""
    for process in [root, *root.children(recursive=True)]:
        with suppress(OSError, psutil.Error):
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                ran, waited, _ = (thread / "schedstat").read_text().split()
                seen[str(process.pid), thread.name] = int(ran), int(waited)


def measure(source: Path, work: Path, picture_size: int) -> dict[str, Any]:
    """Prepare ``source`` once. Raises RuntimeError when that fails."""
    os.sync()  # pictures just made would be written to the disk meanwhile, which slows the first runs and not the later ones
    out = Path(tempfile.mkdtemp(dir=work))
    places = {"dataset_root": (out / "d").as_uri(), "dataset": str(out / "d"), "result": str(out / "r")}
    command = [sys.executable, str(PROJECT / "model_code" / "prepare.py"), "--source", source.as_uri()]
    command += [word for name, value in places.items() for word in (f"--{name}", value)]
    started = time.monotonic()
    child = subprocess.Popen([*command, "--picture_size", str(picture_size)], stdout=subprocess.DEVNULL)
    root, peak, times = psutil.Process(child.pid), 0, dict[tuple[str, str], tuple[int, int]]()
    while child.poll() is None:
        with suppress(psutil.Error):
            peak = max(peak, _tree_memory(root))
            _note_times(root, times)
        with suppress(subprocess.TimeoutExpired):
            child.wait(SAMPLE_S)  # not sleep: the time is to end with the job, not with the sample
    seconds = time.monotonic() - started
    if child.returncode:
        raise RuntimeError(f"prepare.py ended with status {child.returncode}; its message is above")
    result = json.loads((out / "r" / "result.json").read_text())
    shutil.rmtree(out)
    # Not from getrusage: the worker processes are no children of the job, but of the server that forks them.
    cpu, waited = (sum(kind) / 1e9 for kind in zip(*times.values(), strict=True))
    pictures = sum(result["num_pictures"].values())
    return {
        "pictures": pictures,
        "seconds": round(seconds, 2),
        "pictures_per_s": round(pictures / seconds),
        "cpu_seconds": round(cpu, 2),
        "cpu_share": round(cpu / seconds / CPUS, 3),
        "ready_share": round((cpu + waited) / seconds / CPUS, 3),
        "peak_mib": round(peak / 2**20),
        "load_before": round(os.getloadavg()[0], 1),
    }


def best(source: Path, work: Path, picture_size: int, repeat: int) -> dict[str, Any]:
    """The fastest of some runs: what others do on the machine can only add time."""
    return min((measure(source, work, picture_size) for _ in range(repeat)), key=lambda run: float(run["seconds"]))


def show(name: str, run: dict[str, Any]) -> None:
    print(
        f"{name:14} {run['pictures']:>8} {run['seconds']:>9.1f} {run['pictures_per_s']:>11} {run['cpu_seconds']:>8.1f} "
        f"{run['cpu_share']:>6.0%} {run['ready_share']:>6.0%} {run['peak_mib']:>9} {run['load_before']:>6}",
        flush=True,
    )


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000, help="generated pictures at 1x")
    parser.add_argument(
        "--times", type=int, nargs="*", default=[1, 4, 16], help="multiples of that number (none: real pictures only)"
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the fastest counts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON to write")
    flags = parser.parse_args()
    runs: dict[str, Any] = {}
    heads = f"{'seconds':>9} {'pictures/s':>11} {'cpu s':>8} {'cpu':>6} {'ready':>6} {'peak MiB':>9} {'load':>6}"
    print(f"{'source':14} {'pictures':>8} {heads}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        generate(work / "all", flags.pictures * max(flags.times, default=0))
        for times in flags.times:
            part(work / "all", work / f"x{times}", flags.pictures * times)
            runs[f"generated {times}x"] = best(work / f"x{times}", work, 224, flags.repeat)
            show(f"generated {times}x", runs[f"generated {times}x"])
        shutil.rmtree(work / "all", ignore_errors=True)
        dogs = REAL_DATA / "data" / "dogs-120"
        if dogs.is_dir():
            mirror(dogs, work / "dogs2")
            for name, source in (("dogs-120 1x", dogs), ("dogs-120 2x", work / "dogs2")):
                runs[name] = best(source, work, 256, flags.repeat)
                show(name, runs[name])
    columns = ["source", "pictures", "seconds", "pictures/s", "processors busy, %", "peak memory, MiB (PSS)"]
    rows = [
        [name, run["pictures"], run["seconds"], float(run["pictures_per_s"]), 100 * run["cpu_share"], float(run["peak_mib"])]
        for name, run in runs.items()
    ]
    found = {"name": flags.results.stem, **harness.plain(columns, rows), "runs": runs}
    print(f"written: {harness.write(found, flags.results.parent)}")


if __name__ == "__main__":
    main()
