"""Where in the picture the model saw a class: a heat map over what the network was given.

Class activation map (Zhou et al., 2016, arXiv:1512.04150) for networks that end in global average pooling and a linear layer: the
feature map weighted with the class's row of that layer. Occlusion (Zeiler and Fergus, 2014, arXiv:1311.2901) for all others: how
much the class loses when a part of the picture is hidden.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from classifier.serving import Floats, Pixels

GRID = 7
"""Places along a side where occlusion hides a window; windows are two places wide, so that neighbours overlap."""
SHOWN_PX = 448
"""Side of the answer; smaller squares are enlarged to it."""
OPACITY = 0.6
# Dark to light like matplotlib's "inferno" (CC0), five of its colours: it is read right in grey and by the colour-blind.
_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float32)


def activation_map(features: Floats, weights: Floats) -> Floats:
    """``(D, H, W)`` and one class's ``(D,)`` to ``(H, W)`` in 0..1: what speaks for the class."""
    return _scaled(np.maximum(np.tensordot(weights, features, axes=1), 0))


def occlusion_map(batch: Floats, label: int, probabilities: Callable[[Floats], Floats]) -> Floats:
    """``(1, 3, S, S)`` to ``(GRID, GRID)`` in 0..1; ``probabilities`` maps ``(B, 3, S, S)`` to ``(B, C)``."""
    size = batch.shape[-1]
    step = size / GRID
    hidden = np.repeat(batch, GRID * GRID, axis=0)
    for place in range(GRID * GRID):
        top, left = (round((index - 0.5) * step) for index in divmod(place, GRID))
        # 0 is the mean colour after normalisation.
        hidden[place, :, max(0, top) : top + round(2 * step), max(0, left) : left + round(2 * step)] = 0
    lost = probabilities(batch)[0, label] - probabilities(hidden)[:, label]
    return _scaled(np.maximum(lost, 0).reshape(GRID, GRID))


def _scaled(heat: Floats) -> Floats:
    most = float(heat.max(initial=0.0))
    return np.asarray(heat / most if most > 0 else heat, dtype=np.float32)


def overlay(square: Pixels, heat: Floats) -> bytes:
    """The square ``(S, S, 3) uint8`` with the heat map ``(H, W)`` over it, as PNG."""
    side = max(SHOWN_PX, square.shape[0])
    picture = Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR)
    smooth = np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(smooth, steps, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    alpha = (OPACITY * smooth)[..., None]
    blended = np.asarray(picture, dtype=np.float32) * (1 - alpha) + colours * alpha
    out = io.BytesIO()
    Image.fromarray(blended.round().astype(np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()
