"""The training rules: each fires on a training with its fault, through the hook and smdebug's reader, and on no healthy one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier import features, findings, live_rules, model, profile_rules, rules, saved_tensors, training
from classifier.errors import ConfigError
from classifier.preparation import prepare
from debugging_fakes import fired, judged, small, watched
from model_fakes import MODEL_CODE, config, flags, prepared, run_script, write_folder
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # smdebug is unmaintained and says so in many ways

BALANCED = [8, 8, 8]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True)
def _channel(dataset: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(dataset))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# --- each rule with its fault ------------------------------------------------------------------------------------------------


def found(folder: Path, network: nn.Module, counts: list[int] = BALANCED, change: Any = None, **changes: object) -> dict[str, Any]:
    """The findings on a training of a small network."""
    settings = config(**{"epochs": 6, "debug_interval": 1, "label_smoothing": 0.0, "learning_rate": 0.1, **changes})
    try:
        _, history = watched(settings, folder, network, change)
    except training.UserError:  # the loss became not finite, which ends the training
        history = []
    return judged(folder, history, counts)


def test_a_healthy_training_of_the_small_network_sets_off_no_rule(tmp_path: Path):
    found_here = found(tmp_path, small())
    assert fired(found_here) == set()
    assert not any("not judged" in finding.detail for finding in found_here.values()), "every rule has judged it"
    assert all(finding.threshold and finding.source for finding in found_here.values())


def deep_sigmoids() -> nn.Sequential:
    """Sixteen sigmoid layers: each takes the gradient at most by a quarter of its weights' size."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(3 * 32 * 32, 32)]
    for _ in range(16):
        layers += [nn.Sigmoid(), nn.Linear(32, 32)]
    return nn.Sequential(*layers, nn.Sigmoid(), nn.Linear(32, 3))


def test_vanishing_gradient(tmp_path: Path):
    finding = found(tmp_path, deep_sigmoids())["VanishingGradient"]
    assert finding.triggered
    assert "Sequential_1.weight" in finding.detail
    assert "step 0" in finding.detail
    assert "ReLUs" in finding.remedy


def test_exploding_tensor(tmp_path: Path):
    finding = found(tmp_path, small(), learning_rate=10, momentum=0.99, warmup_epochs=0, change=unbounded)["ExplodingTensor"]
    assert finding.triggered
    assert finding.steps
    assert f"at step {finding.steps[0]}" in finding.detail
    assert "learning_rate" in finding.remedy


def unbounded(setup: training.Setup) -> None:
    """Without the ReLU6 that bounds the activations."""
    setup.network[3] = nn.ReLU()  # type: ignore[operator]


def dead() -> nn.Sequential:
    network = small()
    nn.init.constant_(network[2].bias, -20.0)  # type: ignore[arg-type]
    return network


def test_dead_relu(tmp_path: Path):
    finding = found(tmp_path, dead())["DeadRelu"]
    assert finding.triggered
    assert "100% of the channels after 3 are dead" in finding.detail
    assert finding.values["layers"] == ["3"]


def test_poor_weight_initialization(tmp_path: Path):
    constant = small()
    for module in constant.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.05)
    finding = found(tmp_path / "constant", constant)["PoorWeightInitialization"]
    assert finding.triggered
    assert "at step 0: 2 layers of weights without variance" in finding.detail
    huge = small()
    nn.init.normal_(huge[6].weight, std=100.0)  # type: ignore[arg-type]
    finding = found(tmp_path / "huge", huge, epochs=1, learning_rate=1e-6)["PoorWeightInitialization"]
    assert finding.triggered
    assert "where guessing has 1.1" in finding.detail


def test_loss_not_decreasing_and_update_ratio_too_small(tmp_path: Path):
    found_here = found(tmp_path, small(), learning_rate=1e-6, optimizer="adamw")
    assert fired(found_here) == {"LossNotDecreasing", "UpdateRatioTooSmall"}
    assert "raise learning_rate" in found_here["UpdateRatioTooSmall"].remedy
    assert len(found_here["UpdateRatioTooSmall"].steps) == 18


def test_update_ratio_too_large(tmp_path: Path):
    finding = found(tmp_path, small(), learning_rate=10, warmup_epochs=0)["UpdateRatioTooLarge"]
    assert finding.triggered
    assert "at step" in finding.detail


