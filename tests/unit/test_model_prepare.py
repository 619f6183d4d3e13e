"""Preparation: what users throw at it, and what it makes of it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from classifier import preparation, serving, sources, storage
from classifier.catalogue import Catalogue
from classifier.dataset import load_split, read_info
from classifier.errors import ConfigError, DataError
from classifier.exchange import Hosts
from classifier.layout import Scheme, readable_labels
from classifier.lookalikes import near_pairs
from classifier.pictures import looks, normalise, perceptual_hash, shard_bytes
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


def test_a_tar_of_several_gzip_members_is_read_whole(tmp_path: Path):
    """As ``bgzip`` and parallel packers write it."""
    whole = _tar(tmp_path / "one.tar.gz", _member("train/cat/1.jpg"), _member("train/cat/2.jpg"))
    flat = gzip.decompress(whole.read_bytes())
    (tmp_path / "many.tgz").write_bytes(b"".join(gzip.compress(flat[at : at + 700]) for at in range(0, len(flat), 700)))
    one, many = (sources.TarSource(path, None) for path in (whole, tmp_path / "many.tgz"))
    assert [*many.entries()] == [*one.entries()] != []
    assert [*many.contents()] == [*one.contents()]


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


# --- how a person would see a picture --------------------------------------------------------------------------------------


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _near(image: Image.Image, colour: tuple[int, int, int], at: tuple[int, int] = (3, 3)) -> bool:
    return max(abs(a - b) for a, b in zip(image.getpixel(at), colour, strict=True)) <= 12


def _without_adobe_marker(data: bytes) -> bytes:
    """The same JPEG as a program other than Adobe's writes it: no marker, so readers take the inks as they are."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def test_cmyk_is_red_whether_its_inks_are_stored_inverted_or_not():
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert _near(_stored(_bytes(inks, "JPEG"), 256), (255, 0, 0))
    inverted = Image.eval(inks, lambda value: 255 - value)
    turned = Image.Exif()
    turned[0x0112] = 6
    for exif in (Image.Exif(), turned):
        assert _near(_stored(_without_adobe_marker(_bytes(inverted, "JPEG", exif=exif)), 256), (255, 0, 0))
    assert _near(_stored(_bytes(inks, "TIFF"), 256), (255, 0, 0))


@pytest.mark.parametrize("largest", [200, 65535])
def test_grey_of_sixteen_bits_keeps_its_brightness(largest: int):
    values = np.full((16, 16), largest, dtype=np.uint16)
    expected = round(largest / 257)
    assert _near(_stored(_bytes(Image.fromarray(values), "PNG"), 256), (expected,) * 3)


