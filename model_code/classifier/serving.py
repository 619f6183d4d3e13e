"""Preprocessing with numpy and Pillow: THE definition of what a network sees of a picture.

Preparation, training and evaluation use these functions too; nothing here may import torch.

Shapes: a decoded picture is ``(H, W, 3) uint8``; network input is ``(B, 3, S, S) float32``; logits are ``(B, classes) float32``.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageOps

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded; read from the header before any pixel is."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Pillow decoders that may run; all others stay closed to uploads."""
DRAFT_MARGIN = 2
"""A large JPEG is scaled while it is decoded, to no less than this many times the size needed: as Pillow's own thumbnails do
(``reducing_gap``), since the antialiased resize that follows then leaves no visible difference."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PictureError(ValueError):
    """A file that is not a picture we accept; the message says why."""


class PictureTooLargeError(PictureError):
    """More pixels than MAX_PIXELS."""


def default_resize_size(image_size: int) -> int:
    """Short side before the centre crop. The whole picture is used; chosen on the valid split (see docs)."""
    return image_size


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a picture before the network.

    Take the central square, resize it (bilinear, antialiased) to a side of ``resize_size``, take the central ``image_size`` of
    that, scale to 0..1, subtract ``mean`` and divide by ``std`` per channel.
    """

    image_size: int = 224
    resize_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def of(cls, image_size: int, resize_size: int = 0) -> Preprocessing:
        """The preprocessing for a network input of ``image_size``."""
        return cls(image_size, resize_size or default_resize_size(image_size))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocessing:
        """Read back what ``to_json`` wrote."""
        mean, std = (tuple(float(x) for x in values[name]) for name in ("mean", "std"))
        return cls(int(values["image_size"]), int(values["resize_size"]), mean, std)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """A JSON object for model.json and features.json."""
        return asdict(self)


def open_picture(source: bytes) -> Image.Image:
    """Read the header only. Raises PictureError for other formats, several frames, or too many pixels."""
    try:
        picture = Image.open(io.BytesIO(source), formats=FORMATS)
    except Image.DecompressionBombError as problem:
        raise PictureTooLargeError(str(problem)) from None
    except Exception as problem:  # decoders raise many kinds (OSError, SyntaxError, struct.error…)
        raise PictureError(f"not a picture in one of the formats {', '.join(FORMATS)}") from problem
    if picture.width * picture.height > MAX_PIXELS:
        raise PictureTooLargeError(f"{picture.width}x{picture.height} pixels are more than {MAX_PIXELS:,}")
    if _frames(picture) > 1:
        raise PictureError("animated or multi-page picture")
    return picture


def _frames(picture: Image.Image) -> int:
    """How many frames the file shows. Raises PictureError when its list of frames is damaged."""
    if picture.format == "MPO":
        return 1  # a telephone's JPEG with a preview or a depth map behind it; the first frame is the picture
    try:
        return int(getattr(picture, "n_frames", 1))
    except Exception as problem:
        raise PictureError(f"damaged picture ({type(problem).__name__}: {str(problem)[:100]})") from problem


def draft(picture: Image.Image, short_side: int) -> None:
    """Let libjpeg decode a JPEG at a half, a quarter or an eighth of its size, no smaller than DRAFT_MARGIN times ``short_side``.

    To be called before the pixels are read; smaller pictures and other formats are left alone.
    """
    if picture.format not in ("JPEG", "MPO"):
        return
    factor = DRAFT_MARGIN * short_side / min(picture.size)
    if factor <= 0.5:
        picture.draft(None, (round(picture.width * factor), round(picture.height * factor)))  # type: ignore[arg-type]


