"""What ``DATA=`` and ``WEIGHTS=`` mean: local files are checked, packed and put under ``incoming/``; addresses pass through."""

from __future__ import annotations

import tarfile
import tempfile
import urllib.parse
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from local_cloud.digits import write_digits

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "valid", "val", "validation", "test")
WEIGHTS = (".pth", ".pt", ".safetensors")
THREADS = 16


class SourceError(ValueError):
    """``DATA`` or ``WEIGHTS`` cannot be used; the message says which, what was expected, and what to do."""


@dataclass(frozen=True)
class Source:
    """What to upload and what to tell the state machine."""

    stage: str
    """Stage of cdk.json to deploy: ``local`` holds the digits' defaults, ``dev`` the pictures'."""
    upload: Path | None
    """File to put at ``incoming/<name>``; None when the address is remote."""
    source: str | None
    """The machine's ``source``; None for the stage's default."""
    note: str = ""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts to add to the stage's ``allowed_hosts``: the user named them."""


def choose(data: str | None, scratch: Path) -> Source:
    """Read ``DATA``; raises ``SourceError``. Packs go to ``scratch``."""
    if not data:
        return Source("local", _zip(write_digits(scratch / "digits"), scratch), None, "scikit-learn's digits")
    if data == "dogs":
        return Source("dev", None, None, "dogImages.zip from its public address")
    if data.startswith("https://"):
        return Source("dev", None, data, data, (urllib.parse.urlsplit(data).hostname or "",))
    if data.startswith("s3://"):
        copied = _from_s3(data, scratch)
        try:
            return replace(choose(str(copied), scratch), note=data)
        except SourceError as error:  # about the copy: the user knows only the address
            raise SourceError(str(error).replace(str(copied), data)) from error
    if "://" in data:
        raise SourceError(f"DATA={data}: expected a folder, an archive, an https:// address, an s3:// address or 'dogs'")
    path = Path(data).expanduser().resolve()
    if path.is_dir():
        return Source("dev", _zip(_checked_folder(path), scratch), f"incoming/{path.name}.zip", str(path))
    if path.is_file():
        return Source("dev", _checked_archive(path), f"incoming/{path.name}", str(path))
    raise SourceError(
        f"DATA={data}: no such file or folder. Give a folder of class folders, a .zip or .tar, or an https:// address"
    )


def checked_weights(weights: str) -> Path:
    """The file ``WEIGHTS`` names; raises ``SourceError``."""
    path = Path(weights).expanduser().resolve()
    if not path.is_file():
        raise SourceError(f"WEIGHTS={weights}: no such file. Give a PyTorch state dict ({', '.join(WEIGHTS)})")
    if path.suffix not in WEIGHTS:
        raise SourceError(f"WEIGHTS={weights}: expected a state dict ending in {', '.join(WEIGHTS)}")
    return path


def _from_s3(uri: str, scratch: Path) -> Path:
    """Copy an archive or a prefix out of the user's own S3, with the user's own credentials; the local cloud has neither."""
    parts = urllib.parse.urlsplit(uri)
    key = parts.path.lstrip("/")
    target = scratch / "s3" / (Path(key).name or parts.netloc)
    try:
        bucket = boto3.Session().resource("s3", config=Config(max_pool_connections=THREADS)).Bucket(parts.netloc)
        if key.lower().endswith(ARCHIVES):
            target.parent.mkdir(parents=True, exist_ok=True)
            bucket.download_file(key, str(target))
            return target
        prefix = f"{key.rstrip('/')}/" if key else ""

        def copy(item: Any) -> None:
            path = target / item.key.removeprefix(prefix)
            if target.resolve() in path.resolve().parents and not item.key.endswith("/"):
                path.parent.mkdir(parents=True, exist_ok=True)
                bucket.meta.client.download_file(parts.netloc, item.key, str(path))  # a client, unlike a bucket, is for threads

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(copy, bucket.objects.filter(Prefix=prefix)))
    except (BotoCoreError, ClientError) as error:
        raise SourceError(f"DATA={uri}: {error}. Give an s3:// address that your AWS credentials may read") from error
    if not target.is_dir():
        raise SourceError(f"DATA={uri}: holds no objects. Expected an archive, or a prefix of class folders")
    return target


def _checked_folder(folder: Path) -> Path:
    """Refuse at once what the preparation job would refuse a minute later."""
    base = folder
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if len(inside) == 1 and inside[0].is_dir() and inside[0].name.lower() not in SPLITS:
        deeper = [p for p in inside[0].iterdir() if p.is_dir()]
        base = inside[0] if deeper else folder
    train = next((p for p in base.iterdir() if p.is_dir() and p.name.lower() == "train"), base)
    classes = [p for p in sorted(train.iterdir()) if p.is_dir() and any(f.suffix.lower() in PICTURES for f in p.rglob("*"))]
    if not classes:
        raise SourceError(
            f"DATA={folder}: no pictures in class folders. Expected <class>/<picture> or train|valid|test/<class>/<picture>, "
            f"pictures ending in {', '.join(PICTURES)}"
        )
    if len(classes) == 1:
        raise SourceError(f"DATA={folder}: only one class ('{classes[0].name}'). A classifier needs two or more class folders")
    return folder


def _checked_archive(path: Path) -> Path:
    if not path.name.lower().endswith(ARCHIVES):
        raise SourceError(f"DATA={path}: expected an archive ending in {', '.join(ARCHIVES)}")
    if not (zipfile.is_zipfile(path) or tarfile.is_tarfile(path)):
        raise SourceError(f"DATA={path}: not a readable zip or tar archive. Pack the folder again")
    return path


def _zip(folder: Path, scratch: Path) -> Path:
    """Pack ``folder`` uncompressed: pictures are compressed already, and one object uploads faster than thousands."""
    scratch.mkdir(parents=True, exist_ok=True)
    target = scratch / f"{folder.name}.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                archive.write(path, path.relative_to(folder))
    return target


def put(client: Any, bucket: str, path: Path, key: str) -> str:
    """Upload ``path``; returns ``key``."""
    client.upload_file(str(path), bucket, key)
    return key


def scratch_folder() -> Path:
    """A new private folder for packs."""
    return Path(tempfile.mkdtemp(prefix="classifier-"))
