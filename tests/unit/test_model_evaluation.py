"""Evaluation: its numbers against closed forms and scikit-learn, one pass over test, and the pictures it keeps."""

from __future__ import annotations

import html
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from classifier import choosing, evaluation, metrics, report_sections, reporting
from classifier import dataset as datasets
from classifier.errors import DataError
from classifier.preparation import prepare
from classifier.served_model import ServedModel
from classifier.serving import Preprocessing
from model_fakes import flags, picture
from PIL import Image
from scipy.stats import binom, binomtest
from sklearn.metrics import precision_recall_fscore_support

# --- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "hits"), [(40, 31), (2_000, 1_700), (100_000, 84_321)])
def test_the_bootstrap_agrees_with_the_binomial(count: int, hits: int):
    right = np.arange(count) < hits
    low, high = metrics.bootstrap_interval(right)
    assert (low, high) == metrics.bootstrap_interval(right)
    quantiles = binom.ppf([0.025, 0.975], count, hits / count) / count
    error = 0.027 * (hits / count * (1 - hits / count) / count) ** 0.5  # one standard error of these quantiles of 10,000 draws
    assert np.abs(np.array([low, high]) - quantiles).max() <= 4 * error + 1 / count
    exact = binomtest(hits, count).proportion_ci(0.95, "exact")
    assert np.abs(np.array([low, high]) - exact).max() <= 4 * error + 1.5 / count
    assert low < hits / count < high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random, truth = np.random.default_rng(5), 0.8
    bounds = [metrics.bootstrap_interval(random.random(500) < truth, resamples=2_000) for _ in range(600)]
    covered = np.mean([low <= truth <= high for low, high in bounds])
    assert 0.92 <= covered <= 0.975  # 0.95 less the bootstrap's bias, +- 2.5 standard errors of 600 trials


@pytest.mark.parametrize("right", [True, False])
def test_an_accuracy_without_errors_is_not_certain(right: bool):
    low, high = metrics.bootstrap_interval(np.full(120, right))
    exact = binomtest(120 if right else 0, 120).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))


def test_an_interval_needs_pictures():
    with pytest.raises(ValueError, match="got none"):
        metrics.bootstrap_interval(np.zeros(0, dtype=bool))


def test_confused_pairs_by_hand():
    table = np.array([[5, 3, 0, 0], [3, 1, 0, 0], [0, 2, 2, 2], [0, 0, 0, 0]])
    # Of the two pairs with 3, class 1's is the larger share (3 of 4); equal pairs come in the order of the classes.
    expected = [(1, 0, 3, 0.75), (0, 1, 3, 0.375), (2, 1, 2, 1 / 3), (2, 3, 2, 1 / 3)]
    assert metrics.confused_pairs(table, 12) == expected
    assert metrics.confused_pairs(table, 2) == expected[:2]
    assert metrics.confused_pairs(np.diag([4, 2]), 12) == []


def test_macro_averages_are_those_of_scikit_learn():
    random = np.random.default_rng(2)
    labels, predicted = random.integers(0, 6, 300), random.integers(0, 5, 300)  # class 5 is never predicted, 6 never present
    found = metrics.macro(metrics.per_class(metrics.confusion(predicted, labels, 7), list("abcdefg")))
    want = precision_recall_fscore_support(labels, predicted, labels=range(6), average="macro", zero_division=0)
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx(want[:3])
    assert found["num_classes"] == 6


