"""The few storage calls the jobs make themselves: ``s3://`` objects and ``file://`` paths behind the same functions."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from classifier.errors import DataError


class Entry(NamedTuple):
    """One stored object: its name under the listed prefix, whole uri, bytes, and a tag that changes with its content."""

    name: str
    uri: str
    size: int
    tag: str


@functools.cache
def s3() -> Any:
    """An unmodified client: region, credentials and endpoint come from the environment."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"max_attempts": 5, "mode": "standard"}, max_pool_connections=32))


def _split(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme == "s3" and parts.netloc:
        # A key may hold '?'; urlsplit takes it for a query.
        return parts.netloc, (parts.path + (f"?{parts.query}" if parts.query else "")).lstrip("/")
    raise DataError(f"{uri!r} is not an S3 location: expected s3://bucket/key")


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def is_file(uri: str) -> bool:
    """Whether ``uri`` names a mounted folder or file (``file:///…``)."""
    return uri.startswith("file://")


def _missing(problem: Exception) -> bool:
    code = str(getattr(problem, "response", {}).get("Error", {}).get("Code", ""))
    # Without s3:ListBucket S3 answers 403 for an object that does not exist.
    return code in {"404", "403", "NoSuchKey", "NotFound", "AccessDenied", "Forbidden"}


def read_optional(uri: str) -> bytes | None:
    """The object's bytes, or None when there is no such object."""
    if is_file(uri):
        return _path(uri).read_bytes() if _path(uri).is_file() else None
    from botocore.exceptions import ClientError

    bucket, key = _split(uri)
    try:
        body: bytes = s3().get_object(Bucket=bucket, Key=key)["Body"].read()
    except ClientError as problem:
        if _missing(problem):
            return None
        raise
    return body


def read_json_optional(uri: str) -> dict[str, Any] | None:
    """The JSON object at ``uri``, or None when it is absent."""
    body = read_optional(uri)
    if body is None:
        return None
    value = json.loads(body)
    if not isinstance(value, dict):
        raise DataError(f"{uri} holds JSON that is not an object")
    return value


def read(uri: str) -> bytes:
    """The object's bytes. Raises DataError when it is absent."""
    body = read_optional(uri)
    if body is None:
        raise DataError(f"{uri} does not exist or may not be read")
    return body


def listing(uri: str) -> Iterator[Entry]:
    """Every object under a prefix, in key order."""
    if is_file(uri):
        root = _path(uri)
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                yield Entry(path.relative_to(root).as_posix(), path.as_uri(), stat.st_size, f"{stat.st_mtime_ns}")
        return
    bucket, prefix = _split(uri)
    prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    for page in s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                tag = str(item["ETag"]).strip('"')
                yield Entry(item["Key"][len(prefix) :], f"s3://{bucket}/{item['Key']}", int(item["Size"]), tag)


def folders(uri: str) -> Iterator[str]:
    """Names of the folders directly under a prefix, in order; what lies in them is not listed."""
    if is_file(uri):
        root = _path(uri)
        yield from sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else ()
        return
    bucket, prefix = _split(uri)
    prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    for page in s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        for item in page.get("CommonPrefixes", []):
            yield str(item["Prefix"])[len(prefix) :].rstrip("/")


def head(uri: str) -> Entry:
    """The entry of one object. Raises DataError when it is absent."""
    if is_file(uri):
        path = _path(uri)
        if not path.is_file():
            raise DataError(f"{uri} does not exist")
        return Entry(path.name, uri, path.stat().st_size, f"{path.stat().st_mtime_ns}")
    from botocore.exceptions import ClientError

    bucket, key = _split(uri)
    try:
        found = s3().head_object(Bucket=bucket, Key=key)
    except ClientError as problem:
        if _missing(problem):
            raise DataError(f"{uri} does not exist or may not be read: check the bucket, the key and the role") from None
        raise
    return Entry(key.rsplit("/", 1)[-1], uri, int(found["ContentLength"]), str(found["ETag"]).strip('"'))


def download(uri: str, target: Path) -> None:
    """Copy one object to ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_file(uri):
        shutil.copyfile(_path(uri), target)
        return
    bucket, key = _split(uri)
    s3().download_file(bucket, key, str(target))


def download_all(uri: str, folder: Path, wanted: Callable[[Entry, Path], bool] = lambda _entry, _target: True) -> int:
    """Copy the objects under a prefix into ``folder``, several at once: S3 answers one call in some 30 ms, however small.

    ``wanted`` is asked with each entry and the path it would go to. Returns how many there are, wanted or not. Names that would
    leave the folder raise DataError.
    """

    def fetch(entry: Entry) -> None:
        if ".." in Path(entry.name).parts or entry.name.startswith("/"):
            raise DataError(f"{entry.uri} would be written outside of {folder}: remove that object")
        if wanted(entry, folder / entry.name):
            download(entry.uri, folder / entry.name)

    with ThreadPoolExecutor(16, thread_name_prefix="download") as pool:
        return sum(1 for _ in pool.map(fetch, listing(uri)))


def upload(path: Path, uri: str) -> None:
    """Copy one file to ``uri``."""
    if is_file(uri):
        _path(uri).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, _path(uri))
        return
    bucket, key = _split(uri)
    s3().upload_file(str(path), bucket, key)
