"""Final training job: the best hyperparameters, with the smdebug hook, the profiler, checkpoints and the model artifact."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classifier.config import TrainingConfig, parse
from classifier.errors import UserError, base_dir, run_entry_point

if TYPE_CHECKING:
    from classifier.engine import Observer
    from classifier.live_rules import Watched
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
    from classifier.live_rules import RuleProcess
    from classifier.observers import Observers
    from classifier.operator_window import OperatorWindow
    from classifier.precision import device_of

    output = Path(os.environ.get("SM_OUTPUT_DIR", str(base_dir() / "output")))
    tensors, profile, findings = output / "tensors", output / "profiler", output / "rules"
    stop: Callable[[], str] = lambda: ""  # noqa: E731
    with ExitStack() as watchers:
        if (run := os.environ.get("RUN_OUTPUT_URI")) and distributed.is_first_here():
            places = {tensors: "debug-output", profile: "profiler-output", findings: "rule-output"}
            uploads = {folder: f"{run.rstrip('/')}/{name}" for folder, name in places.items()}
            watchers.enter_context(profiling.Uploader(uploads))
        if distributed.is_first_here():
            watchers.enter_context(profiling.SystemSampler(profile))
        setup = training.prepare_run(config)
        on_gpu = device_of(setup.network).type == "cuda"
        timeline = profiling.StepTimeline(profile, on_gpu=on_gpu)
        observer: Observer = timeline
        if distributed.is_main():
            rules = RuleProcess(_watched(setup, tensors, profile, findings, started))
            stop = watchers.enter_context(rules).stop_reason
            hook = watchers.enter_context(HookObserver(tensors, setup.config, timeline, profile))
            window = OperatorWindow(profile, setup.config.profile_steps, on_gpu=on_gpu)
            watchers.callback(window.close)
            observer = Observers(window, hook)  # the window first: its work belongs to the steps that it slows
        else:
            watchers.callback(timeline.close)
        history = training.fit(
            setup,
            observer=observer,
            checkpoints=base_dir() / "checkpoints",
            on_epoch=lambda _: timeline.flush(),
            stop=stop,
        )
        timeline.close()
        distributed.gather(None)  # every process has written its phases before the first one here uploads the rest
    if reason := stop():  # the rules' last look, after the last step
        raise UserError(reason)
    if distributed.is_main():
        _export(setup, history, started)
    distributed.stop()


def _watched(setup: Setup, tensors: Path, profile: Path, findings: Path, started: float) -> Watched:
    """What the rules beside the training are told."""
    from collections import Counter

    from classifier.live_rules import Watched

    counts = Counter(setup.labels.tolist())
    return Watched(
        tensors=str(tensors),
        profile=str(profile),
        out=str(findings),
        class_counts=[counts[number] for number in range(setup.info.num_classes)],
        started=started,
        batch_size=setup.config.batch_size,
        stop_rules=setup.config.stopping(),
    )


def _export(setup: Setup, history: list[dict[str, Any]], started: float) -> None:
    """The model artifact, and what the report wants to know of the training."""
    from classifier import export, training

    exported_at = time.monotonic()
    folder = Path(os.environ.get("SM_MODEL_DIR", str(base_dir() / "model")))
    description = export.export(setup, training.whole_model(setup), history, folder)
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
