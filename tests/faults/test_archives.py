"""Row 8: archives that would climb out, fill the disk or the memory, or say two things at once."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from classifier.errors import DataError
from classifier.preparation import prepare
from fault_table import Landed
from model_fakes import MODEL_CODE, flags, picture

pytestmark = pytest.mark.fault(8)

Make = Callable[[Path], Path]
GIB = 2**30


def pictures() -> dict[str, bytes]:
    """A harmless set; every hostile archive holds it too, so that nothing but the hostile entry can be at fault."""
    return {f"{split}/{name}/{n}.png": picture(hash((split, name, n)) % 9999) for split in ("train", "valid", "test")
            for name in ("cat", "dog") for n in range(2)}  # fmt: skip


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in pictures().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def named(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def zipped(path: Path, *members: tuple[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in pictures().items():
            archive.writestr(name, data)
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, mode << 16
            archive.writestr(info, data)
    return path


def rezipped(path: Path, old: bytes, new: bytes) -> Path:
    """A zip whose names say what ``zipfile`` would not write."""
    assert len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


NAMES = [
    "../escape.png", "train/../../escape.png", "/etc/escape.png", "train/cat/../../../escape.png", "..\\escape.png",
    "C:\\escape.png", "\\\\host\\share\\escape.png", "train\\..\\..\\escape.png", "//escape.png", "C:/escape.png",
]  # fmt: skip
LINKS = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "block": tarfile.BLKTYPE,
         "fifo": tarfile.FIFOTYPE}  # fmt: skip


def refused(archive: Path, out: Path) -> str:
    """What preparing it says; asserts that it is refused and that nothing was written outside of ``out`` or for good inside."""
    before = set(out.parent.parent.rglob("*"))
    with pytest.raises(DataError) as problem:
        prepare(flags(archive.as_uri(), out, max_quarantined_share=0.9))
    after = set(out.parent.parent.rglob("*")) - before
    assert all(path == out or out in path.parents for path in after), after
    assert not [path for path in after if path.is_file()]
    assert not Path("/etc/escape.png").exists()
    return str(problem.value)


def test_what_the_archives_hold_beside_the_hostile_entry_is_harmless(tmp_path: Path, landed: Landed):
    """Otherwise a refusal would say nothing about the hostile entry."""
    for archive in (tar(tmp_path / "a.tar.gz"), zipped(tmp_path / "a.zip")):
        prepare(flags(archive.as_uri(), tmp_path / archive.suffix[1:] / "out"))
        landed()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_climbs_is_refused_and_named(tmp_path: Path, name: str, landed: Landed):
    (tmp_path / "jail").mkdir()
    placeholder = "x" * len(name.encode())
    made = [
        tar(tmp_path / "x.tar.gz", named(name)),
        rezipped(zipped(tmp_path / "x.zip", (placeholder, b"")), placeholder.encode(), name.encode()),
    ]
    with tarfile.open(made[0]) as archive:
        assert name in archive.getnames()
    for archive_path in made:
        words = refused(archive_path, tmp_path / "jail" / "out")
        assert "unsafe name" in words
        assert repr(name) in words
        landed()


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("target", ["/etc/passwd", "../../etc/passwd", "0.png"])
def test_links_and_devices_are_refused_and_named(tmp_path: Path, kind: str, target: str, landed: Landed):
    (tmp_path / "jail").mkdir()
    words = refused(tar(tmp_path / "x.tar", named("train/cat/evil.png", LINKS[kind], target), mode="w"), tmp_path / "jail" / "out")
    assert "train/cat/evil.png" in words
    landed()


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o060666, 0o010666, 0o140777])
def test_links_and_devices_in_a_zip_are_refused_and_named(tmp_path: Path, mode: int, landed: Landed):
    (tmp_path / "jail").mkdir()
    words = refused(zipped(tmp_path / "x.zip", ("train/cat/evil.png", b"/etc/passwd"), mode=mode), tmp_path / "jail" / "out")
    assert "train/cat/evil.png" in words
    landed()


def test_a_name_that_comes_twice_is_refused_and_named(tmp_path: Path, landed: Landed):
    (tmp_path / "jail").mkdir()
    twice = "train/cat/0.png"
    with pytest.warns(UserWarning, match="Duplicate name"):
        made = zipped(tmp_path / "x.zip", (twice, picture(1)))
    info, _ = named(twice)
    for archive in (made, tar(tmp_path / "x.tar.gz", (info, picture(1)))):
        assert repr(twice) in refused(archive, tmp_path / "jail" / "out")
        landed()


@pytest.mark.parametrize("other", ["train/Cat/5.png", "train/CAT/5.png"])
def test_classes_that_differ_in_case_only_are_refused_and_named(tmp_path: Path, other: str, landed: Landed):
    (tmp_path / "jail").mkdir()
    words = refused(zipped(tmp_path / "x.zip", (other, picture(1))), tmp_path / "jail" / "out")
    assert "'cat'" in words
    assert repr(other.split("/")[1]) in words
    landed()


# --- bombs -----------------------------------------------------------------------------------------------------------------


def in_little_memory(archive: Path, out: Path, limit_mib: int = 700) -> tuple[str, int]:
    """prepare.py as a job would run it; (its last line, most MiB that it held)."""
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        # Not ru_maxrss: that of a process begins with its parent's.
        "    print('most', next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    arguments = [
        "--source",
        archive.as_uri(),
        "--dataset_root",
        out.as_uri(),
        "--result",
        str(out / "r"),
        "--dataset",
        str(out / "d"),
    ]
    command = [sys.executable, "-c", program, str(MODEL_CODE / "prepare.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=MODEL_CODE)
    assert done.returncode == 1, done.stdout + done.stderr
    most = int(done.stdout.rsplit("most ", 1)[1]) // 1024
    assert most < limit_mib, f"{most} MiB"
    return done.stderr.strip().splitlines()[-1], most


def overlapping(path: Path, entries: int, size: int) -> Path:
    """Every entry of the directory points at the same compressed bytes: far beyond deflate's own 1,032:1.

    https://www.bamsoftware.com/hacks/zipbomb/
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(b"\0" * size) + packer.flush()
    crc = zlib.crc32(b"\0" * size)
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(packed), size, 1, 0) + b"x"
    entry = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(packed), size, len(name), 0, 0, 0, 0, 0, 0) + name
        for name in (f"train/cat/{n}.png".encode() for n in range(entries))
    )
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, entries & 0xFFFF, entries & 0xFFFF, len(entry), len(head) + len(packed), 0)
    path.write_bytes(head + packed + entry + end)
    return path


