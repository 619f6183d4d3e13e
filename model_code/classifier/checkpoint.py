"""Checkpoints that survive an interruption: written beside and renamed, holding everything a resumed run needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

NAME = "last.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` and the random generators' states atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}.{os.getpid()}"
    with temporary.open("wb") as file:
        torch.save({**state, "torch_rng": torch.get_rng_state()}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def load(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, or None. A damaged file counts as none: training starts over rather than failing."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        print(f"note: {path} is damaged ({type(problem).__name__}); training starts from the first epoch", flush=True)
        return None
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Put torch's generator back to where it was at the checkpoint."""
    torch.set_rng_state(state["torch_rng"])
