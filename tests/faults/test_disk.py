"""Row 5: the disk is full. A small tmpfs of the test's own, so the real ENOSPC."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from classifier import checkpoint, preparation
from classifier.errors import one_line
from fault_table import Landed
from model_fakes import MODEL_CODE, flags, prepared, write_folder
from report_fakes import write_run
from serving_fakes import write_model

pytestmark = pytest.mark.fault(5)

WRITERS = str(Path(__file__).with_name("writers.py"))


def _may_mount() -> bool:
    """Whether a process here may have mounts of its own."""
    return bool(shutil.which("unshare")) and subprocess.run(["unshare", *ALONE, "true"], check=False).returncode == 0


ALONE = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
needs_mount = pytest.mark.skipif(not _may_mount(), reason="this machine lets no test mount a small disk (unshare --mount)")


def on_small_disk(base: Path, folder: Path, kib: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A program that sees ``folder`` as a disk of so many KiB, with what the folder held; what it wrote is copied back."""
    keep = base / "kept"
    shutil.copytree(folder, keep)
    command = " ".join(shlex.quote(word) for word in (sys.executable, *words))
    script = (
        f"mount -t tmpfs -o size={kib}k none {folder} && cp -a {keep}/. {folder}/ && {command}; code=$?; "
        f"df -k --output=avail {folder} | tail -1 >&2; rm -rf {keep}/*; cp -a {folder}/. {keep}/; exit $code"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SAGEMAKER_BASE_DIR": str(base), "TMPDIR": str(base)}
    done = subprocess.run(
        ["unshare", *ALONE, "sh", "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    shutil.rmtree(folder)
    keep.rename(folder)
    return done


def assert_said(done: subprocess.CompletedProcess[str], base: Path) -> None:
    assert done.returncode == 1, done.stderr[-800:]
    assert "the disk is full" in done.stderr, done.stderr[-800:]
    assert "larger volume" in (base / "output" / "failure").read_text()


@needs_mount
def test_preparation_says_so_and_leaves_earlier_data_sets_alone(tmp_path: Path, landed: Landed):
    small = write_folder(tmp_path / "small", train=2, held=1)
    preparation.prepare(flags(small.as_uri(), tmp_path / "disk"))
    before = {path: path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file()}
    large = write_folder(tmp_path / "large", train=200, held=20)
    given = flags(large.as_uri(), tmp_path / "disk")
    names = ("source", "dataset_root", "result", "dataset", "picture_size")
    words = [word for name in names for word in (f"--{name}", str(getattr(given, name)))]
    done = on_small_disk(tmp_path, tmp_path / "disk", 700, str(MODEL_CODE / "prepare.py"), *words)
    assert_said(done, tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((tmp_path / "disk").rglob("dataset.json"))) == 1
    landed()


@needs_mount
def test_a_training_says_so_and_keeps_its_last_checkpoint(tmp_path: Path, landed: Landed):
    dataset, disk = prepared(tmp_path / "pictures"), tmp_path / "disk"
    disk.mkdir()
    words = ("training", str(dataset), str(disk), str(tmp_path / "result.pt"))
    # The first checkpoint fits (27 MB), the second beside it does not.
    done = on_small_disk(tmp_path, disk, 45_000, WRITERS, *words)
    assert_said(done, tmp_path)
    saved = checkpoint.load(disk)
    assert saved is not None
    landed()
    again = subprocess.run([sys.executable, WRITERS, *words], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert set(torch.load(tmp_path / "result.pt", weights_only=True)) == {"weights", "losses"}


@needs_mount
def test_an_artifact_says_so_and_leaves_the_one_before(tmp_path: Path, landed: Landed):
    model, target = write_model(tmp_path / "model"), tmp_path / "artifact"
    (model / "weights.safetensors").write_bytes(os.urandom(100_000))
    subprocess.run([sys.executable, WRITERS, "artifact", str(model), str(target)], check=True)
    before = (target / "model.tar.gz").read_bytes()
    (model / "weights.safetensors").write_bytes(os.urandom(3_000_000))
    done = on_small_disk(tmp_path, target, 2000, WRITERS, "artifact", str(model), str(target))
    assert_said(done, tmp_path)
    assert (target / "model.tar.gz").read_bytes() == before
    landed()


@needs_mount
def test_a_report_says_so_and_leaves_the_one_before(tmp_path: Path, landed: Landed):
    write_run(tmp_path / "run")
    subprocess.run([sys.executable, WRITERS, "report", str(tmp_path)], check=True)
    before = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    used_kib = sum(len(data) for data in before.values()) // 1024
    done = on_small_disk(tmp_path, tmp_path / "report", used_kib + 300, WRITERS, "report", str(tmp_path))
    assert_said(done, tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    landed()


@needs_mount
def test_a_downloaded_archive_says_so(tmp_path: Path, landed: Landed):
    """The archive itself is larger than the disk: known before anything is copied, or at the first byte too many."""
    import zipfile

    source, disk = write_folder(tmp_path / "large", train=200, held=20), tmp_path / "disk"
    disk.mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in source.rglob("*.png"):
            archive.write(path, path.relative_to(source))
    given = flags((tmp_path / "x.zip").as_uri(), disk)
    names = ("source", "dataset_root", "result", "dataset", "picture_size")
    words = [word for name in names for word in (f"--{name}", str(getattr(given, name)))]
    done = on_small_disk(tmp_path, disk, 700, str(MODEL_CODE / "prepare.py"), *words)
    assert done.returncode == 1
    assert "give the job a larger volume" in done.stderr
    assert not list(disk.rglob("dataset.json"))
    landed()


@needs_mount
def test_a_catalogue_says_so(tmp_path: Path, landed: Landed):
    """SQLite has an error of its own for it."""
    (tmp_path / "disk").mkdir()
    program = (
        f"import sys; sys.path.insert(0, {str(MODEL_CODE)!r})\n"
        "from pathlib import Path\n"
        "from classifier.catalogue import Catalogue\n"
        "from classifier.errors import run_entry_point\n"
        "from classifier.sources import Entry\n"
        f"table = Catalogue(Path({str(tmp_path / 'disk' / 'c.sqlite')!r}))\n"
        "run_entry_point(lambda _: table.fill((Entry(f'train/{n % 9}/{n}.png', 1) for n in range(50_000)), 0))\n"
    )
    assert_said(on_small_disk(tmp_path, tmp_path / "disk", 300, "-c", program), tmp_path)
    landed()


def test_the_reason_names_the_file_and_the_remedy(landed: Landed):
    text = one_line(OSError(28, "No space left on device", "/opt/ml/x"))
    assert "/opt/ml/x" in text
    assert "the disk is full" in text
    landed()
