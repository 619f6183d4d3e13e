"""What watching a training costs: `make bench-observability`, or `python bench/observability.py --rounds 6`.

The same steps of the same network, on batches in memory, by peers that take turns: unwatched; with the smdebug hook; with the hook,
the system sampler and the phases of every step. A round of each peer saves one step of every ten, as a training does by default,
and judges nothing. Where steps are so short that the hook has to leave saves out, the rounds before those that count go beyond the
saves that it makes in any case (``debugging.FREE_SAVES``): what is timed is what a long training pays.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")  # smdebug needs it
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "model_code"), str(ROOT / "bench")]

import harness  # noqa: E402

ALONE, HOOK, ALL = "unwatched", "hook", "hook, system sampler, step phases"
STEPS = 10
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network, the side of its pictures in pixels, pictures a step, epochs of STEPS steps in a round, rounds of warm-up."""

    backbone: str
    side: int
    batch_size: int
    epochs: int
    warmup: int


CASES = {
    "MobileNetV2, 224 px, batch 16": Case("mobilenet_v2", 224, 16, 1, warmup=1),
    "ResNet-18, 32 px, batch 32": Case("resnet18", 32, 32, 5, warmup=4),
}


class InMemory:
    """STEPS batches of noise, the same in every epoch."""

    def __init__(self, case: Case) -> None:
        import torch
        from classifier.batches import Batch

        random = torch.Generator().manual_seed(0)
        shape = (case.batch_size, 3, case.side, case.side)
        self._batches = [
            Batch(
                torch.randint(0, 256, shape, dtype=torch.uint8, generator=random),
                torch.randint(0, CLASSES, (case.batch_size,), generator=random),
                case.batch_size,
            )
            for _ in range(STEPS)
        ]
        self.num_examples = STEPS * case.batch_size

    def __len__(self) -> int:
        return STEPS

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        """All of them."""
        yield from self._batches[start:]


class NoTimeline:
    """Stands for the phases where they are not recorded."""

    def watch(self, trainer: object, position: object) -> None:
        """Nothing."""

    def mark(self, phase: str) -> None:
        """Nothing."""

    def mode(self, name: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Training:
    """One peer: a training that goes on for some steps whenever it is called, and returns how many."""

    def __init__(self, case: Case, kind: str, folder: Path, rounds: int) -> None:
        import torch
        from classifier import model, profiling
        from classifier.config import from_mapping
        from classifier.debugging import HookObserver
        from classifier.engine import Position, Silent, Trainer
        from classifier.serving import Preprocessing
        from torch import nn

        torch.manual_seed(0)
        settings = {"recipe": "finetune", "backbone": case.backbone, "image_size": case.side, "batch_size": case.batch_size}
        # A rate so small that noise for pictures does no harm: the cost of a step does not depend on it.
        settings |= {"precision": "fp32", "epochs": min(1000, case.epochs * rounds), "learning_rate": 1e-4}
        config = from_mapping({name: str(value) for name, value in settings.items()})
        network = model.channels_last(model.build(case.backbone, CLASSES))
        self._trainer = Trainer(
            network, config, Preprocessing.of(case.side), "fp32", nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES, STEPS
        )
        self._batches, self._epochs, self._done = InMemory(case), case.epochs, 0
        self._folder, self._kind = folder, kind
        self._observer: Any = Silent()
        if kind != ALONE:
            timeline: Any = profiling.StepTimeline(folder / "profiler") if kind == ALL else NoTimeline()
            self._observer = HookObserver(folder / "tensors", config, timeline, folder / "profiler")
        self._observer.watch(self._trainer, Position())

    def __call__(self) -> int:
        from classifier import profiling
        from classifier.engine import Position, train_one_epoch

        sampler: AbstractContextManager[object] = nullcontext()
        if self._kind == ALL:
            sampler = profiling.SystemSampler(self._folder / "profiler")
        with sampler:
            for _ in range(self._epochs):
                position = Position(epoch=self._done)
                train_one_epoch(
                    self._trainer,
                    self._batches,
                    position,
                    observer=self._observer,
                    after_step=lambda: None,
                    say=lambda _: None,
                )
                self._done += 1
        return self._epochs * STEPS


def measure(cases: dict[str, Case], rounds: int) -> dict[str, Any]:
    """The record: steps/s of every peer in every case, and the ratio to the unwatched training."""
    found = {}
    for title, case in cases.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # smdebug is of another age
            peers = {
                kind: Training(case, kind, Path(folder) / str(n), case.warmup + rounds) for n, kind in enumerate((ALONE, HOOK, ALL))
            }
            found[title] = harness.compare(peers, against=ALONE, rounds=rounds, warmup=case.warmup, title=title)
    return harness.record("observability", found, against=ALONE, unit="steps/s")


def main() -> None:
    """Measure, write bench/results/observability.json and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count, of every peer")
    flags = parser.parse_args()
    found = measure(CASES, flags.rounds)
    harness.write(found)
    print(harness.table(found))


if __name__ == "__main__":
    main()
