"""The hook: what is saved, when, at which names and steps, and that the training stays what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import saved_tensors, training
from classifier.debugging import followed_activations, followed_layers
from classifier.engine import Trainer
from classifier.errors import ConfigError
from debugging_fakes import small, watched
from model_fakes import MODEL_CODE, assert_gloo_has_ended, config, note_last_threads, prepared
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")  # smdebug is unmaintained and says so in many ways

STEPS = 3  # of an epoch: 24 pictures in batches of 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True)
def _channel(dataset: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(dataset))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def steps(folder: Path) -> list[saved_tensors.Step]:
    trial = saved_tensors.open_trial(folder / "tensors")
    return [saved_tensors.read_step(trial, number) for number in trial.steps()]


def test_smdebug_reads_losses_rates_accuracies_and_reductions_under_sensible_names(tmp_path: Path):
    _, history = watched(config(epochs=2, debug_interval=1), tmp_path, small())
    from smdebug import modes
    from smdebug.trials import create_trial

    trial = create_trial(str(tmp_path / "tensors"))
    loss = trial.tensor("CrossEntropyLoss_output_0")
    assert loss.steps(mode=modes.TRAIN) == list(range(6))
    assert loss.steps(mode=modes.EVAL) == [3, 6]  # numbered by the steps done by then: one axis for both curves
    assert [loss.value(step, mode=modes.EVAL).item() for step in (3, 6)] == pytest.approx([row["valid_loss"] for row in history])
    top1 = trial.tensor("top1")
    assert top1.value(6, mode=modes.EVAL).item() == pytest.approx(history[1]["valid_top1"])
    assert trial.tensor("learning_rate").value(3, mode=modes.TRAIN).item() == pytest.approx(history[1]["learning_rate"])
    assert trial.tensor_names(collection="losses") == ["CrossEntropyLoss_output_0", "epoch_train_loss"]
    assert set(trial.tensor_names(collection="metrics")) == {"examples", "epoch_train_top1", "learning_rate", "top1"}
    assert trial.tensor_names(collection="weights") == [f"Sequential_{number}.weight" for number in (0, 2, 6)]
    assert trial.tensor_names(collection="gradients") == [f"gradient/Sequential_{number}.weight" for number in (0, 2, 6)]
    assert {"1_output_0", "3_output_0", "dead_share/1"} <= set(trial.tensor_names(collection="activations"))
    assert trial.tensor_names(collection="update_ratios") == ["update_ratio/0", "update_ratio/2", "update_ratio/6"]


def test_the_figures_are_those_of_torch(tmp_path: Path):
    """The first step, done again by hand."""
    network = small()
    weight = network[2].weight.detach().clone()
    seen: dict[str, Tensor] = {}

    def change(setup: Any) -> None:
        batch = next(iter(setup.train.epoch(0, 0)))
        trainer = Trainer(network, setup.config, setup.preprocessing, "fp32", nn.CrossEntropyLoss(label_smoothing=0.05), 3, STEPS)
        trainer.train_mode()
        inputs, labels = trainer.inputs(batch)
        seen["activation"] = network[:2](inputs).detach()
        trainer.loss_function(network(inputs), labels).backward()
        seen["gradient"] = network[2].weight.grad.detach().clone()
        network.zero_grad(set_to_none=True)

    watched(config(epochs=1, debug_interval=1, momentum=0, weight_decay=0, warmup_epochs=0), tmp_path, network, change)
    first = steps(tmp_path)[0]
    expected = {"Sequential_2.weight": weight, "gradient/Sequential_2.weight": seen["gradient"], "1_output_0": seen["activation"]}
    for name, tensor in expected.items():
        found = first.reductions[name]
        assert found["l2"] == pytest.approx(tensor.norm().item(), rel=1e-4), name
        assert found["mean"] == pytest.approx(tensor.mean().item(), rel=1e-3, abs=1e-6), name
        assert found["std"] == pytest.approx(tensor.std(correction=0).item(), rel=1e-4), name
        assert found["zeros"] == pytest.approx((tensor == 0).float().mean().item(), abs=1e-6), name
    assert first.reductions["1_output_0"]["zeros"] > 0.05
    change_of_weights = 0.03 * seen["gradient"].norm() / weight.norm()
    assert first.values["update_ratio/2"] == pytest.approx(change_of_weights.item(), rel=1e-3)


def test_each_mode_has_its_interval_and_an_epoch_is_always_seen(tmp_path: Path):
    watched(config(epochs=4, debug_interval=2, debug_eval_interval=2), tmp_path / "a", small())
    assert [step.number for step in steps(tmp_path / "a") if step.train] == [0, 2, 4, 6, 8, 10]
    assert [step.number for step in steps(tmp_path / "a") if not step.train] == [3, 9]
    watched(config(epochs=2, debug_interval=1000), tmp_path / "b", small())
    assert [step.number for step in steps(tmp_path / "b") if step.train] == [0, 3]


def test_layers_are_spread_over_the_depth_or_chosen_by_name():
    deep = nn.Sequential(*[nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()) for _ in range(40)])
    names = list(followed_layers(deep))
    assert len(names) == 12
    assert (names[0], names[-1]) == ("0.0", "39.0")
    assert list(followed_layers(deep, r"^3\.")) == ["3.0"]
    assert list(followed_activations(deep, r"^3\.")) == ["3.1"]
    assert list(followed_activations(nn.Sequential(nn.Linear(2, 2)))) == ["0"]
    with pytest.raises(ConfigError, match=r"debug_layers='nothing' matches no layer: names are such as 0\.0"):
        followed_layers(deep, "nothing")
    with pytest.raises(ConfigError, match="debug_layers='\\(' is no regular expression"):
        config(debug_layers="(")


RECIPES: dict[str, dict[str, object]] = {
    "bf16": {"precision": "bf16"},
    "accumulation and average": {"accumulation_steps": 4, "ema_decay": 0.9},
    "mixing and clipping": {"mixup_alpha": 0.2, "gradient_clip_norm": 1.0, "optimizer": "adamw"},
}


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES.keys())
def test_a_watched_training_is_the_same_bit_for_bit(tmp_path: Path, changes: dict[str, object]):
    alone, watching = config(epochs=2, **changes), config(epochs=2, debug_interval=1, **changes)

    setup = training.prepare_run(alone)
    setup.network = small().to(memory_format=torch.channels_last)
    training.fit(setup, say=lambda _: None)
    other, _ = watched(watching, tmp_path, small().to(memory_format=torch.channels_last))
    for name, value in setup.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name
    found = steps(tmp_path)
    assert len([step for step in found if step.train]) == 2 * STEPS
    assert all("gradient/Sequential_0.weight" in step.reductions for step in found if step.train)


def test_overflows_that_the_loss_scaler_handles_are_left_out(tmp_path: Path):
    """fp16: the first scale of 65536 overflows a gradient; later ones are saved as what they are without the scale."""
    watched(config(epochs=2, debug_interval=1), tmp_path / "plain", small())

    def half(setup: Any) -> None:
        setup.precision = "fp16"

    watched(config(epochs=2, debug_interval=1), tmp_path / "half", small(), half)
    plain, scaled = steps(tmp_path / "plain")[0], steps(tmp_path / "half")[0]
    name = "gradient/Sequential_6.weight"
    assert scaled.reductions[name]["l2"] == pytest.approx(plain.reductions[name]["l2"], rel=0.02)


def test_nothing_runs_in_a_step_that_is_not_saved(tmp_path: Path):
    network, hooks = small(), list[int]()

    class Counting(nn.Flatten):
        def forward(self, inputs: Tensor) -> Tensor:
            if self.training:
                hooks.append(sum(len(module._forward_hooks) for module in network.modules()))
            return super().forward(inputs)

    network[5] = Counting()
    watched(config(epochs=2, debug_interval=3), tmp_path, network)
    assert [count > 0 for count in hooks] == [True, False, False, True, False, False]
    assert not any(module._forward_hooks for module in network.modules())


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path: Path):
    settings = config(epochs=3, debug_interval=1, checkpoint_interval_s=0)
    whole, _ = watched(settings, tmp_path / "whole", small())

    def interrupt(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 1):
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        watched(settings, tmp_path / "parts", small(), checkpoints=tmp_path / "checkpoints", on_step=interrupt)
    folder = tmp_path / "parts" / "tensors"
    assert not (folder / "training_job_end.ts").exists(), "readers would take an interrupted training for an ended one"
    before = sorted(path.name for path in (folder / "index").rglob("*.json"))
    assert len(before) == 6  # five steps and an evaluation
    (folder / "index" / "000000000" / "000000000007_worker_0.json.tmp").write_text("half a step of a killed run")
    resumed, _ = watched(settings, tmp_path / "parts", small(), checkpoints=tmp_path / "checkpoints")
    assert (folder / "training_job_end.ts").exists()
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path):
    watched(config(epochs=3, debug_interval=1), tmp_path, small())
    watched(config(epochs=1, debug_interval=1), tmp_path, small())
    assert [step.number for step in steps(tmp_path)] == [0, 1, 2, 3]


def test_the_files_are_complete_while_the_training_runs(tmp_path: Path):
    counts = []

    def look(epoch: int, step: int) -> None:
        counts.append(len(steps(tmp_path)))

    watched(config(epochs=2, debug_interval=1), tmp_path, small(), on_step=look)
    assert counts == [1, 2, 3, 5, 6, 7]


def test_the_hook_says_what_share_of_the_time_it_took(tmp_path: Path):
    watched(config(epochs=2, debug_interval=1), tmp_path, small())
    share = json.loads((tmp_path / "profiler" / "overhead.json").read_text())["hook_share"]
    assert 0 < share < 1


def test_a_hook_that_takes_too_long_leaves_steps_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("classifier.debugging.FREE_SAVES", 2)
    monkeypatch.setattr("classifier.debugging.MAX_SHARE", 0.0)
    watched(config(epochs=2, debug_interval=1), tmp_path, small())
    assert [step.number for step in steps(tmp_path) if step.train] == [0, 1]


def test_a_long_training_saves_a_bounded_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("classifier.debugging.MAX_SAVES", 3)
    watched(config(epochs=4, debug_interval=1), tmp_path, small())
    assert [step.number for step in steps(tmp_path) if step.train] == [0, 4, 8]


@pytest.mark.slow
def test_the_first_of_two_processes_is_watched(dataset: Path, tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(MODEL_CODE / "train_model.py")]
    command += ["--recipe", "scratch", "--epochs", "2", "--batch_size", "8", "--debug_interval", "1", "--precision", "fp32"]
    run = tmp_path / "run"
    places = {"SAGEMAKER_BASE_DIR": str(tmp_path), "SM_CHANNEL_DATASET": str(dataset), "RUN_OUTPUT_URI": run.as_uri()}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1", "PYTHONPATH": note_last_threads(tmp_path / "threads")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_gloo_has_ended(tmp_path / "threads")
    trial = saved_tensors.open_trial(run / "debug-output")
    found = [saved_tensors.read_step(trial, number) for number in trial.steps()]
    assert [step.number for step in found] == [0, 1, 2, 3, 3, 4, 5, 6]
    assert "gradient/ResNet_conv1.weight" in found[0].reductions
    assert (run / "rule-output" / "VanishingGradient" / "VanishingGradient.json").is_file()
