"""Preparation: what users throw at it, and what it makes of it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifier import serving, sources
from classifier.dataset import load_split, read_info
from classifier.errors import DataError
from classifier.catalogue import Catalogue
from classifier.exchange import Hosts
from classifier.layout import Scheme, readable_labels
from classifier.lookalikes import near_pairs
from classifier.pictures import looks, normalise, shard_bytes
from classifier.preparation import prepare
from classifier.sources import Entry
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fakes import MODEL_CODE, flags, picture, run_script, write_folder
from PIL import Image, ImageDraw


def _placed(names: list[str], seed: int) -> tuple[dict[str, tuple[str, str]], str, list[str]]:
    """``({name: (split, class)}, "given" or "seeded", notes)`` of a listing."""
    table = Catalogue(Path(":memory:"))
    split, notes = table.fill([Entry(name, 1) for name in names], seed)
    places = table.places()
    table.close()
    return places, split, notes


def _listed(path: Path, allowed: list[str], work: Path) -> list[Entry]:
    return list(sources.open_source(path.as_uri(), allowed, work).entries())


def _stored(data: bytes, size: int) -> Image.Image:
    """What training will decode."""
    return serving.decode(normalise(data, size).data)


def _results(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return tuple(json.loads((out / "result" / name).read_text()) for name in ("result.json", "report.json"))  # type: ignore[return-value]


def test_bad_duplicate_and_leaking_pictures_are_named_and_left_out(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    folder = root / "train" / "n02000000-breed_0"
    (folder / "corrupt.jpg").write_bytes(picture(1, kind="JPEG")[:400])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    shutil.copy(folder / "0.png", folder / "copy.png")
    shutil.copy(root / "test" / "n02000000-breed_0" / "0.png", folder / "leak.png")
    conflict = picture(999)
    for name in ("n02000000-breed_0", "n02000001-breed_1"):
        (root / "train" / name / "both.png").write_bytes(conflict)

    prepare(flags(root.as_uri(), tmp_path))

    result, report = _results(tmp_path)
    reasons = {Path(entry["file"]).name: entry["reason"] for entry in report["quarantined"]}
    assert set(reasons) == {"corrupt.jpg", "text.png", "empty.png", "moving.gif", "both.png"}
    assert "animated" in reasons["moving.gif"]
    assert "several classes" in reasons["both.png"]
    assert {entry["kind"] for entry in report["duplicates"]} == {"copy", "leak"}
    assert result["num_pictures"] == {"train": 24, "valid": 12, "test": 12}
    assert result["num_quarantined"] == 6
    assert result["split"] == "given"


def test_the_same_pictures_give_the_same_data_set_and_nothing_is_done_twice(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    for out in ("a", "b"):
        prepare(flags(root.as_uri(), tmp_path / out))
    first, second = (_results(tmp_path / out)[0] for out in ("a", "b"))
    assert first["dataset_hash"] == second["dataset_hash"]
    shards = [sorted((tmp_path / out / "datasets" / first["dataset_hash"] / "shards").iterdir()) for out in ("a", "b")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]

    prepare(flags(root.as_uri(), tmp_path / "a"))
    assert _results(tmp_path / "a")[0] == {**first, "reused": True}
    (root / "test" / "n02000000-breed_0" / "0.png").write_bytes(picture(777))
    prepare(flags(root.as_uri(), tmp_path / "a"))
    assert _results(tmp_path / "a")[0]["reused"] is False


def test_class_folders_without_splits_get_a_seeded_stratified_split():
    names = [f"pets/{label}/{number}.jpg" for label in ("cat", "dog") for number in range(20)]
    places, split, notes = _placed(names, seed=0)
    counts = Counter(places.values())
    assert split == "seeded"
    assert "no valid and no test folder" in notes[0]
    assert counts == {(s, c): n for s, n in (("train", 14), ("valid", 3), ("test", 3)) for c in ("cat", "dog")}
    assert places == _placed(list(reversed(names)), seed=0)[0] != _placed(names, seed=1)[0]


def test_a_top_folder_and_other_names_of_splits_are_understood():
    names = [f"dogImages/{split}/00{c}.Breed/{n}.jpg" for split in ("train", "val", "test") for c in (1, 2) for n in range(2)]
    places, split, _ = _placed([*names, "dogImages/.DS_Store", "__MACOSX/x"], seed=0)
    assert split == "given"
    assert set(places.values()) == {(s, f"00{c}.Breed") for s in ("train", "valid", "test") for c in (1, 2)}
    assert readable_labels(["001.Affenpinscher", "n02088094-Afghan_hound", "7"]) == ["Affenpinscher", "Afghan hound", "7"]
    assert readable_labels(["001.Cat", "002.Cat"]) == ["001.Cat", "002.Cat"]


def test_small_png_stays_lossless_upright_jpeg_stays_untouched_and_large_pictures_shrink():
    small = picture(1)
    stored = normalise(small, 256)
    assert stored.extension == "png"
    assert Image.open(io.BytesIO(stored.data)).tobytes() == Image.open(io.BytesIO(small)).tobytes()
    jpeg = picture(2, kind="JPEG")
    assert normalise(jpeg, 256).data == jpeg
    assert normalise(picture(3, size=(400, 300)), 64).picture.size == (85, 64)


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "MAX_PIXELS", 1000)
    with pytest.raises(serving.PictureTooLargeError, match="40x32 pixels"):
        normalise(picture(1), 256)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root.mkdir(), "no objects"),
        (lambda root: _one_class(root), "only one class, 'cat'"),
        (lambda root: _files(root, {"a.jpg": b"x", "b.jpg": b"y"}), "no class folders"),
        (lambda root: _files(root, {f"{c}/{n}.jpg": b"x" for c in "ab" for n in range(5)}), "no usable picture"),
    ],
)
def test_a_source_without_a_training_set_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], None], words: str):
    make(tmp_path / "pictures")
    with pytest.raises(DataError, match=words):
        prepare(flags((tmp_path / "pictures").as_uri(), tmp_path))


def _files(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def _one_class(root: Path) -> None:
    _files(root, {f"cat/{number}.png": picture(number) for number in range(4)})


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_gives_the_same_data_set_as_its_folder(tmp_path: Path, kind: str):
    root = write_folder(tmp_path / "pictures")
    archive = tmp_path / f"pictures.{kind}"
    shutil.make_archive(str(tmp_path / "pictures"), "gztar" if kind == "tar.gz" else "zip", root)
    prepare(flags(root.as_uri(), tmp_path / "a"))
    prepare(flags(archive.as_uri(), tmp_path / "b"))
    assert _results(tmp_path / "a")[0]["dataset_hash"] == _results(tmp_path / "b")[0]["dataset_hash"]


def _tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 0
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("/etc/passwd"),
        _member("train/../../escape.jpg"),
        _member("train/cat/link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        _member("train/cat/hard.jpg", tarfile.LNKTYPE, "other"),
        _member("train/cat/device", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_hostile_tar_members_are_refused(tmp_path: Path, member: tarfile.TarInfo):
    archive = _tar(tmp_path / "x.tar.gz", _member("train/cat/ok.jpg"), member)
    with pytest.raises(DataError, match=r"unsafe name|link or device"):
        _listed(archive, [], tmp_path)


def test_hostile_zips_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr("../escape.jpg", b"x")
    with pytest.raises(DataError, match="unsafe name"):
        _listed(tmp_path / "slip.zip", [], tmp_path)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/0.jpg", b"\0" * (60 * 2**20))
    with pytest.raises(DataError, match="times its size"):
        _listed(tmp_path / "bomb.zip", [], tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 broken")
    with pytest.raises(DataError, match="not a readable zip"):
        _listed(tmp_path / "broken.zip", [], tmp_path)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://example.com/x.zip", "not an https address"),
        ("https://evil.example/x.zip", "allow-list"),
        ("https://missing.invalid/x.zip", "was not found"),
        ("https://localhost/x.zip", "private address"),
        ("https://user@good.example/x.zip", "a port or a user"),
        ("https://good.example/pictures/", "only archives"),
        ("ftp://good.example/x.zip", "not understood"),
    ],
)
def test_addresses_that_must_not_be_fetched_are_refused(tmp_path: Path, uri: str, words: str):
    with pytest.raises(DataError, match=words):
        sources.open_source(uri, ["good.example", "localhost", "missing.invalid"], tmp_path)


def test_the_job_writes_its_outputs_and_its_failure(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    out = tmp_path / "out"
    arguments = ["--dataset_root", out.as_uri(), "--result", str(out / "r"), "--dataset", str(out / "d"), "--picture_size", "32"]
    done = run_script("prepare.py", "--source", root.as_uri(), *arguments, SAGEMAKER_BASE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "r" / "result.json").read_text())
    info = read_info(out / "d" / result["dataset_hash"])
    assert info.labels == ["breed 0", "breed 1", "breed 2"]
    assert load_split(info, "valid", 32).pictures.shape == (12, 32, 32, 3)
    failed = run_script("prepare.py", "--source", "nowhere", *arguments, SAGEMAKER_BASE_DIR=str(tmp_path))
    assert failed.returncode == 1
    assert "source 'nowhere' is not understood" in (tmp_path / "output" / "message").read_text()
