"""Other Pythons than the tests' own: those of the Lambdas, of the serving image, and the ones that users may have."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from classifier import evaluation, export, serving, training
from classifier.served_model import ServedModel
from model_fakes import MODEL_CODE, config, picture, prepared

from infra.functions import RUNTIME
from local_cloud.dockerfile import parse

PROJECT = MODEL_CODE.parent
SUPPORTED = ("3.11", "3.12", "3.13")
LAMBDAS = str(RUNTIME.name).removeprefix("python")
DEPLOYMENT = (PROJECT / "docs" / "deployment.md").read_text()
UV = str(Path(sys.executable).parent / "uv")

COMPILE = """
import pathlib, sys, warnings
warnings.simplefilter("error")
for name in sys.argv[1:]:
    compile(pathlib.Path(name).read_bytes(), name, "exec")
"""
IMPORT = """
import importlib, pathlib, sys
for folder in pathlib.Path("lambdas").iterdir():
    sys.path.insert(0, str(folder))
    for path in folder.glob("*.py"):
        importlib.import_module(path.stem)
    sys.path.remove(str(folder))
"""
IMPORT_ALL = """
import importlib, pathlib, sys
sys.path[:0] = [".", "model_code"]
for folder in ("infra", "local_cloud", "model_code"):
    root = pathlib.Path("." if folder != "model_code" else folder)
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        if path.name != "__main__.py":
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            importlib.import_module(name)
import smdebug.pytorch
"""
READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
if touch "$1/written" 2>/dev/null; then exit 97; fi
cd "$1/program"
exec "${@:2}"
"""
"""In a mount namespace of its own: the folder ``$1`` cannot be written, and then the command runs."""


def python(version: str) -> str:
    """An interpreter of that version; the test is skipped, and says so, where there is none."""
    here = shutil.which(f"python{version}")
    for path in [*([here] if here else []), *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]:
        told = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True)
        if told.stdout.strip() == version:
            return path
    return pytest.skip(f"no Python {version} on this machine")


