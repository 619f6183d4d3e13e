"""Two processes, started by torchrun through the training toolkit, learn what one process learns with the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import features, model, training
from model_fakes import MODEL_CODE, assert_gloo_has_ended, config, note_last_threads, prepared, run_script
from safetensors.torch import save_file

# What AWS's container does for the hyperparameter sagemaker_torch_distributed_enabled (sagemaker_pytorch_container.training).
TRAIN = """
from sagemaker_training import entry_point, environment
from sagemaker_training.runner import RunnerType
env = environment.Environment()
assert env.additional_framework_parameters["sagemaker_torch_distributed_enabled"]
entry_point.run(env.module_dir, env.user_entry_point, env.to_cmd_args(), env.to_env_vars(), runner_type=RunnerType.TorchDistributed)
"""


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data set, weights, and features of a small network."""
    folder = tmp_path_factory.mktemp("channels")
    dataset = prepared(folder)
    torch.manual_seed(0)
    network = model.build("resnet18")
    (folder / "pretrained").mkdir()
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, folder / "pretrained" / "resnet18.safetensors"
    )
    model.split_head(network)
    settings = config(recipe="head", pretrained="channel", image_size=32, feature_views=2)
    features.cache(training.read_info(dataset), network.eval(), "resnet18", settings, folder / "features")
    return {"dataset": dataset, "pretrained": folder / "pretrained", "features": folder / "features"}


def one_process(base: Path, channels: dict[str, Path], flags: dict[str, str]) -> list[dict[str, Any]]:
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    places = {f"SM_CHANNEL_{name.upper()}": str(path) for name, path in channels.items()}
    done = run_script("hpo.py", *arguments, SAGEMAKER_BASE_DIR=str(base), **places)
    assert done.returncode == 0, done.stderr
    return json.loads((base / "model" / "trial.json").read_text())["history"]


def two_processes(base: Path, channels: dict[str, Path], flags: dict[str, str]) -> list[dict[str, Any]]:
    """The container's files, and the toolkit in a process of its own."""
    code = base / "source"
    shutil.copytree(MODEL_CODE, code, ignore=shutil.ignore_patterns("requirements*.txt", "__pycache__"))
    for name, path in channels.items():
        (base / "input" / "data").mkdir(parents=True, exist_ok=True)
        (base / "input" / "data" / name).symlink_to(path)
    toolkit = {
        "sagemaker_program": "hpo.py",
        "sagemaker_submit_directory": str(code),
        "sagemaker_torch_distributed_enabled": "true",
        # On machines with GPUs the toolkit starts one process for each of them; this parameter stands for two.
        "sagemaker_mpi_num_of_processes_per_host": "2",
    }
    group = {"instance_group_name": "homogeneousCluster", "instance_type": "ml.g5.12xlarge", "hosts": ["localhost"]}
    resources = {
        "current_host": "localhost",
        "hosts": ["localhost"],
        "network_interface_name": "lo",
        "current_instance_type": "ml.g5.12xlarge",
        "current_group_name": "homogeneousCluster",
        "instance_groups": [group],
    }
    files = {
        "hyperparameters": {**flags, **toolkit},
        "inputdataconfig": {name: {"TrainingInputMode": "File"} for name in channels},
        "resourceconfig": resources,
    }
    (base / "input" / "config").mkdir(parents=True)
    for name, content in files.items():
        (base / "input" / "config" / f"{name}.json").write_text(json.dumps(content))
    environment = {
        **os.environ,
        "SAGEMAKER_BASE_DIR": str(base),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": note_last_threads(base / "threads"),
    }
    done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, timeout=240, cwd=base)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "processes=2" in done.stdout
    assert "SIGABRT" not in done.stdout + done.stderr
    assert_gloo_has_ended(base / "threads")
    assert sum(line.startswith("epoch=1/") for line in done.stdout.splitlines()) == 1, "one process of the two speaks"
    return json.loads((base / "model" / "trial.json").read_text())["history"]


@pytest.mark.parametrize(
    "flags",
    [
        {"recipe": "head", "batch_size": "10", "epochs": "4", "learning_rate": "0.05"},
        {
            "recipe": "finetune",
            "learning_rate": "0.002",  # of weights that were never trained, hardly any step is a good one
            "backbone": "resnet18",
            "pretrained": "channel",
            "image_size": "32",
            "batch_size": "10",
            "accumulation_steps": "2",
            "epochs": "2",
            "batch_norm": "frozen",
            "precision": "fp32",
            "augmentation": "trivial",
        },
    ],
    ids=["features", "pictures"],
)
def test_two_processes_reach_the_metrics_of_one(tmp_path: Path, channels: dict[str, Path], flags: dict[str, str]):
    """24 pictures in batches of 10: full batches, and a last one of 4."""
    alone = one_process(tmp_path / "one", channels, {**flags, "accumulation_steps": "1"})
    together = two_processes(tmp_path / "two", channels, flags)
    assert len(alone) == int(flags["epochs"])
    for first, second in zip(alone, together, strict=True):
        for name in ("train_loss", "valid_loss", "train_top1", "valid_top1", "learning_rate"):
            assert second[name] == pytest.approx(first[name], rel=2e-4), name
