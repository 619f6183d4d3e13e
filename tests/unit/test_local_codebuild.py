"""The local CodeBuild: a Dockerfile becomes an environment and a tag in ECR."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_fakes import BUCKET, ROLE, Client, FakeCloud, moto_cloud, wait

from local_cloud.codebuild import CodeBuild
from local_cloud.dockerfile import Builder, DockerfileError, parse
from local_cloud.images import Images
from local_cloud.service import Permission, ServiceError

DOCKERFILE = """\
# syntax=docker/dockerfile:1
ARG VERSION=3.12
FROM python:${VERSION}-slim
ENV PYTHONUNBUFFERED=1 \\
    HOME_OF_CODE=/opt/program
WORKDIR /opt/program
RUN apt-get update && apt-get install -y libgomp1 && rm -rf /var/lib/apt/lists/*
COPY requirements.txt ./
RUN python -m pip install --no-cache-dir --require-hashes -r requirements.txt
COPY server.py lib/ /opt/program/
RUN python -m compileall -q /opt/program
RUN useradd --uid 1001 server
USER server
EXPOSE 8080
ENTRYPOINT ["python", "/opt/program/server.py"]
CMD ["serve"]
"""
BUILDSPEC = json.dumps({"phases": {"build": {"commands": ["docker build -t x .", "docker push x"]}}})
URI = "123456789012.dkr.ecr.us-east-1.amazonaws.com/server"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCloud]:
    with moto_cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        ecr = cloud.client("ecr")
        ecr.create_repository(repositoryName="server")
        ecr.close()
        yield cloud


@pytest.fixture
def service(cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[CodeBuild]:
    builds = CodeBuild(cloud, Images(cloud))
    project = {
        "name": "server",
        "serviceRole": ROLE,
        "source": {"type": "S3", "location": f"{BUCKET}/source.zip", "buildspec": BUILDSPEC},
        "environment": {
            "type": "LINUX_CONTAINER",
            "image": "x",
            "computeType": "BUILD_GENERAL1_SMALL",
            "environmentVariables": [{"name": "REPOSITORY_URI", "value": URI}, {"name": "IMAGE_TAG", "value": "old"}],
        },
    }
    # moto's CodeBuild refuses projects that AWS accepts; the project itself is not what is tested.
    monkeypatch.setattr(builds, "_project", lambda name: _missing(name) if name != "server" else project)
    yield builds
    builds.stop()


def _missing(name: str) -> Any:
    raise ServiceError("ResourceNotFoundException", name)


def source(cloud: FakeCloud, dockerfile: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("Dockerfile", dockerfile)
        packed.writestr("requirements.txt", "")
        packed.writestr("server.py", "import sys, helper; print(sys.prefix, helper.NAME, sys.argv[1])")
        packed.writestr("lib/helper.py", "NAME = 'help'")
    cloud.put("source.zip", buffer.getvalue())


def run(service: CodeBuild, **request: Any) -> dict[str, Any]:
    call = Client(service, "codebuild")
    build = call("StartBuild", projectName="server", **request)["build"]
    return wait(lambda: call("BatchGetBuilds", ids=[build["id"]])["builds"][0], "buildStatus", ("IN_PROGRESS",))


def test_a_build_makes_an_environment_and_a_tag(cloud: FakeCloud, service: CodeBuild) -> None:
    source(cloud, DOCKERFILE)
    done = run(service, environmentVariablesOverride=[{"name": "IMAGE_TAG", "value": "t1", "type": "PLAINTEXT"}])
    log = (cloud.root / "logs" / "builds" / f"{done['id'].replace(':', '-')}.log").read_text()
    assert done["buildStatus"] == "SUCCEEDED", log
    assert done["phases"][-1]["phaseType"] == "COMPLETED"
    assert "ignored: apt-get install -y libgomp1" in log
    ecr = cloud.client("ecr")
    found = ecr.describe_images(repositoryName="server", imageIds=[{"imageTag": "t1"}])["imageDetails"][0]
    ecr.close()
    image = Images(cloud).resolve(f"{URI}:t1", cloud.session(ROLE, "sagemaker.amazonaws.com", "x"))
    assert image.digest == found["imageDigest"]
    assert image.environment()["HOME_OF_CODE"] == f"{image.root}/opt/program"
    assert image.environment()["PATH"].startswith(str(image.venv))
    command = [str(image.venv / "bin" / "python"), *[image.translate(word) for word in image.entrypoint[1:]], "serve"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(image.venv), "help", "serve"]
    assert (cloud.root / "images/server/t1.json").is_file()


@pytest.mark.parametrize("looks", [True, False])
def test_a_tag_that_another_build_pushed_is_used_by_a_buildspec_that_looks_for_it(
    cloud: FakeCloud, service: CodeBuild, looks: bool
) -> None:
    ecr = cloud.client("ecr")
    name = f"server-{looks}".lower()
    ecr.create_repository(repositoryName=name, imageTagMutability="IMMUTABLE")
    source(cloud, DOCKERFILE)
    project = service._project("server")
    if looks:
        project["source"]["buildspec"] = BUILDSPEC.replace("docker push x", "docker push x || docker manifest inspect x")
    variables = [{"name": "REPOSITORY_URI", "value": f"{URI.rsplit('/', 1)[0]}/{name}"}, {"name": "IMAGE_TAG", "value": "same"}]
    first, second = (run(service, environmentVariablesOverride=variables) for _ in range(2))
    images = ecr.describe_images(repositoryName=name)["imageDetails"]
    ecr.close()
    assert first["buildStatus"] == "SUCCEEDED"
    (failed,) = [one["contexts"][0]["message"] for one in second["phases"] if one.get("phaseStatus") in ("FAILED", "FAULT")] or [""]
    assert second["buildStatus"] == ("SUCCEEDED" if looks else "FAILED"), failed
    assert ("already exists" in failed) is not looks
    assert len(images) == 1
    (kept,) = (cloud.root / "images" / name / "made").iterdir()
    assert kept.name == first["id"].split(":")[1], "what was built in vain is not kept"


def test_a_failing_step_fails_the_build_with_its_line(cloud: FakeCloud, service: CodeBuild) -> None:
    source(cloud, DOCKERFILE.replace("compileall -q", "compileall -q --no-such-option"))
    done = run(service)
    assert done["buildStatus"] == "FAILED"
    failed = [phase for phase in done["phases"] if phase.get("phaseStatus") == "FAILED"]
    assert failed[0]["phaseType"] == "BUILD"
    assert "line 11" in failed[0]["contexts"][0]["message"]
    with pytest.raises(ServiceError, match="has not been built"):
        Images(cloud).resolve(f"{URI}:old")
    assert not list((cloud.root / "images" / "server" / "made" / done["id"].split(":")[1]).glob("*"))


def test_requests_that_cannot_be_done_are_refused(service: CodeBuild) -> None:
    call = Client(service, "codebuild")
    with pytest.raises(ServiceError, match="buildspecOverride is not emulated"):
        call("StartBuild", projectName="server", buildspecOverride="x")
    with pytest.raises(ServiceError) as missing:
        call("StartBuild", projectName="other")
    assert missing.value.code == "ResourceNotFoundException"
    assert call("BatchGetBuilds", ids=["server:1"])["buildsNotFound"] == ["server:1"]
    arn = "arn:aws:codebuild:us-east-1:123456789012:project/server"
    assert service.permissions("StartBuild", {"projectName": "server"}) == [Permission("codebuild:StartBuild", arn)]
    assert service.permissions("BatchGetBuilds", {"ids": ["server:1", "server:2"]}) == [Permission("codebuild:BatchGetBuilds", arn)]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("RUN curl https://example.com | sh", "'|' in RUN"),
        ("RUN make install", "RUN make install is not emulated"),
        ("RUN pip install --index-url https://x y", "--index-url"),
        ("COPY missing.txt /x", "'missing.txt' is not in the source"),
        ("COPY --from=build /x /y", "several stages"),
        ("ENTRYPOINT python server.py", "JSON form"),
        ("ONBUILD RUN x", "ONBUILD"),
    ],
)
def test_instructions_that_are_not_emulated_are_named(tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "src").mkdir()
    builder = Builder(tmp_path / "src", tmp_path / "image", lambda *_: 0, lambda _: None)
    with pytest.raises(DockerfileError, match="line 2") as refusal:
        builder.build(f"FROM python:3.12\n{line}\n")
    assert named in str(refusal.value)


def test_continued_lines_and_comments_are_joined() -> None:
    items = parse('# c\nRUN a && \\\n  # inside\n  b\nCMD ["x"]\n')
    assert [(item.line, item.keyword, item.value) for item in items] == [(2, "RUN", "a && b"), (5, "CMD", '["x"]')]
