"""S3 to folder and back, with a job's own credentials and SageMaker's rules for key prefixes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from local_cloud.service import Cloud

_PARALLEL = 8
_CHUNK = 1 << 20


class TransferError(Exception):
    """A transfer failed. The message is the job's FailureReason in AWS's words."""


def client(cloud: Cloud, session: Any, service: str) -> Any:
    """A client of ``service`` in the local cloud with the session's credentials."""
    config = Config(retries={"mode": "standard", "max_attempts": 4}, max_pool_connections=_PARALLEL + 2)
    return session.client(service, endpoint_url=cloud.url, region_name=cloud.region, config=config)


def parse(uri: str) -> tuple[str, str]:
    """Bucket and key (or prefix) of an ``s3://`` URI."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        msg = f"ClientError: {uri!r} is not an S3 URI: expected s3://<bucket>/<prefix>."
        raise TransferError(msg)
    return bucket, key


def relative_path(key: str, prefix: str) -> str:
    """Where below the channel's folder an object of a prefix goes.

    ``prefix`` itself → its base name; ``prefix/…`` → what follows the slash; a prefix that ends in the middle of a name → what
    follows the prefix's last slash (S3Prefix matches by characters, not by folders).
    """
    if key == prefix:
        return PurePosixPath(key).name
    folder = prefix if prefix.endswith("/") or not prefix else f"{prefix}/"
    if key.startswith(folder):
        return key[len(folder) :]
    return key[prefix.rfind("/") + 1 :]


def download(cloud: Cloud, session: boto3.Session, uri: str, folder: Path, *, required: bool = True) -> int:
    """Copy every object under the prefix ``uri`` into ``folder``; returns their number.

    Raises ``TransferError`` when the role may not, or when nothing matches and ``required``.
    """
    bucket, prefix = parse(uri)
    s3 = client(cloud, session, "s3")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        keys = [key for key in _keys(s3, bucket, prefix) if not key.endswith("/")]
        _parallel(lambda key: _get(s3, bucket, key, _inside(folder, relative_path(key, prefix))), keys)
    except (ClientError, BotoCoreError) as error:
        msg = f"ClientError: Data download failed:Failed to download data. {error} (S3 URL {uri!r})"
        raise TransferError(msg) from error
    finally:
        s3.close()
    if required and not keys:
        msg = (
            f'ClientError: Data download failed:Failed to download data. No S3 objects found under S3 URL "{uri}" given in input '
            f"data source. Please ensure that the bucket exists in the selected region ({cloud.region}), that objects exist under "
            f'that S3 prefix, and that the role has "s3:ListBucket" permissions on bucket "{bucket}".'
        )
        raise TransferError(msg)
    return len(keys)


def download_object(cloud: Cloud, session: boto3.Session, uri: str, target: Path) -> None:
    """Copy one object to the file ``target``."""
    bucket, key = parse(uri)
    s3 = client(cloud, session, "s3")
    try:
        _get(s3, bucket, key, target)
    except (ClientError, BotoCoreError) as error:
        msg = f"{error} (S3 URL {uri!r})"
        raise TransferError(msg) from error
    finally:
        s3.close()


def upload_file(cloud: Cloud, session: boto3.Session, source: Path, uri: str) -> None:
    """Copy the file ``source`` to the object ``uri``."""
    _upload(cloud, session, [(source, uri)])


class FolderSync:
    """Copies new and changed files of a folder to a prefix; remembers what it has copied. Nothing is ever deleted in S3."""

    def __init__(self, cloud: Cloud, folder: Path, uri: str) -> None:
        self._cloud, self._folder, self._uri = cloud, folder, uri.rstrip("/")
        self._seen: dict[Path, tuple[int, int]] = {}

    def mark_present(self) -> None:
        """Treat the files that are there now as already copied (they came from S3)."""
        self._seen = dict(self._files())

    def sync(self, session: boto3.Session) -> int:
        """Upload what changed since the last call; returns the number of files. Raises ``TransferError``."""
        changed = [(path, mark) for path, mark in self._files() if self._seen.get(path) != mark]
        pairs = [(path, f"{self._uri}/{path.relative_to(self._folder).as_posix()}") for path, _ in changed]
        _upload(self._cloud, session, pairs)
        self._seen.update(changed)
        return len(changed)

    def _files(self) -> Iterable[tuple[Path, tuple[int, int]]]:
        for root, _, names in os.walk(self._folder):
            for name in names:
                path = Path(root, name)
                try:
                    status = path.stat()
                except OSError:  # a temporary file renamed meanwhile
                    continue
                if path.is_file():
                    yield path, (status.st_mtime_ns, status.st_size)


def _upload(cloud: Cloud, session: boto3.Session, pairs: list[tuple[Path, str]]) -> None:
    if not pairs:
        return
    s3 = client(cloud, session, "s3")
    plain = TransferConfig(use_threads=False)

    def put(pair: tuple[Path, str]) -> None:
        bucket, key = parse(pair[1])
        s3.upload_file(str(pair[0]), bucket, key, Config=plain)

    try:
        _parallel(put, pairs)
    except Exception as error:  # boto3's S3UploadFailedError and botocore's errors share no base but this
        if isinstance(error, (TransferError, FileNotFoundError)):
            raise
        msg = f"ClientError: Failed to upload data. {error}"
        raise TransferError(msg) from error
    finally:
        s3.close()


def _keys(s3: Any, bucket: str, prefix: str) -> Iterable[str]:
    for answer in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in answer.get("Contents", ()):
            yield item["Key"]


def _inside(folder: Path, relative: str) -> Path:
    target = (folder / relative).resolve()
    if not target.is_relative_to(folder.resolve()):
        msg = f"ClientError: the S3 key {relative!r} points outside its folder: rename the object."
        raise TransferError(msg)
    return target


def _get(s3: Any, bucket: str, key: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    body = s3.get_object(Bucket=bucket, Key=key)["Body"]
    with body, target.open("wb") as file:
        for chunk in body.iter_chunks(_CHUNK):
            file.write(chunk)


def _parallel(work: Callable[[Any], Any], items: list[Any]) -> None:
    """Run ``work`` over ``items`` on a few threads; the first error is raised, the rest are not started."""
    with ThreadPoolExecutor(_PARALLEL) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
