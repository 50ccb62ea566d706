"""Read an image of a scene back, by analysis and synthesis.

The checker sees pixels only. It finds the background that explains most pixels; what it does not
explain, where it hangs together, is an object; an object is the thing, in the color, whose sprite
in its place explains its pixels best, of all things in all colors. Blur and noise of a decoded
image are tolerated, and smudges below ``MIN_AREA`` ignored, but everything else counts: what no
sprite explains is an object too, an "unknown" one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dalle_mini_impl.builtin_datasets.scenes.colors import COLORS, recolor
from dalle_mini_impl.builtin_datasets.scenes.scene import (
    MIN_IMAGE_SIZE,
    Background,
    SceneObject,
    all_backgrounds,
)
from dalle_mini_impl.builtin_datasets.scenes.things import color_weights, load_sprites, render_thing
from dalle_mini_impl.errors import UserError

# Smallest area of an object, as a fraction of the image: a fifth of the smallest thing's box.
MIN_AREA = 0.008
# A pixel is no background if it differs by this much from it, in RGB of [0, 1].
MIN_CONTRAST = 0.18
# A sprite is recognized if it leaves at most this fraction of an object's contrast unexplained.
MAX_UNEXPLAINED = 0.5
# Above this fraction, several sprites are tried.
_WELL_EXPLAINED = 0.15

_SIDE = 64  # every image is read at this size
_BOX = 16  # side of the templates that are compared first
_SPRITE = 32  # longer side of the sprites that they are made of
_NUM_REFINED = 8
# Parts of one thing are at most so many pixels apart.
_REACH = 12
# More regions than this are not compared with sprites; no scene has so many.
_MAX_REGIONS = 8

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SceneReading:
    """What an image holds."""

    objects: tuple[SceneObject, ...]
    background: Background


def read_scene(
    image: Image.Image, *, style: str = "twemoji", npm_dir: Path | None = None
) -> SceneReading:
    """Find the background and the things of a square image of 32 pixels or more; else UserError."""
    pixels = _to_pixels(image)
    # 1. the background that explains most of the image
    background, behind = _find_background(pixels)
    reader = _Reader(pixels, behind, _sprites(style, npm_dir))
    foreground = reader.contrast >= MIN_CONTRAST**2
    fits: list[_Fit] = []
    # 2. what it does not explain, where it hangs together; parts that nearly touch are one
    regions = _find_regions(foreground, gap=1)
    for region in regions[:_MAX_REGIONS]:
        # 3. the sprite that explains it, or one for each part where these explain it better
        fit = reader.fit(region)
        parts = [fit]
        if fit.unexplained > _WELL_EXPLAINED:
            parts = [reader.fit(part) for part in _find_regions(region, gap=0)]
        fits += parts if parts and _mean_unexplained(parts) < fit.unexplained else [fit]
    # 4. parts of one thing, apart since something between them has the background's color
    fragments = foreground & ~np.any([np.zeros_like(foreground), *regions], axis=0)
    fits = reader.join([reader.with_fragments(fit, fragments) for fit in fits])
    unread = [_unknown(region) for region in regions[_MAX_REGIONS:]]
    return SceneReading((*(fit.item for fit in fits), *unread), background)


def _to_pixels(image: Image.Image) -> Pixels:
    width, height = image.size
    if width != height or width < MIN_IMAGE_SIZE:
        raise UserError(
            f"image: got {width} x {height}, expected a square of {MIN_IMAGE_SIZE} or more"
        )
    resampling = Image.Resampling.BOX if width > _SIDE else Image.Resampling.BICUBIC
    small = image.convert("RGB").resize((_SIDE, _SIDE), resampling)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


@cache
def _rendered_backgrounds() -> Pixels:
    return np.stack([background.render(_SIDE)[:, 0] for background in all_backgrounds()])


def _find_background(pixels: Pixels) -> tuple[Background, Pixels]:
    """Choose the background that explains most pixels, and those well; and render it."""
    columns = _rendered_backgrounds()  # (backgrounds, height, 3): all are alike along a row
    errors = ((pixels[None] - columns[:, :, None]) ** 2).sum(-1)  # (backgrounds, height, width)
    explained = np.exp(-errors / (2 * 0.05**2)).mean((1, 2))
    best = int(explained.argmax())
    behind = np.repeat(columns[best][:, None], _SIDE, axis=1)
    return all_backgrounds()[best], behind


def _find_regions(foreground: Mask, *, gap: int) -> list[Mask]:
    """List the regions that are large enough; parts up to 2 * ``gap`` pixels apart are one."""
    near = (
        ndimage.binary_dilation(foreground, np.ones((3, 3)), iterations=gap) if gap else foreground
    )
    labels, count = ndimage.label(near, np.ones((3, 3)))
    regions = [foreground & (labels == label) for label in range(1, count + 1)]
    large = [region for region in regions if region.sum() >= MIN_AREA * region.size]
    return sorted(large, key=lambda region: -int(region.sum()))


def _box_of(region: Mask) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _unknown(region: Mask) -> SceneObject:
    left, top, right, bottom = (edge / _SIDE for edge in _box_of(region))
    center = ((left + right) / 2, (top + bottom) / 2)
    return SceneObject("unknown", "unknown", center, max(right - left, bottom - top))


@dataclass(frozen=True)
class _Sprites:
    """All things in all colors, small."""

    style: str
    npm_dir: Path | None
    names: list[tuple[str, str]]
    """(thing, color)."""
    images: list[Image.Image]
    """Premultiplied RGBA; the longer side is ``_SPRITE``."""
    pixels: NDArray[np.uint8]
    """The same, not premultiplied, each in the top left of a square: (sprites, side, side, 4)."""


@dataclass(frozen=True)
class _Templates:
    """What can be seen of each sprite before a color, stretched to a square of ``_BOX`` pixels."""

    alpha: Pixels
    """(sprites, pixels)"""
    colors: Pixels
    """Premultiplied: (sprites, pixels * 3)"""
    power: Pixels
    """Sum of alpha times the squared color: (sprites,)"""
    boxes: Pixels
    """Left, top, right, bottom of what can be seen, in longer sides of the sprite, from its middle:
    (sprites, 4)."""


@cache
def _sprites(style: str, npm_dir: Path | None) -> _Sprites:
    names, images, squares = [], [], []
    for thing, sprite in load_sprites(style, npm_dir).items():
        scale = _SPRITE / max(sprite.size)
        size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
        pixels = np.asarray(sprite.resize(size, Image.Resampling.BOX))
        # Shrunk like the sprite: a small one might be colored by another rule.
        weights = Image.fromarray(color_weights(style, npm_dir, thing).astype(np.float32))
        weight = np.asarray(weights.resize(size, Image.Resampling.BOX), dtype=np.float64)
        for color in COLORS:
            colored = recolor(pixels, color, weight)
            names.append((thing, color))
            # or hidden colors would bleed in when it is resized
            images.append(Image.fromarray(colored).convert("RGBa"))
            squares.append(np.zeros((_SPRITE, _SPRITE, 4), dtype=np.uint8))
            squares[-1][: size[1], : size[0]] = colored
    return _Sprites(style, npm_dir, names, images, np.stack(squares))


@lru_cache(maxsize=24)  # as many as there are plain backgrounds, skies and grounds
def _templates(style: str, npm_dir: Path | None, back: tuple[float, ...] | None) -> _Templates:
    """Make the templates for a plain background, or for any (None)."""
    sprites = _sprites(style, npm_dir)
    edges = _visible_boxes(sprites, back)
    squares = [
        image.resize((_BOX, _BOX), Image.Resampling.BOX, tuple(box)).tobytes()
        for image, box in zip(sprites.images, edges.tolist(), strict=True)
    ]
    middles = np.array([(image.width / 2, image.height / 2) * 2 for image in sprites.images])
    boxes = ((edges - middles) / _SPRITE).astype(np.float32)
    flat = np.frombuffer(b"".join(squares), np.uint8).reshape(len(squares), -1, 4)
    bank = flat.astype(np.float32) / np.float32(255)
    alpha, colors = bank[..., 3], bank[..., :3]
    power = (colors**2 / np.maximum(alpha, 1e-3)[..., None]).sum((1, 2))
    return _Templates(alpha, colors.reshape(len(bank), -1), power, boxes)


def _visible_boxes(sprites: _Sprites, back: tuple[float, ...] | None) -> NDArray[np.int64]:
    """Box what can be seen of each sprite before a color: left, top, right, bottom."""
    pixels = sprites.pixels.astype(np.float32) / np.float32(255)
    visible = pixels[..., 3]
    if back is not None:
        visible = visible * np.sqrt(
            ((pixels[..., :3] - np.array(back, dtype=np.float32)) ** 2).sum(-1)
        )
    seen = visible >= MIN_CONTRAST
    # the whole sprite where nothing of it can be seen
    seen |= ~seen.any((1, 2), keepdims=True) & (sprites.pixels[..., 3] > 0)
    edges = []
    for axis in (1, 2):  # columns, then rows
        is_in = seen.any(axis)
        edges.append((is_in.argmax(1), _SPRITE - is_in[:, ::-1].argmax(1)))
    (left, right), (top, bottom) = edges
    return np.stack([left, top, right, bottom], axis=1)


@dataclass(frozen=True, eq=False)
class _Fit:
    """The sprite that explains a region best."""

    region: Mask
    item: SceneObject
    unexplained: float
    """Fraction of the region's contrast."""
    contrast: float


