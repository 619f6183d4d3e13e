"""What ``DATA`` and ``WEIGHTS`` may be, and what is said when they are something else."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from local_fakes import BUCKET, FakeCloud, moto_cloud
from PIL import Image

from local_cloud import digits, source


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    for name in ("cat", "dog"):
        picture(folder / name / "1.png")
    return folder


# ---- The digits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.write_digits(tmp_path_factory.mktemp("first") / "digits")


def test_digits_are_1797_pictures_in_three_splits_of_ten_classes(written: Path) -> None:
    places = [path.relative_to(written).parts for path in written.rglob("*.png")]
    assert len(places) == 1797
    assert len({name for _, _, name in places}) == 1797, "a picture is in two splits"
    for split, share in digits.SPLITS.items():
        labels = Counter(label for part, label, _ in places if part == split)
        assert sorted(labels) == [str(digit) for digit in range(10)]
        assert sum(labels.values()) == pytest.approx(share * 1797, abs=10)


def test_digits_are_grey_pictures_with_ink(written: Path) -> None:
    with Image.open(next(written.glob("train/0/*.png"))) as opened:
        assert (opened.mode, opened.size) == ("L", (32, 32))
        low, high = opened.getextrema()
    assert low < 30 < 200 < high


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_digits_are_the_same_every_time_and_others_with_another_seed(written: Path, tmp_path: Path) -> None:
    first = contents(written)
    assert contents(digits.write_digits(tmp_path / "again")) == first
    assert contents(digits.write_digits(tmp_path / "other", seed=1)).keys() != first.keys()


def test_no_data_means_the_digits(tmp_path: Path) -> None:
    chosen = source.choose("", tmp_path)
    assert (chosen.stage, chosen.source) == ("local", None), "the stage's own default is the source"
    assert chosen.upload is not None
    with zipfile.ZipFile(chosen.upload) as packed:
        names = packed.namelist()
    assert len(names) == 1797
    assert {PurePosixPath(name).parts[0] for name in names} == set(digits.SPLITS)


# ---- What a user may give -------------------------------------------------------------------------------------------


def test_a_folder_is_packed_under_incoming(two_classes: Path, tmp_path: Path) -> None:
    chosen = source.choose(str(two_classes), tmp_path / "scratch")
    assert (chosen.stage, chosen.source) == ("dev", "incoming/pets.zip")
    assert chosen.upload is not None
    with zipfile.ZipFile(chosen.upload) as packed:
        assert packed.namelist() == ["cat/1.png", "dog/1.png"]


def test_links_are_not_packed(two_classes: Path, tmp_path: Path) -> None:
    (two_classes / "cat" / "secret.png").symlink_to("/etc/hostname")
    chosen = source.choose(str(two_classes), tmp_path / "scratch")
    assert chosen.upload is not None
    with zipfile.ZipFile(chosen.upload) as packed:
        assert "cat/secret.png" not in packed.namelist()


@pytest.mark.parametrize("layout", ["train/{}/1.jpg", "photos/{}/1.JPG", "photos/train/{}/1.jpg", "{}/deeper/1.webp"])
def test_layouts_that_are_understood(tmp_path: Path, layout: str) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / "data" / layout.format(name))
    assert source.choose(str(tmp_path / "data"), tmp_path / "scratch").source == "incoming/data.zip"


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz", ".tgz"])
def test_an_archive_is_uploaded_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"pets{kind}"
    if kind == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("cat/1.png", b"x")
    else:
        with tarfile.open(path, "w:gz" if "gz" in kind else "w") as tar:
            tar.addfile(tarfile.TarInfo("cat/1.png"), io.BytesIO())
    assert source.choose(str(path), tmp_path) == source.Source("dev", path, f"incoming/{path.name}", str(path))


def test_the_reference_data_set_is_the_stage_s_own_source(tmp_path: Path) -> None:
    assert source.choose("dogs", tmp_path) == source.Source("dev", None, None, "dogImages.zip from its public address")


def test_an_https_address_passes_through_and_its_host_is_allowed(tmp_path: Path) -> None:
    data = "https://pictures.example.com/pets.zip"
    assert source.choose(data, tmp_path) == source.Source("dev", None, data, data, ("pictures.example.com",))


# ---- The user's own S3 ----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloud]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mine")
    with moto_cloud(tmp_path / "cloud") as cloud:
        monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
        yield cloud


def test_an_s3_prefix_is_copied_and_packed(bucket: FakeCloud, tmp_path: Path) -> None:
    for key in ("pets/cat/1.png", "pets/dog/1.png", "pets-of-others/cat/1.png"):
        bucket.put(key, b"x")
    chosen = source.choose(f"s3://{BUCKET}/pets/", tmp_path / "scratch")
    assert (chosen.stage, chosen.source, chosen.note) == ("dev", "incoming/pets.zip", f"s3://{BUCKET}/pets/")
    assert chosen.upload is not None
    with zipfile.ZipFile(chosen.upload) as packed:
        assert packed.namelist() == ["cat/1.png", "dog/1.png"]


def test_an_s3_archive_is_copied(bucket: FakeCloud, tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("cat/1.png", b"x")
    bucket.put("pets.zip", content.getvalue())
    chosen = source.choose(f"s3://{BUCKET}/pets.zip", tmp_path / "scratch")
    assert chosen.source == "incoming/pets.zip"
    assert chosen.upload is not None
    assert chosen.upload.read_bytes() == content.getvalue()


@pytest.mark.parametrize("key", ["../../outside/1.png", "cat/../../../outside.png"])
def test_an_s3_key_cannot_leave_the_folder(bucket: FakeCloud, tmp_path: Path, key: str) -> None:
    bucket.put(f"pets/{key}", b"x")
    for name in ("cat", "dog"):
        bucket.put(f"pets/{name}/1.png", b"x")
    chosen = source.choose(f"s3://{BUCKET}/pets/", tmp_path / "scratch")
    assert chosen.upload is not None
    with zipfile.ZipFile(chosen.upload) as packed:
        assert packed.namelist() == ["cat/1.png", "dog/1.png"]
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (f"s3://{BUCKET}/nothing/", "holds no objects. Expected an archive, or a prefix of class folders"),
        (f"s3://{BUCKET}/nothing.zip", "Give an s3:// address that your AWS credentials may read"),
        ("s3://no-such-bucket/pets/", "Give an s3:// address that your AWS credentials may read"),
        (f"s3://{BUCKET}/one/", "only one class ('cat')"),
    ],
)
def test_s3_addresses_that_are_refused(bucket: FakeCloud, tmp_path: Path, data: str, reason: str) -> None:
    bucket.put("one/cat/1.png", b"x")
    assert reason in refused(data, tmp_path / "scratch")


# ---- What is refused: the value, what was expected, what to do ------------------------------------------------------


def refused(data: Path | str, scratch: Path) -> str:
    with pytest.raises(source.SourceError) as raised:
        source.choose(str(data), scratch)
    message = str(raised.value)
    assert message.startswith(f"DATA={data}:"), "the message names the value"
    return message


def test_missing(tmp_path: Path) -> None:
    message = refused(tmp_path / "none", tmp_path)
    assert "no such file or folder" in message
    assert "Give a folder of class folders, a .zip or .tar, or an https:// address" in message


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty", tmp_path)
    assert "no pictures in class folders" in message
    assert "Expected <class>/<picture> or train|valid|test/<class>/<picture>" in message


def test_pictures_without_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "flat" / "1.png")
    assert "no pictures in class folders" in refused(tmp_path / "flat", tmp_path)


def test_class_folders_without_pictures(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "notes" / name).mkdir(parents=True)
        (tmp_path / "notes" / name / "1.txt").write_text("x")
    assert "pictures ending in .jpg" in refused(tmp_path / "notes", tmp_path)


@pytest.mark.parametrize("layout", ["cat/1.png", "train/cat/1.png"])
def test_one_class(tmp_path: Path, layout: str) -> None:
    picture(tmp_path / "one" / layout)
    message = refused(tmp_path / "one", tmp_path)
    assert "only one class ('cat')" in message
    assert "two or more class folders" in message


def test_not_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "pets.zip"
    path.write_text("not a zip")
    message = refused(path, tmp_path)
    assert "not a readable zip or tar archive" in message
    assert "Pack the folder again" in message


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    assert "expected an archive ending in .zip, .tar, .tar.gz, .tgz" in refused(picture(tmp_path / "cat.png"), tmp_path)


@pytest.mark.parametrize("data", ["http://example.com/pets.zip", "ftp://example.com/pets.zip", "gs://bucket/pets/"])
def test_unknown_scheme(tmp_path: Path, data: str) -> None:
    assert "expected a folder, an archive, an https:// address, an s3:// address or 'dogs'" in refused(data, tmp_path)


# ---- WEIGHTS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", source.WEIGHTS)
def test_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"resnet18{suffix}"
    path.touch()
    assert source.checked_weights(str(path)) == path


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(source.SourceError, match=r"^WEIGHTS=.*/no\.pth: no such file\. Give a PyTorch state dict \(\.pth"):
        source.checked_weights(str(tmp_path / "no.pth"))


def test_weights_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    with pytest.raises(source.SourceError, match=r"^WEIGHTS=.*/model\.onnx: expected a state dict ending in \.pth"):
        source.checked_weights(str(path))
