"""The benchmarks' own machinery, on tiny sizes: harness, tables, source pictures, and that every peer does what is timed."""

from __future__ import annotations

import importlib
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """``bench("harness")``: a script of bench/, imported as one script imports another."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        assert Path(module.__file__ or "").parent == BENCH
        return module

    return load


@pytest.fixture
def sources(bench, tmp_path: Path) -> Path:
    return bench("samples").make((120, 90), 12, out=tmp_path / "sources", sources=[])


# --- harness and tables ----------------------------------------------------------------------------------------------------


def test_peers_take_turns_and_warm_up_is_not_counted(bench):
    harness, order = bench("harness"), []

    def peer(name: str, count: int):
        def work() -> int:
            order.append(name)
            return count

        return work

    rates = harness.interleave({"a": peer("a", 1), "b": peer("b", 2)}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert {name: len(row) for name, row in rates.items()} == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="'idle' did 0 things"):
        harness.interleave({"idle": peer("idle", 0)}, rounds=1)


def test_a_ratio_is_taken_inside_each_round(bench):
    """The machine was three times slower in the second round, for both: the ratio of the medians would be 3."""
    found = bench("harness").summarise({"base": [30.0, 10.0, 30.0], "ours": [60.0, 20.0, 90.0]}, "base")
    assert found["ours"]["ratio"] == 2.0
    assert (found["ours"]["median"], found["ours"]["min"], found["ours"]["max"]) == (60.0, 20.0, 90.0)
    assert found["base"]["ratio"] == 1.0
    with pytest.raises(ValueError, match="no peer is called 'other'"):
        bench("harness").compare({"base": lambda: 1}, against="other")


@pytest.fixture
def project(bench, tmp_path: Path) -> Path:
    """A project with one record and one document with its table, still empty."""
    harness = bench("harness")
    cases = {
        "small": harness.summarise({"base": [2000.0], "a|b": [3000.0]}, "base"),
        "large": harness.summarise({"base": [2.5]}, "base"),
    }
    harness.write(harness.record("input", cases, against="base"), tmp_path / "bench" / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no table\n")
    (tmp_path / "docs" / "performance.md").write_text("before\n<!-- bench:input -->\nold\n<!-- /bench -->\nafter\n")
    return tmp_path


def test_tables_are_written_from_the_records_and_checked(bench, project: Path, capsys: pytest.CaptureFixture[str]):
    tables, document = bench("tables"), project / "docs" / "performance.md"
    assert tables.main(["--check"], project) == 1
    assert "docs/performance.md: run python bench/tables.py --write" in capsys.readouterr().err
    assert "old" in document.read_text()
    assert tables.main(["--write"], project) == 0
    lines = document.read_text().splitlines()
    assert lines[2:6] == [
        "| pictures/s | small | ratio | large | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| base | 2,000 | 1.00× | 2.5 | 1.00× |",
        "| a\\|b | 3,000 | 1.50× | – | – |",
    ]
    assert (lines[0], lines[-1]) == ("before", "after")
    assert tables.main(["--check"], project) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:none -->\n<!-- /bench -->\n", r"README.md: there is no bench/results/none.json \(there are: input\)"),
        ("<!-- bench:input -->\n", "the table 'input' is not closed"),
        ("<!-- bench:input -->\n<!-- bench:input -->\n<!-- /bench -->\n", "the table 'input' is not closed"),
        ("<!-- /bench -->\n", "closes no table"),
        ("<!-- bench:broken -->\n<!-- /bench -->\n", "broken.json is no record"),
    ],
)
def test_a_table_that_cannot_be_made_is_named(bench, project: Path, text: str, message: str):
    tables, broken = bench("tables"), project / "bench" / "results" / "broken.json"
    if "broken" in text:
        broken.write_text("{}")
    (project / "README.md").write_text(text)
    with pytest.raises(tables.TableError, match=message):
        tables.run(True, project)


def test_the_projects_own_tables_are_the_measured_ones(bench, capsys):
    assert bench("tables").main(["--check"]) == 0, capsys.readouterr().err


# --- pictures --------------------------------------------------------------------------------------------------------------


def test_source_pictures_have_the_size_and_the_bits_of_photographs(bench, tmp_path: Path):
    pictures = bench("samples")
    folder = pictures.make((500, 400), 11, out=tmp_path, sources=[])
    files = sorted(folder.glob("*/*.jpg"))
    assert [path.parent.name for path in files] == sorted([f"class_{n}" for n in range(10)] + ["class_0"])
    with Image.open(files[0]) as opened:
        assert (opened.size, opened.mode) == ((500, 400), "RGB")
        assert [band[1:3] for band in opened.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
    facts = json.loads((folder.parent / "made.json").read_text())
    assert 1.2 <= facts["bits_per_pixel"] <= 2.2
    stamp = files[0].stat().st_mtime_ns
    assert pictures.make((500, 400), 11, out=tmp_path, sources=[]) == folder
    assert files[0].stat().st_mtime_ns == stamp


def test_a_photograph_is_enlarged(bench, tmp_path: Path):
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    Image.fromarray(gradient).save(tmp_path / "one.jpg")
    found = bench("samples").enlarged(tmp_path / "one.jpg", (200, 100), np.random.default_rng(0))
    assert found.size == (200, 100)
    assert np.abs(np.asarray(found)[:, ::8, 0].mean(axis=0) - np.linspace(0, 255, 25)).max() < 12


# --- peers -----------------------------------------------------------------------------------------------------------------


def test_the_reference_and_the_limit_read_every_picture(bench, sources: Path):
    peers = bench("peers")
    assert peers.reference_loader(sources, 0, 5)() == 12
    pytest.importorskip("simplejpeg")
    assert peers.decode_only(peers.pictures_of(sources), 2)() == 12
    with pytest.raises(FileNotFoundError, match=r"make some with python bench/samples\.py"):
        peers.pictures_of(sources.parent)


def test_dali_reads_files_and_shards(bench, sources: Path, tmp_path: Path):
    peers = bench("peers")
    pytest.importorskip("nvidia.dali", reason=peers.DALI_MISSING)
    with tarfile.open(tmp_path / "train-00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, path in enumerate(peers.pictures_of(sources)):
            tar.add(path, f"0/{number:08d}.jpg")
    for epoch in (peers.dali_loader(sources, 1, 5), peers.dali_shards_loader([tmp_path / "train-00000.tar"], 1, 5)):
        assert [epoch(), epoch()] == [15, 15]  # three full batches


def test_a_missing_dali_says_how_to_install_it(bench, sources: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ModuleNotFoundError, match="uv sync --group bench"):
        bench("peers").dali_loader(sources, 1, 5)


@pytest.fixture
def splits(bench, tmp_path: Path) -> Path:
    """Two classes that differ in colour, 24 pictures in each of train, valid and test."""
    random = np.random.default_rng(1)
    for split in ("train", "valid", "test"):
        for label in range(2):
            folder = tmp_path / "data" / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = random.integers(0, 90, (40, 40, 3))
                pixels[..., label] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg")
    return tmp_path / "data"


def test_the_reference_recipe_learns_and_reports(bench, splits: Path):
    reference = bench("reference_train")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = reference.reference_recipe(
            splits, None, 3, architecture="resnet18", crop_size=32, resize_size=36, learning_rate=0.05
        )
    finally:
        torch.set_num_threads(threads)
    assert len(found["valid_top1"]) == len(found["train_loss"]) == 3
    assert found["train_loss"][-1] < found["train_loss"][0]
    assert 0.0 <= found["test_top1"] <= 1.0
    Image.new("RGB", (41, 40)).save(splits / "valid" / "class_0" / "odd.jpg")
    with pytest.raises(ValueError, match="2 sizes"):
        reference.load(splits / "valid")


def test_cached_pictures_are_evaluated_like_the_references_files(bench, splits: Path):
    """ClassificationPresetEval on Pillow pictures, step by step, against the restatement on tensors."""
    reference = bench("reference_train")
    (found, labels), *rest = reference.evaluation_batches(reference.load(splits / "test"), 36, 32)
    preset = [transforms.Resize(36), transforms.CenterCrop(32), transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float)]
    preset.append(transforms.Normalize(reference.MEAN, reference.STD))
    folder = datasets.ImageFolder(str(splits / "test"), transforms.Compose(preset))
    expected = torch.stack([picture for picture, _ in folder])
    assert not rest
    assert labels.tolist() == folder.targets
    assert (found - expected).abs().max() < 1.01 / 255 / min(reference.STD)  # one grey level


def test_the_linear_probe_chooses_on_valid_and_reads_test_once(bench, monkeypatch: pytest.MonkeyPatch):
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(4)
    centres = random.normal(size=(3, 20))
    labels = [random.integers(0, 3, 60) for _ in range(3)]
    features = [(centres[y] + random.normal(scale=1.5, size=(60, 20))).astype(np.float32) for y in labels]
    scored = []
    score = LogisticRegression.score
    monkeypatch.setattr(LogisticRegression, "score", lambda self, x, y: scored.append(id(y)) or score(self, x, y))
    probe = bench("reference_train").linear_probe
    found = probe(*(part for pair in zip(features, labels, strict=True) for part in pair), l2=(1.0, 0.1, 0.01))
    assert scored == [id(labels[1])] * 3 + [id(labels[2])]
    assert found["valid_top1"][found["l2"]] == max(found["valid_top1"].values())
    alone = probe(*(part for pair in zip(features, labels, strict=True) for part in pair), l2=(found["l2"],))
    assert found["test_top1"] == pytest.approx(alone["test_top1"], abs=1 / 60)  # a warm start ends where a cold one does
    assert found["test_top1"] > 0.6
