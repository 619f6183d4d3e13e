"""Final training job: the best hyperparameters, with the smdebug hook, the profiler, checkpoints and the model artifact."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

from classifier.config import TrainingConfig, parse
from classifier.errors import base_dir, run_entry_point


def main(argv: list[str]) -> None:
    """Train, export, and leave tensors and profile under the run's prefix."""
    started = time.time()
    train(parse(argv), started)


def train(config: TrainingConfig, started: float) -> None:
    """The training with everything that watches it."""
    from classifier import export, profiling, training
    from classifier.debugging import HookObserver
    from torch import nn

    output = Path(os.environ.get("SM_OUTPUT_DIR", str(base_dir() / "output")))
    tensors, profile = output / "tensors", output / "profiler"
    with ExitStack() as watchers:
        if run := os.environ.get("RUN_OUTPUT_URI"):
            uploads = {tensors: f"{run.rstrip('/')}/debug-output", profile: f"{run.rstrip('/')}/profiler-output"}
            watchers.enter_context(profiling.Uploader(uploads))
        watchers.enter_context(profiling.SystemSampler(profile))
        setup = training.prepare_run(config)
        loss_function = nn.CrossEntropyLoss(label_smoothing=setup.config.label_smoothing)
        interval = min(setup.config.debug_interval, max(1, len(setup.train)))
        timeline = profiling.StepTimeline(profile)
        observer = HookObserver(setup.network, loss_function, tensors, interval, timeline)
        watchers.callback(observer.close)
        history = training.fit(
            setup,
            observer=observer,
            checkpoints=base_dir() / "checkpoints",
            on_epoch=lambda _: timeline.flush(),
            loss_function=loss_function,
        )
    exported_at = time.monotonic()
    folder = Path(os.environ.get("SM_MODEL_DIR", str(base_dir() / "model")))
    description = export.export(setup, observer.bare(training.whole_model(setup)), history, folder)
    record = {"started": started, "batch_size": setup.config.batch_size, "history": history}
    (folder / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    top1, difference = description["valid_top1"], description["onnx"]["difference"]
    print(
        f"exported {setup.config.backbone} with {setup.info.num_classes} classes: top1_on_valid={top1:.4f} "
        f"onnx_difference={difference:.1e} seconds={time.monotonic() - exported_at:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    run_entry_point(main)
