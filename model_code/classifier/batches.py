"""What an epoch iterates over: pictures or cached features, in a seeded order that depends on the epoch alone.

Every batch is named by (seed, epoch, step), so a run that resumes in the middle of an epoch sees exactly the batches it would have
seen, with the same crops. Batches are global: with several processes, each makes only its own part of every batch.

Legend: B this process's part of a batch, S image_size, R side of a decoded square, D features.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classifier import distributed, transforms
from classifier.config import TrainingConfig
from classifier.cpus import cpu_count
from classifier.dataset import DecodedSplit, Labels, Pictures
from classifier.serving import Pixels, Preprocessing, centre, to_square

EVALUATION_BATCH = 128


class Batch(NamedTuple):
    """``inputs (B, 3, S, S) uint8`` or features ``(B, D) float32``; ``labels (B,) int64``; ``total``: size of the whole batch."""

    inputs: Tensor
    labels: Tensor
    total: int


class Batches(Protocol):
    """Batches of one split."""

    def __len__(self) -> int:
        """Steps in an epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number`` (from 0), from step ``start`` on."""

    @property
    def num_examples(self) -> int:
        """Examples in an epoch, over all processes."""


@dataclass(frozen=True)
class Order:
    """Which examples make up which batch. An incomplete last batch is kept unless it is too small to train on."""

    count: int
    size: int
    seed: int
    train: bool

    def __len__(self) -> int:
        # Batch normalisation cannot train on one example, and each process needs its part.
        rest, smallest = self.count % self.size, 2 * distributed.size()
        lonely = self.train and 0 < rest < smallest and self.count > self.size
        return -(-self.count // self.size) - lonely

    def chunks(self, epoch: int, start: int) -> Iterator[tuple[int, Labels]]:
        """``(step, numbers of the examples)``; sorted within a batch, because files are read faster in order."""
        order = np.arange(self.count)
        if self.train:
            order = transforms.generator(self.seed, epoch, 0, purpose=2).permutation(self.count)
        for step in range(start, len(self)):
            yield step, np.sort(order[step * self.size : (step + 1) * self.size])


class PictureBatches:
    """Batches decoded and cropped by threads ahead of their use; augmented when ``train``. uint8 until they are on the device."""

    AHEAD = 3
    """Batches in the making; more only cost memory."""

    def __init__(
        self,
        pictures: Pictures,
        preprocessing: Preprocessing,
        config: TrainingConfig,
        *,
        train: bool,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.preprocessing = preprocessing
        self._pictures, self._config, self._train, self._pin = pictures, config, train, pin
        size = config.batch_size if train else max(EVALUATION_BATCH, config.batch_size)
        self._order = Order(len(pictures), size, config.seed, train)
        self.workers = workers or config.num_workers or cpu_count()

    @property
    def num_examples(self) -> int:
        return len(self._pictures)

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        # Each thread works on a picture of its own: a second level of threads inside torch would only get in the way.
        # The setting is the thread's own.
        with ThreadPoolExecutor(self.workers, "input", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                chunks = self._order.chunks(number, start)
                ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
                for step, index in itertools.islice(chunks, self.AHEAD):
                    ahead.append(self._begin(pool, number, step, index))
                while ahead:
                    batch, parts = ahead.popleft()
                    for part in parts:
                        part.result()
                    for step, index in itertools.islice(chunks, 1):
                        ahead.append(self._begin(pool, number, step, index))
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, epoch: int, step: int, index: Labels) -> tuple[Batch, list[Future[None]]]:
        """A batch whose pictures the pool is filling in."""
        mine = distributed.share(len(index))
        choices = transforms.draw(len(index), self._config, epoch, step).part(mine) if self._train else None
        numbers = index[mine]
        size = self.preprocessing.image_size
        with torch.inference_mode(mode=False):  # evaluation's mode is the caller's; the threads that fill the room have none
            room = torch.empty(len(numbers), size, size, 3, dtype=torch.uint8, pin_memory=self._pin)
        # A few tasks for each thread: one that is held up does not hold up the batch.
        width = max(1, -(-len(numbers) // (self.workers * 2)))
        parts = [
            pool.submit(
                self._fill, room[at : at + width], numbers[at : at + width], choices and choices.part(slice(at, at + width))
            )
            for at in range(0, len(numbers), width)
        ]
        return Batch(room.permute(0, 3, 1, 2), torch.from_numpy(self._pictures.labels[numbers]), len(index)), parts

    def _fill(self, room: Tensor, numbers: Labels, choices: transforms.Draw | None) -> None:
        for position, number in enumerate(numbers):
            picture = self._pictures.picture(int(number))
            if choices is None:
                room[position] = torch.from_numpy(np.ascontiguousarray(self._middle(picture)))
            else:
                # Crops come from the square that evaluation sees, wherever pictures are kept: a run does not depend on its machine.
                square = centre(picture, min(picture.shape[:2]))
                room[position] = transforms.augmented(square, choices, position, self._config)

    def _middle(self, picture: Pixels) -> Pixels:
        """What evaluation sees of a picture: the definition is serving's."""
        resize_size = self.preprocessing.resize_size
        if picture.shape[:2] != (resize_size, resize_size):
            picture = to_square(Image.fromarray(picture), resize_size)
        return centre(picture, self.preprocessing.image_size)


