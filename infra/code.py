"""Our own code as assets: what training jobs unpack, what CodeBuild builds, what a Lambda runs. Same files, same bytes."""

from __future__ import annotations

import ast
import atexit
import functools
import gzip
import hashlib
import io
import shutil
import tarfile
import tempfile
from pathlib import Path

from infra.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
MODEL_CODE = ROOT / "model_code"
_SKIPPED = {"__pycache__", "tests", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


@functools.cache
def staging() -> Path:
    """A folder of this process for assets in the making; CDK copies them, and it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="classifier-assets-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def files_below(folder: Path) -> list[Path]:
    """All source files below a folder, sorted, without caches and tests. Raises ConfigError when there is none."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _SKIPPED & set(path.relative_to(folder).parts) and path.suffix != ".pyc"
    ]
    if not files:
        raise ConfigError(f"{folder} holds no file; expected this project's code there: check out the repository again.")
    return files


def digest(files: list[Path], root: Path) -> str:
    """SHA-256 (hex) over names and contents, independent of times and owners."""
    total = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def pack(files: list[Path], root: Path) -> bytes:
    """A gzip tar of the files, the same bytes on every machine: the training toolkit wants ``sourcedir.tar.gz``."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in files:
            info = tarfile.TarInfo(path.relative_to(root).as_posix())
            content = path.read_bytes()
            info.size, info.mode, info.mtime = len(content), 0o644, 0
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(plain.getvalue(), mtime=0)


def model_code_archive() -> tuple[Path, str]:
    """Path of ``sourcedir.tar.gz`` with everything in model_code/, and the code's hash."""
    files = files_below(MODEL_CODE)
    code_hash = digest(files, MODEL_CODE)
    folder = staging() / code_hash[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "sourcedir.tar.gz"
    target.write_bytes(pack(files, MODEL_CODE))
    return target, code_hash


@functools.cache
def hyperparameters() -> tuple[str, ...]:
    """Names of the training code's hyperparameters, read from its source: the check of the input cannot fall behind it."""
    path = MODEL_CODE / "classifier" / "config.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == "TrainingConfig":
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            return tuple(target.id for target in fields if isinstance(target, ast.Name))
    raise ConfigError(f"{path} defines no class TrainingConfig; expected the training code's configuration there.")


def epochs_by_recipe() -> tuple[int, dict[str, int]]:
    """The training code's default number of epochs, and the recipes that have another: read from its source too."""
    path = MODEL_CODE / "classifier" / "config.py"
    default, recipes = None, None
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            if node.target.id == "epochs":
                default = ast.literal_eval(node.value)
            if node.target.id == "RECIPE_DEFAULTS":
                recipes = ast.literal_eval(node.value)
    if default is None or recipes is None:
        raise ConfigError(f"{path}: expected TrainingConfig.epochs and RECIPE_DEFAULTS with plain values there.")
    return default, {recipe: values["epochs"] for recipe, values in recipes.items() if "epochs" in values}


@functools.cache
def prices() -> tuple[str, dict[str, float]]:
    """``(region and month of the list prices, instance type -> US dollars an hour)``: the same that the report reckons with."""
    path = MODEL_CODE / "classifier" / "prices.py"
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return f"{found['REGION']}, {found['PRICED_ON']}", found["USD_PER_HOUR"]


def copied_by(dockerfile: Path) -> list[Path]:
    """The files that a Dockerfile copies into its image, and the Dockerfile itself: everything the image depends on."""
    context = dockerfile.parent
    names: list[str] = []
    for line in dockerfile.read_text().replace("\\\n", " ").splitlines():
        words = line.split()
        if words and words[0].upper() in {"COPY", "ADD"}:
            names += [word for word in words[1:-1] if not word.startswith("--")]
    files = {dockerfile}
    for name in names:
        source = context / name
        if not source.exists():
            raise ConfigError(f"{dockerfile}: COPY {name}: no such file in {context}; add it or correct the Dockerfile.")
        files |= set(files_below(source)) if source.is_dir() else {source}
    return sorted(files)


def server_folder(gpu: bool = False) -> tuple[Path, str]:
    """A folder with what the serving image is built from, and the image's tag: a hash of exactly those files."""
    dockerfile = MODEL_CODE / ("Dockerfile.gpu" if gpu else "Dockerfile")
    if not dockerfile.is_file():
        raise ConfigError(f"{dockerfile} is missing; expected the serving image's Dockerfile: check out the repository again.")
    files = copied_by(dockerfile)
    tag = digest(files, MODEL_CODE)[:16]
    named = {path.relative_to(MODEL_CODE).as_posix(): path for path in files}
    named["Dockerfile"] = named.pop(dockerfile.name)  # what `docker build` looks for
    return staged(f"server-{tag}", named), tag


def staged(name: str, files: dict[str, Path]) -> Path:
    """A fresh folder holding ``files`` (name in the folder -> source)."""
    folder = staging() / name
    shutil.rmtree(folder, ignore_errors=True)
    for relative, source in files.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return folder


def lambda_folder(name: str, extra: dict[str, Path] | None = None) -> Path:
    """A folder with the files of ``lambdas/<name>`` and, beside them, ``extra`` ones."""
    source = ROOT / "lambdas" / name
    files = {path.relative_to(source).as_posix(): path for path in files_below(source)}
    return staged(f"lambda-{name}", files | (extra or {}))
