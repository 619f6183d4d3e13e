"""Tuning trial: trains with one set of hyperparameters and prints the objective; keeps no model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from classifier.config import parse
from classifier.errors import base_dir, run_entry_point


def main(argv: list[str]) -> None:
    """Train one trial."""
    config = parse(argv)  # before torch is imported: a typing error costs a second, not ten
    from classifier import distributed, training

    setup = training.prepare_run(config)
    # SageMaker makes the folder when the trial is given a CheckpointConfig: on spot machines. Trials may share its place in S3.
    folder = base_dir() / "checkpoints"
    checkpoints = folder / os.environ.get("TRAINING_JOB_NAME", "trial") if folder.is_dir() else None
    history = training.fit(setup, checkpoints=checkpoints)
    if distributed.is_main():
        folder = Path(os.environ.get("SM_MODEL_DIR", str(base_dir() / "model")))
        folder.mkdir(parents=True, exist_ok=True)
        record = {"hyperparameters": asdict(setup.config), "precision": setup.precision, "history": history}
        (folder / "trial.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    distributed.stop()


if __name__ == "__main__":
    run_entry_point(main)
