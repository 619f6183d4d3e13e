"""A training in a process of its own, started from a server that has imported torch already; the parent may kill it."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from model_fakes import config

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision", "classifier.training"])


def train(dataset: str, checkpoints: str, result: str, changes: dict[str, object], steps: Connection) -> None:
    """Train and save the weights; every step is reported as (epoch, step) as soon as it is done."""
    import torch
    from classifier import training

    warnings.simplefilter("ignore")
    os.environ.update(SM_CHANNEL_DATASET=dataset, OMP_NUM_THREADS="1")
    setup = training.prepare_run(config(**changes))
    history = training.fit(setup, checkpoints=Path(checkpoints), on_step=lambda epoch, step: steps.send((epoch, step)))
    losses = [(row["train_loss"], row["valid_loss"]) for row in history]
    torch.save({"weights": setup.network.state_dict(), "losses": losses}, result)


def start(dataset: Path, checkpoints: Path, result: Path, changes: dict[str, object]) -> tuple[ForkServerProcess, Connection]:
    """The process and where its steps arrive."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=train, args=(str(dataset), str(checkpoints), str(result), changes, there))
    process.start()
    there.close()
    return process, here


def rest(steps: Connection) -> list[tuple[int, int]]:
    """All steps until the process closes its end, by ending or by being killed."""
    found = []
    try:
        while True:
            found.append(steps.recv())
    except EOFError:
        return found