def environment(folder: Path, version: str, *packages: str) -> Path:
    """A virtual environment with nothing but ``packages``; returns its Python."""
    subprocess.run([UV, "venv", "--quiet", "--no-config", "--python", python(version), str(folder)], check=True)
    subprocess.run([UV, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), *packages], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_supported_python_compiles_the_source_without_a_warning(version: str):
    files = [str(p) for folder in ("infra", "lambdas", "local_cloud", "model_code") for p in (PROJECT / folder).rglob("*.py")]
    assert len(files) > 60
    done = subprocess.run([python(version), "-c", COMPILE, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_of_the_jobs_comes_as_a_wheel():
    """Nothing is compiled in a job, and docs/deployment.md's ``pip download --only-binary=:all:`` finds all of them."""
    (version,) = re.findall(r"--python-version (\S+) --only-binary=:all: -r model_code/requirements.txt", DEPLOYMENT)
    usable = re.compile(rf"(py3-none-any|(cp{version.replace('.', '')}|abi3)-manylinux.*x86_64.*)\.whl$")
    locked = tomllib.loads((PROJECT / "uv.lock").read_text())["package"]
    wheels = {package["name"]: [wheel["url"] for wheel in package.get("wheels", [])] for package in locked}
    names = re.findall(r"^([\w.-]+)==", (MODEL_CODE / "requirements.txt").read_text(), re.MULTILINE)
    assert {"smdebug", "onnxruntime", "openvino"} <= set(names)
    assert [name for name in names if not any(usable.search(url) for url in wheels[name])] == []


@pytest.mark.slow
def test_the_lambdas_are_imported_by_their_runtime_with_what_it_brings(tmp_path: Path):
    """AWS's runtime has boto3 and nothing else (https://docs.aws.amazon.com/lambda/latest/dg/lambda-python.html)."""
    interpreter = environment(tmp_path / "venv", LAMBDAS, "boto3")
    clean = {"PATH": os.environ["PATH"], "AWS_DEFAULT_REGION": "us-east-1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([interpreter, "-W", "error", "-c", IMPORT], cwd=PROJECT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", SUPPORTED)
def test_what_make_run_installs_is_imported_by_every_supported_python(tmp_path: Path, version: str):
    """The locked packages of ``make run``, in an environment of their own, and every module of ours that runs there."""
    clean = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"UV_PROJECT_ENVIRONMENT": str(tmp_path)}
    subprocess.run([UV, "sync", "--quiet", "--frozen", "--python", python(version)], cwd=PROJECT, env=clean, check=True)
    command = [tmp_path / "bin" / "python", "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=PROJECT, env={**clean, "STATE_DIR": str(tmp_path / "state")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class Image:
    """What the serving image's Dockerfile says, and its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.program, self.env = folder / "program", dict[str, str]()
        for item in parse((MODEL_CODE / "Dockerfile").read_text()):
            match item.keyword:
                case "FROM":
                    (self.version,) = re.findall(r"python:(\d\.\d+)-slim", item.value)
                case "COPY":
                    *sources, target = item.value.split()
                    (self.program / target).mkdir(parents=True, exist_ok=True)
                    for name in sources:
                        shutil.copy(MODEL_CODE / name, self.program / target)
                case "ENV":
                    self.env |= dict(pair.split("=", 1) for pair in item.value.split())
                case "ENTRYPOINT":
                    self.entrypoint = json.loads(item.value)
                case "CMD":
                    self.command = json.loads(item.value)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """The servable model.tar.gz, as evaluate.py makes it of a training's."""
    dataset = prepared(tmp_path)
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(dataset))
    setup = training.prepare_run(config(epochs=1))
    export.export(setup, setup.network, [], tmp_path / "exported")
    (tmp_path / "trained").mkdir()
    with tarfile.open(tmp_path / "trained" / "model.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "exported", ".")
    evaluation.evaluate(
        evaluation.EvaluateFlags(
            dataset=str(dataset),
            model=str(tmp_path / "trained"),
            evaluation=str(tmp_path / "evaluation"),
            artifact=str(tmp_path / "artifact"),
            champion_uri=(tmp_path / "none.json").as_uri(),
            run="r",
        )
    )
    return tmp_path / "artifact" / "model.tar.gz"


@pytest.mark.slow
def test_the_image_s_command_serves_from_a_read_only_folder_with_its_locked_packages_alone(
    tmp_path: Path, artifact: Path, own_port: int
):
    folder = tmp_path / "container"
    image = Image(folder)
    with tarfile.open(artifact) as tar:
        tar.extractall(folder / "model", filter="data")
    interpreter = environment(
        folder / "venv", image.version, "--require-hashes", "-r", str(image.program / "requirements-server.txt")
    )
    variables: dict[str, Any] = {
        **image.env,
        "PATH": f"{interpreter.parent}:/usr/bin:/bin",
        "PYTHONPATH": str(image.program),
        "SM_MODEL_DIR": str(folder / "model"),
        "SAGEMAKER_BIND_TO_PORT": str(own_port),
        "BIND_HOST": "127.0.0.1",
        "TMPDIR": str(folder),
    }
    command = [word.replace("/opt/program", str(image.program)) for word in [*image.entrypoint, *image.command]]
    isolated = ["unshare", "--map-root-user", "--mount", "bash", "-c", READ_ONLY, "bash", str(folder), *command]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(isolated, env=variables, stdout=log, stderr=log)
    try:
        _answers(own_port, process, tmp_path / "log")
        body = picture(3)
        answer = httpx.post(f"http://127.0.0.1:{own_port}/invocations", content=body, headers={"Content-Type": "image/png"})
        assert answer.status_code == 200, answer.text
        model = ServedModel(folder / "model")
        expected = serving.top_k(model.predict(serving.decode(body)), model.labels, 3)
        told = {one["label"]: one["probability"] for one in answer.json()["predictions"]}
        assert told == pytest.approx({one["label"]: one["probability"] for one in expected}, abs=1e-3)
    finally:
        process.terminate()
        code = process.wait(20)
    # uvicorn ends in good order, and then lets the signal do what it does.
    assert code == -signal.SIGTERM, (tmp_path / "log").read_text()


def _answers(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until ``/ping`` answers 200."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if process.poll() == 1 and "unshare" in log.read_text():
            pytest.skip(f"this machine lets nobody make a mount namespace: {log.read_text().strip()}")
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ping").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(f"/ping did not answer 200 within 60 s: {log.read_text()}")