def flat() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 3))


def random_labels(setup: training.Setup) -> None:
    """Labels that say nothing of the pictures: there is nothing to learn but the pictures themselves."""
    chance = np.random.default_rng(0)
    for batches in (setup.train, setup.valid):
        held = batches._pictures  # type: ignore[attr-defined]
        batches._pictures = replace(held, labels=chance.permutation(held.labels))  # type: ignore[attr-defined]


MEMORISED: dict[str, object] = {
    "random_resized_crop_min_scale": 1.0, "learning_rate": 0.01, "epochs": 40, "weight_decay": 0, "debug_interval": 3,
}  # fmt: skip


def test_overfit_and_overtraining(tmp_path: Path):
    found_here = found(tmp_path, flat(), change=random_labels, **MEMORISED)
    assert {"Overfit", "Overtraining"} <= fired(found_here)
    assert "at step 120: train top1 1.000" in found_here["Overfit"].detail
    assert "fewer epochs" in found_here["Overtraining"].remedy


def test_class_imbalance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures = write_folder(tmp_path / "pictures", train=40)
    for label in (1, 2):
        for path in sorted((pictures / "train" / f"n0200000{label}-breed_{label}").iterdir())[4:]:
            path.unlink()
    prepare(flags(pictures.as_uri(), tmp_path))
    lopsided = next(path for path in (tmp_path / "datasets").iterdir() if (path / "dataset.json").exists())
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(lopsided))
    setup, history = watched(config(epochs=2), tmp_path, small())
    finding = judged(tmp_path, history, np.bincount(setup.labels).tolist())["ClassImbalance"]
    assert finding.triggered
    assert "4 to 40" in finding.detail
    assert "class_weights" in finding.remedy


# --- health ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Channels with weights that have learned something, and their features."""
    folder = tmp_path_factory.mktemp("weights")
    os.environ["SM_CHANNEL_DATASET"] = str(dataset)
    setup = training.prepare_run(config(epochs=12, learning_rate=0.01))  # running statistics take some steps
    training.fit(setup, say=lambda _: None)
    network = setup.network
    _, head = model.split_head(network)
    state = {
        key: value.contiguous() for key, value in {**network.state_dict(), "fc.weight": head.weight, "fc.bias": head.bias}.items()
    }
    (folder / "pretrained").mkdir()
    save_file(state, folder / "pretrained" / "resnet18.safetensors")
    settings = config(recipe="head", pretrained="channel", image_size=32, feature_views=3)
    features.cache(training.read_info(dataset), network.eval(), "resnet18", settings, folder / "features")
    return {"SM_CHANNEL_PRETRAINED": str(folder / "pretrained"), "SM_CHANNEL_FEATURES": str(folder / "features")}


FINETUNE = {"pretrained": "channel", "backbone": "resnet18", "image_size": 32, "epochs": 4}
HEALTHY: dict[str, dict[str, object]] = {
    "head": {"recipe": "head", "pretrained": "channel", "epochs": 8},
    "head, adamw, mixup": {"recipe": "head", "pretrained": "channel", "epochs": 8, "optimizer": "adamw", "mixup_alpha": 0.2},
    "head, long, without smoothing": {"recipe": "head", "pretrained": "channel", "epochs": 30, "label_smoothing": 0.0},
    "scratch": {"learning_rate": 0.01},
    "scratch, adamw, bf16": {"optimizer": "adamw", "precision": "bf16", "epochs": 4},
    "scratch, mixing, average": {"mixup_alpha": 0.2, "cutmix_alpha": 0.5, "ema_decay": 0.5, "learning_rate": 0.003},
    "scratch, accumulation, augmentation": {
        "accumulation_steps": 2, "gradient_clip_norm": 1.0, "augmentation": "trivial", "learning_rate": 0.01, "epochs": 6,
    },
    "finetune, frozen statistics": {"recipe": "finetune", "batch_norm": "frozen", **FINETUNE},
    "finetune, adamw, layer decay": {
        "recipe": "finetune", "batch_norm": "train", "optimizer": "adamw", "layer_decay": 0.7,
        "class_weights": "balanced", **FINETUNE,
    },
    "lp-ft": {"recipe": "lp-ft", "probe_epochs": 8, "learning_rate": 0.001, **FINETUNE},
}  # fmt: skip
QUICK = ("head", "scratch", "lp-ft")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HEALTHY])
def test_a_healthy_training_sets_off_no_rule(tmp_path: Path, weights: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str):
    for key, value in weights.items():
        monkeypatch.setenv(key, value)
    _, history = watched(config(**{"debug_interval": 1, **HEALTHY[name]}), tmp_path)
    found_here = judged(tmp_path, history, BALANCED)
    assert fired(found_here) == set(), [finding.detail for finding in found_here.values() if finding.triggered]


