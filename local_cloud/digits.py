"""Real handwriting to train on without a download: scikit-learn's digits as PNG files in class folders.

1,797 pictures of 8×8 grey pixels by 43 writers (Alpaydin and Kaynak, 1998, https://archive.ics.uci.edu/dataset/80), enlarged to
32×32 with bicubic interpolation. The split is seeded and stratified: 70 % train, 15 % valid, 15 % test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE_PX = 32
SPLITS = {"train": 0.70, "valid": 0.15, "test": 0.15}


def write_digits(folder: Path, seed: int = 0) -> Path:
    """Write ``<folder>/<split>/<digit>/<n>.png`` and return ``folder``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    for label in range(10):
        chosen = [int(i) for i in order if digits.target[i] == label]
        for split, numbers in _split(chosen).items():
            target = folder / split / str(label)
            target.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                _picture(digits.images[number]).save(target / f"{number:04d}.png")
    return folder


def _split(numbers: list[int]) -> dict[str, list[int]]:
    train_end = round(len(numbers) * SPLITS["train"])
    valid_end = train_end + round(len(numbers) * SPLITS["valid"])
    return {"train": numbers[:train_end], "valid": numbers[train_end:valid_end], "test": numbers[valid_end:]}


def _picture(pixels: np.ndarray) -> Image.Image:
    """``pixels``: (8, 8) float, 0 (paper) to 16 (ink) → a grey picture of 32×32, ink white on black as in the source."""
    grey = Image.fromarray((pixels * 255 / 16).astype(np.uint8), mode="L")
    return grey.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
