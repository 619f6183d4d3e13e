"""What our accuracy is measured against, on the same pictures and the same backbone.

``reference_recipe`` is pytorch/vision's references/classification/train.py, restated for one device. It stands for

    train.py --model mobilenet_v2 --epochs E --batch-size 32 --lr 0.0125 --momentum 0.9 --wd 1e-4
             --lr-scheduler cosineannealinglr --label-smoothing 0.1
             --train-crop-size 224 --val-resize-size 256 --val-crop-size 224

- ``--lr``: the script's default of 0.1 is for 8 GPUs with 32 pictures each; scaled linearly to 32 pictures.
- ``--lr-scheduler``: the default, StepLR every 30 epochs, never steps in the few epochs compared here, so it is the cosine of the
  newer recipes; ``--label-smoothing`` is theirs too. The rest of them (mixup, cutmix, random erasing, EMA, warm-up, 176-pixel
  crops) is made for hundreds of epochs from scratch and stays at the script's defaults: off.
- ``--pretrained``: the backbone's state dict is given; its last linear layer is replaced by a new one for our classes, which the
  script leaves to its user.
- The last epoch's weights are the result, as in the script; valid is measured after every epoch, test once at the end.

Pictures are decoded once and kept as uint8; transforms draw from the same distributions as the script's, on tensors.

``linear_probe`` is the common small-data peer: logistic regression (L-BFGS, scikit-learn) on a frozen backbone's features.

    python bench/reference_train.py --data ../shared/data/dogs-120 --weights ../shared/weights/mobilenet_v2_imagenet.pth --epochs 4
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import datasets, models
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 32, 0.0125, 0.9, 1e-4
L2 = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""Weight of the penalty against the mean loss, strong first."""


@dataclass(frozen=True)
class Split:
    """``pictures (N, 3, H, W) uint8`` and ``labels (N,) int64``."""

    pictures: Tensor
    labels: Tensor


def load(folder: Path) -> Split:
    """An ImageFolder, decoded. Raises ValueError unless all pictures have one size, as those of dogs-120 have."""
    found = datasets.ImageFolder(str(folder))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = list(pool.map(lambda sample: np.asarray(found.loader(sample[0])), found.samples))
    if len(sizes := {picture.shape for picture in pictures}) > 1:
        raise ValueError(f"{folder} holds pictures of {len(sizes)} sizes: resize them to one first, they are cached as one tensor")
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return Split(stacked, torch.tensor(found.targets))


def build(architecture: str, weights: Path | dict[str, Tensor] | None, num_classes: int) -> nn.Module:
    """torchvision's model with ImageNet weights (a file or a state dict; None: random) and a new last layer."""
    network: Any = models.get_model(architecture, weights=None)
    if weights is not None:
        state = weights if isinstance(weights, dict) else torch.load(weights, weights_only=True, map_location="cpu")
        network.load_state_dict(state)
    holder = network.fc if hasattr(network, "fc") else network.classifier
    if isinstance(holder, nn.Linear):
        network.fc = nn.Linear(holder.in_features, num_classes)
    else:
        holder[-1] = nn.Linear(holder[-1].in_features, num_classes)
    return network.to(memory_format=torch.channels_last)


def normalised(pictures: Tensor) -> Tensor:
    """``(B, 3, S, S)`` uint8 to float32: what ConvertImageDtype and Normalize do, on a batch."""
    scaled = pictures.float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((scaled - mean) / std).contiguous(memory_format=torch.channels_last)