def _mean_unexplained(fits: Sequence[_Fit]) -> float:
    total = sum(fit.contrast for fit in fits)
    return sum(fit.unexplained * fit.contrast for fit in fits) / total


class _Reader:
    """Explains regions of one image by sprites."""

    def __init__(self, pixels: Pixels, behind: Pixels, sprites: _Sprites) -> None:
        self.pixels, self.behind, self.sprites = pixels, behind, sprites
        self.contrast: Pixels = ((pixels - behind) ** 2).sum(-1)

    def fit(self, region: Mask) -> _Fit:
        """Name the thing and the color of a region, and measure its box."""
        left, top, right, bottom = _box_of(region)
        # 1. compare the box with all sprites, stretched to it
        box = (slice(top, bottom), slice(left, right))
        templates = _templates(self.sprites.style, self.sprites.npm_dir, self._plain(top, bottom))
        errors = self._compare_with_all(box, templates)
        size = templates.boxes[:, 2:] - templates.boxes[:, :2]
        aspect = np.log(size[:, 0] / size[:, 1]) - np.log((right - left) / (bottom - top))
        # a sprite of another shape would be stretched
        errors *= 1 + 2 * np.abs(aspect)
        # 2. render the likeliest in their true shape, and try places and sizes around the box
        scale = np.sqrt((right - left) * (bottom - top) / size.prod(1))
        middle = (templates.boxes[:, 2:] + templates.boxes[:, :2]) / 2
        window, fits = _around(region), []
        for index in np.argsort(errors)[:_NUM_REFINED].tolist():
            x = (left + right) / 2 - float(scale[index] * middle[index, 0])
            y = (top + bottom) / 2 - float(scale[index] * middle[index, 1])
            fits.append((*self._place(window, index, (x, y, float(scale[index]))), index))
        fits = sorted(fits)[:3]
        fits = [(*self._place(window, index, place), index) for _, place, index in fits]
        error, (x, y, side), index = min(fits)
        contrast = float(self.contrast[window].sum())
        thing, color = self.sprites.names[index]
        item = SceneObject(thing, color, (x / _SIDE, y / _SIDE), side / _SIDE)
        if error > MAX_UNEXPLAINED * contrast:
            item = _unknown(region)
        return _Fit(region, item, error / contrast, contrast)

    def with_fragments(self, fit: _Fit, fragments: Mask) -> _Fit:
        """Add fragments that are no region of their own, where a sprite then explains more."""
        if fit.unexplained <= _WELL_EXPLAINED:
            return fit
        near = ndimage.binary_dilation(fit.region, np.ones((3, 3)), iterations=_REACH)
        small = fragments & near
        joint = self.fit(fit.region | small) if small.any() else fit
        return joint if joint.unexplained < fit.unexplained else fit

    def join(self, fits: Sequence[_Fit]) -> list[_Fit]:
        """Put neighbors together where one sprite explains both better than two do."""
        kept: list[_Fit] = []
        # From the largest on; what was put together is compared with the others again.
        waiting = sorted(fits, key=lambda fit: fit.contrast)
        while waiting:
            fit = waiting.pop()
            joint, other = self._best_joint(fit, kept)
            if joint is None:
                kept.append(fit)
            else:
                kept = [each for each in kept if each is not other]
                waiting.append(joint)
        return kept

    def _best_joint(
        self, fit: _Fit, others: Sequence[_Fit]
    ) -> tuple[_Fit, _Fit] | tuple[None, None]:
        """Find a neighbor that one sprite explains together with a region, and that fit."""
        near = ndimage.binary_dilation(fit.region, np.ones((3, 3)), iterations=_REACH)
        for other in others:
            poorly = max(fit.unexplained, other.unexplained) > _WELL_EXPLAINED
            if poorly and (near & other.region).any():
                joint = self.fit(fit.region | other.region)
                if joint.unexplained < min(MAX_UNEXPLAINED, _mean_unexplained([fit, other])):
                    return joint, other
        return None, None

    def _plain(self, top: int, bottom: int) -> tuple[float, ...] | None:
        """Name the color behind most of some rows; None for a gradient."""
        colors, counts = np.unique(self.behind[top:bottom, 0], axis=0, return_counts=True)
        if counts.max() < 0.4 * (bottom - top):
            return None
        return tuple(colors[counts.argmax()].tolist())

    def _compare_with_all(self, box: tuple[slice, slice], templates: _Templates) -> Pixels:
        """Squared error of each sprite before the background, stretched to the box: (sprites,)."""
        seen, back = _stretch(self.pixels[box]), _stretch(self.behind[box])
        # sum of alpha |seen - color|^2 + (1 - alpha) |seen - back|^2
        inside = templates.alpha @ (seen**2).sum(-1) + templates.power
        inside -= 2 * templates.colors @ seen.reshape(-1)
        errors: Pixels = inside + (1 - templates.alpha) @ ((seen - back) ** 2).sum(-1)
        return errors

    def _place(
        self, window: Mask, index: int, start: tuple[float, float, float]
    ) -> tuple[float, tuple[float, float, float]]:
        """Find the place and size, near (x, y, side), at which a sprite explains a window best.

        Returns the squared error, and (x, y, side) in pixels.
        """
        thing, color = self.sprites.names[index]
        outside = float(self.contrast[window].sum())
        best = (float("inf"), start)
        for side in {max(4, round(start[2]) + change) for change in (-1, 0, 1)}:
            sprite = render_thing(
                thing, color, side, style=self.sprites.style, npm_dir=self.sprites.npm_dir
            )
            height, width = sprite.shape[:2]
            places = {
                (round(start[0] + dx - width / 2), round(start[1] + dy - height / 2))
                for dx in (-1, 0, 1)
                for dy in (-1, 0, 1)
            }
            for left, top in places:
                x0, y0 = max(left, 0), max(top, 0)
                box = (slice(y0, max(top + height, 0)), slice(x0, max(left + width, 0)))
                seen = self.pixels[box]
                part = sprite[y0 - top :, x0 - left :][: len(seen), : seen.shape[1]]
                made = self.behind[box] * (1 - part[..., 3:]) + part[..., :3]
                # what the sprite changes, in and out of the window
                inside = window[box]
                missed = (seen - made) * inside[..., None]
                error = outside - float(self.contrast[box][inside].sum())
                # a sprite that reaches beyond the region is no explanation of it
                beyond = (made - self.behind[box]) * ~inside[..., None]
                error += float(np.vdot(missed, missed) + np.vdot(beyond, beyond))
                best = min(best, (error, (left + width / 2, top + height / 2, float(side))))
        return best


def _stretch(pixels: Pixels) -> Pixels:
    """Resize (height, width, 3) to a square of ``_BOX`` pixels: (pixels, 3)."""
    bytes_of = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    square = bytes_of.resize((_BOX, _BOX), Image.Resampling.BOX)
    return (np.asarray(square, dtype=np.float32) / np.float32(255)).reshape(-1, 3)


def _around(region: Mask) -> Mask:
    """Mark the region and two pixels around it."""
    grown: Mask = ndimage.binary_dilation(region, np.ones((3, 3)), iterations=2)
    return grown
