"""Checkpoints that survive an interruption: written beside and renamed, holding everything a resumed run needs.

A notice of interruption (SIGTERM: a spot machine is taken back, or the job is stopped) ends the run at the next step, after a
checkpoint. https://docs.aws.amazon.com/sagemaker/latest/dg/model-checkpoints.html
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from classifier import distributed

NAME = "last.pt"


class Notice:
    """Notes SIGTERM instead of dying of it; use as a context manager around the training."""

    def __init__(self) -> None:
        self.given = False
        self._before: Any = None

    def __enter__(self) -> Notice:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.given = True

    def exit(self) -> NoReturn:
        """End as a process that SIGTERM ended."""
        raise SystemExit(128 + signal.SIGTERM)


class Clock:
    """Says when the next checkpoint inside an epoch is due; a monotonic clock does not jump."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s, self._last = interval_s, time.monotonic()

    def due(self) -> bool:
        """Whether ``interval_s`` have passed since the last checkpoint."""
        return time.monotonic() - self._last >= self._interval_s

    def reset(self) -> None:
        """A checkpoint was written now."""
        self._last = time.monotonic()


def random_states() -> dict[str, Any]:
    """torch's generators of this process."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random(states: dict[str, Any]) -> None:
    """Put torch's generators back to where they were."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` with the random generators of all processes; the main process writes, atomically."""
    random = distributed.gather(random_states())
    if not distributed.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}.part"  # one name: what a killed run left behind is overwritten
    with temporary.open("wb") as file:
        torch.save({**state, "random": random}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def load(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint of the main process, in all processes, or None.

    A damaged file counts as none: training starts over rather than failing.
    """
    return distributed.from_main(_read(folder) if distributed.is_main() else None)  # type: ignore[no-any-return]


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        print(f"note: {path} is damaged ({type(problem).__name__}); training starts from the first epoch", flush=True)
        return None
    return state
