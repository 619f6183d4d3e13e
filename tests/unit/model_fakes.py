"""Small generated picture folders for the tests of the model code."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from classifier.config import TrainingConfig, from_mapping
from classifier.preparation import PrepareFlags, prepare
from PIL import Image

MODEL_CODE = Path(__file__).resolve().parents[2] / "model_code"


def picture(seed: int, size: tuple[int, int] = (40, 32), hue: int = 0, kind: str = "PNG") -> bytes:
    """Noise around one colour, so that classes can be told apart."""
    noise = np.random.default_rng(seed).integers(0, 90, (size[1], size[0], 3))
    noise[..., hue % 3] += 150
    out = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(out, kind)
    return out.getvalue()


def write_folder(root: Path, *, train: int = 8, held: int = 4, classes: int = 3) -> Path:
    """``train|valid|test/<class>/<n>.png``."""
    seed = 0
    for split, count in (("train", train), ("valid", held), ("test", held)):
        for label in range(classes):
            folder = root / split / f"n0200000{label}-breed_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                seed += 1
                (folder / f"{number}.png").write_bytes(picture(seed, hue=label))
    return root


def flags(source: str, out: Path, **changes: object) -> PrepareFlags:
    """Flags of prepare.py with folders under ``out``."""
    known: dict[str, object] = {"picture_size": 32, "max_quarantined_share": 0.5}
    return PrepareFlags(  # type: ignore[arg-type]
        source=source,
        dataset_root=(out / "datasets").as_uri(),
        result=str(out / "result"),
        dataset=str(out / "datasets"),
        **{**known, **changes},
    )


def prepared(tmp: Path, **sizes: int) -> Path:
    """A prepared data set's folder."""
    prepare(flags(write_folder(tmp / "pictures", **sizes).as_uri(), tmp))
    return next(path for path in (tmp / "datasets").iterdir() if (path / "dataset.json").exists())


def config(**changes: object) -> TrainingConfig:
    """A tiny, deterministic training from scratch."""
    values = {
        "recipe": "scratch",
        "backbone": "resnet18",
        "image_size": "32",
        "epochs": "3",
        "batch_size": "8",
        "precision": "fp32",
    }
    return from_mapping({**values, **{name: str(value) for name, value in changes.items()}})


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an entry point as a job would."""
    env = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(MODEL_CODE / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


_LAST_THREADS = """
import atexit, os
from pathlib import Path
if "RANK" in os.environ:
    names = lambda: "".join(thread.read_text() for thread in Path("/proc/self/task").glob("*/comm"))
    atexit.register(lambda: Path(__file__).with_name("rank-" + os.environ["RANK"]).write_text(names()))
"""


def note_last_threads(folder: Path) -> str:
    """For PYTHONPATH: each process that torchrun starts leaves the names of the threads with which it ends in ``folder``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_LAST_THREADS)
    return str(folder)


def assert_gloo_has_ended(folder: Path) -> None:
    """A thread of gloo's that is there when the interpreter ends may abort the process, after a training that went well."""
    threads = {file.name: file.read_text().split() for file in sorted(folder.glob("rank-*"))}
    assert set(threads) == {"rank-0", "rank-1"}, threads
    assert not [name for names in threads.values() for name in names if "gloo" in name], threads