def many(path: Path, entries: int) -> Path:
    """A zip64 of so many empty files, and an end that states only one."""
    with path.open("wb") as file:
        file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"x")
        start = file.tell()
        block = []
        for n in range(entries):
            name = b"t/c/%d" % n
            block.append(struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name)
            if len(block) == 100_000:
                file.write(b"".join(block))
                block.clear()
        file.write(b"".join(block))
        size = file.tell() - start
        at = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, at, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return path


def packed_tar(path: Path, compress: Callable[[bytes], bytes], size: int) -> Path:
    """A tar with one file of zeros, compressed by a stronger method than its name says."""
    info = tarfile.TarInfo("train/cat/0.png")
    info.size = size
    path.write_bytes(compress(info.tobuf() + b"\0" * (size + 1024)))
    return path


BOMBS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "entries that share their bytes": ("x.zip", lambda path: overlapping(path, 2000, 2**20), "times its size"),
    "xz in a tar": ("x.tar", lambda path: packed_tar(path, lzma.compress, 256 * 2**20), "not a readable tar"),
    "bzip2 in a tar": ("x.tar.gz", lambda path: packed_tar(path, bz2.compress, 256 * 2**20), "not a readable tar"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_of_more_than_a_thousand_to_one_is_refused_in_little_memory(tmp_path: Path, bomb: str, landed: Landed):
    name, make, words = BOMBS[bomb]
    archive = make(tmp_path / name)
    unpacked = 2000 * 2**20 if bomb.startswith("entries") else 256 * 2**20
    assert unpacked > 6_000 * archive.stat().st_size, "no bomb"
    said, _ = in_little_memory(archive, tmp_path / "out")
    assert words in said
    landed()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_unpacks_to_a_gigabyte_is_refused_in_little_memory(tmp_path: Path, kind: bytes, landed: Landed):
    """tarfile reads such headers into memory before it shows a member."""
    info = tarfile.TarInfo("evil")
    info.type, info.size = kind, GIB
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    with (tmp_path / "x.tar.gz").open("wb") as file:
        file.write(packer.compress(info.tobuf(tarfile.USTAR_FORMAT)))
        for _ in range(256):
            file.write(packer.compress(b"\0" * (4 * 2**20)))
        file.write(packer.flush())
    said, _ = in_little_memory(tmp_path / "x.tar.gz", tmp_path / "out")
    assert f"a header of {GIB:,} bytes" in said
    assert "'evil'" in said
    landed()


@pytest.mark.slow
def test_ten_million_entries_are_refused_in_little_memory(tmp_path: Path, landed: Landed):
    """The archive says that it holds one."""
    archive = many(tmp_path / "x.zip", 10_000_000)
    said, _ = in_little_memory(archive, tmp_path / "out")
    assert "holds more than 3,000,000 files" in said
    landed()


def test_the_count_goes_by_the_directory_not_by_what_the_archive_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, landed: Landed
):
    from classifier import sources

    monkeypatch.setattr(sources, "MAX_MEMBERS", 1000)
    for archive in (many(tmp_path / "a.zip", 1001), overlapping(tmp_path / "b.zip", 1001, 16)):
        with pytest.raises(DataError, match="more than 1,000 files"):
            list(sources.ZipSource(archive, None).entries())
        landed()
    assert len(list(sources.ZipSource(many(tmp_path / "c.zip", 1000), None).entries())) == 1000


