"""The eleven basic colors, and how a sprite takes one on and keeps its shading.

Basic color terms: Berlin & Kay 1969. The color space is OKLab (Ottosson 2020,
https://bottosson.github.io/posts/oklab/), in which equal steps look equal.
"""

import numpy as np
from numpy.typing import NDArray

# Values in sRGB, far apart from each other also after an image tokenizer.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 130, 20),
    "yellow": (250, 215, 40),
    "green": (45, 160, 60),
    "blue": (40, 95, 225),
    "purple": (135, 60, 190),
    "pink": (255, 130, 185),
    "brown": (130, 80, 40),
    "black": (35, 35, 38),
    "gray": (140, 142, 146),
    "white": (244, 244, 246),
}
# A sprite has its color if at least this fraction of it has.
MIN_COLORED = 0.45

Map = NDArray[np.float64]

_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def recolor(
    sprite: NDArray[np.uint8], color: str, weight: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Give a sprite, uint8 (height, width, 4) in RGBA, one of ``COLORS``; its outline stays.

    Light and shadow move along: they are differences of lightness from the sprite's median.
    ``weight``, (height, width), comes from ``colorable``.
    """
    values = sprite.astype(np.float64) / 255
    alpha, lab = values[..., 3], _to_oklab(values[..., :3])
    lightness = lab[..., 0]
    visible = (alpha > 0.5) & (weight > 0.5)
    median = float(np.median(lightness[visible])) if visible.any() else 0.6
    # 1. the new lightness, around that of the color
    target = _to_oklab(np.array(COLORS[color], dtype=np.float64) / 255)
    low, high = max(0.12, target[0] - 0.28), min(0.99, target[0] + 0.22)
    shaded = np.clip(target[0] + 0.75 * (lightness - median), low, high)
    # 2. less chroma towards black and white, where there is no room for it
    room = np.minimum(shaded / target[0], (1.05 - shaded) / (1.05 - target[0]))
    chroma = np.clip(room, 0.4, 1.1)
    colored = np.stack([shaded, target[1] * chroma, target[2] * chroma], axis=-1)
    mixed = lab + weight[..., None] * (colored - lab)
    result = np.concatenate([_to_srgb(mixed), alpha[..., None]], axis=-1)
    return np.rint(result * 255).astype(np.uint8)


def colorable(sprite: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Tell of each pixel of a sprite which fraction of it takes on a color: (height, width).

    White and dark parts (eyes, teeth, wheels) keep theirs where enough else can take one on.
    """
    values = sprite.astype(np.float64) / 255
    alpha, lab = values[..., 3], _to_oklab(values[..., :3])
    lightness, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    light = _ramp(lightness, 0.30, 0.42)

    def is_enough(weight: Map) -> bool:
        return float((weight * alpha).sum()) >= MIN_COLORED * float(alpha.sum())

    # What has a color; outlines that are nearly black have a trace of one.
    weight = _ramp(chroma, 0.02, 0.06) * _ramp(lightness, 0.22, 0.32)
    # Too little: also what is gray; then also what is white; then everything.
    for more in (light * (1 - _ramp(lightness, 0.86, 0.93)), light, np.ones_like(light)):
        if is_enough(weight):
            break
        weight = np.maximum(weight, more)
    return weight


def _ramp(values: Map, low: float, high: float) -> Map:
    """Rise smoothly from 0 at ``low`` to 1 at ``high``."""
    part = np.clip((values - low) / (high - low), 0.0, 1.0)
    ramp: Map = part * part * (3 - 2 * part)
    return ramp


def _to_oklab(srgb: Map) -> Map:
    """Convert sRGB in [0, 1] to OKLab: (..., 3) both."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lab: Map = np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T
    return lab


def _to_srgb(lab: Map) -> Map:
    """Convert OKLab to sRGB in [0, 1], clipped: (..., 3) both."""
    lms = (lab @ np.linalg.inv(_LMS_TO_LAB).T) ** 3
    linear = np.clip(lms @ np.linalg.inv(_RGB_TO_LMS).T, 0.0, 1.0)
    curve = 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    return np.clip(np.where(linear <= 0.0031308, 12.92 * linear, curve), 0.0, 1.0)
