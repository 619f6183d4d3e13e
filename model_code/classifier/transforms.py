"""Random crops, flips, colours and mixing of training, and normalisation on the device. Transforms live here and nowhere else.

Every random choice of a batch is drawn at once from a generator keyed by (seed, epoch, step): it does not depend on the number of
threads or processes, nor on where a run was resumed.

Legend: B pictures, R side of a stored square, S image_size. Stored pictures are ``(H, W, 3) uint8``, batches ``(B, 3, S, S) uint8``
(channels_last in memory) until ``normalise``. The definition of the preprocessing is ``serving.Preprocessing``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from classifier.config import TrainingConfig
from classifier.serving import Pixels, Preprocessing

Box = tuple[float, float, float, float]

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "auto_contrast", "equalize"),
)
BINS = 31
"""Magnitudes of an operation, from none to its maximum."""


@dataclass(frozen=True)
class Space:
    """The strongest magnitude of each group of operations, and how many are applied one after the other."""

    count: int
    shear: float
    translate: float
    """Pixels."""
    rotate: float
    """Degrees."""
    enhance: float
    bits: int
    """Fewest bits that posterize leaves."""
    magnitude_bin: int | None
    """None: drawn; otherwise always this one."""


def space(config: TrainingConfig) -> Space | None:
    """The operations of ``config.augmentation``, with the maxima of torchvision's classes of the same name."""
    if config.augmentation == "trivial":
        return Space(1, 0.99, 32.0, 135.0, 0.99, 2, None)
    if config.augmentation == "rand":
        return Space(2, 0.3, 150.0 / 331.0 * config.image_size, 30.0, 0.9, 4, 9)
    return None


@dataclass(frozen=True)
class Draw:
    """Random choices for B pictures."""

    boxes: npt.NDArray[np.float64]
    """``(B, 4)``: left, top, width, height as shares of the picture."""
    flips: npt.NDArray[np.bool_]
    operations: npt.NDArray[np.int64]
    """``(B, operations)`` indices into OPERATIONS."""
    magnitudes: npt.NDArray[np.int64]
    """``(B, operations)`` signed bins."""

    def __len__(self) -> int:
        return len(self.flips)

    def part(self, chosen: Any) -> Draw:
        """The choices of some of the pictures."""
        return Draw(self.boxes[chosen], self.flips[chosen], self.operations[chosen], self.magnitudes[chosen])


def generator(seed: int, epoch: int, step: int, purpose: int = 0) -> np.random.Generator:
    """The random numbers of one batch; ``purpose`` tells apart what is drawn for the same batch."""
    return np.random.Generator(np.random.Philox(key=[(seed << 32) | epoch, (step << 8) | purpose]))


def draw(count: int, config: TrainingConfig, epoch: int, step: int) -> Draw:
    """Boxes as torchvision's RandomResizedCrop draws them (area share, then aspect 3/4 to 4/3), flips, operations."""
    random = generator(config.seed, epoch, step)
    boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (count, 1))
    if config.random_resized_crop_min_scale < 1.0:
        area = random.uniform(config.random_resized_crop_min_scale, 1.0, count)
        ratio = np.exp(random.uniform(math.log(3 / 4), math.log(4 / 3), count))
        width, height = np.minimum(np.sqrt(area * ratio), 1.0), np.minimum(np.sqrt(area / ratio), 1.0)
        left, top = random.uniform(0, 1, count) * (1 - width), random.uniform(0, 1, count) * (1 - height)
        boxes = np.stack([left, top, width, height], axis=1)
    flips = random.random(count) < 0.5 if config.horizontal_flip else np.zeros(count, dtype=bool)
    kinds = space(config)
    shape = (count, kinds.count if kinds else 0)
    operations = random.integers(0, len(OPERATIONS), shape)
    bins = random.integers(0, BINS, shape) if kinds is None or kinds.magnitude_bin is None else np.full(shape, kinds.magnitude_bin)
    return Draw(boxes, flips, operations, bins * random.choice((-1, 1), shape))


# --- one picture, on a CPU thread --------------------------------------------------------------------------------------------


def crop(picture: Pixels, box: Sequence[float], flip: bool, size: int) -> Tensor:
    """The box of a picture, resized with antialiasing: ``(size, size, 3) uint8``.

    torch's antialiased uint8 kernel on channels_last memory is several times as fast as Pillow's resize.
    """
    height, width = picture.shape[:2]
    left, top = round(box[0] * width), round(box[1] * height)
    right, bottom = max(left + 1, round((box[0] + box[2]) * width)), max(top + 1, round((box[1] + box[3]) * height))
    part = torch.from_numpy(picture[top:bottom, left:right]).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    if part.shape[-2:] != (size, size):
        part = functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
    return (part.flip(-1) if flip else part)[0].permute(1, 2, 0)


def augmented(picture: Pixels, choices: Draw, number: int, config: TrainingConfig) -> Tensor:
    """Picture ``number`` of a draw: crop, flip and operations; ``(S, S, 3) uint8``."""
    square = crop(picture, choices.boxes[number].tolist(), bool(choices.flips[number]), config.image_size)
    kinds = space(config)
    if kinds is None:
        return square
    image: Any = Image.fromarray(square.numpy())
    for operation, magnitude in zip(choices.operations[number], choices.magnitudes[number], strict=True):
        image = operate(image, OPERATIONS[operation], int(magnitude), kinds)
    return torch.from_numpy(np.array(image))


