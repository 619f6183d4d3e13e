"""Small programs that write what must never be half written: ``python writers.py <what> <folder> …``, for tests that end them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "model_code"), str(PROJECT / "tests" / "unit")]

CHANGES = {"backbone": "mobilenet_v2", "epochs": 3, "batch_size": 12, "ema_decay": 0.8, "checkpoint_interval_s": 0}
"""Of a training with a checkpoint after every step, some 27 MB each."""


def training(dataset: str, checkpoints: str, result: str) -> None:
    """Train, with checkpoints, and save weights and losses."""
    import torch
    from classifier import training
    from model_fakes import config

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(SM_CHANNEL_DATASET=dataset, OMP_NUM_THREADS="1")
    setup = training.prepare_run(config(**CHANGES))
    history = training.fit(setup, checkpoints=Path(checkpoints))
    torch.save({"weights": setup.network.state_dict(), "losses": [row["train_loss"] for row in history]}, result)


def artifact(model: str, target: str) -> None:
    """Pack a model artifact."""
    from classifier import evaluation

    evaluation.pack(Path(model), Path(target))


def report(base: str) -> None:
    """Write the report of the run below ``base``."""
    from classifier import reporting
    from report_fakes import FakeSageMaker, flags

    warnings.simplefilter("ignore")
    reporting._client = lambda: FakeSageMaker()
    reporting.write(flags(Path(base)))


if __name__ == "__main__":
    from classifier.errors import run_entry_point

    run_entry_point(lambda words: {"training": training, "artifact": artifact, "report": report}[words[0]](*words[1:]))
