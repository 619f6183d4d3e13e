"""Row 1: a training that is killed anywhere, or told to stop, goes on and ends with the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import checkpoint
from fault_table import Landed
from model_fakes import prepared
from training_child import rest, start

pytestmark = pytest.mark.fault(1)

# Everything that a checkpoint must hold is in play: dropout draws from torch's generator, the average and the momentum move.
CHANGES: dict[str, object] = {
    "backbone": "mobilenet_v2",
    "epochs": 4,
    "batch_size": 6,
    "ema_decay": 0.8,
    "augmentation": "trivial",
    "mixup_alpha": 0.2,
    "gradient_clip_norm": 1.0,
    "checkpoint_interval_s": 0,
}
STEPS = [(epoch, step) for epoch in range(4) for step in range(4)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("dataset"))


def finish(dataset: Path, checkpoints: Path, result: Path, **changes: object) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """A run to its end: the steps it took, and its weights and losses."""
    process, steps = start(dataset, checkpoints, result, {**CHANGES, **changes})
    taken = rest(steps)
    process.join(60)
    assert process.exitcode == 0
    return taken, torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    taken, result = finish(dataset, folder / "checkpoints", folder / "result.pt")
    assert taken == STEPS
    return result


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == expected["losses"]
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name


def end_in_the_middle(dataset: Path, folder: Path, after: int, number: int, pause_s: float) -> list[tuple[int, int]]:
    """Send a signal some time after a step; the steps that were taken. Proves that the signal ended the run."""
    process, steps = start(dataset, folder / "checkpoints", folder / "result.pt", CHANGES)
    taken = [steps.recv() for _ in range(after)]
    time.sleep(pause_s)
    assert process.pid is not None
    os.kill(process.pid, number)
    taken += rest(steps)
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    assert len(taken) < len(STEPS), "the run had ended before the signal came"
    assert not (folder / "result.pt").exists()
    assert (folder / "checkpoints" / checkpoint.NAME).is_file()
    return taken


def kill_and_resume(dataset: Path, folder: Path, undisturbed: dict[str, Any], chance: random.Random) -> tuple[int, int]:
    # From the second step on: by then the first checkpoint is complete. The pause ends anywhere in a step or in its checkpoint.
    after = chance.randrange(2, len(STEPS) - 2)
    taken = end_in_the_middle(dataset, folder, after, signal.SIGKILL, chance.uniform(0, 0.15))
    resumed, result = finish(dataset, folder / "checkpoints", folder / "result.pt")
    assert resumed == STEPS[len(STEPS) - len(resumed) :]
    assert 0 < len(resumed) <= len(STEPS) - len(taken) + 2, "it began again instead of going on"
    assert_same(result, undisturbed)
    return STEPS[len(taken) - 1]


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_training_ends_with_the_same_weights(dataset, tmp_path, undisturbed, landed: Landed, seed: int):
    kill_and_resume(dataset, tmp_path, undisturbed, random.Random(seed))
    landed()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_killed_trainings_end_with_the_same_weights(dataset, tmp_path, undisturbed, landed: Landed):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed={seed}")
    chance = random.Random(seed)
    points = []
    for number in range(100):
        points.append(kill_and_resume(dataset, tmp_path / str(number), undisturbed, chance))
        landed()
        shutil.rmtree(tmp_path / str(number))
    assert len(set(points)) >= 8, f"the kills landed in too few places: {points}"


def test_a_run_that_is_told_to_stop_saves_its_last_step(dataset, tmp_path, undisturbed, landed: Landed):
    taken = end_in_the_middle(dataset, tmp_path, 3, signal.SIGTERM, 0.0)
    resumed, result = finish(dataset, tmp_path / "checkpoints", tmp_path / "result.pt")
    assert taken + resumed == STEPS  # nothing is done twice
    assert_same(result, undisturbed)
    landed()


def test_a_checkpoint_of_another_run_is_not_taken_up(dataset, tmp_path, landed: Landed):
    finish(dataset, tmp_path, tmp_path / "a.pt", epochs=1)
    taken, _ = finish(dataset, tmp_path, tmp_path / "b.pt", epochs=1, learning_rate=0.02)
    assert taken == STEPS[:4]
    landed()
