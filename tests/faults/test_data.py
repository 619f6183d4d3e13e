"""Row 6: bad pictures, a missing split, trials that all fail, a loss that is no number. What went wrong reaches the user."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifier import checkpoint
from classifier.errors import DataError
from classifier.preparation import prepare
from fault_table import Landed
from model_fakes import flags, picture, prepared, run_script, write_folder

from infra.pipeline import definition
from infra.verify import walk
from infra.verify.configurations import config_of
from infra.verify.walk import TaskError

pytestmark = pytest.mark.fault(6)

Spoil = Callable[[Path, random.Random], None]


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(1, len(data) // 2)])


def text(path: Path, chance: random.Random) -> None:
    path.write_text("this is no picture")


def emptied(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def noise(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(2000))


def moving(path: Path, chance: random.Random) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (40, 32), (chance.randrange(255), n * 99, 7)) for n in range(2)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def bomb(path: Path, chance: random.Random) -> None:
    from hostile_pictures import png

    path.write_bytes(png(60_000, 60_000, b"\0" * (100 + chance.randrange(100))))


SPOILS: list[Spoil] = [cut, text, emptied, noise, moving, bomb]


def spoil_some(root: Path, share: float, chance: random.Random) -> set[str]:
    """Spoil a share of the pictures, one way after the other; their names."""
    found = sorted(root.rglob("*.png"))
    chosen = chance.sample(found, round(len(found) * share))
    for number, path in enumerate(chosen):
        SPOILS[number % len(SPOILS)](path, chance)
    return {path.relative_to(root).as_posix() for path in chosen}


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_few_corrupt_pictures_are_listed_exactly(tmp_path: Path, landed: Landed, share: float):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed={seed}")
    root = write_folder(tmp_path / "pictures", train=100, held=50)
    bad = spoil_some(root, share, random.Random(seed))
    landed(len(bad))
    prepare(flags(root.as_uri(), tmp_path, max_quarantined_share=0.2))
    listed = [json.loads(line) for line in (tmp_path / "result" / "refused.jsonl").read_text().splitlines()]
    assert {entry["file"] for entry in listed if entry["kind"] == "quarantined"} == bad
    assert all(entry["reason"] for entry in listed)
    result = json.loads((tmp_path / "result" / "result.json").read_text())
    assert result["num_quarantined"] == len(bad)
    assert sum(result["num_pictures"].values()) == 600 - len(bad)


def job(root: Path, base: Path) -> tuple[int, str, str]:
    """prepare.py as its job runs it: exit code, last line of stderr, and what DescribeProcessingJob would say."""
    given = flags(root.as_uri(), base, max_quarantined_share=0.2)
    names = ("source", "dataset_root", "result", "dataset", "picture_size", "max_quarantined_share")
    words = [word for name in names for word in (f"--{name}", str(getattr(given, name)))]
    done = run_script("prepare.py", *words, SAGEMAKER_BASE_DIR=str(base))
    message = base / "output" / "message"
    return done.returncode, done.stderr.strip().splitlines()[-1], message.read_text() if message.exists() else ""


def ended(message: str, state: str = "PrepareData") -> tuple[list[str], dict[str, Any]]:
    """The states of an execution whose job fails with this message, and what it ends with."""
    described = {"ProcessingJobName": "dogs-dev-prep-0", "ProcessingJobStatus": "Failed", "ExitMessage": message}
    account = walk.Account(**{state: TaskError("States.TaskFailed", json.dumps(described))})
    machine = walk.Walk(definition(config_of({"stage": "dev"})), account)
    _, output = machine.run({})
    return machine.visited, output


def test_many_corrupt_pictures_end_the_run_before_money_is_spent_on_training(tmp_path: Path, landed: Landed):
    root = write_folder(tmp_path / "pictures", train=20, held=10)
    bad = spoil_some(root, 0.6, random.Random(1))
    code, line, message = job(root, tmp_path / "job")
    assert code == 1
    assert not list((tmp_path / "job").rglob("dataset.json"))
    landed(len(bad))
    # By chance a class may lose all its pictures, which is said first.
    assert "72 of 120 files were quarantined, more than max_quarantined_share=0.2" in line or "no usable training picture" in line
    assert message in line
    states, output = ended(message)
    assert not {"CacheFeatures", "Tune", "Train", "Deploy"} & set(states)
    assert message[:200] in output["Cause"]
    assert "PrepareData" in output["Cause"]


def without(split: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        import shutil

        shutil.rmtree(root / split)

    return remove


def all_of_a_split(split: str) -> Callable[[Path], None]:
    """Its pictures are there, and none can be used."""

    def spoil(root: Path) -> None:
        for path in (root / split).rglob("*.png"):
            path.write_text("no picture")

    return spoil


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (without("train"), "none called train"),
        (all_of_a_split("train"), "no usable training picture"),
        (all_of_a_split("valid"), "no valid pictures are left"),
        (all_of_a_split("test"), "no test pictures are left"),
    ],
    ids=["train is missing", "train is spoiled", "valid is spoiled", "test is spoiled"],
)
def test_a_split_that_is_missing_is_said(tmp_path: Path, landed: Landed, fault: Callable[[Path], None], words: str):
    root = write_folder(tmp_path / "pictures", train=20, held=2)
    fault(root)
    with pytest.raises(DataError, match=words):
        prepare(flags(root.as_uri(), tmp_path, max_quarantined_share=0.9))
    landed()
    states, output = ended(words)
    assert words in output["Cause"]
    assert "Tune" not in states


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_held_out_split_that_is_missing_is_drawn_and_said(tmp_path: Path, landed: Landed, split: str):
    root = write_folder(tmp_path / "pictures", train=20, held=5)
    without(split)(root)
    prepare(flags(root.as_uri(), tmp_path))
    report = json.loads((tmp_path / "result" / "report.json").read_text())
    assert report["split"] == "seeded"
    assert f"no {split} folder: drawn from train" in report["notes"][0]
    assert json.loads((tmp_path / "result" / "result.json").read_text())["num_pictures"][split] > 0
    landed()


# --- training --------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_job_with_the_reason(tmp_path: Path, landed: Landed):
    """The weights are spoiled in the checkpoint from which the training goes on, so that the loss is certain to be no number."""
    import torch

    dataset = prepared(tmp_path / "pictures")
    places = {"SAGEMAKER_BASE_DIR": str(tmp_path), "SM_CHANNEL_DATASET": str(dataset), "SM_MODEL_DIR": str(tmp_path / "model")}
    words = ["--recipe", "scratch", "--epochs", "1", "--batch_size", "8", "--precision", "fp32", "--image_size", "32"]
    words += ["--debug_interval", "100"]
    assert run_script("train_model.py", *words, **places).returncode == 0
    saved = checkpoint.load(tmp_path / "checkpoints")
    assert saved is not None

    def poison(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return torch.full_like(value, float("nan"))
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return value

    saved["trainer"] = {**saved["trainer"], "model": poison(saved["trainer"]["model"])}
    saved["position"] = {**saved["position"], "epoch": 0, "step": 0}
    torch.save(saved, tmp_path / "checkpoints" / checkpoint.NAME)
    for path in (tmp_path / "model").glob("*"):
        path.unlink()
    done = run_script("train_model.py", *words, **places)
    assert done.returncode == 1, done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert "loss" in line
    assert "learning_rate" in line
    assert (tmp_path / "output" / "failure").read_text() in line
    assert not list((tmp_path / "model").glob("*.onnx"))
    landed()


def test_trials_that_all_fail_end_the_search_with_the_first_ones_reason(landed: Landed):
    reason = "AlgorithmError: the loss is not finite: lower learning_rate"
    search = {"HyperParameterTuningJobName": "dogs-dev-0", "HyperParameterTuningJobStatus": "Failed",
              "FailureReason": "No training job succeeded after 5 attempts."}  # fmt: skip
    trials = {"TrainingJobSummaries": [{"TrainingJobName": "dogs-dev-0-001", "FailureReason": reason}]}
    account = walk.Account(Tune=TaskError("States.TaskFailed", json.dumps(search)), ReadTrialFailure=trials)
    machine = walk.Walk(definition(config_of({"stage": "dev"})), account)
    last, output = machine.run({})
    assert last == "Failed"
    assert reason in output["Cause"]
    assert "dogs-dev-0-001" in output["Cause"]
    assert not {"Train", "Deploy"} & set(machine.visited)
    landed()


def test_the_pictures_that_nobody_spoiled_are_all_used(tmp_path: Path, landed: Landed):
    """Otherwise an exact list of the bad ones would say little."""
    root = write_folder(tmp_path / "pictures", train=20, held=10)
    (root / "train" / "n02000000-breed_0" / "extra.png").write_bytes(picture(12345))
    prepare(flags(root.as_uri(), tmp_path, max_quarantined_share=0.0))
    assert sum(json.loads((tmp_path / "result" / "result.json").read_text())["num_pictures"].values()) == 121
    landed()
