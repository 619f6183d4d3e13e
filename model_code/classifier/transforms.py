"""The torch side of the preprocessing, on whole batches, and the random augmentation of training.

Shapes: ``(B, R, R, 3) uint8`` in, ``(B, 3, S, S) float32`` out (channels_last in memory). The definition is
``serving.Preprocessing``; ``evaluation_batch`` gives the same numbers (a test holds them to 1e-5).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from classifier.serving import Pixels, Preprocessing, centre


def normalise(pictures: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``(B, S, S, 3) uint8`` to ``(B, 3, S, S) float32``."""
    mean = torch.tensor(preprocessing.mean) * 255.0
    std = torch.tensor(preprocessing.std) * 255.0
    return ((pictures.float() - mean) / std).permute(0, 3, 1, 2)


def evaluation_batch(pictures: Pixels, preprocessing: Preprocessing) -> Tensor:
    """Central crop and normalisation."""
    square = np.ascontiguousarray(centre(pictures, preprocessing.image_size))
    return normalise(torch.from_numpy(square), preprocessing)


def _crop_boxes(count: int, min_scale: float, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres and half sides ``(B,)`` of random crops in the unit square -1..1 (area min_scale..1, aspect 3/4..4/3)."""
    area = torch.empty(count).uniform_(min_scale, 1.0, generator=random)
    ratio = torch.exp(torch.empty(count).uniform_(-0.2877, 0.2877, generator=random))
    half_width = (area * ratio).sqrt().clamp(max=1.0)
    half_height = (area / ratio).sqrt().clamp(max=1.0)
    x = (torch.rand(count, generator=random) * 2 - 1) * (1 - half_width)
    y = (torch.rand(count, generator=random) * 2 - 1) * (1 - half_height)
    return x, y, half_width, half_height


def training_batch(
    pictures: Pixels, preprocessing: Preprocessing, *, flip: bool, min_scale: float, trivial: bool, random: torch.Generator
) -> Tensor:
    """Random resized crop, flip and (when ``trivial``) one random colour change a picture."""
    if min_scale >= 1.0 and not flip:
        batch = evaluation_batch(pictures, preprocessing)
    else:
        normal = normalise(torch.from_numpy(np.ascontiguousarray(pictures)), preprocessing)
        x, y, half_width, half_height = _crop_boxes(len(pictures), min_scale, random)
        if flip:
            half_width = half_width * (1 - 2 * (torch.rand(len(pictures), generator=random) < 0.5).float())
        theta = torch.zeros(len(pictures), 2, 3)
        theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = half_width, x, half_height, y
        size = preprocessing.image_size
        grid = functional.affine_grid(theta, [len(pictures), 3, size, size], align_corners=False)
        batch = functional.grid_sample(normal, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if trivial:
        batch = _colour(batch, random)
    return batch.contiguous(memory_format=torch.channels_last)


def _colour(batch: Tensor, random: torch.Generator) -> Tensor:
    """Brightness and contrast, drawn per picture (after the idea of TrivialAugment: one mild random change each)."""
    count = len(batch)
    strength = torch.empty(count, 1, 1, 1).uniform_(-0.4, 0.4, generator=random)
    which = torch.rand(count, 1, 1, 1, generator=random) < 0.5
    mean = batch.mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(which, batch + strength, (batch - mean) * (1 + strength) + mean)