def training_batches(split: Split, crop_size: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch of ClassificationPresetTrain: random resized crop, flip."""
    augment = v2.Compose([v2.RandomResizedCrop(crop_size, antialias=True), v2.RandomHorizontalFlip(0.5)])
    for chosen in torch.randperm(len(split.labels), generator=random).split(BATCH):
        yield normalised(torch.stack([augment(split.pictures[i]) for i in chosen])), split.labels[chosen]


def evaluation_batches(split: Split, resize_size: int, crop_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """ClassificationPresetEval: resize, centre crop."""
    prepare = v2.Compose([v2.Resize(resize_size, antialias=True), v2.CenterCrop(crop_size)])
    for pictures, labels in zip(split.pictures.split(128), split.labels.split(128), strict=True):
        yield normalised(prepare(pictures)), labels


def _autocast(device: torch.device, bf16: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def train_one_epoch(
    network: nn.Module, optimizer: Any, batches: Iterator[tuple[Tensor, Tensor]], loss_of: Any, bf16: bool
) -> float:
    """The script's function of the same name; returns the mean loss."""
    network.train()
    total, count, device = 0.0, 0, next(network.parameters()).device
    for pictures, labels in batches:
        with _autocast(device, bf16):
            loss = loss_of(network(pictures.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + float(loss.detach()) * len(labels), count + len(labels)
    return total / count


@torch.inference_mode()
def top1(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], bf16: bool) -> float:
    """Share of pictures that are classified right."""
    network.eval()
    right, count, device = 0, 0, next(network.parameters()).device
    for pictures, labels in batches:
        with _autocast(device, bf16):
            right += int((network(pictures.to(device)).argmax(dim=1).cpu() == labels).sum())
        count += len(labels)
    return right / count


def reference_recipe(
    data_root: Path,
    weights: Path | dict[str, Tensor] | None,
    epochs: int,
    *,
    architecture: str = "mobilenet_v2",
    learning_rate: float = LEARNING_RATE,
    label_smoothing: float = 0.1,
    bf16: bool = False,
    device: str = "cpu",
    crop_size: int = 224,
    resize_size: int = 256,
    seed: int = 0,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train on ``data_root``/train; see the head of this file. ``{"valid_top1": [an epoch...], "test_top1", "seconds", ...}``."""
    torch.manual_seed(seed)  # the new layer, the crops and the flips
    random = torch.Generator().manual_seed(seed)
    train, valid = load(data_root / "train"), load(data_root / "valid")
    network = build(architecture, weights, int(train.labels.max()) + 1).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    loss_of = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    losses, scores, seconds = [], [], 0.0
    for epoch in range(epochs):
        started = time.perf_counter()
        losses.append(train_one_epoch(network, optimizer, training_batches(train, crop_size, random), loss_of, bf16))
        schedule.step()
        seconds += time.perf_counter() - started
        scores.append(top1(network, evaluation_batches(valid, resize_size, crop_size), bf16))
        if verbose:
            print(f"epoch={epoch + 1} train_loss={losses[-1]:.4f} valid_top1={scores[-1]:.4f} seconds={seconds:.0f}", flush=True)
    test = top1(network, evaluation_batches(load(data_root / "test"), resize_size, crop_size), bf16)
    return {
        "train_loss": losses,
        "valid_top1": scores,
        "test_top1": test,
        "train_seconds": seconds,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "bf16": bf16,
    }


@torch.inference_mode()
def features(
    data_root: Path, split: str, weights: Path | dict[str, Tensor] | None, *, architecture: str = "mobilenet_v2", size: int = 224
) -> tuple[np.ndarray, np.ndarray]:
    """``(N, D) float32`` and ``(N,) int64``: what the frozen backbone gives its last layer, pictures at ``size``, uncropped."""
    network: Any = build(architecture, weights, 2).eval()
    last = network.fc if hasattr(network, "fc") else network.classifier[-1]
    kept: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    found = load(data_root / split)
    for pictures, _ in evaluation_batches(found, size, size):
        network(pictures)
    return torch.cat(kept).numpy(), found.labels.numpy()


def linear_probe(
    features_train: np.ndarray,
    labels_train: np.ndarray,
    features_valid: np.ndarray,
    labels_valid: np.ndarray,
    features_test: np.ndarray,
    labels_test: np.ndarray,
    *,
    l2: Sequence[float] = L2,
    max_iter: int = 500,
) -> dict[str, Any]:
    """Logistic regression on standardised features, the penalty chosen on valid, test read once with the chosen one.

    ``{"valid_top1": {l2: share}, "l2": the best, "test_top1", "seconds"}``; of equal penalties the stronger.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    started = time.perf_counter()
    scale = StandardScaler().fit(features_train)
    train, valid = scale.transform(features_train), scale.transform(features_valid)
    scores: dict[float, float] = {}
    fitted: dict[float, tuple[Any, Any]] = {}
    # scikit-learn sums the loss over pictures and halves the squared weights: C = 1 / (l2 N). Each start is the last's end.
    model = LogisticRegression(solver="lbfgs", warm_start=True, max_iter=max_iter)
    for strength in sorted(l2, reverse=True):
        model.set_params(C=1 / (strength * len(labels_train))).fit(train, labels_train)
        scores[strength] = float(model.score(valid, labels_valid))
        fitted[strength] = model.coef_.copy(), model.intercept_.copy()
    chosen = max(scores, key=lambda strength: scores[strength])
    model.coef_, model.intercept_ = fitted[chosen]
    test = float(model.score(scale.transform(features_test), labels_test))
    return {"valid_top1": scores, "l2": chosen, "test_top1": test, "seconds": time.perf_counter() - started}


def main() -> None:
    """Both peers on one data set."""
    parser = argparse.ArgumentParser(description="The reference recipe and the linear probe on one data set.")
    parser.add_argument("--data", type=Path, required=True, help="train|valid|test/<class>/*.jpg")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet state dict")
    parser.add_argument("--architecture", default="mobilenet_v2")
    parser.add_argument("--epochs", type=int, default=4, help="0 leaves the recipe out")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: for processors with avx512_bf16 or AMX")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--probe", action="store_true", help="the linear probe too")
    flags = parser.parse_args()
    found: dict[str, Any] = {}
    if flags.probe:
        splits = (features(flags.data, name, flags.weights, architecture=flags.architecture) for name in ("train", "valid", "test"))
        found["linear_probe"] = linear_probe(*(part for split in splits for part in split))
    if flags.epochs:
        known = {"architecture": flags.architecture, "bf16": flags.bf16, "device": flags.device}
        found["reference"] = reference_recipe(flags.data, flags.weights, flags.epochs, **known, verbose=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
