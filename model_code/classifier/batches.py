"""What an epoch iterates over: pictures or cached features, in a seeded order that depends on the epoch alone.

Because every epoch has its own generator, a run that resumes sees exactly the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from classifier.config import TrainingConfig
from classifier.dataset import DecodedSplit
from classifier.serving import Preprocessing
from classifier.transforms import evaluation_batch, training_batch


class Batches(Protocol):
    """Batches ``(inputs (B, …), labels (B,) int64)`` of one split."""

    def __len__(self) -> int:
        """Steps in an epoch."""

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``number`` (from 0)."""

    @property
    def num_examples(self) -> int:
        """Examples in an epoch."""


def _order(count: int, seed: int, epoch: int, train: bool) -> tuple[Tensor, torch.Generator]:
    random = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return (torch.randperm(count, generator=random) if train else torch.arange(count)), random


def _chunks(order: Tensor, size: int, train: bool) -> list[Tensor]:
    chunks = list(torch.split(order, size))
    # Batch normalisation cannot train on one example.
    if train and len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks.pop()
    return chunks


class PictureBatches:
    """Batches from decoded pictures; augmented when ``train``."""

    def __init__(self, split: DecodedSplit, preprocessing: Preprocessing, config: TrainingConfig, *, train: bool) -> None:
        self._split, self._preprocessing, self._config, self._train = split, preprocessing, config, train
        self._size = config.batch_size if train else max(config.batch_size, 128)

    @property
    def num_examples(self) -> int:
        return len(self._split)

    def __len__(self) -> int:
        return len(_chunks(torch.arange(len(self._split)), self._size, self._train))

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, random = _order(len(self._split), self._config.seed, number, self._train)
        for chunk in _chunks(order, self._size, self._train):
            index = np.sort(chunk.numpy())  # memory-mapped pictures are read in order
            pictures, labels = self._split.pictures[index], torch.from_numpy(self._split.labels[index])
            if self._train:
                config = self._config
                inputs = training_batch(
                    pictures,
                    self._preprocessing,
                    flip=config.horizontal_flip,
                    min_scale=config.random_resized_crop_min_scale,
                    trivial=config.augmentation == "trivial",
                    random=random,
                )
            else:
                inputs = evaluation_batch(pictures, self._preprocessing).contiguous(memory_format=torch.channels_last)
            yield inputs, labels


class FeatureBatches:
    """Batches of cached features ``(B, D) float32``."""

    def __init__(self, features: Tensor, labels: Tensor, config: TrainingConfig, *, train: bool) -> None:
        self._features, self._labels, self._config, self._train = features, labels, config, train
        self._size = config.batch_size if train else 4096

    @property
    def num_examples(self) -> int:
        return len(self._labels)

    def __len__(self) -> int:
        return len(_chunks(torch.arange(len(self._labels)), self._size, self._train))

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, _ = _order(len(self._labels), self._config.seed, number, self._train)
        for chunk in _chunks(order, self._size, self._train):
            yield self._features[chunk], self._labels[chunk]