def test_no_rule_fires_on_the_beginning_of_a_healthy_training(tmp_path: Path):
    """The rules beside the training see every prefix of it."""
    seen, live = set[str](), rules.TrainingRules(tmp_path / "tensors", BALANCED)

    def look(epoch: int, step: int) -> None:
        seen.update(finding.rule for finding in live.findings() if finding.triggered)

    watched(config(epochs=6, debug_interval=1, learning_rate=0.1), tmp_path, small(), on_step=look)
    assert seen == set()


# --- judgement without a training --------------------------------------------------------------------------------------------


def history(*rows: tuple[float, float, float, float]) -> list[dict[str, float]]:
    names = ("train_loss", "train_top1", "valid_loss", "valid_top1")
    return [dict(zip(names, row, strict=True)) for row in rows]


def by_history(rows: list[dict[str, float]], counts: list[int]) -> set[str]:
    found_here, notes = rules.training_findings(Path("nowhere"), rows, counts)
    assert "nowhere holds no saved tensors" in notes[0]
    assert [finding.rule for finding in found_here] == list(findings.TRAINING_RULES)
    return {finding.rule for finding in found_here if finding.triggered}


def test_the_epochs_figures_stand_in_for_tensors():
    assert by_history(history((2, 0.3, 2, 0.3), (1, 0.7, 1, 0.7)), [10, 12]) == set()
    assert by_history(history((2, 0.1, 2, 0.1), (2.1, 0.1, 2.1, 0.1)), [10, 100]) == {"LossNotDecreasing", "ClassImbalance"}
    overdone = history((2, 0.5, 0.5, 0.8), (1, 0.9, 0.8, 0.7), (0.5, 1, 0.9, 0.7), (0.1, 1, 1.0, 0.7))
    assert by_history(overdone, [5, 5]) == {"Overfit", "Overtraining"}
    assert by_history([], []) == set()


def test_tiny_losses_and_noise_are_no_fault():
    tiny = history((0.4, 0.9, 0.02, 1.0), *[(0.01, 1.0, 0.01 * 2**number, 1.0) for number in range(4)])
    assert by_history(tiny, [8, 8]) == set()
    augmented = history((2.0, 0.3, 1.0, 0.8), (1.9, 0.4, 0.7, 0.9), (1.9, 0.4, 0.6, 0.9))
    assert by_history(augmented, [8, 8]) == set()


def test_rules_are_smdebugs_and_complete(tmp_path: Path):
    from smdebug.rules.rule import Rule

    assert tuple(kind.__name__ for kind in rules.JUDGES) == findings.TRAINING_RULES
    for kind in rules.JUDGES:
        assert issubclass(rules.smdebug_rule(kind), Rule)
        assert kind.__doc__
        assert kind.threshold
        assert kind.source
        assert kind.remedy
    assert {finding.rule for finding in profile_rules.profile_findings(tmp_path)} == set(findings.PROFILER_RULES)


def test_a_finding_says_threshold_and_source():
    finding = rules.ClassImbalance([1, 100]).verdict().to_json()
    assert finding["RuleTriggered"] == 1
    assert "10 times" in finding["Threshold"]
    assert finding["Source"].startswith("https://docs.aws.amazon.com/")


# --- beside the training -----------------------------------------------------------------------------------------------------


