"""Where pictures come from: a prefix, or an archive (zip, tar) that is read member by member and never extracted.

A source is an iterator of ``Item`` in a fixed order; its names are known before any bytes are read.
"""

from __future__ import annotations

import http.client
import ipaddress
import shutil
import socket
import stat
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from classifier import storage
from classifier.errors import DataError

MAX_MEMBERS = 3_000_000
MAX_TOTAL_BYTES = 200 * 2**30
MAX_DOWNLOAD_BYTES = 100 * 2**30
MAX_FILE_BYTES = 100 * 2**20
MAX_RATIO = 200
"""Uncompressed over compressed bytes of a whole archive; pictures hardly compress, bombs do."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Item:
    """A file of the source: posix name, size in bytes, and a function that reads it (called once, in any thread)."""

    name: str
    size: int
    read: Callable[[], bytes]


class Source(Protocol):
    """A set of named files."""

    def names(self) -> list[str]:
        """All names, in the order of ``items``."""

    def items(self) -> Iterator[Item]:
        """The files; a sequential archive is read as the iterator advances."""

    def fingerprint(self) -> str | None:
        """A text that changes when the content does; None when the origin offers none."""


def safe_name(name: str) -> str:
    """The member's name in posix form. Raises DataError for absolute names, drives, and ``..``."""
    posix = name.replace("\\", "/")
    parts = PurePosixPath(posix).parts
    if posix.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")) or "\0" in posix:
        raise DataError(f"the archive holds the unsafe name {name!r}: make it again from inside the folder of pictures")
    return "/".join(part for part in parts if part != ".")


class PrefixSource:
    """Objects under ``s3://bucket/prefix/`` (or a mounted ``file:///folder``)."""

    def __init__(self, uri: str) -> None:
        self._entries = list(storage.listing(uri))
        if not self._entries:
            raise DataError(f"{uri} holds no objects: upload class folders with pictures there, or give another source")

    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    def items(self) -> Iterator[Item]:
        for entry in self._entries:
            yield Item(entry.name, entry.size, lambda uri=entry.uri: storage.read(uri))  # type: ignore[misc]

    def fingerprint(self) -> str | None:
        return "\n".join(f"{entry.name}\0{entry.size}\0{entry.tag}" for entry in self._entries)


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


class ZipSource:
    """A zip file on disk."""

    def __init__(self, path: Path, tag: str | None) -> None:
        self._tag = tag
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as problem:
            raise DataError(f"{path.name} is not a readable zip archive ({problem}): make or download it again") from None
        limits = _Limits(path)
        self._members: list[tuple[str, zipfile.ZipInfo]] = []
        for info in self._zip.infolist():
            name = safe_name(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"the archive holds {name!r}, a link or device: only plain files are accepted")
            if not info.is_dir():
                limits.add(info.file_size)
                self._members.append((name, info))

    def names(self) -> list[str]:
        return [name for name, _ in self._members]

    def items(self) -> Iterator[Item]:
        for name, info in self._members:
            yield Item(name, info.file_size, lambda info=info: self._read(info))  # type: ignore[misc]

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        try:
            with self._zip.open(info) as stream:
                return stream.read(info.file_size + 1)
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as problem:
            raise DataError(f"unreadable in the archive ({problem})") from None

    def fingerprint(self) -> str | None:
        return self._tag


