"""From a container image's URI to an environment on this machine that stands for it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from local_cloud.service import Cloud, ServiceError

DLC_ACCOUNTS = frozenset({"763104351884"})
"""Account of AWS's deep learning containers in us-east-1 and most regions."""
DLC_REPOSITORIES = frozenset({"pytorch", "pytorch-training"})
_URI = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/"
    r"(?P<repository>[a-z0-9][a-z0-9._/-]*?)(?::(?P<tag>[\w][\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)
# Without the containers' PYTHONDONTWRITEBYTECODE. Their packages were compiled when the image was built, ours are when they are
# first imported. Were that not kept, every job would compile torch, torchvision and smdebug anew: 13 s of processor time.
_DLC_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "UTF-8",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True)
class Image:
    """A container image as folders: a virtual environment, and the files copied into it."""

    uri: str
    venv: Path
    """Virtual environment whose ``bin`` comes first in PATH."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    root: Path | None = None
    """Folder that stands for ``/`` of the image; None where the image has no files of its own."""
    paths: tuple[str, ...] = ()
    """Absolute folders of the image that exist under ``root``."""
    digest: str = ""

    def translate(self, text: str) -> str:
        """``text`` with the image's own folders replaced by their place on this machine."""
        if self.root is None:
            return text
        for path in sorted(self.paths, key=len, reverse=True):
            place = (str(self.root) + path).replace("\\", r"\\")
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", place, text)
        return text

    def environment(self) -> dict[str, str]:
        """The image's variables, with PATH beginning at the virtual environment."""
        found = {name: self.translate(value) for name, value in self.env.items() if name != "PATH"}
        found["PATH"] = f"{self.venv / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        found["VIRTUAL_ENV"] = str(self.venv)
        return found

    def folder(self) -> Path | None:
        """WORKDIR on this machine, or None when the image has no files of its own."""
        if self.root is None:
            return None
        place = Path(str(self.root) + self.workdir)
        place.mkdir(parents=True, exist_ok=True)
        return place


class Images:
    """The images that can run here: AWS's PyTorch training containers, and what the local CodeBuild has built."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self.pushing = threading.Lock()
        """Held while an image's tag and its file are written: a build that finds the tag taken may rely on the file."""

    def built(self, repository: str, tag: str) -> Path:
        """File that describes the image ``repository:tag`` built here."""
        return self._cloud.root / "images" / repository / f"{tag}.json"

    def remove(self, repository: str) -> None:
        """Delete the files of a repository's images, as ECR does with the repository."""
        folder = self._cloud.root / "images" / repository
        for described in folder.glob("*.json"):
            described.unlink(missing_ok=True)
        shutil.rmtree(folder / "made", ignore_errors=True)

    def check(self, uri: str) -> None:
        """Raise ``ValidationException`` when no image of this name can ever run here; it need not be built yet."""
        self._parse(uri)

    def resolve(self, uri: str, session: boto3.Session | None = None) -> Image:
        """The environment of an image. With ``session``, ECR is asked for the image with those credentials, as a pull does.

        Raises ``ServiceError``: an unknown image, one not built yet, or a role that may not read it.
        """
        account, repository, tag, digest = self._parse(uri)
        if account in DLC_ACCOUNTS:
            train = Path(sys.prefix) / "bin" / "train"
            return Image(uri=uri, venv=Path(sys.prefix), entrypoint=(str(train),), env=dict(_DLC_ENVIRONMENT))
        if session is not None:
            digest = self._pull(session, uri, repository, tag, digest)
        file = self._find(repository, tag, digest)
        if file is None:
            message = f'The image "{uri}" has not been built in the local cloud: start its CodeBuild project first.'
            raise ServiceError("ValidationException", message)
        return _load(uri, file)

    def _parse(self, uri: str) -> tuple[str, str, str | None, str | None]:
        found = _URI.fullmatch(uri)
        if found is not None:
            known = found["account"] in DLC_ACCOUNTS and found["repository"] in DLC_REPOSITORIES
            if known or found["account"] == self._cloud.account:
                return found["account"], found["repository"], found["tag"], found["digest"]
        message = (
            f'The image "{uri}" cannot run in the local cloud. Possible: AWS\'s PyTorch training containers '
            f"(763104351884.dkr.ecr.<region>.amazonaws.com/pytorch:<tag>, or pytorch-training), and images built by CodeBuild here "
            f"({self._cloud.account}.dkr.ecr.{self._cloud.region}.amazonaws.com/<repository>:<tag>)."
        )
        raise ServiceError("ValidationException", message)

    def _pull(self, session: boto3.Session, uri: str, repository: str, tag: str | None, digest: str | None) -> str:
        """Ask ECR for the image as the role; returns its digest."""
        ecr: Any = session.client("ecr", endpoint_url=self._cloud.url, region_name=self._cloud.region)
        wanted: dict[str, str] = {"imageTag": tag} if tag else {"imageDigest": digest or ""}
        try:
            ecr.get_authorization_token()
            answer: dict[str, Any] = ecr.batch_get_image(repositoryName=repository, imageIds=[wanted])
        except (ClientError, BotoCoreError) as error:
            message = f'The role does not have the permission to read the image "{uri}" from ECR: {error}'
            raise ServiceError("ValidationException", message) from error
        finally:
            ecr.close()
        if not answer.get("images"):
            message = f"Requested image {uri} not found."
            raise ServiceError("ValidationException", message)
        return str(answer["images"][0]["imageId"]["imageDigest"])

    def _find(self, repository: str, tag: str | None, digest: str | None) -> Path | None:
        if tag is not None and self.built(repository, tag).is_file():
            return self.built(repository, tag)
        for file in (self._cloud.root / "images" / repository).glob("*.json"):
            if digest and json.loads(file.read_text()).get("digest") == digest:
                return file
        return None


def _load(uri: str, file: Path) -> Image:
    data = json.loads(file.read_text())
    return Image(
        uri=uri,
        venv=Path(data["venv"]),
        entrypoint=tuple(data["entrypoint"]),
        cmd=tuple(data["cmd"]),
        env=data["env"],
        workdir=data["workdir"],
        root=Path(data["root"]),
        paths=tuple(data["paths"]),
        digest=data["digest"],
    )


def aws_images(body: bytes) -> dict[str, Any] | None:
    """The answer to ECR's BatchGetImage about AWS's deep learning containers; None for a question about other registries."""
    try:
        request = json.loads(body)
    except ValueError:
        return None
    account, name = str(request.get("registryId", "")), str(request.get("repositoryName", ""))
    if account not in DLC_ACCOUNTS:
        return None
    tags = [str(one.get("imageTag", "")) for one in request.get("imageIds", [])]
    known = [tag for tag in tags if name in DLC_REPOSITORIES and tag.endswith("-sagemaker")]
    found = [{"registryId": account, "repositoryName": name, "imageId": {"imageTag": tag}, "imageManifest": "{}"} for tag in known]
    failures = [{"imageId": {"imageTag": tag}, "failureCode": "ImageNotFound"} for tag in tags if tag not in known]
    return {"images": found, "failures": failures}
