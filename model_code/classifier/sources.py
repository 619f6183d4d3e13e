"""Where pictures come from: a prefix, or an archive (zip, tar) that is read member by member and never extracted.

A source is listed first, in a fixed order, and read afterwards; of neither anything stays in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import threading
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, Self, cast

from classifier import downloads, storage
from classifier.errors import DataError
from classifier.pictures import MAX_FILE_BYTES, Reader

MAX_MEMBERS = 3_000_000
MAX_TOTAL_BYTES = 200 * 2**30
MAX_HEADER_BYTES = 2**20
"""Of a long name or of pax records in a tar."""
MAX_RATIO = 200
"""Uncompressed over compressed bytes of a whole archive; pictures hardly compress, bombs do."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


class Entry(NamedTuple):
    """A file of the source: posix name, size in bytes, and what its reader needs to find it.

    A name that ends in ``/`` is a folder: worth knowing, since it may be an empty class.
    """

    name: str
    size: int
    locator: str = ""


class Source(Protocol):
    """A set of named files, listed in a fixed order."""

    def entries(self) -> Iterator[Entry]:
        """Every file, and folders as far as they are known; nothing is kept of them. Raises DataError."""

    def reader(self) -> Reader | None:
        """Reads files in any order from any process; None when they come in the order of ``contents`` only."""

    def contents(self) -> Iterator[bytes]:
        """The bytes of every entry, in the order of ``entries`` (empty for a folder or a file that is too large)."""

    def fingerprint(self) -> str | None:
        """A text that changes when the content does, known once ``entries`` has ended; None when the origin offers none."""


def safe_name(name: str) -> str:
    """The member's name in posix form. Raises DataError for absolute names, drives, and ``..``."""
    posix = name.replace("\\", "/")
    parts = PurePosixPath(posix).parts
    if posix.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")) or "\0" in posix:
        raise DataError(f"the archive holds the unsafe name {name!r}: make it again from inside the folder of pictures")
    return "/".join(part for part in parts if part != ".")  # "" for the archive's own root


@dataclass(frozen=True)
class FolderReader:
    """Files of a mounted folder."""

    root: str
    slow: bool = False

    def read(self, name: str, size: int, locator: str) -> bytes:
        return (Path(self.root) / name).read_bytes()


@dataclass(frozen=True)
class BucketReader:
    """Objects of S3 under ``uri``, which ends in ``/``."""

    uri: str
    slow: bool = True

    def read(self, name: str, size: int, locator: str) -> bytes:
        with _MAKING_A_CLIENT:
            storage.s3()
        return storage.read(self.uri + name)


_MAKING_A_CLIENT = threading.Lock()
"""boto3 makes clients in one thread at a time; it then keeps them, and they serve all threads."""


class PrefixSource:
    """Objects under ``s3://bucket/prefix/`` (or a mounted ``file:///folder``)."""

    def __init__(self, uri: str) -> None:
        self._uri = uri if uri.endswith("/") else uri + "/"
        self._digest = hashlib.sha256()

    def entries(self) -> Iterator[Entry]:
        self._digest, found = hashlib.sha256(), False
        for entry, tag in self._folder() if storage.is_file(self._uri) else self._bucket():
            found = found or not entry.name.endswith("/")
            self._digest.update(f"{entry.name}\0{entry.size}\0{tag}\n".encode())
            yield entry
        if not found:
            raise DataError(f"{self._uri} holds no objects: upload class folders with pictures there, or give another source")

    def _root(self) -> Path:
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(self._uri).path))

    def _folder(self) -> Iterator[tuple[Entry, str]]:
        if self._root().is_dir():
            yield from _walk(str(self._root()), "")

    def _bucket(self) -> Iterator[tuple[Entry, str]]:
        """Objects in key order. An empty object whose key ends in ``/`` is how the console makes a folder."""
        bucket, _, prefix = self._uri.removeprefix("s3://").partition("/")
        for page in storage.s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                if item["Key"] != prefix:
                    yield Entry(item["Key"][len(prefix) :], int(item["Size"])), str(item["ETag"]).strip('"')

    def reader(self) -> Reader:
        return FolderReader(str(self._root())) if storage.is_file(self._uri) else BucketReader(self._uri)

    def contents(self) -> Iterator[bytes]:
        raise NotImplementedError("a prefix is read by name")

    def fingerprint(self) -> str | None:
        return self._digest.hexdigest()


def _walk(root: str, below: str) -> Iterator[tuple[Entry, str]]:
    """Plain files and empty folders under ``root``, sorted, with their times; links are not followed."""
    with os.scandir(f"{root}/{below}") as found:
        entries = sorted(found, key=lambda entry: entry.name)
    if not entries and below:
        yield Entry(_text(below), 0), ""
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, f"{below}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            facts = entry.stat(follow_symlinks=False)
            yield Entry(_text(below + entry.name), facts.st_size), f"{facts.st_mtime_ns}"


