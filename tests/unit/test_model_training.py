"""Training: preprocessing agreement, resuming, metrics, weights, export, and what the hook and sampler leave behind."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier import (
    checkpoint,
    choosing,
    export,
    features,
    metrics,
    model,
    profiling,
    reporting,
    saved_tensors,
    serving,
    training,
)
from classifier.errors import ConfigError, WeightsError
from classifier.evaluation import EvaluateFlags, evaluate
from classifier.served_model import ServedModel
from model_fakes import config, prepared, run_script
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def channels(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(dataset))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return dataset


def test_a_damaged_checkpoint_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / ".last.pt.part").write_bytes(b"of a killed run")
    checkpoint.save(tmp_path, {"epoch": 1})
    assert checkpoint.load(tmp_path)["epoch"] == 1  # type: ignore[index]
    (tmp_path / checkpoint.NAME).write_bytes(b"half a file")
    assert checkpoint.load(tmp_path) is None
    assert "damaged" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_metrics_on_cases_worked_by_hand():
    logits = np.array([[2, 1, 0], [0, 2, 1], [2, 0, 1], [0, 1, 2]], dtype=np.float32)
    labels = np.array([0, 1, 2, 2])
    assert metrics.top_k_accuracy(logits, labels, 1) == 0.75
    assert metrics.top_k_accuracy(logits, labels, 2) == metrics.top_k_accuracy(logits, labels, 5) == 1.0
    table = metrics.confusion(logits.argmax(axis=1), labels, 3)
    assert table.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert metrics.per_class(table, ["a", "b", "c"])[2] == {
        "label": "c", "num_pictures": 2, "recall": 0.5, "precision": 1.0, "f1": pytest.approx(2 / 3),
    }  # fmt: skip


def test_temperature_repairs_overconfidence():
    random = np.random.default_rng(0)
    truth = random.normal(size=(4000, 5)).astype(np.float32)
    probabilities = serving.softmax(truth)
    labels = np.array([random.choice(5, p=row / row.sum()) for row in probabilities.astype(np.float64)])
    temperature = metrics.fit_temperature(truth * 3, labels)
    assert temperature == pytest.approx(3, rel=0.1)
    assert metrics.expected_calibration_error(truth * 3, labels, temperature) < 0.05
    assert metrics.expected_calibration_error(truth * 3, labels) > 0.15


def test_architectures_are_recognised_and_misfits_are_explained(tmp_path: Path):
    network = model.build("mobilenet_v2", num_classes=7)
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "w.pth")
    state = model.read_state(tmp_path / "w.pth")
    assert model.recognise(state) == "mobilenet_v2"
    with pytest.raises(WeightsError, match="they are of mobilenet_v2: set backbone to that"):
        model.load_backbone_state(model.build("resnet18"), state, "resnet18")
    with pytest.raises(ConfigError, match="try resnet18"):
        model.build("resnet-18")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="2 weight files"):
        model.find_weights(tmp_path)
    with pytest.raises(WeightsError, match="not a readable state dict"):
        model.read_state(tmp_path / "bad.pth")


def test_the_standardisation_folds_into_one_linear_layer():
    torch.manual_seed(0)
    head = model.StandardisedHead(torch.randn(6), torch.rand(6) + 0.5, 3)
    nn.init.normal_(head.linear.weight)
    inputs = torch.randn(10, 6)
    assert torch.allclose(head(inputs), head.folded()(inputs), atol=1e-5)


def test_a_head_on_cached_features_exports_the_whole_network(channels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    backbone = model.build("mobilenet_v3_small")
    model.split_head(backbone)
    info = training.read_info(channels)
    settings = config(recipe="head", pretrained="torchvision", image_size=32, feature_views=3)
    features.cache(info, backbone.eval(), "mobilenet_v3_small", settings, tmp_path / "features")
    monkeypatch.setenv("SM_CHANNEL_FEATURES", str(tmp_path / "features"))
    setup = training.prepare_run(config(recipe="head", pretrained="torchvision", epochs=5))
    history = training.fit(setup)
    described = export.export(setup, training.whole_model(setup), history, tmp_path / "model")
    assert described["architecture"] == "mobilenet_v3_small"
    assert described["onnx"]["difference"] < 1e-4
    inputs, labels = features.load(tmp_path / "features", "valid")
    served = ServedModel(tmp_path / "model")
    valid = training.load_split(info, "valid", 32)
    logits = served.logits(serving.normalise(valid.pictures, served.preprocessing))
    with torch.inference_mode():
        expected = setup.network(inputs[0].float()).numpy()
    assert np.abs(logits - expected).max() < 0.1 * max(1.0, np.abs(logits).max())
    assert labels.tolist() == valid.labels.tolist()


@pytest.fixture(scope="module")
def job(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training job as a container would run it; its base folder."""
    base = tmp_path_factory.mktemp("job")
    arguments = ["--recipe", "scratch", "--epochs", "3", "--batch_size", "8", "--debug_interval", "2", "--precision", "fp32"]
    places = {"SAGEMAKER_BASE_DIR": str(base), "SM_CHANNEL_DATASET": str(dataset), "RUN_OUTPUT_URI": (base / "run").as_uri()}
    done = run_script("train_model.py", *arguments, **places)
    assert done.returncode == 0, done.stderr
    (base / "log").write_text(done.stdout)
    return base