class DeviceBatches:
    """Training batches cut on the device that holds all pictures: ``(N, R, R, 3) uint8`` in a GPU's memory, nothing to load."""

    def __init__(self, split: DecodedSplit, config: TrainingConfig, device: torch.device) -> None:
        self._pictures = torch.from_numpy(split.pictures).to(device)
        self._labels, self._config = split.labels, config
        self._order = Order(len(split), config.batch_size, config.seed, train=True)

    @property
    def num_examples(self) -> int:
        return len(self._labels)

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for step, index in self._order.chunks(number, start):
            mine = distributed.share(len(index))
            choices = transforms.draw(len(index), self._config, number, step).part(mine)
            chosen = torch.from_numpy(index[mine])
            pictures = self._pictures[chosen.to(self._pictures.device)]
            inputs = transforms.batch_on_device(pictures, choices, self._config)
            yield Batch(inputs, torch.from_numpy(self._labels[index[mine]]), len(index))


class FeatureBatches:
    """Batches of cached features: ``views (K, N, D)``, of which training draws one for each example; evaluation takes the first."""

    def __init__(self, views: Tensor, labels: Labels, config: TrainingConfig, *, train: bool) -> None:
        self._views, self._labels, self._config, self._train = views, labels, config, train
        self._order = Order(len(labels), config.batch_size if train else 4096, config.seed, train)

    @property
    def num_examples(self) -> int:
        return len(self._labels)

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for step, index in self._order.chunks(number, start):
            mine = distributed.share(len(index))
            view = np.zeros(len(index), dtype=np.int64)
            if self._train:
                view = transforms.generator(self._config.seed, number, step).integers(0, len(self._views), len(index))
            inputs = self._views[torch.from_numpy(view[mine]), torch.from_numpy(index[mine])].float()
            yield Batch(inputs, torch.from_numpy(self._labels[index[mine]]), len(index))


def choose_workers(batches: PictureBatches, limit: int, seconds: float = 0.4) -> dict[int, float]:
    """Pictures per second with 1, 2, 4 … threads, each timed for ``seconds``; leaves the fewest within 5 % of the best."""
    paces: dict[int, float] = {}
    workers = 1
    while workers <= limit:
        batches.workers = workers
        paces[workers] = _pace(batches, seconds)
        workers = workers * 2 if workers * 2 <= limit or workers == limit else limit
    best = max(paces.values())
    batches.workers = min(number for number, pace in paces.items() if pace >= 0.95 * best)
    return paces


def _pace(batches: PictureBatches, seconds: float) -> float:
    """Pictures per second from the second batch on: the first one finds the threads still starting."""
    seen, started = 0, 0.0
    for step, batch in enumerate(batches.epoch(0)):
        if step == 0:
            started = time.perf_counter()
        else:
            seen += len(batch.labels)
        if step and time.perf_counter() - started > seconds:
            break
    return seen / max(time.perf_counter() - started, 1e-9) if seen else float(len(batches))
