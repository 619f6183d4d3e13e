"""What our training input is measured against. Each function prepares a peer and returns its epoch: ``() -> int``, which reads a
whole epoch and returns how many pictures came out.

- ``reference_loader``: the input of torchvision's reference training script.
- ``dali_loader``, ``dali_shards_loader``: NVIDIA DALI on the CPU (`uv sync --group bench`).
- ``decode_only``: nothing but decoding, the limit of any design that starts from JPEGs.

All give 224 x 224 random resized crops with flips; the reference float32 CHW, DALI uint8 HWC (normalisation is left to the device).
`python bench/peers.py FOLDER` times them.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Epoch = Callable[[], int]

CROP = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREFETCH = 3
"""Batches that DALI works ahead."""
DALI_MISSING = "NVIDIA DALI is not installed: run `uv sync --group bench` (package nvidia-dali-cuda130; it needs no GPU)"


def pictures_of(folder: Path) -> list[Path]:
    """All pictures of an ImageFolder. Raises FileNotFoundError when there is none."""
    found = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no class folders with JPEGs: make some with python bench/samples.py")
    return found


def reference_batches(folder: Path, workers: int, batch_size: int, *, persistent: bool = True) -> Any:
    """The input of pytorch/vision, references/classification (train.py and presets.ClassificationPresetTrain) at its defaults.

    ImageFolder, Pillow, transforms v1, a RandomSampler, DataLoader with workers and the default collate. One thing is in its
    favour: workers live on between epochs, so that starting them is not timed (``persistent=False``: as in the script).
    """
    import torch
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(CROP, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.RandomHorizontalFlip(0.5),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(mean=MEAN, std=STD),
    ]
    dataset = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=torch.utils.data.RandomSampler(dataset),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and workers > 0,
    )


def reference_loader(folder: Path, workers: int, batch_size: int, *, persistent: bool = True) -> Epoch:
    """An epoch of ``reference_batches``."""
    loader = reference_batches(folder, workers, batch_size, persistent=persistent)
    return lambda: sum(len(images) for images, _ in loader)


def dali() -> Any:
    """The package. Raises ModuleNotFoundError that says how to install it."""
    try:
        import nvidia.dali as package
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError(DALI_MISSING) from problem
    return package


def dali_loader(folder: Path, threads: int, batch_size: int) -> Epoch:
    """DALI on the CPU from files: shuffled reader, decoder with random crop, resize, flip; uint8 ``(B, 224, 224, 3)``."""
    package = dali()

    def read() -> Any:
        files = [str(path) for path in pictures_of(folder)]
        return package.fn.readers.file(files=files, random_shuffle=True, name="reader", prefetch_queue_depth=PREFETCH)[0]

    return _dali_epoch(package, read, threads, batch_size)


def dali_shards_loader(shards: Sequence[Path], threads: int, batch_size: int) -> Epoch:
    """The same from tar shards (prepared data sets have ``shards/train-*.tar``), shuffled in DALI's buffer."""
    package = dali()
    if not shards:
        raise FileNotFoundError("no shards were given: prepare a data set and name its shards/train-*.tar")

    def read() -> Any:
        paths = [str(path) for path in shards]
        # One extension, one output: no list, as readers.file gives.
        return package.fn.readers.webdataset(
            paths=paths, ext=["jpg;jpeg;png"], random_shuffle=True, name="reader", prefetch_queue_depth=PREFETCH
        )

    return _dali_epoch(package, read, threads, batch_size)


def _dali_epoch(package: Any, read: Callable[[], Any], threads: int, batch_size: int) -> Epoch:
    fn, types = package.fn, package.types
    pipe = package.Pipeline(batch_size, threads, device_id=None, seed=1, prefetch_queue_depth=PREFETCH)
    with pipe:
        pixels = fn.decoders.image_random_crop(
            read(), device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
        )
        pixels = fn.resize(pixels, size=[CROP, CROP], interp_type=types.INTERP_LINEAR, antialias=True)
        pipe.set_outputs(fn.flip(pixels, horizontal=fn.random.coin_flip(probability=0.5)))
    pipe.build()
    batches = math.ceil(pipe.epoch_size("reader") / batch_size)
    return lambda: sum(_dali_batches(pipe, batches))


def _dali_batches(pipe: Any, batches: int) -> Iterator[int]:
    """Pictures of each batch, the last one full too. No work is scheduled beyond the epoch, so none runs in another's time."""
    for _ in range(min(PREFETCH, batches)):
        pipe.schedule_run()
    for number in range(batches):
        (pictures,) = pipe.share_outputs()
        batch = pictures.as_tensor()
        yield int(batch.shape()[0])
        pipe.release_outputs()
        if number + PREFETCH < batches:
            pipe.schedule_run()


def decode_only(files: Sequence[Path], threads: int) -> Epoch:
    """Reads and fully decodes every file with simplejpeg (libjpeg-turbo) on threads; nothing is resized or kept."""
    import simplejpeg

    def decode(path: Path) -> int:
        return int(simplejpeg.decode_jpeg(path.read_bytes()).ndim == 3)

    def epoch() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(decode, files))

    return epoch


def main() -> None:
    """Time the peers on one folder."""
    import harness

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="class folders with JPEGs")
    parser.add_argument("--shards", type=Path, nargs="*", default=[], help="tar shards of the same pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    peers: dict[str, Epoch] = {
        "reference": reference_loader(flags.folder, flags.workers, flags.batch_size),
        "decode only": decode_only(pictures_of(flags.folder), flags.workers),
    }
    try:
        peers["DALI"] = dali_loader(flags.folder, flags.workers, flags.batch_size)
        if flags.shards:
            peers["DALI, shards"] = dali_shards_loader(flags.shards, flags.workers, flags.batch_size)
    except ModuleNotFoundError as problem:
        print(f"note: {problem}")
    case = harness.compare(peers, against="reference", rounds=flags.rounds)
    print(harness.table(harness.record("peers", {flags.folder.parent.name: case}, against="reference")))


if __name__ == "__main__":
    main()
