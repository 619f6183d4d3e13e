"""Source pictures for the benchmarks: JPEGs of one size, quality 90, 4:2:0, in class folders, kept under build/bench/.

How long a JPEG takes to decode follows from its pixels and its bits, so the bits must be those of photographs: 1.2 to 2 a pixel
at this quality. Pictures of dogs-120 under $REAL_DATA are enlarged, sharpened, and given the grain that enlarging takes away;
without them, noise with the spectrum of natural scenes (amplitude about 1/f) does. `python bench/samples.py --size 500x400`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
QUALITY = 90
CLASSES = 10
GRAIN = 1.5
"""Standard deviation of the grain in grey levels: 2.0 bits a pixel at 500x400 and 1.3 at 1000x800."""

Size = tuple[int, int]
"""Width and height in pixels."""


def real_data() -> Path:
    """$REAL_DATA, by default the folder shared/ beside the checkout."""
    return Path(os.environ.get("REAL_DATA") or ROOT.parent / "shared")


def photographs() -> list[Path]:
    """The pictures of dogs-120, or none."""
    return sorted((real_data() / "data" / "dogs-120").glob("train/*/*.jpg"))


def make(size: Size, count: int, *, out: Path = BUILD, sources: list[Path] | None = None) -> Path:
    """A folder ``class_<n>/<number>.jpg`` with ``count`` pictures, made once; made.json beside that folder says how."""
    found = photographs() if sources is None else sources
    kind = "photographs" if found else "noise"
    home = out / f"{size[0]}x{size[1]}-{count}-{kind}"
    if not (home / "made.json").is_file():
        shutil.rmtree(home, ignore_errors=True)
        for label in range(min(CLASSES, count)):
            (home / "pictures" / f"class_{label}").mkdir(parents=True)
        files = [home / "pictures" / f"class_{number % CLASSES}" / f"{number:05d}.jpg" for number in range(count)]
        used: list[Path | None] = list(islice(cycle(found), count)) if found else [None] * count
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: _write(*item, size), zip(range(count), files, used, strict=True)))
        bits = 8 * sum(file.stat().st_size for file in files) / (count * size[0] * size[1])
        facts = {"kind": kind, "pictures": count, "size": size, "quality": QUALITY, "bits_per_pixel": round(bits, 3)}
        (home / "made.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return home / "pictures"


def _write(number: int, path: Path, source: Path | None, size: Size) -> None:
    random = np.random.default_rng(number)
    picture = enlarged(source, size, random) if source else fractal(size, random)
    picture.save(path, "JPEG", quality=QUALITY, subsampling="4:2:0")


def enlarged(source: Path, size: Size, random: np.random.Generator) -> Image.Image:
    """A photograph at ``size`` with the fine detail that a camera's picture of that size would have."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    picture = picture.filter(ImageFilter.UnsharpMask(radius=1.5, percent=60, threshold=0))
    grain = random.normal(0.0, GRAIN, (size[1], size[0], 1)).astype(np.float32)
    return Image.fromarray(np.clip(np.asarray(picture, dtype=np.float32) + grain, 0, 255).astype(np.uint8))


def fractal(size: Size, random: np.random.Generator) -> Image.Image:
    """Noise with amplitude 1/f**1.5 (luminance) and 1/f**1.8 (colour): natural scenes have 1/f to 1/f**1.5."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0

    def noise(power: float, deviation: float) -> np.ndarray:
        spectrum = np.fft.rfft2(random.normal(size=(height, width))) / frequency**power
        spectrum[0, 0] = 0.0
        values = np.fft.irfft2(spectrum, s=(height, width))
        return values * (deviation / values.std())

    planes = [128 + noise(1.5, 45.0), 128 + noise(1.8, 16.0), 128 + noise(1.8, 16.0)]
    bands = [Image.fromarray(np.clip(plane, 0, 255).astype(np.uint8)) for plane in planes]
    return Image.merge("YCbCr", bands).convert("RGB")


def parse_size(text: str) -> Size:
    """``500x400``."""
    try:
        width, height = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give width and height, such as 500x400") from None
    return width, height


def main() -> None:
    """Make the pictures and print where they lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, nargs="+", default=[(500, 400), (1000, 800)])
    parser.add_argument("--count", type=int, default=512)
    flags = parser.parse_args()
    for size in flags.size:
        folder = make(size, flags.count)
        print(folder.relative_to(ROOT), (folder.parent / "made.json").read_text(encoding="utf-8").strip())


if __name__ == "__main__":
    main()