def _text(name: str) -> str:
    """The name as text; bytes that are not UTF-8 are spelled out (such a file is then refused as one that is not found)."""
    return name.encode("utf-8", "backslashreplace").decode()


class _Limits:
    """Counts members and bytes of an archive; raises DataError beyond the limits."""

    def __init__(self, archive: Path) -> None:
        self.compressed = max(archive.stat().st_size, 1)
        self.members = 0
        self.total = 0

    def add(self, size: int) -> None:
        self.members += 1
        self.total += size
        if self.members > MAX_MEMBERS:
            raise DataError(f"the archive holds more than {MAX_MEMBERS:,} files: split it")
        if self.total > MAX_TOTAL_BYTES:
            raise DataError(f"the archive unpacks to more than {MAX_TOTAL_BYTES:,} bytes: split it")
        if self.total > 50 * 2**20 and self.total > MAX_RATIO * self.compressed:
            raise DataError(f"the archive unpacks to more than {MAX_RATIO} times its size: that is not a set of pictures")


@dataclass(frozen=True)
class ZipReader:
    """Members of a zip file, found by their offset: a process that reads one need not read the archive's directory."""

    path: str
    slow: bool = False

    def read(self, name: str, size: int, locator: str) -> bytes:
        """``locator``: offset of the local header, bytes stored, method, flags, checksum. Raises DataError."""
        offset, packed, method, flags, checksum = (int(part) for part in locator.split())
        if flags & 1:
            raise DataError("unreadable in the archive (encrypted)")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"unreadable in the archive (compression method {method}; stored and deflated are read)")
        with Path(self.path).open("rb") as archive:
            archive.seek(offset)
            header = archive.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise DataError("unreadable in the archive (no header where its directory says)")
            archive.seek(sum(_LOCAL_HEADER.unpack(header)[-2:]), os.SEEK_CUR)
            data = archive.read(packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                # No more than the announced size is unpacked, whatever the data say.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
            except zlib.error as problem:
                raise DataError(f"unreadable in the archive ({problem})") from None
        if len(data) != size or zlib.crc32(data) != checksum:
            raise DataError("unreadable in the archive (its checksum is wrong)")
        return data


_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""A member's header in a zip: its last two numbers are the lengths of the name and of the extra field, which follow."""


_ENTRY_BYTES = 46
"""Of an entry in a zip's directory, without its name and comment; three of its fields are their lengths."""
_ZIP64_BYTES = 56 + 20
"""What zip64 puts between the directory and the end of the archive."""


def _check_directory(path: Path) -> None:
    """Raises DataError for more than MAX_MEMBERS entries: ``zipfile`` would read them all into memory before it says how many.

    The directory's size is what counts, since that is what ``zipfile`` goes by; the number that the archive states may lie.
    """
    with path.open("rb") as archive:
        end: Any = zipfile._EndRecData(archive)  # type: ignore[attr-defined]  # zip64's too, where zipfile itself finds them
        signature, size, ends = (end[0], end[5], end[9]) if end else (b"", 0, 0)
        start = ends - size - (_ZIP64_BYTES if signature == b"PK\6\6" else 0)
        if size // _ENTRY_BYTES <= MAX_MEMBERS or start < 0:
            return
        archive.seek(start)
        members = 0
        while size > 0 and members <= MAX_MEMBERS:
            lengths = struct.unpack_from("<3H", archive.read(_ENTRY_BYTES), 28)
            archive.seek(sum(lengths), os.SEEK_CUR)
            size -= _ENTRY_BYTES + sum(lengths)
            members += 1
    if members > MAX_MEMBERS:
        raise DataError(f"{path.name} holds more than {MAX_MEMBERS:,} files: split it")


class ZipSource:
    """A zip file on disk. While it is listed, its whole directory is in memory (some 700 bytes for a member)."""

    def __init__(self, path: Path, tag: str | None) -> None:
        self._path, self._tag = path, tag

    def entries(self) -> Iterator[Entry]:
        limits = _Limits(self._path)
        try:
            _check_directory(self._path)
            archive = zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, struct.error) as problem:
            raise DataError(f"{self._path.name} is not a readable zip archive ({problem}): make or download it again") from None
        with archive:
            for info in archive.infolist():
                name = safe_name(info.filename)
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise DataError(f"the archive holds {name!r}, a link or device: only plain files are accepted")
                if info.is_dir():
                    yield Entry(f"{name}/", 0)
                    continue
                limits.add(info.file_size)
                where = (info.header_offset, info.compress_size, info.compress_type, info.flag_bits, info.CRC)
                yield Entry(name, info.file_size, " ".join(str(number) for number in where))

    def reader(self) -> Reader:
        return ZipReader(str(self._path))

    def contents(self) -> Iterator[bytes]:
        raise NotImplementedError("a zip archive is read by offset")

    def fingerprint(self) -> str | None:
        return self._tag