def test_transparent_parts_are_white():
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 8, 8))
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 8, 8))
    key = Image.new("RGB", (16, 16), (255, 0, 0))
    key.paste((1, 2, 3), (0, 0, 8, 8))
    sixteen = np.full((16, 16), 40_000, dtype=np.uint16)
    sixteen[:8, :8] = 7
    for data, ink in (
        (_bytes(palette, "PNG", transparency=0), (255, 0, 0)),
        (_bytes(palette, "GIF", transparency=0), (255, 0, 0)),
        (_bytes(half, "PNG"), (255, 0, 0)),
        (_bytes(half, "WEBP", lossless=True), (255, 0, 0)),
        (_bytes(half.convert("LA"), "PNG"), (76, 76, 76)),
        (_bytes(key, "PNG", transparency=(1, 2, 3)), (255, 0, 0)),
        (_bytes(Image.fromarray(sixteen), "PNG", transparency=7), (156, 156, 156)),
    ):
        stored = _stored(data, 256)
        assert stored.mode == "RGB"
        assert _near(stored, (255, 255, 255))
        assert _near(stored, ink, (12, 12))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_stored_upright(orientation: int, kind: str):
    upright = Image.new("RGB", (64, 48), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    upright.paste((0, 0, 255), (48, 0, 64, 16))
    # EXIF's numbers, and what a camera that was held so did to the picture.
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE}
    turns |= {6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    camera = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = _stored(_bytes(camera, kind, exif=exif, quality=95), 256)
    assert stored.size == (64, 48)
    assert _near(stored, (255, 0, 0), (6, 6))
    assert _near(stored, (0, 0, 255), (58, 6))
    assert _near(stored, (255, 255, 255), (6, 42))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_pictures_that_move_or_have_pages_are_refused(kind: str):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(serving.PictureError, match="animated or multi-page"):
        normalise(data, 256)


def test_a_telephones_jpeg_with_a_second_picture_behind_it_is_one_picture():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    stored = normalise(_bytes(frames[0], "MPO", save_all=True, append_images=frames[1:]), 256)
    assert stored.extension == "jpg"
    assert _near(serving.decode(stored.data), (255, 0, 0))
    assert Image.open(io.BytesIO(stored.data)).format == "JPEG"


def test_a_progressive_jpeg_is_stored_as_a_baseline_one_with_half_the_colour():
    data = _bytes(Image.open(io.BytesIO(picture(5))), "JPEG", progressive=True, subsampling=0)
    stored = normalise(data, 256).data
    kept = Image.open(io.BytesIO(stored))
    assert "progressive" not in kept.info
    assert [layer[1:3] for layer in kept.layer] == [(2, 2), (1, 1), (1, 1)]


def test_a_large_jpeg_is_scaled_while_decoded_without_a_visible_difference(monkeypatch: pytest.MonkeyPatch):
    source = _bytes(Image.open(io.BytesIO(picture(3, size=(16, 12)))).resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG")
    fast = np.asarray(normalise(source, 100).picture, dtype=int)
    monkeypatch.setattr("classifier.serving.draft", lambda *_: None)
    exact = np.asarray(normalise(source, 100).picture, dtype=int)
    assert fast.shape == exact.shape == (100, 133, 3)
    assert np.abs(fast - exact).mean() < 1.0


@given(st.binary(max_size=300), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_damaged_files_are_refused_and_never_end_the_job(noise: bytes, cut: int):
    for data in (noise, picture(1, size=(8, 8), kind="JPEG")[:cut] + noise, picture(1, size=(8, 8))[:cut] + noise):
        with contextlib.suppress(serving.PictureError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it reads over
            assert normalise(data, 256).data


# --- names -----------------------------------------------------------------------------------------------------------------

_PARTS = st.text(st.characters(exclude_characters="/\\\0:", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda part: part not in (".", "..")
)


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@given(st.lists(_PARTS, min_size=1, max_size=5))
def test_safe_names_stay_as_they_are_and_climbing_ones_are_refused(parts: list[str]):
    name = "/".join(parts)
    assert sources.safe_name(name) == name
    assert sources.safe_name("./" + name.replace("/", "\\")) == name
    for bad in ("/" + name, "../" + name, name + "/..", "c:/" + name, name + "\0"):
        with pytest.raises(DataError, match="unsafe name"):
            sources.safe_name(bad)


@given(
    # Two classes that differ in case or in the way an accent is written are refused: tests/faults/test_archives.py.
    st.lists(_PARTS.map(lambda part: f"c{part}"), min_size=2, max_size=4, unique_by=_spelling),
    st.lists(_PARTS.map(lambda part: f"top{part}"), max_size=2),
    st.integers(2, 9),
    st.booleans(),
)
@settings(deadline=None)
def test_every_picture_of_every_layout_has_one_place(classes: list[str], top: list[str], count: int, splits: bool):
    parts = [["train"], ["val"], ["test"]] if splits else [[]]
    names = ["/".join([*top, *part, label, f"{number}.jpg"]) for part in parts for label in classes for number in range(count)]
    places, split, _ = _placed(names, seed=1)
    assert set(places) == set(names)
    assert split == ("given" if splits else "seeded")
    assert all(places[name][1] == name.split("/")[-2] for name in names)
    for label in classes:
        assert any(place == ("train", label) for place in places.values())


def test_a_file_beside_the_class_folders_has_no_place():
    scheme = Scheme(depth=1, splits=True)
    assert scheme.place("top/train/cat/1.jpg") is not None
    assert [scheme.place(name) for name in ("top/README", "top/train/x.jpg", "top/other/cat/1.jpg")] == [None] * 3


# --- look-alikes -----------------------------------------------------------------------------------------------------------


def _scene(seed: int) -> Image.Image:
    """Something with shapes in it, as photographs have."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120), Image.Resampling.BICUBIC)
    for _ in range(6):
        x, y, w, h = (int(value) for value in random.integers(5, 70, 4))
        ImageDraw.Draw(image).ellipse((x, y, x + w, y + h), fill=tuple(int(c) for c in random.integers(0, 256, 3)))
    return image


def test_near_pairs_are_those_of_comparing_all():
    random = np.random.default_rng(0)
    rows = []
    for number in range(60):
        look, check = (random.integers(0, 256, 32, dtype=np.uint8) for _ in range(2))
        for copy in range(3):
            flips = [1 << int(random.integers(0, 8)) for _ in range(7)]
            at = random.choice(32, 7, replace=False)
            other = look.copy()
            other[at] ^= np.array(flips, dtype=np.uint8)
            rows.append((number * 3 + copy, other.tobytes(), check.tobytes()))

    def apart(a: bytes, b: bytes) -> int:
        return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count()

    for distance in (1, 5, 12, 16):
        expected = {
            (a[0], b[0], apart(a[1], b[1]))
            for a, b in itertools.combinations(rows, 2)
            if apart(a[1], b[1]) <= distance and apart(a[2], b[2]) <= distance
        }
        assert set(near_pairs(rows, distance)) == expected
    assert set(near_pairs([], 12)) == set()
    assert len(set(near_pairs(rows, 16))) > 100


def test_perceptual_hash_is_the_librarys():
    random = np.random.default_rng(3)
    for cells in (2, 5, 9, 30):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells + 3), dtype=np.uint8))
        for size in ((64, 64), (97, 301), (640, 20)):
            grey = coarse.resize(size, Image.Resampling.BICUBIC)
            assert (perceptual_hash(grey) == imagehash.phash(grey, 16).hash).all(), (cells, size)


def test_plain_pictures_look_like_nothing():
    for shade in (0, 255):
        assert looks(Image.new("RGB", (64, 64), (shade,) * 3)) == (None, None)


def test_look_alikes_of_held_out_pictures_leave_train_and_others_are_only_named(tmp_path: Path):
    root = tmp_path / "pictures"
    numbers = iter(range(1000))
    for split, count in (("train", 6), ("valid", 3), ("test", 3)):
        for label in ("cat", "dog"):
            _files(root, {f"{split}/{label}/{n}.jpg": _bytes(_scene(next(numbers)), "JPEG", quality=92) for n in range(count)})
    again = _bytes(Image.open(root / "test/cat/0.jpg").resize((80, 60)), "JPEG", quality=70)
    weaker = _bytes(Image.open(root / "test/cat/0.jpg"), "JPEG", quality=60)
    twin = _bytes(Image.open(root / "train/dog/1.jpg"), "JPEG", quality=65)
    _files(root, {"train/dog/again.jpg": again, "valid/cat/weaker.jpg": weaker, "train/dog/twin.jpg": twin})

    prepare(flags(root.as_uri(), tmp_path / "out", picture_size=256))
    result, report = _results(tmp_path / "out")
    assert [(entry["file"], entry["kind"], entry["same_as"]) for entry in report["duplicates"]] == [
        ("train/dog/again.jpg", "near-leak", "test/cat/0.jpg"),
        ("valid/cat/weaker.jpg", "near-leak", "test/cat/0.jpg"),
    ]
    assert (report["num_near_leaks"], report["num_near_duplicates"]) == (2, 1)
    assert {report["near_duplicates"][0][key] for key in ("file", "looks_like")} == {"train/dog/1.jpg", "train/dog/twin.jpg"}
    assert result["num_pictures"] == {"train": 13, "valid": 6, "test": 6}

    prepare(flags(root.as_uri(), tmp_path / "off", picture_size=256, near_duplicate_distance=0))
    assert _results(tmp_path / "off")[0]["num_pictures"] == {"train": 14, "valid": 7, "test": 6}
    assert _results(tmp_path / "off")[1]["num_near_duplicates"] is None


# --- what a data set holds, and what it leaves out -------------------------------------------------------------------------


def test_everything_that_was_refused_is_listed_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preparation, "LISTED", 2)
    root = write_folder(tmp_path / "pictures")
    _files(root, {f"train/n02000000-breed_0/bad{number}.png": b"x" for number in range(5)} | {"README": b"hello"})
    shutil.copy(root / "test" / "n02000000-breed_0" / "0.png", root / "train" / "n02000000-breed_0" / "leak.png")
    prepare(flags(root.as_uri(), tmp_path))
    result, report = _results(tmp_path)
    assert len(report["quarantined"]) == 2
    assert report["num_quarantined"] == 6
    assert sum(report["quarantine_reasons"].values()) == 6
    assert report["refused_by_class"] == {"n02000000-breed_0": {"quarantined": 5, "leak": 1}}
    assert report["imbalance_ratio"] == 1.0
    for folder in (tmp_path / "result", tmp_path / "datasets" / result["dataset_hash"]):
        lines = [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]
        assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)
        assert Counter(line["kind"] for line in lines) == {"quarantined": 6, "leak": 1}


def test_the_manifest_has_a_row_for_every_picture_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(preparation, "ROW_GROUP", 7)
    prepare(flags(write_folder(tmp_path / "pictures").as_uri(), tmp_path))
    folder = tmp_path / "datasets" / _results(tmp_path)[0]["dataset_hash"]
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    stored = {}
    for shard in json.loads((folder / "dataset.json").read_text())["shards"]:
        path = folder / "shards" / shard["name"]
        assert path.stat().st_size == shard["bytes"]
        with tarfile.open(path) as tar:
            found = {(path.name, member.name): tar.extractfile(member).read() for member in tar}
        assert len(found) == shard["pictures"]
        stored |= found
    assert len({row["shard"] for row in rows}) > 3
    assert {(row["shard"], row["member"]): row["sha256"] for row in rows} == {
        key: hashlib.sha256(data).hexdigest() for key, data in stored.items()
    }
    assert not list(tmp_path.rglob("*.partial"))


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=30))
@settings(deadline=None)
def test_the_size_of_a_shard_is_known_before_it_is_written(sizes: list[int]):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            info = tarfile.TarInfo(f"00000/{number:040d}.jpg")
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    assert len(out.getvalue()) == shard_bytes(sizes)


def test_a_data_set_of_which_a_shard_is_missing_or_short_is_made_again(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    prepare(flags(root.as_uri(), tmp_path))
    shard = next((tmp_path / "datasets").glob("*/shards/train-00000.tar"))
    whole = shard.read_bytes()
    for damage in (shard.unlink, lambda: shard.write_bytes(whole[:1000])):
        damage()
        prepare(flags(root.as_uri(), tmp_path))
        assert _results(tmp_path)[0]["reused"] is False
        assert shard.read_bytes() == whole
    prepare(flags(root.as_uri(), tmp_path))
    assert _results(tmp_path)[0]["reused"] is True


def test_a_data_set_that_is_whole_is_not_written_over(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    prepare(flags(root.as_uri(), tmp_path))
    shard = next((tmp_path / "datasets").glob("*/shards/train-00000.tar"))
    before = shard.stat().st_mtime_ns
    (root / "README").write_text("the source is another, its pictures are the same")
    prepare(flags(root.as_uri(), tmp_path))
    result, report = _results(tmp_path)
    assert not result["reused"]
    assert report["num_quarantined"] == 1
    assert shard.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "train" / "empty").mkdir(), r"class 'empty' has no usable training picture \(its folder is empty\)"),
        (lambda root: _files(root, {f"train/bad/{n}.jpg": b"x" for n in range(3)}), r"class 'bad' .*3 quarantined.*not a picture"),
        (lambda root: _files(root, {"valid/only/1.png": picture(5000)}), r"class 'only' .*1 in valid"),
        (lambda root: _files(root, {"train/few/1.png": picture(5000)}), r"fewer than 2 training pictures \('few': 1\)"),
        (lambda root: shutil.rmtree(root / "train"), r"none called train"),
    ],
)
def test_an_empty_class_ends_with_one_clear_line(tmp_path: Path, spoil: Callable[[Path], None], words: str):
    root = write_folder(tmp_path / "pictures")
    spoil(root)
    with pytest.raises(DataError, match=words):
        prepare(flags(root.as_uri(), tmp_path))
    assert not list((tmp_path / "datasets").iterdir())


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_empty_class_in_an_archive_is_seen_too(tmp_path: Path, kind: str):
    root = write_folder(tmp_path / "pictures")
    (root / "train" / "empty").mkdir()
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), kind, root))
    with pytest.raises(DataError, match="class 'empty'"):
        prepare(flags(archive.as_uri(), tmp_path))


def test_an_empty_class_ends_the_command_with_exit_code_1(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    (root / "train" / "empty").mkdir()
    out = [word for name in ("dataset", "result") for word in (f"--{name}", str(tmp_path / name))]
    failed = run_script(
        "prepare.py", "--source", root.as_uri(), "--dataset_root", "file:///x", *out, SAGEMAKER_BASE_DIR=str(tmp_path)
    )
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines() == [
        "error: class 'empty' has no usable training picture (its folder is empty): add pictures or remove the folder"
    ]


# --- archives --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data, at: data[: at + 60] + b"\0\0\0\0" + data[at + 64 :], "checksum"),
        (lambda data, at: data[:at] + b"JUNK" + data[at + 4 :], "no header"),
    ],
)
def test_a_damaged_member_of_a_zip_is_refused_alone(tmp_path: Path, damage: Callable[[bytes, int], bytes], words: str):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.bin", bytes(range(256)))
        archive.writestr("a/2.bin", bytes(range(256)), zipfile.ZIP_DEFLATED)
    path.write_bytes(damage(path.read_bytes(), 0))
    source = sources.ZipSource(path, None)
    bad, good = source.entries()
    assert source.reader().read(*good) == bytes(range(256))
    with pytest.raises(DataError, match=words):
        source.reader().read(*bad)


def test_members_of_a_zip_that_cannot_be_read_say_why(tmp_path: Path):
    reader = sources.ZipReader(str(tmp_path / "none"))
    for locator, words in (("0 1 0 1 0", "encrypted"), ("0 1 12 0 0", "compression method 12")):
        with pytest.raises(DataError, match=words):
            reader.read("x", 1, locator)


def test_a_tar_that_ends_too_early_is_refused(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), "gztar", root))
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(DataError, match="not a readable tar"):
        _listed(archive, [], tmp_path)


# --- processes and instances -----------------------------------------------------------------------------------------------


def _contents(folder: Path) -> set[tuple[str, str, bytes]]:
    """``(split, member, bytes)`` of all stored pictures."""
    found = set()
    for shard in json.loads((folder / "dataset.json").read_text())["shards"]:
        with tarfile.open(folder / "shards" / shard["name"]) as tar:
            found |= {(shard["split"], member.name, tar.extractfile(member).read()) for member in tar}
    return found


# Small chunks, so that every process gets some; in a process of its own, because this one has threads.
_TWO_PROCESSES = """
import json, sys
sys.path.insert(0, sys.argv[1])
from classifier import workforce
workforce.CHUNK = 5
from prepare import warm_up
with workforce.Workforce(2, warm_up) as workers:
    from classifier.preparation import PrepareFlags, prepare
    prepare(PrepareFlags(**json.loads(sys.argv[2])), workers)
"""


def test_worker_processes_make_the_same_data_set(tmp_path: Path):
    root = write_folder(tmp_path / "pictures")
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), "tar", root))
    prepare(flags(root.as_uri(), tmp_path / "one"))
    for name, source in (("many", root), ("tar", archive)):
        given = json.dumps(asdict(flags(source.as_uri(), tmp_path / name)))
        subprocess.run([sys.executable, "-c", _TWO_PROCESSES, str(MODEL_CODE), given], check=True, timeout=120)
        assert _results(tmp_path / name)[0]["dataset_hash"] == _results(tmp_path / "one")[0]["dataset_hash"]
    name = _results(tmp_path / "one")[0]["dataset_hash"]
    manifests = [(tmp_path / out / "datasets" / name / "manifest.parquet").read_bytes() for out in ("one", "many")]
    assert manifests[0] == manifests[1]


def _instance(tmp_path: Path, host: str, hosts: list[str]) -> Path:
    """The base folder of one instance of a processing job."""
    config = tmp_path / host / "config"
    config.mkdir(parents=True)
    (config / "resourceconfig.json").write_text(json.dumps({"current_host": host, "hosts": hosts}))
    return tmp_path / host


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_two_instances_make_the_data_set_of_one(tmp_path: Path, kind: str):
    root = write_folder(tmp_path / "pictures")
    shutil.copy(root / "test" / "n02000000-breed_0" / "0.png", root / "train" / "n02000000-breed_0" / "leak.png")
    (root / "train" / "n02000000-breed_0" / "bad.png").write_text("no picture")
    source = root if kind == "folder" else Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", root))
    prepare(flags(source.as_uri(), tmp_path / "one"))
    hosts, running = ["algo-1", "algo-2"], []
    for host in hosts:
        out = tmp_path / host / "output"
        arguments = {
            "source": source.as_uri(),
            "dataset_root": (tmp_path / "store").as_uri(),
            "dataset": str(out / "d"),
            "result": str(out / "r"),
            "picture_size": "32",
            "max_quarantined_share": "0.5",
            "exchange_uri": (tmp_path / "exchange").as_uri(),
            "exchange_wait_s": "60",
        }
        command = [sys.executable, str(MODEL_CODE / "prepare.py"), *(w for k, v in arguments.items() for w in (f"--{k}", v))]
        environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(_instance(tmp_path, host, hosts))}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    assert [status for _, status in ended] == [0, 0], ended
    for host in hosts:  # what SageMaker does when the job has ended
        shutil.copytree(tmp_path / host / "output", tmp_path / "joined", dirs_exist_ok=True)
    alone, report = _results(tmp_path / "one")
    together = json.loads((tmp_path / "joined" / "r" / "result.json").read_text())
    assert not (tmp_path / "algo-2" / "output" / "r").exists()
    assert {k: v for k, v in together.items() if k != "dataset_uri"} == {k: v for k, v in alone.items() if k != "dataset_uri"}
    assert json.loads((tmp_path / "joined" / "r" / "report.json").read_text()) == report
    name = alone["dataset_hash"]
    assert _contents(tmp_path / "joined" / "d" / name) == _contents(tmp_path / "one" / "datasets" / name)
    assert preparation.is_complete((tmp_path / "joined" / "d").as_uri(), name)
    written = [sorted(path.name for path in (tmp_path / host).rglob("*.tar")) for host in hosts]
    assert all(written)
    assert not set(written[0]) & set(written[1])


def test_an_instance_that_is_not_heard_of_or_failed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write_folder(tmp_path / "pictures")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(_instance(tmp_path, "algo-1", ["algo-1", "algo-2"])))
    with pytest.raises(ConfigError, match="exchange_uri is empty"):
        prepare(flags(root.as_uri(), tmp_path))
    exchange = {"exchange_uri": (tmp_path / "exchange").as_uri(), "exchange_wait_s": 1}
    with pytest.raises(DataError, match="nothing was heard of instance algo-2"):
        prepare(flags(root.as_uri(), tmp_path, **exchange))
    assert "algo-2" in (tmp_path / "exchange" / "algo-1.failed").read_text()
    (tmp_path / "exchange" / "algo-2.failed").write_text("the disk is full")
    with pytest.raises(DataError, match="instance algo-2 failed: the disk is full"):
        prepare(flags(root.as_uri(), tmp_path, **exchange))


class _Bucket:
    """The few calls of S3 that preparation makes, on a dictionary."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def get_paginator(self, _: str) -> _Bucket:
        return self

    def paginate(self, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:  # noqa: N803
        for key in sorted(self.objects):
            if key.startswith(Prefix):
                yield {"Contents": [{"Key": key, "Size": len(self.objects[key]), "ETag": f'"{zlib.crc32(self.objects[key])}"'}]}

    def _object(self, key: str) -> bytes:
        if key not in self.objects:
            raise ClientError({"Error": {"Code": "404"}}, "GetObject")
        return self.objects[key]

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        return {"Body": io.BytesIO(self._object(Key))}

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        return {"ContentLength": len(self._object(Key)), "ETag": '"x"'}

    def download_file(self, bucket: str, key: str, path: str) -> None:
        Path(path).write_bytes(self._object(key))

    def upload_file(self, path: str, bucket: str, key: str) -> None:
        self.objects[key] = Path(path).read_bytes()


def test_a_prefix_of_s3_gives_the_same_data_set_as_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write_folder(tmp_path / "pictures")
    (root / "train" / "n02000000-breed_0" / "what?.png").write_bytes(picture(4000))
    bucket = _Bucket({f"in/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*.png")})
    monkeypatch.setattr(storage, "s3", lambda: bucket)
    prepare(flags(root.as_uri(), tmp_path / "folder"))
    prepare(flags("s3://pictures/in", tmp_path / "bucket"))
    assert _results(tmp_path / "bucket")[0]["dataset_hash"] == _results(tmp_path / "folder")[0]["dataset_hash"]
    prepare(flags("s3://pictures/in", tmp_path / "bucket"))
    assert _results(tmp_path / "bucket")[0]["reused"] is True
    bucket.objects["in/train/empty/"] = b""
    with pytest.raises(DataError, match="class 'empty'"):
        prepare(flags("s3://pictures/in/", tmp_path / "bucket"))
    with pytest.raises(DataError, match="holds no objects"):
        prepare(flags("s3://pictures/out/", tmp_path / "bucket"))


def test_instances_meet_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bucket = _Bucket({})
    monkeypatch.setattr(storage, "s3", lambda: bucket)
    one, other = (Hosts(["algo-1", "algo-2"], number, "s3://pictures/parts/", 1) for number in range(2))
    other.tell_text("done", "same")
    heard: list[tuple[str, str]] = []
    one.collect("done", tmp_path, lambda host, path: heard.append((host, path.read_text())))
    assert heard == [("algo-2", "same")]
    assert set(bucket.objects) == {"parts/algo-2.done"}
    with pytest.raises(DataError, match="algo-1"):
        other.collect("done", tmp_path, lambda *_: None)


def test_one_instance_needs_no_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    hosts = Hosts.of_this_job("", 1)
    assert (hosts.names, hosts.first) == (["one"], True)
    hosts.tell_text("done", "x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"near_duplicate_distance": 17}, "outside 0 to 16 bits"),
        ({"picture_size": 8}, "outside 16 to 4096"),
        ({"exchange_wait_s": 0}, "below 1"),
    ],
)
def test_flags_out_of_range_are_refused(tmp_path: Path, changes: dict[str, int], words: str):
    with pytest.raises(ConfigError, match=words):
        prepare(flags("file:///x", tmp_path, **changes))