def operate(image: Any, operation: str, magnitude: int, kinds: Space) -> Any:
    """One operation on a Pillow image or a ``(…, 3, H, W) uint8`` tensor; ``magnitude`` is a signed bin."""
    from torchvision.transforms.v2 import functional as f

    share = magnitude / (BINS - 1)
    match operation:
        case "shear_x" | "shear_y":
            angle = math.degrees(math.atan(kinds.shear * share))
            shear = [angle, 0.0] if operation == "shear_x" else [0.0, angle]
            return f.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0.0, 0.0])
        case "translate_x" | "translate_y":
            pixels = int(kinds.translate * share)
            moved = [pixels, 0] if operation == "translate_x" else [0, pixels]
            return f.affine(image, angle=0.0, translate=moved, scale=1.0, shear=[0.0, 0.0])
        case "rotate":
            return f.rotate(image, kinds.rotate * share)
        case "brightness":
            return f.adjust_brightness(image, 1.0 + kinds.enhance * share)
        case "color":
            return f.adjust_saturation(image, 1.0 + kinds.enhance * share)
        case "contrast":
            return f.adjust_contrast(image, 1.0 + kinds.enhance * share)
        case "sharpness":
            return f.adjust_sharpness(image, 1.0 + kinds.enhance * share)
        case "posterize":
            return f.posterize(image, 8 - round((8 - kinds.bits) * abs(share)))
        case "solarize":
            return f.solarize(image, 255.0 * (1.0 - abs(share)))
        case "auto_contrast":
            return f.autocontrast(image)
        case "equalize":
            return f.equalize(image)
    return image


# --- a whole batch, where the pictures already are (a GPU's memory) ----------------------------------------------------------


def batch_on_device(pictures: Tensor, choices: Draw, config: TrainingConfig) -> Tensor:
    """``(B, R, R, 3) uint8`` to ``(B, 3, S, S) uint8`` on the same device.

    Boxes are as in ``crop``; the sampling is bilinear without antialiasing, which the small reduction from R to S does not need.
    """
    size, device = config.image_size, pictures.device
    boxes = torch.from_numpy(choices.boxes).to(device, torch.float32)
    theta = torch.zeros(len(choices), 2, 3, device=device)
    sign = 1 - 2 * torch.from_numpy(choices.flips).to(device, torch.float32)
    theta[:, 0, 0], theta[:, 1, 1] = boxes[:, 2] * sign, boxes[:, 3]
    theta[:, 0, 2], theta[:, 1, 2] = 2 * boxes[:, 0] + boxes[:, 2] - 1, 2 * boxes[:, 1] + boxes[:, 3] - 1
    grid = functional.affine_grid(theta, [len(choices), 3, size, size], align_corners=False)
    planes = pictures.permute(0, 3, 1, 2).float()
    batch = functional.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    batch = batch.round_().to(torch.uint8)
    kinds = space(config)
    for turn in range(choices.operations.shape[1] if kinds else 0):
        batch = _operate_in_groups(batch, choices.operations[:, turn], choices.magnitudes[:, turn], kinds)  # type: ignore[arg-type]
    return batch.contiguous(memory_format=torch.channels_last)


def _operate_in_groups(batch: Tensor, operations: Any, magnitudes: Any, kinds: Space) -> Tensor:
    """Pictures with the same operation and magnitude go together: a few dozen kernels instead of one set a picture."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, key in enumerate(zip(operations.tolist(), magnitudes.tolist(), strict=True)):
        groups.setdefault(key, []).append(number)
    for (operation, magnitude), numbers in groups.items():
        if OPERATIONS[operation] != "identity":
            batch[numbers] = operate(batch[numbers], OPERATIONS[operation], magnitude, kinds)
    return batch


def normalise(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``(B, 3, S, S) uint8`` to float32 on the batch's device, the memory format kept."""
    mean = torch.tensor(preprocessing.mean, device=batch.device).mul_(255.0).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=batch.device).mul_(255.0).view(1, 3, 1, 1)
    return batch.float().sub_(mean).div_(std)


# --- mixing ------------------------------------------------------------------------------------------------------------------


def mix(batch: Tensor, targets: Tensor, config: TrainingConfig, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """mixup or cutmix of a float batch with itself; ``targets (B, C)`` are probabilities and are mixed alike."""
    kinds = [name for name, alpha in (("mixup", config.mixup_alpha), ("cutmix", config.cutmix_alpha)) if alpha > 0]
    if not kinds:
        return batch, targets
    random = generator(config.seed, epoch, step, purpose=1)
    kind = kinds[int(random.integers(len(kinds)))]
    other = torch.from_numpy(random.permutation(len(batch))).to(batch.device)
    if kind == "mixup":
        share = float(random.beta(config.mixup_alpha, config.mixup_alpha))
        batch = batch * share + batch[other] * (1 - share)
    else:
        height, width = batch.shape[-2:]
        share = float(random.beta(config.cutmix_alpha, config.cutmix_alpha))
        half_height, half_width = math.sqrt(1 - share) * height / 2, math.sqrt(1 - share) * width / 2
        y, x = random.uniform(0, height), random.uniform(0, width)
        top, bottom = max(0, round(y - half_height)), min(height, round(y + half_height))
        left, right = max(0, round(x - half_width)), min(width, round(x + half_width))
        batch = batch.clone()
        batch[..., top:bottom, left:right] = batch[other][..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)  # what the edges cut off counts as kept
    return batch, targets * share + targets[other] * (1 - share)
