"""Features of a frozen backbone, computed once for train and valid.

The folder holds ``<split>.npy`` ``(N, D) float32``, ``<split>_labels.npy`` ``(N,) int64``, features.json, and the backbone's
weights, so that the training job needs no second download and cannot fold a head onto other weights.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from classifier.dataset import DatasetInfo, load_split
from classifier.errors import DataError
from classifier.precision import autocast, faster_precision
from classifier.serving import Preprocessing
from classifier.transforms import evaluation_batch

SPLITS = ("train", "valid")
BATCH = 32


@dataclass(frozen=True)
class FeaturesInfo:
    """features.json."""

    backbone: str
    dataset_hash: str
    preprocessing: Preprocessing
    num_features: int
    weights_sha256: str


@torch.inference_mode()
def extract(model: nn.Module, pictures: npt.NDArray[np.uint8], preprocessing: Preprocessing, precision: str, what: str) -> Tensor:
    """``(N, R, R, 3) uint8`` to features ``(N, D) float32``."""
    model.eval()
    parts: list[Tensor] = []
    started = said = time.monotonic()
    for start in range(0, len(pictures), BATCH):
        batch = evaluation_batch(pictures[start : start + BATCH], preprocessing)
        with autocast(precision):
            parts.append(model(batch.contiguous(memory_format=torch.channels_last)).float())
        if time.monotonic() - said > 2:
            said = time.monotonic()
            done = start + len(batch)
            print(f"progress split={what} pictures={done}/{len(pictures)} pictures_per_s={done / (said - started):.0f}", flush=True)
    return torch.cat(parts)


def cache(info: DatasetInfo, backbone: nn.Module, name: str, preprocessing: Preprocessing, folder: Path) -> None:
    """Write the features of train and valid; ``backbone(x)`` must already give ``(B, D)``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sample = torch.zeros(BATCH, 3, preprocessing.image_size, preprocessing.image_size).contiguous(memory_format=torch.channels_last)
    precision = faster_precision(backbone, sample)
    width = 0
    for split in SPLITS:
        started = time.monotonic()
        data = load_split(info, split, preprocessing.resize_size)
        features = extract(backbone, data.pictures, preprocessing, precision, split)
        width = features.shape[1]
        np.save(folder / f"{split}.npy", features.numpy())
        np.save(folder / f"{split}_labels.npy", data.labels)
        seconds = time.monotonic() - started
        print(f"features split={split} pictures={len(data)} width={width} precision={precision} seconds={seconds:.1f}", flush=True)
    weights = folder / "backbone.safetensors"
    save_file({key: value.contiguous() for key, value in backbone.state_dict().items()}, weights)
    description = {
        "backbone": name,
        "dataset_hash": info.hash,
        "preprocessing": preprocessing.to_json(),
        "num_features": width,
        "precision": precision,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (folder / "features.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read_info(folder: Path) -> FeaturesInfo:
    """Raises DataError when the channel holds no features."""
    path = folder / "features.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: recipe head needs the channel 'features' that cache_features.py wrote")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return FeaturesInfo(
        found["backbone"],
        found["dataset_hash"],
        Preprocessing.from_json(found["preprocessing"]),
        int(found["num_features"]),
        found["weights_sha256"],
    )


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """``(features (N, D) float32, labels (N,) int64)``."""
    features, labels = np.load(folder / f"{split}.npy"), np.load(folder / f"{split}_labels.npy")
    return torch.from_numpy(features), torch.from_numpy(labels)
