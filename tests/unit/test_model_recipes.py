"""Every recipe and option trains; learning rates fall where they should; bad values end in one clear line."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier import engine, export, features, model, optim, serving, training
from classifier.errors import ConfigError, DataError
from classifier.served_model import ServedModel
from model_fakes import config, prepared, run_script
from torch import nn


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel with weights of a network that has never seen a picture."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    torch.save(model.build("resnet18").state_dict(), folder / "resnet18.pth")
    return folder


@pytest.fixture(autouse=True)
def channels(dataset: Path, weights: Path, monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    for name, value in (("SM_CHANNEL_DATASET", dataset), ("SM_CHANNEL_PRETRAINED", weights), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, str(value))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "gradient_clip_norm": 1.0},
        {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "class_weights": "balanced", "ema_decay": 0.5, "augmentation": "rand"},
        {"accumulation_steps": 2, "precision": "bf16"},
        {"input_cache": "none", "num_workers": 2},
        {"input_cache": "disk", "recipe": "finetune", "pretrained": "channel", "batch_norm": "frozen", "layer_decay": 0.7},
    ],
    ids=["adamw", "mixed", "accumulated", "shards", "frozen"],
)
def test_options_learn_to_tell_three_colours_apart(changes: dict[str, object]):
    setup = training.prepare_run(config(**{"epochs": 6, "batch_size": 8, "learning_rate": 0.01, **changes}))
    history = training.fit(setup)
    assert len(history) == 6
    assert min(row["train_loss"] for row in history[1:]) < history[0]["train_loss"]
    if "mixup_alpha" not in changes:  # of a mixed picture, either class is right
        assert max(row["train_top1"] for row in history) >= 0.75  # a third is chance


def test_accumulated_parts_make_the_same_step():
    states = []
    for parts in (1, 4):
        changes = {"accumulation_steps": parts, "batch_norm": "frozen", "recipe": "finetune", "pretrained": "channel", "epochs": 1}
        setup = training.prepare_run(config(**changes))
        training.fit(setup)
        states.append(setup.network.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(states[1][name].float(), value.float(), atol=2e-5), name


@pytest.fixture
def probed(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> training.Setup:
    """A run of lp-ft whose probe has been trained, and which has not begun to fine-tune; what it said is the test's to read."""
    torch.manual_seed(0)
    network = model.build("resnet18")
    model.split_head(network)
    settings = {"recipe": "lp-ft", "pretrained": "channel", "image_size": 32}
    features.cache(training.read_info(dataset), network.eval(), "resnet18", config(**settings), tmp_path / "features")
    monkeypatch.setenv("SM_CHANNEL_FEATURES", str(tmp_path / "features"))
    return training.prepare_run(config(**{**settings, "backbone": "auto"}, probe_epochs=20, epochs=1, learning_rate=0.01))


def test_a_linear_probe_comes_before_the_fine_tuning(probed: training.Setup, tmp_path: Path, capsys):
    assert probed.config.backbone == "resnet18"
    said = capsys.readouterr().out
    assert "linear probe ended with top1_on_valid=" in said
    assert "valid_top1=" not in said, "the probe's epochs are none of the trial's"
    trainer = training.Run.begin(probed).trainer
    before = engine.evaluate(trainer, probed.valid, observer=engine.Silent())
    assert before.top1 >= 0.6, "fine-tuning begins with the head that the probe found"
    history = training.fit(probed)
    described = export.export(probed, training.whole_model(probed), history, tmp_path / "model")
    assert described["hyperparameters"]["recipe"] == "lp-ft"
    assert described["valid_top1"] == engine.evaluate(trainer, probed.valid, observer=engine.Silent()).top1
    assert isinstance(ServedModel(tmp_path / "model").labels, list)


@pytest.mark.parametrize(("middle", "kept"), [(0.9, 0.5), (0.5, 0.5), (0.3, 1.0)], ids=["better", "of-less-loss", "worse"])
def test_lp_ft_keeps_the_mean_of_probe_and_fine_tuned_weights_where_it_is_better(
    probed: training.Setup, middle: float, kept: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    start = copy.deepcopy(probed.network.state_dict())
    judged: list[dict[str, torch.Tensor]] = []

    def evaluate(trainer: engine.Trainer, *_: object, **__: object) -> engine.Result:
        judged.append(copy.deepcopy(trainer.judged.state_dict()))
        return engine.Result(loss=1.0 / len(judged), top1=(0.5, middle)[len(judged) - 1], seconds=0.0, examples=1)

    monkeypatch.setattr(training, "evaluate", evaluate)
    history = training.fit(probed)
    assert history[-1]["valid_top1"] == 0.5
    assert history[-1]["best_valid_top1"] == max(0.5, middle)
    tuned = judged[0]
    assert not torch.equal(tuned["conv1.weight"], start["conv1.weight"])
    for name, value in probed.network.state_dict().items():
        assert torch.allclose(value.double(), start[name].double().lerp(tuned[name].double(), kept), atol=1e-6), name
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(f"top1_on_valid={middle:.4f} best_valid_top1={max(0.5, middle):.4f}")
    assert " valid_top1=" not in said, "the metric of the last epoch stays the last"


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "convnext_tiny", "efficientnet_v2_s", "swin_t", "vit_b_16"])
def test_the_head_learns_fastest_and_rates_fall_with_depth(backbone: str):
    with torch.device("meta"):
        network = model.build(backbone)
    settings = config(recipe="finetune", pretrained="channel", learning_rate=0.1, backbone_lr_scale=0.1, layer_decay=0.5)
    rates = optim.learning_rates(network, settings)
    head = model.head_name(network)
    assert {rate for name, rate in rates.items() if name.startswith(head)} == {0.1}
    below = [rate for name, rate in rates.items() if not name.startswith(head)]
    assert max(below) == pytest.approx(0.01)
    assert min(below) < 0.01 * 0.5**4
    if backbone != "vit_b_16":  # its class token is registered before, and works after, the first layers
        assert below == sorted(below), "blocks lie in the order in which the picture passes them"