def test_ten_million_members_of_a_tar_end_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, landed: Landed):
    from classifier import sources

    monkeypatch.setattr(sources, "MAX_MEMBERS", 20_000)
    header = tarfile.TarInfo("train/cat/0.png").tobuf()
    (tmp_path / "x.tar").write_bytes(header * 30_000 + b"\0" * 1024)
    with pytest.raises(DataError, match="more than 20,000 files"):
        list(sources.TarSource(tmp_path / "x.tar", None).entries())
    landed()


def test_a_byte_that_is_not_what_it_was_is_found_wherever_it_is(tmp_path: Path, landed: Landed):
    """Of a tar in gzip; a picture in it may still be one, with other pixels."""
    from classifier import sources

    def files(path: Path) -> tuple[list[sources.Entry], list[bytes]]:
        source = sources.TarSource(path, None)
        return [*source.entries()], [*source.contents()]

    packed = tar(tmp_path / "good.tar.gz").read_bytes()
    before, damaged, said = files(tmp_path / "good.tar.gz"), tmp_path / "x.tar.gz", []
    places = range(2, len(packed), 97)
    for at in places:
        damaged.write_bytes(packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at + 1 :])
        try:
            assert files(damaged) == before, f"byte {at}: other pictures were taken"
        except DataError as problem:
            said.append(str(problem))
    assert {one.split("(")[0] for one in said} == {"x.tar.gz is not a readable tar archive "}
    assert len(said) > 0.95 * len(places)  # in gzip's header are bytes that mean nothing here, as the archive's name
    landed()


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path: Path, landed: Landed):
    """The files behind it would be missing, and nobody would hear of it. A tar without gzip has no other checksum."""
    archive = tar(tmp_path / "x.tar", mode="w")
    with tarfile.open(archive) as made:
        middle = made.getmembers()[6].offset
    data = bytearray(archive.read_bytes())
    data[middle + 5] ^= 1  # a letter of its name
    archive.write_bytes(data)
    (tmp_path / "jail").mkdir()
    words = refused(archive, tmp_path / "jail" / "out")
    assert "x.tar is not a readable tar archive" in words
    assert f"at byte {middle:,}" in words
    landed()


def test_nothing_of_a_refused_archive_is_described(tmp_path: Path, landed: Landed):
    archive = tar(tmp_path / "x.tar.gz", named("../escape.png"))
    in_little_memory(archive, tmp_path / "out", limit_mib=2000)
    assert not list((tmp_path / "out").rglob("dataset.json"))
    assert not [path for path in (tmp_path / "out").rglob("*.json") if json.loads(path.read_text())]
    landed()