class TarSource:
    """A tar file on disk, plain or gzip; bytes are read as the iterator advances, so memory stays bounded."""

    def __init__(self, path: Path, tag: str | None) -> None:
        self._path, self._tag = path, tag
        limits = _Limits(path)
        self._names: list[str] = []
        for member in self._members():
            limits.add(member[1].size)
            self._names.append(member[0])

    def _members(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        try:
            with tarfile.open(self._path, mode="r|*") as archive:
                for member in archive:
                    name = safe_name(member.name)
                    if member.isdir():
                        continue
                    if not member.isreg():
                        raise DataError(f"the archive holds {name!r}, a link or device: only plain files are accepted")
                    yield name, member, archive
        except (tarfile.TarError, EOFError, OSError) as problem:
            raise DataError(f"{self._path.name} is not a readable tar archive ({problem}): make or download it again") from None

    def names(self) -> list[str]:
        return self._names

    def items(self) -> Iterator[Item]:
        for name, member, archive in self._members():
            stream = archive.extractfile(member)
            data = stream.read() if stream and member.size <= MAX_FILE_BYTES else b""
            yield Item(name, member.size, lambda data=data: data)  # type: ignore[misc]

    def fingerprint(self) -> str | None:
        return self._tag


def _public_host(host: str, allowed: Sequence[str]) -> None:
    if host.lower() not in allowed:
        raise DataError(f"host {host!r} is not on the allow-list ({', '.join(allowed) or 'empty'}): add it to allowed_hosts")
    try:
        addresses = socket.getaddrinfo(host, 443, proto=socket.IPPROTO_TCP)
    except OSError as problem:
        remedy = "check the address and the network, or upload the archive to S3 and give that"
        raise DataError(f"host {host!r} was not found ({problem}): {remedy}") from None
    for found in addresses:
        address = ipaddress.ip_address(found[4][0])
        if not address.is_global:
            raise DataError(f"host {host!r} resolves to the private address {address}: only public hosts are fetched")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Every hop must pass the same checks as the first address."""

    max_redirections = 5

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl, self._allowed)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_url(url: str, allowed: Sequence[str]) -> None:
    """Raises DataError unless ``url`` is https on the default port of an allowed, public host."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise DataError(f"{url!r} is not an https address: use https://, s3://bucket/prefix/ or an archive in S3")
    if parts.port not in (None, 443) or parts.username:
        raise DataError(f"{url!r} names a port or a user: use a plain https address")
    _public_host(parts.hostname, allowed)


def _request(url: str, method: str = "GET") -> urllib.request.Request:
    """A request for an address that ``check_url`` has accepted."""
    return urllib.request.Request(url, method=method, headers={"User-Agent": "image-classifier"})  # noqa: S310 - https only


def _fetch(url: str, target: Path, allowed: Sequence[str]) -> str | None:
    """Download ``url``; returns its ETag or Last-Modified."""
    check_url(url, allowed)
    opener = urllib.request.build_opener(_CheckedRedirects(allowed))
    try:
        with opener.open(_request(url), timeout=60) as answer:
            copied = 0
            with target.open("wb") as out:
                while block := answer.read(1 << 20):
                    copied += len(block)
                    if copied > MAX_DOWNLOAD_BYTES:
                        raise DataError(f"{url} is larger than {MAX_DOWNLOAD_BYTES:,} bytes: put it into S3 instead")
                    out.write(block)
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            return f"{tag}\0{copied}" if tag else None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as problem:
        raise DataError(f"{url} could not be fetched ({problem}): check the address, or upload the archive to S3") from None


def remote_tag(url: str, allowed: Sequence[str]) -> str | None:
    """A tag of an https archive from its headers alone, or None. Raises DataError for an address that is refused."""
    check_url(url, allowed)
    opener = urllib.request.build_opener(_CheckedRedirects(allowed))
    try:
        request = _request(url, "HEAD")
        with opener.open(request, timeout=30) as answer:
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            return f"{tag}\0{answer.headers.get('Content-Length')}" if tag else None
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None  # the download will say what is wrong


def is_archive(uri: str) -> bool:
    """Whether the name ends like an archive."""
    return urllib.parse.urlsplit(uri).path.lower().endswith(ARCHIVES)


def check_source(uri: str) -> None:
    """Raises DataError for a source of no known form."""
    web = uri.startswith(("http://", "https://"))
    if not web and not uri.startswith(("s3://", "file://")):
        raise DataError(f"source {uri!r} is not understood: give s3://bucket/prefix/, an archive in S3, or an https archive")
    if web and not is_archive(uri):
        raise DataError(f"{uri} does not end in {', '.join(ARCHIVES)}: only archives are fetched over https")


def cheap_fingerprint(uri: str, allowed: Sequence[str]) -> str | None:
    """What identifies the source's content without downloading it, or None. Raises DataError."""
    check_source(uri)
    if uri.startswith(("http://", "https://")):
        return remote_tag(uri, allowed)
    if is_archive(uri):
        entry = storage.head(uri)
        return f"{entry.size}\0{entry.tag}"
    return PrefixSource(uri).fingerprint()


def open_source(uri: str, allowed: Sequence[str], work: Path) -> Source:
    """The source behind ``uri``. Raises DataError naming what is wrong and what is accepted."""
    check_source(uri)
    web = uri.startswith(("http://", "https://"))
    if not is_archive(uri):
        return PrefixSource(uri)
    target = Path(tempfile.mkdtemp(dir=work)) / PurePosixPath(urllib.parse.urlsplit(uri).path).name
    if web:
        tag = _fetch(uri, target, allowed)
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
