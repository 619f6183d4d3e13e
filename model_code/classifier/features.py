"""Features of a frozen backbone, computed once for train and valid.

The folder holds ``<split>.npy`` ``(K, N, D) float16``, ``<split>_labels.npy`` ``(N,) int64``, features.json, and the backbone's
weights, so that the training job needs no second download and cannot fold a head onto other weights.

Legend: K views of each picture (the first is what evaluation sees, the others are augmented), N pictures, D features.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classifier import distributed, transforms
from classifier.batches import PictureBatches
from classifier.config import TrainingConfig
from classifier.dataset import DatasetInfo, Labels, Pictures, ShardSplit
from classifier.errors import DataError
from classifier.precision import autocast, device_of, faster_precision
from classifier.serving import Preprocessing

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


class ViewBatches(PictureBatches):
    """Pictures in their own order: plain, or augmented anew in each epoch (an epoch is a view)."""

    def __init__(self, pictures: Pictures, preprocessing: Preprocessing, config: TrainingConfig, *, augmented: bool) -> None:
        super().__init__(pictures, preprocessing, replace(config, batch_size=BATCH), train=augmented)
        self._order = replace(self._order, size=BATCH, train=False)


@torch.inference_mode()
def extract(network: nn.Module, batches: ViewBatches, view: int, precision: str, what: str) -> Iterator[tuple[int, Tensor]]:
    """``(number of the first picture, features (B, D) float16)`` of one view."""
    where, preprocessing = device_of(network), batches.preprocessing
    started = said = time.monotonic()
    done = 0
    for batch in batches.epoch(view):
        inputs = transforms.normalise(batch.inputs.to(where), preprocessing)
        with autocast(precision, where.type):
            yield done, network(inputs).to(torch.float16).cpu()
        done += len(batch.labels)
        if time.monotonic() - said > 2:
            said = time.monotonic()
            pace = done / (said - started)
            print(f"progress split={what} view={view} pictures={done}/{batches.num_examples} pictures_per_s={pace:.0f}", flush=True)


def cache(info: DatasetInfo, backbone: nn.Module, name: str, config: TrainingConfig, folder: Path) -> None:
    """Write the features of train (``config.feature_views`` views) and valid; ``backbone(x)`` must already give ``(B, D)``.

    Memory does not grow with the number of pictures: they are read from the shards, and features go to mapped files.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = Preprocessing.of(config.image_size, config.resize_size)
    network = backbone.eval()
    side = preprocessing.image_size
    sample = torch.zeros(BATCH, 3, side, side, device=device_of(network)).contiguous(memory_format=torch.channels_last)
    precision = faster_precision(network, sample)
    width = 0
    for split in SPLITS:
        started = time.monotonic()
        pictures = ShardSplit(info, split)
        views = config.feature_views if split == "train" else 1
        width = _write(folder, split, pictures, network, preprocessing, replace(config, feature_views=views), precision)
        seconds = time.monotonic() - started
        counts = f"split={split} pictures={len(pictures)} views={views} width={width}"
        print(f"features {counts} precision={precision} seconds={seconds:.1f}", flush=True)
    weights = folder / "backbone.safetensors"
    save_file({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, weights)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    description = {
        "backbone": name,
        "dataset_hash": info.hash,
        "preprocessing": preprocessing.to_json(),
        "num_features": width,
        "num_views": config.feature_views,
        "precision": precision,
        "weights_sha256": digest,
    }
    (folder / "features.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _write(
    folder: Path,
    split: str,
    pictures: Pictures,
    network: nn.Module,
    preprocessing: Preprocessing,
    config: TrainingConfig,
    precision: str,
) -> int:
    """Fill ``<split>.npy`` view by view; returns D."""
    store: Any = None
    for view in range(config.feature_views):
        batches = ViewBatches(pictures, preprocessing, config, augmented=view > 0)
        for start, features in extract(network, batches, view, precision, split):
            if store is None:
                shape = (config.feature_views, len(pictures), features.shape[1])
                store = np.lib.format.open_memmap(folder / f"{split}.npy", mode="w+", dtype=np.float16, shape=shape)  # type: ignore[no-untyped-call]
            store[view, start : start + len(features)] = features.numpy()
    if store is None:
        raise DataError(f"split {split!r} holds no picture: prepare the data set again")
    store.flush()
    np.save(folder / f"{split}_labels.npy", pictures.labels)
    return int(store.shape[2])


def read_info(folder: Path) -> FeaturesInfo:
    """Raises DataError when the channel holds no features."""
    path = folder / "features.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: recipes head and lp-ft need the channel 'features' that cache_features.py wrote")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return FeaturesInfo(
        found["backbone"],
        found["dataset_hash"],
        Preprocessing.from_json(found["preprocessing"]),
        int(found["num_features"]),
        found["weights_sha256"],
    )


def load(folder: Path, split: str) -> tuple[Tensor, Labels]:
    """``(views (K, N, D) float16, labels (N,) int64)``; the features stay in their file until a batch asks for them."""
    # Private copies of touched pages, never written back: torch wants writable memory.
    return torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="c")), np.load(folder / f"{split}_labels.npy")


def moments(views: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(D,) float32`` of the plain view, in blocks."""
    count = views.shape[1]
    total, squares = torch.zeros(views.shape[2], dtype=torch.float64), torch.zeros(views.shape[2], dtype=torch.float64)
    for block in torch.split(views[0], 65536):
        wide = block.double()
        total += wide.sum(dim=0)
        squares += wide.square().sum(dim=0)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0) * count / max(count - 1, 1)
    return mean.float(), variance.sqrt().float()


@torch.no_grad()  # not inference mode: the result becomes part of a network that is trained and restored
def observed_moments(network: nn.Module, batches: PictureBatches, count: int = 512) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(D,) float32`` of the features of about ``count`` pictures, over all processes."""
    network.eval()
    where = device_of(network)
    sums: Tensor | None = None
    for batch in batches.epoch(0):
        found = network(transforms.normalise(batch.inputs.to(where), batches.preprocessing)).double()
        part = torch.cat([found.sum(dim=0), found.square().sum(dim=0), found.new_tensor([float(len(found))])])
        sums = part if sums is None else sums + part
        count -= batch.total
        if count <= 0:
            break
    if sums is None:
        raise DataError("there is no picture to train on: prepare the data set again")
    sums = distributed.total(sums)
    mean, squares = (sums[:-1] / sums[-1]).chunk(2)
    std = (squares - mean.square()).clamp(min=0).sqrt()
    # A feature that is all but silent now may speak once the backbone learns: it must not be magnified without bound.
    return mean.float(), std.clamp(min=float(std.median()) / 10).float()