def test_rules_run_beside_the_training_and_stop_it(dataset: Path, tmp_path: Path):
    """A real job: a rule fires, the training saves a checkpoint and ends with one clear line."""
    epochs = 160  # far longer than the rules need to begin, on a busy machine too; of more, the hook would not save every step
    arguments = ["--recipe", "scratch", "--epochs", str(epochs), "--batch_size", "8", "--precision", "fp32"]
    faulty = ["--learning_rate", "10", "--warmup_epochs", "0", "--optimizer", "adamw"]
    watch = ["--debug_interval", "1", "--stop_rules", "ExplodingTensor,UpdateRatioTooLarge"]
    run = tmp_path / "run"
    places = {"SAGEMAKER_BASE_DIR": str(tmp_path), "SM_CHANNEL_DATASET": str(dataset), "RUN_OUTPUT_URI": run.as_uri()}
    done = run_script("train_model.py", *arguments, *faulty, *watch, **places)
    assert done.returncode == 1, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: stopped by rule ")
    assert "at step" in lines[0]
    assert "what to change: lower learning_rate" in lines[0]
    assert (tmp_path / "output" / "failure").read_text().startswith("stopped by rule ")
    assert (tmp_path / "checkpoints" / "last.pt").is_file()
    assert not (tmp_path / "model" / "model.onnx").exists()
    ended = sum(line.startswith("epoch=") for line in done.stdout.splitlines())
    assert ended < epochs, "it was stopped while it ran"
    rule = lines[0].split()[4].rstrip(":")
    uploaded = json.loads((run / "rule-output" / rule / f"{rule}.json").read_text())
    assert uploaded["RuleTriggered"] == 1
    assert {path.name for path in (run / "rule-output").iterdir()} >= set(findings.TRAINING_RULES)


def test_an_unknown_stop_rule_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"there is no rule 'Overfitting': known are VanishingGradient, .*StepOutlier"):
        config(stop_rules="Overfit, Overfitting")
    assert config(stop_rules="Overfit, StepOutlier").stopping() == ["Overfit", "StepOutlier"]


def test_training_stops_after_a_checkpoint_and_goes_on_without_the_rule(tmp_path: Path):
    reasons = iter(["", "", "stopped by rule Overfit"])
    with pytest.raises(training.UserError, match="stopped by rule Overfit"):
        watched(config(epochs=2, stop_rules="Overfit"), tmp_path, small(), checkpoints=tmp_path / "c", stop=lambda: next(reasons))
    steps = list[int]()
    watched(
        config(epochs=2), tmp_path, small(), checkpoints=tmp_path / "c", on_step=lambda epoch, step: steps.append(3 * epoch + step)
    )
    assert steps == [3, 4, 5]


PARENT = """
import sys, time
from classifier.live_rules import RuleProcess, Watched
with RuleProcess(Watched(tensors=sys.argv[1], profile=sys.argv[1], out=sys.argv[2])) as rules:
    print(rules._process.pid, flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_rules_die_with_a_training_that_is_killed(tmp_path: Path):
    command = [sys.executable, "-c", PARENT, str(tmp_path / "tensors"), str(tmp_path / "rules")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=MODEL_CODE) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        assert alive(child)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)
        deadline = time.monotonic() + 10
        while alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(child)


def test_rules_that_fail_are_a_note(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    index = tmp_path / "tensors" / "index" / "000000000"
    (tmp_path / "tensors" / "collections" / "000000000").mkdir(parents=True)
    (tmp_path / "tensors" / "collections" / "000000000" / "worker_0_collections.json").write_text("{")
    index.mkdir(parents=True)
    (index / "000000000000_worker_0.json").write_text("{")
    watched_folders = live_rules.Watched(str(tmp_path / "tensors"), str(tmp_path / "profile"), str(tmp_path / "rules"))
    with live_rules.RuleProcess(watched_folders) as beside:
        assert beside.stop_reason() == ""
    assert "note: the rules beside the training have ended (" in capfd.readouterr().out


def test_findings_are_written_once_and_when_they_change(tmp_path: Path):
    finding = findings.Finding("Overfit", False, "fine")
    live_rules.write_findings([finding], tmp_path)
    path = tmp_path / "Overfit" / "Overfit.json"
    before = path.stat().st_mtime_ns
    live_rules.write_findings([finding], tmp_path)
    assert path.stat().st_mtime_ns == before
    live_rules.write_findings([findings.Finding("Overfit", True, "at step 3")], tmp_path)
    assert json.loads(path.read_text())["Detail"] == "at step 3"
    assert asdict(finding)["steps"] == []


def test_loss_series_reads_the_training_losses(tmp_path: Path):
    watched(config(epochs=2, debug_interval=1), tmp_path, small())
    series = saved_tensors.loss_series(tmp_path / "tensors")
    assert [step for step, _ in series] == list(range(6))
