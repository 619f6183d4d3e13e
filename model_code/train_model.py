"""Final training job: the best hyperparameters, with the smdebug hook, the profiler, checkpoints and the model artifact."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classifier.config import TrainingConfig, parse
from classifier.errors import base_dir, run_entry_point

if TYPE_CHECKING:
    from classifier.engine import Observer
    from classifier.training import Setup


def main(argv: list[str]) -> None:
    """Train, export, and leave tensors and profile under the run's prefix."""
    started = time.time()
    train(parse(argv), started)


def train(config: TrainingConfig, started: float) -> None:
    """The training with everything that watches it: phases in every process, the system on every machine, the rest in the main
    process."""
    from classifier import distributed, profiling, training
    from classifier.debugging import HookObserver
    from classifier.observers import Observers
    from classifier.operator_window import OperatorWindow
    from classifier.precision import device_of

    output = Path(os.environ.get("SM_OUTPUT_DIR", str(base_dir() / "output")))
    tensors, profile = output / "tensors", output / "profiler"
    with ExitStack() as watchers:
        if (run := os.environ.get("RUN_OUTPUT_URI")) and distributed.is_first_here():
            uploads = {tensors: f"{run.rstrip('/')}/debug-output", profile: f"{run.rstrip('/')}/profiler-output"}
            watchers.enter_context(profiling.Uploader(uploads))
        if distributed.is_first_here():
            watchers.enter_context(profiling.SystemSampler(profile))
        setup = training.prepare_run(config)
        on_gpu = device_of(setup.network).type == "cuda"
        timeline = profiling.StepTimeline(profile, on_gpu=on_gpu)
        observer: Observer = timeline
        if distributed.is_main():
            interval = min(setup.config.debug_interval, max(1, len(setup.train)))
            hook = HookObserver(tensors, interval, timeline)
            window = OperatorWindow(profile, setup.config.profile_steps, on_gpu=on_gpu)
            watchers.callback(hook.close)
            watchers.callback(window.close)
            observer = Observers(window, hook)  # the window first: its work belongs to the steps that it slows
        else:
            watchers.callback(timeline.close)
        history = training.fit(
            setup,
            observer=observer,
            checkpoints=base_dir() / "checkpoints",
            on_epoch=lambda _: timeline.flush(),
        )
        timeline.close()
        distributed.gather(None)  # every process has written its phases before the first one here uploads the rest
    if distributed.is_main():
        _export(setup, history, started)
    distributed.stop()


def _export(setup: Setup, history: list[dict[str, Any]], started: float) -> None:
    """The model artifact, and what the report wants to know of the training."""
    from classifier import export, training
    from classifier.debugging import HookObserver

    exported_at = time.monotonic()
    folder = Path(os.environ.get("SM_MODEL_DIR", str(base_dir() / "model")))
    description = export.export(setup, HookObserver.bare(training.whole_model(setup)), history, folder)
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