def test_numbers_do_not_depend_on_how_many_pictures_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(3)
    logits, labels = random.normal(size=(103, 9)).astype(np.float32), random.integers(0, 9, 103)

    def numbers() -> list[float]:
        return [
            *metrics.in_top_k(logits, labels, 5),
            metrics.negative_log_likelihood(logits, labels, 1.5),
            *metrics.confidences(logits, 2.0),
        ]

    at_once = numbers()
    monkeypatch.setattr(metrics, "ROWS", 10)
    assert numbers() == pytest.approx(at_once, rel=1e-6)
    assert metrics.top_k_accuracy(logits, labels, 1) == (logits.argmax(axis=1) == labels).mean()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast a form is, is not under test here."""
    monkeypatch.setattr(choosing, "TIMED_S", 0.01)


# --- the job ---------------------------------------------------------------------------------------------------------------

# How many test pictures of each class are coloured like which class: 12 pictures, of which 4 are "wrong".
TEST = {(0, 0): 3, (0, 1): 1, (1, 1): 2, (1, 0): 2, (2, 2): 3, (2, 0): 1}


def _write_source(root: Path) -> Path:
    seed = 0
    for split, counts in (("train", {(c, c): 3 for c in range(3)}), ("valid", {(c, c): 2 for c in range(3)}), ("test", TEST)):
        for (label, hue), count in counts.items():
            folder = root / split / f"n0200000{label}-breed_<{label}>"
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                seed += 1
                (folder / f"{seed}.png").write_bytes(picture(seed, (400, 300), hue=hue))
    return root


def _write_model(folder: Path, info: datasets.DatasetInfo) -> None:
    """A network whose logits are the mean of each colour, packed like a training job's output."""
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
    node = onnx.helper.make_node("ReduceMean", ["picture", "axes"], ["logits"], keepdims=0)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "colour", [value("picture", 1, ["b", 3, 32, 32])], [value("logits", 1, ["b", 3])], [axes]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    (folder / "weights.safetensors").write_bytes(b"none")
    description = {"classes": info.classes, "labels": info.labels, "preprocessing": Preprocessing.of(32).to_json()}
    (folder / "model.json").write_text(json.dumps(description))
    with tarfile.open(folder / "model.tar.gz", "w:gz") as tar:
        for name in ("model.onnx", "model.json", "weights.safetensors"):
            tar.add(folder / name, name)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``(prepared data set, folder with model.tar.gz)``; two shards a split."""
    tmp = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("classifier.preparation.SHARD_BYTES", 200_000)
        prepare(flags(_write_source(tmp / "pictures").as_uri(), tmp, picture_size=256))
    root = next(path for path in (tmp / "datasets").iterdir() if (path / "dataset.json").exists())
    assert len(datasets.read_info(root).shards["test"]) > 1
    _write_model(tmp / "model", datasets.read_info(root))
    return root, tmp / "model"


@pytest.fixture
def job(places: tuple[Path, Path], tmp_path: Path) -> evaluation.EvaluateFlags:
    root, model = places
    out = {"evaluation": str(tmp_path / "run" / "evaluation"), "artifact": str(tmp_path / "artifact")}
    return evaluation.EvaluateFlags(
        dataset=str(root), model=str(model), champion_uri=(tmp_path / "none.json").as_uri(), run="r", **out
    )


def test_the_test_split_is_decoded_and_classified_once(job: evaluation.EvaluateFlags, monkeypatch: pytest.MonkeyPatch):
    seen: Counter[str] = Counter()
    read, one, many = evaluation.members, datasets._decode_one, ServedModel.logits

    def count_decoded(data: bytes, label: int, size: int):
        seen["decoded"] += 1
        return one(data, label, size)

    def count_classified(self: ServedModel, batch: np.ndarray):
        seen["classified"] += len(batch)
        return many(self, batch)

    def count_read(info: datasets.DatasetInfo, split: str):
        seen[f"{split} read"] += 1
        yield from read(info, split)

    monkeypatch.setattr(datasets, "_decode_one", count_decoded)
    monkeypatch.setattr(ServedModel, "logits", count_classified)
    monkeypatch.setattr(datasets, "members", count_read)
    monkeypatch.setattr(evaluation, "members", count_read)
    evaluation.evaluate(job)
    assert seen["decoded"] == 6 + 6 + 12  # valid for the choice of the form, valid, test
    assert seen["classified"] == 6 + 12 + 6 + 3  # and the latency sample, of valid, and the pictures of the self-test
    assert seen["test read"] == 1


def test_what_the_evaluation_says(job: evaluation.EvaluateFlags):
    summary = evaluation.evaluate(job)
    folder = Path(job.evaluation)
    found = json.loads((folder / "evaluation.json").read_text())
    test = found["test"]
    assert found["confusion"] == [[3, 1, 0], [2, 2, 0], [1, 0, 3]]
    assert summary["top1"] == test["top1"] == pytest.approx(8 / 12)
    assert [summary["top1_low"], summary["top1_high"]] == test["top1_interval"]
    assert test["top1_interval"][0] < 8 / 12 < test["top1_interval"][1]
    assert test["top5_interval"] == [1.0, 1.0]  # of three classes
    assert summary["ece"] == test["ece_after"]
    assert found["macro"]["recall"] == pytest.approx((0.75 + 0.5 + 0.75) / 3)
    assert (folder / "summary.json").stat().st_size < 4096

    pairs = found["confused_pairs"]
    assert [(p["true"], p["predicted"], p["count"], p["share"]) for p in pairs] == [
        (1, 0, 2, 0.5),
        (0, 1, 1, 0.25),
        (2, 0, 1, 0.25),
    ]
    assert [p["expected"] for p in pairs] == ["breed <1>", "breed <0>", "breed <2>"]
    assert [e["file"] for e in pairs[0]["examples"]] == ["examples/1-0-0.jpg", "examples/1-0-1.jpg"]
    assert pairs[0]["references"] == {"expected": "examples/1-1-0.jpg", "said": "examples/0-0-0.jpg"}
    named = {e["file"] for p in pairs for e in p["examples"]} | {f for p in pairs for f in p["references"].values()}
    assert {f"examples/{path.name}" for path in (folder / "examples").iterdir()} == named
    for name in named:
        true, said = map(int, Path(name).stem.split("-")[:2])
        picture = Image.open(folder / name)
        assert (picture.format, max(picture.size)) == ("JPEG", 160)
        # What is shown is what was confused: a picture of class `true` that has the colour of `said`.
        assert np.asarray(picture).reshape(-1, 3).mean(axis=0).argmax() == said, (name, true)


def test_smoke_pictures_are_right_ones_of_different_classes(job: evaluation.EvaluateFlags):
    evaluation.evaluate(job)
    folder = Path(job.evaluation) / "smoke"
    entries = json.loads((folder / "smoke.json").read_text())
    assert sorted(entry["expected"] for entry in entries) == ["breed <0>", "breed <1>", "breed <2>"]
    for entry in entries:
        colour = np.asarray(Image.open(folder / entry["file"])).reshape(-1, 3).mean(axis=0).argmax()
        assert entry["expected"] == f"breed <{colour}>"


def test_examples_are_bounded(places: tuple[Path, Path], tmp_path: Path):
    """All classes confused with each other: no more files than MAX_PAIRS allow, and none of an earlier evaluation."""
    info = datasets.read_info(places[0])
    labels = np.array([label for _, label, _ in datasets.members(info, "test")])
    predicted = (labels + 1) % 3
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "9-9-9.jpg").write_bytes(b"old")
    table = metrics.confusion(predicted, labels, 3)
    pairs = evaluation.write_pairs(info, table, predicted, labels, np.linspace(0.5, 0.9, 12, dtype=np.float32), tmp_path)
    assert len(list((tmp_path / "examples").iterdir())) == 3 * evaluation.EXAMPLES
    assert all(pair["references"] == {"expected": None, "said": None} for pair in pairs)
    shown = [[e["probability"] for e in pair["examples"]] for pair in pairs]
    assert shown == [sorted(row, reverse=True) for row in shown]
    assert evaluation.MAX_PAIRS * (evaluation.EXAMPLES + 2) <= 80


def test_a_picture_that_is_gone_is_named(places: tuple[Path, Path]):
    info = datasets.read_info(places[0])
    stored = [(name, data) for name, _, data in datasets.members(info, "test")]
    assert evaluation.chosen_members(info, "test", [11, 2]) == {2: stored[2], 11: stored[11]}
    with pytest.raises(DataError, match=r"\[12\] of split 'test'"):
        evaluation.chosen_members(info, "test", [1, 12])


def test_the_report_shows_the_confused_pictures(job: evaluation.EvaluateFlags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporting, "_client", lambda: (_ for _ in ()).throw(ConnectionError("no service")))
    evaluation.evaluate(job)
    found = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    reporting.write(reporting.ReportFlags("r", str(tmp_path / "run"), str(tmp_path / "report"), str(tmp_path / "rules")))
    page = (tmp_path / "report" / "report.html").read_text()
    shown = sum(len(p["examples"]) + 2 for p in found["confused_pairs"])
    assert page.count("data:image/jpeg;base64,/9j/") == shown == 10
    assert "macro average of 3 classes" in page
    low, high = found["test"]["top1_interval"]
    assert f"{low:.4g} to {high:.4g} (95 %)" in page
    assert html.escape("breed <0>") in page
    pairs = page[page.index("Most confused") : page.index("Per class, worst first")]
    assert "breed <" not in pairs


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/examples/1-1-1.jpg", "examples/1-1-1.jpg\n", "examples/7-7-7.jpg"])
def test_the_report_reads_no_other_file(tmp_path: Path, name: str):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "evaluation").mkdir()
    assert report_sections.image(tmp_path / "evaluation", name, "") == ""