def decode(source: bytes, short_side: int = 0) -> Image.Image:
    """An upright RGB picture. Raises PictureError.

    With ``short_side``, the pixels to which it will be resized, a JPEG of at least four times as many comes smaller: see ``draft``.
    """
    picture = open_picture(source)
    try:
        if short_side:
            draft(picture, short_side)
        ImageOps.exif_transpose(picture, in_place=True)  # a copy would not know its format any more
        return to_rgb(picture)
    except Exception as problem:
        raise PictureError(f"damaged picture ({type(problem).__name__}: {str(problem)[:100]})") from problem


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB; transparent parts become white, 16-bit grey is scaled to 8 bits."""
    picture.load()  # some formats say only now that a colour is transparent
    if picture.mode.startswith("I") or picture.mode == "F":
        return _grey_to_rgb(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if picture.mode == "CMYK" and getattr(picture, "format", None) in ("JPEG", "MPO") and "adobe" not in picture.info:
        # Pillow inverts the inks of every CMYK JPEG, but only Adobe's programs store them inverted.
        return ImageChops.invert(picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _grey_to_rgb(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, whole or floating, as RGB."""
    values = np.asarray(picture, dtype=np.float32)
    largest = float(values.max(initial=0.0))
    if picture.mode.startswith("I;16"):
        scale = 255.0 / 65535.0  # also of a dark picture, whose values all are small
    elif picture.mode == "F" and largest <= 1.0:
        scale = 255.0  # floating point pictures are commonly 0 to 1
    else:
        scale = 255.0 / 65535.0 if largest > 255.0 else 1.0
    grey = np.clip(values * scale, 0, 255).astype(np.uint8)
    hidden = picture.info.get("transparency")
    if isinstance(hidden, int):
        grey[values == hidden] = 255
    return Image.fromarray(grey).convert("RGB")


def resize_short_side(picture: Image.Image, size: int) -> Image.Image:
    """Antialiased bilinear resize so that the short side is exactly ``size``."""
    width, height = picture.size
    short = min(width, height)
    if short == size:
        return picture
    # Very long pictures would otherwise grow without bound; only their centre is used.
    if max(width, height) > 8 * short:
        picture = _crop(picture, min(width, 8 * short), min(height, 8 * short))
        width, height = picture.size
    target = (max(size, round(width * size / short)), max(size, round(height * size / short)))
    return picture.resize(target, Image.Resampling.BILINEAR)


def _crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def to_square(picture: Image.Image, size: int) -> Pixels:
    """``(size, size, 3) uint8``: the central square, resized (bilinear, antialiased). What training caches."""
    short = min(picture.size)
    if short == size:
        return np.array(_crop(picture, size, size), dtype=np.uint8)
    left, top = ((length - short) / 2 for length in picture.size)
    # Only what is kept is resized: of 5:4 that is a quarter less work than resizing the whole and cutting then.
    square = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
    return np.array(square, dtype=np.uint8)


def centre(pictures: Pixels, size: int) -> Pixels:
    """The central ``size`` x ``size`` of ``(..., H, W, 3)``."""
    top, left = (pictures.shape[-3] - size) // 2, (pictures.shape[-2] - size) // 2
    return pictures[..., top : top + size, left : left + size, :]


def normalise(pixels: Pixels, preprocessing: Preprocessing) -> Floats:
    """``(B, S, S, 3) uint8`` to contiguous ``(B, 3, S, S) float32``."""
    batch, height, width, channels = pixels.shape
    found = np.empty((batch, channels, height, width), dtype=np.float32)
    for channel in range(channels):  # straight to its place: four times as fast as transposing afterwards
        plane = found[:, channel]
        np.subtract(pixels[..., channel], np.float32(preprocessing.mean[channel]) * np.float32(255.0), out=plane, dtype=np.float32)
        plane /= np.float32(preprocessing.std[channel]) * np.float32(255.0)
    return found


def preprocess(picture: Image.Image, preprocessing: Preprocessing) -> Floats:
    """One decoded picture to ``(1, 3, S, S) float32``."""
    square = centre(to_square(picture, preprocessing.resize_size), preprocessing.image_size)
    return normalise(square[None], preprocessing)


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Probabilities along the last axis, of ``logits / temperature``."""
    scaled = logits / np.float32(temperature)
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    exponent = np.exp(scaled)
    return np.asarray(exponent / exponent.sum(axis=-1, keepdims=True), dtype=np.float32)


def top_k(probabilities: Floats, labels: list[str], k: int) -> list[dict[str, Any]]:
    """The ``k`` likeliest labels, sorted."""
    order = np.argsort(-probabilities, kind="stable")[: max(1, min(k, len(labels)))]
    return [{"label": labels[index], "probability": round(float(probabilities[index]), 6)} for index in order]