class _Member(tarfile.TarInfo):
    """A member whose own headers are bounded: ``tarfile`` reads long names and pax records into memory, however long."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """``tarfile`` takes a damaged header for the end of the archive: the files behind it would be missing without a word."""
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as problem:  # type: ignore[attr-defined] # not in the stubs
            raise tarfile.ReadError(f"{problem} at byte {archive.offset:,}") from None

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        kinds = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.type in kinds and self.size > MAX_HEADER_BYTES:
            raise DataError(f"the archive holds a header of {self.size:,} bytes at {self.name[:100]!r}: make it again")
        return super()._proc_member(archive)  # type: ignore[misc]


class TarSource:
    """A tar file on disk, plain or gzip; it is read from its start to its end, once for the names and once for the bytes."""

    def __init__(self, path: Path, tag: str | None) -> None:
        self._path, self._tag = path, tag

    def _open(self) -> BinaryIO:
        """Plain or gzip, by the first bytes. A block of bzip2 or xz, which tarfile would read too, may unpack to gigabytes."""
        with self._path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return cast(BinaryIO, gzip.open(self._path)) if packed else self._path.open("rb")

    def _members(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        limits = _Limits(self._path)
        try:
            with self._open() as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined] # tarfile keeps all that it has seen
                    name = safe_name(member.name)
                    if not (member.isdir() or member.isreg()):
                        raise DataError(f"the archive holds {name!r}, a link or device: only plain files are accepted")
                    limits.add(member.size)
                    yield name + "/" * member.isdir(), member, archive
                while block := stream.read(2**20):  # gzip's checksum stands at its end, and a tar ends before it
                    limits.add(len(block))
        except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
            raise DataError(f"{self._path.name} is not a readable tar archive ({problem}): make or download it again") from None

    def entries(self) -> Iterator[Entry]:
        for name, member, _ in self._members():
            yield Entry(name, member.size)

    def reader(self) -> Reader | None:
        return None

    def contents(self) -> Iterator[bytes]:
        for _, member, archive in self._members():
            stream = archive.extractfile(member) if member.isreg() and member.size <= MAX_FILE_BYTES else None
            yield stream.read() if stream else b""

    def fingerprint(self) -> str | None:
        return self._tag


def is_archive(uri: str) -> bool:
    """Whether the name ends like an archive."""
    return urllib.parse.urlsplit(uri).path.lower().endswith(ARCHIVES)


def check_source(uri: str) -> None:
    """Raises DataError for a source of no known form."""
    try:
        urllib.parse.urlsplit(uri)
    except ValueError as problem:
        raise DataError(f"source {uri!r} is not an address ({problem}): give s3://bucket/prefix/ or an archive") from None
    web = uri.startswith(("http://", "https://"))
    if not web and not uri.startswith(("s3://", "file://")):
        raise DataError(f"source {uri!r} is not understood: give s3://bucket/prefix/, an archive in S3, or an https archive")
    if web and not is_archive(uri):
        raise DataError(f"{uri} does not end in {', '.join(ARCHIVES)}: only archives are fetched over https")


def archive_tag(uri: str, allowed: Sequence[str]) -> str | None:
    """What identifies an archive's content without downloading it; None for a prefix, or when the host does not say.

    Raises DataError.
    """
    check_source(uri)
    if not is_archive(uri):
        return None
    if uri.startswith(("http://", "https://")):
        return downloads.remote_tag(uri, allowed)
    entry = storage.head(uri)
    return f"{entry.size}\0{entry.tag}"


def open_source(uri: str, allowed: Sequence[str], work: Path) -> Source:
    """The source behind ``uri``; an archive is copied into ``work`` first. Raises DataError naming what is wrong."""
    check_source(uri)
    if not is_archive(uri):
        return PrefixSource(uri)
    target = Path(tempfile.mkdtemp(dir=work)) / PurePosixPath(urllib.parse.urlsplit(uri).path).name
    if uri.startswith(("http://", "https://")):
        tag = downloads.fetch(uri, target, allowed)
    else:
        entry = storage.head(uri)
        _check_disk(entry.size, work)
        storage.download(uri, target)
        tag = f"{entry.size}\0{entry.tag}"
    return ZipSource(target, tag) if target.name.lower().endswith(".zip") else TarSource(target, tag)


def _check_disk(size: int, work: Path) -> None:
    free = shutil.disk_usage(work).free
    if size * 2 > free:
        raise DataError(f"the archive has {size:,} bytes, the disk {free:,} free: give the job a larger volume")