def test_the_job_prints_the_metric_lines_and_leaves_the_artifact(job: Path):
    lines = [line for line in (job / "log").read_text().splitlines() if line.startswith("epoch=")]
    keys = ["epoch", "train_loss", "train_top1", "valid_loss", "valid_top1", "best_valid_top1", "learning_rate", "seconds"]
    assert [[pair.split("=")[0] for pair in line.split()] for line in lines] == [keys] * 3
    names = {"model.json", "model.onnx", "head.npy", "weights.safetensors", "training.json"}
    assert {path.name for path in (job / "model").iterdir()} == names
    assert (job / "checkpoints" / "last.pt").is_file()


@pytest.mark.filterwarnings("ignore")  # smdebug is unmaintained and says so in many ways
def test_smdebug_opens_the_tensors_and_the_metrics(job: Path):
    saved_tensors.prepare_smdebug()
    from smdebug.profiler.algorithm_metrics_reader import LocalAlgorithmMetricsReader
    from smdebug.profiler.system_metrics_reader import LocalSystemMetricsReader
    from smdebug.trials import create_trial

    trial = create_trial(str(job / "run" / "debug-output"))
    assert trial.steps()
    assert any(name.startswith("gradient/") for name in trial.tensor_names())
    assert len(saved_tensors.loss_series(job / "run" / "debug-output")) >= 3
    end = time.time() * 1e6
    system = LocalSystemMetricsReader(str(job / "run" / "profiler-output")).get_events(0, end)
    assert {"cpu", "memory"} <= {event.type for event in system}
    phases = LocalAlgorithmMetricsReader(str(job / "run" / "profiler-output")).get_events(0, end)
    assert {event.event_name for event in phases} == set(profiling.PHASES)


def test_evaluation_and_report_of_the_job(job: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tarfile.open(job / "model.tar.gz", "w:gz") as tar:
        tar.add(job / "model", arcname=".")
    (tmp_path / "input").mkdir()
    (job / "model.tar.gz").rename(tmp_path / "input" / "model.tar.gz")
    run = job / "run"
    flags = EvaluateFlags(
        dataset=str(dataset), model=str(tmp_path / "input"), evaluation=str(run / "evaluation"),
        artifact=str(tmp_path / "artifact"),
        champion_uri=(tmp_path / "champion.json").as_uri(), run="r<1>",
    )  # fmt: skip
    monkeypatch.setattr(choosing, "TIMED_S", 0.01)
    summary = evaluate(flags)
    assert summary["champion_top1"] is None
    assert summary["num_pictures"] == 12
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert sum(map(sum, found["confusion"])) == 12
    with tarfile.open(tmp_path / "artifact" / "model.tar.gz") as tar:
        assert {"model.json", "model.onnx", "code/server.py", "code/classifier/serving.py"} <= set(tar.getnames())
    # The run's folder expires; what an endpoint needs lies beside its model.
    assert summary["labels_uri"] == (tmp_path / "models" / "r<1>" / "labels.json").as_uri().replace("%3C", "<").replace("%3E", ">")
    assert len(json.loads((tmp_path / "artifact" / "labels.json").read_text())) == 3
    assert (tmp_path / "artifact" / "smoke" / "smoke.json").is_file()
    champion = {"run": "old", "model_data_url": (tmp_path / "artifact" / "model.tar.gz").as_uri()}
    (tmp_path / "champion.json").write_text(json.dumps(champion))
    assert evaluate(flags)["champion_top1"] == summary["top1"]

    monkeypatch.setattr(reporting, "_client", lambda: (_ for _ in ()).throw(ConnectionError("no service")))
    (run / "prepare").mkdir(exist_ok=True)
    hostile = {"classes": [{"folder": "<script>alert(1)</script>", "train": 1, "valid": 1, "test": 1}], "quarantined": []}
    (run / "prepare" / "report.json").write_text(json.dumps(hostile))
    facts = reporting.write(
        reporting.ReportFlags("r<1>", str(run), str(tmp_path / "report"), str(tmp_path / "rules"), "tuning", "training")
    )
    assert any("'tuning' could not be read" in note for note in facts["notes"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "r&lt;1&gt;" in page
    parts = tmp_path / "rules" / "ProfilerReport" / "profiler-output"
    assert (parts / "profiler-report.html").is_file()
    assert len(list((parts / "profiler-reports").glob("*.json"))) == 11


def test_a_report_without_tensors_and_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The training could not upload them: the report says so, and smdebug does not wait for them."""
    monkeypatch.setattr(reporting, "_client", lambda: (_ for _ in ()).throw(ConnectionError("no service")))
    stored, run = tmp_path / "stored", tmp_path / "run"
    (stored / "profiler-output").mkdir(parents=True)
    flags = reporting.ReportFlags("r", str(run), str(tmp_path / "report"), str(tmp_path / "rules"), run_uri=stored.as_uri())
    notes = reporting.write(flags)["notes"]
    for name in reporting.WATCHED:
        assert any(f"{name}/ is empty" in note for note in notes)
    assert any("holds no saved tensors" in note for note in notes)
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_report_fetches_what_the_training_uploaded(tmp_path: Path):
    stored = tmp_path / "stored" / "debug-output" / "events" / "000"
    stored.mkdir(parents=True)
    (stored / "1.tfevents").write_bytes(b"x")
    run = tmp_path / "run"
    flags = reporting.ReportFlags("r", str(run), "", "", run_uri=(tmp_path / "stored").as_uri())
    notes = reporting.fetch_watched(flags)
    assert (run / "debug-output" / "events" / "000" / "1.tfevents").read_bytes() == b"x"
    assert len(notes) == 1
    assert "profiler-output" in notes[0]