def test_groups_hold_every_weight_once_and_decay_no_bias():
    network = model.build("mobilenet_v2", 7)
    optimizer = optim.make_optimizer(network, config(recipe="finetune", pretrained="channel", weight_decay=0.1))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held}) == len(list(network.parameters()))
    for group in optimizer.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])
    assert optimizer.param_groups[0]["lr"] == config().learning_rate


def test_class_weights_make_classes_count_alike():
    setup = training.prepare_run(config(class_weights="balanced"))
    setup.labels = np.array([0] * 8 + [1] * 4 + [2] * 2)
    weight = training.loss_of(setup).weight
    assert weight is not None
    assert torch.allclose(weight * torch.tensor([8.0, 4.0, 2.0]), torch.full((3,), 14 / 3))


def test_compiled_networks_train_like_others():
    """torch.compile takes tens of seconds, so the compiler is one that changes nothing."""
    setup = training.prepare_run(config(epochs=1))
    run = training.Run.begin(setup)
    calls = []
    run.trainer.forward = torch.compile(setup.network, backend=lambda graph, _: calls.append(1) or graph.forward)  # type: ignore[func-returns-value]
    batch = next(setup.train.epoch(0))
    before = {name: value.clone() for name, value in setup.network.state_dict().items()}
    sums = run.trainer.step(batch, 0, 0, engine.Silent())
    assert calls
    assert sums[2] == len(batch.labels)
    assert any(not torch.equal(value, before[name]) for name, value in setup.network.state_dict().items())


def test_batches_go_where_the_weights_are():
    """With pretended tensors on a GPU: a batch left on the CPU would end in another error than the one at the very end."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    class Two:
        num_examples = 4

        def __len__(self) -> int:
            return 1

        def epoch(self, number: int, start: int = 0):
            yield engine.Batch(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 4)

    with FakeTensorMode():
        with torch.device("cuda"):
            network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
        preprocessing = serving.Preprocessing.of(8)
        trainer = engine.Trainer(network, config(), preprocessing, "fp32", nn.CrossEntropyLoss(), 2, 1)
        with pytest.raises(DataDependentOutputException):
            engine.evaluate(trainer, Two(), observer=engine.Silent())


def test_a_network_that_diverged_in_its_running_statistics_alone_is_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(dataset))
    setup = training.prepare_run(config())
    trainer = training.Run.begin(setup).trainer
    engine.evaluate(trainer, setup.valid, observer=engine.Silent())
    first = next(layer for layer in trainer.network.modules() if isinstance(layer, nn.BatchNorm2d))
    first.running_mean.fill_(float("nan"))
    with pytest.raises(training.UserError, match="the loss became nan on the split that judges: lower learning_rate"):
        engine.evaluate(trainer, setup.valid, observer=engine.Silent())


# --- what users get wrong ----------------------------------------------------------------------------------------------------


def test_a_class_without_training_pictures_is_named(dataset: Path):
    info = training.read_info(dataset)
    with pytest.raises(DataError, match=r"1 classes have no train picture \(n02000001-breed_1\)"):
        training.check_classes(np.array([0, 0, 2]), info, "train")


def test_half_precision_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="precision=fp16 needs a GPU"):
        training.prepare_run(config(precision="fp16"))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--learning_rate", "-1"], "learning_rate=-1.0 is outside 1e-06 to 10: choose a value in that range"),
        (["--backbone", "resnet-18"], "backbone='resnet-18' is not a supported torchvision model: try resnet18"),
        (["--batch_size", "64"], "batch_size=64 is larger than the training split with 24 pictures: choose less"),
        (
            ["--recipe", "finetune", "--pretrained", "channel", "--backbone", "mobilenet_v2"],
            "they are of resnet18: set backbone to that",
        ),
        (["--learning_rate", "10", "--epochs", "10", "--batch_size", "4", "--warmup_epochs", "0"], "the loss became"),
    ],
    ids=["rate", "backbone", "batch", "weights", "diverged"],
)
def test_a_bad_trial_ends_with_one_line_for_the_failure_reason(tmp_path: Path, dataset: Path, weights: Path, flags, reason: str):
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    recipe = {"--recipe": "scratch", "--batch_size": "8", "--precision": "fp32", **given}
    arguments = [part for pair in recipe.items() for part in pair]
    places = {"SM_CHANNEL_DATASET": str(dataset), "SM_CHANNEL_PRETRAINED": str(weights), "SAGEMAKER_BASE_DIR": str(tmp_path)}
    done = run_script("hpo.py", *arguments, **places)
    assert done.returncode == 1, done.stdout
    failure = (tmp_path / "output" / "failure").read_text()
    assert reason in failure
    assert "\n" not in failure
    assert done.stderr.strip().splitlines()[-1] == f"error: {failure}"
