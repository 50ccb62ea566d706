"""Read an image of a scene back: find its objects by analysis and by comparison with templates.

The checker sees pixels only. A pixel is explained as white mixed with one palette color; equal
colors that touch are one object; its shape is the template it overlaps best; its center and size
are the center and the amount of its area. Noise and blur of a decoded image are tolerated and
smudges below ``MIN_AREA`` ignored, but everything else counts: a blob of no known shape or color is
an object too, an "unknown" one.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dalle_mini_impl.builtin_datasets.shapes.scene import (
    BACKGROUND,
    COLORS,
    MIN_IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    ShapeObject,
    render_scene,
)
from dalle_mini_impl.errors import UserError

# Smallest area of an object, as a fraction of the image: a fifth of the smallest shape's.
MIN_AREA = 0.006
# A pixel belongs to an object if at least this fraction of it is not background.
MIN_COVERAGE = 0.4
# Fainter pixels count as ink, of unknown color, if they are this far from white (0 to 441).
MIN_CONTRAST = 80.0
# A color is recognized if its object has at least this fraction that is not white.
MIN_STRENGTH = 0.6
# And if it is off the mix of white and palette color by no more than this (0 to 441).
MAX_COLOR_ERROR = 60.0
# Least intersection over union with a template for a shape to be recognized.
MIN_OVERLAP = 0.75
# An object is of no known shape or size if this much smaller or larger than those of the world.
MAX_SIZE_RATIO = 1.35

_SIDE = MIN_IMAGE_SIZE  # every image is read at this size
_FAINT = len(COLORS)
_TEMPLATE_SIZE = 20
_TEMPLATE_REACH = 1.75  # half the side of a template, in radii of the disc of the same area

Map = NDArray[np.float64]


def read_objects(image: Image.Image | NDArray[np.uint8]) -> tuple[ShapeObject, ...]:
    """Find the objects of an image, in reading order of their topmost pixels.

    ``image`` is square: from Pillow, or uint8 (height, width, 3); its side is at least 32 pixels.
    Raises UserError otherwise.
    """
    # 1. which color explains each pixel, and how much of it
    pixels = _to_pixels(image)
    colors, coverage = _explain_pixels(pixels)
    # 2. equal colors that touch are one object
    labels, count = _label_regions(colors)
    objects = []
    # 3. read each object that is large enough
    for label in range(1, count + 1):
        region = labels == label
        if region.sum() >= MIN_AREA * region.size:
            # Its anti-aliased edge, but no pixel of a neighbor.
            mine = coverage * (_grow(region) & ((labels == 0) | region))
            core = _find_core(coverage[region])
            strength = float(np.median(coverage[region][core]))
            color = _read_color(pixels[region][core], strength, int(colors[region][0]))
            objects.append(_read_object(np.minimum(mine / strength, 1), color))
    return tuple(objects)


def _to_pixels(image: Image.Image | NDArray[np.uint8]) -> Map:
    """Check an image and shrink it to the size of the templates: (32, 32, 3), 0 to 255."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                f"image: got {image.dtype} of shape {image.shape}, "
                "expected uint8 (height, width, 3)"
            )
        image = Image.fromarray(image)
    width, height = image.size
    if width != height or width < MIN_IMAGE_SIZE:
        raise UserError(
            f"image: got {width} x {height}, expected a square of {MIN_IMAGE_SIZE} or more"
        )
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def _explain_pixels(pixels: Map) -> tuple[NDArray[np.int64], Map]:
    """Explain each pixel, (height, width, 3), as background mixed with the best palette color.

    Returns the index of the palette color, ``_FAINT`` for ink that is none, -1 for background; and
    the fraction of the color in the mix.
    """
    background = np.array(BACKGROUND, dtype=np.float64)
    inks = background - np.array(list(COLORS.values()), dtype=np.float64)  # (colors, 3)
    delta = background - pixels
    # Least squares: the fraction f that minimizes |delta - f * ink|^2, for each ink.
    dots = delta @ inks.T  # (height, width, colors)
    norms = (inks**2).sum(1)
    fractions = np.clip(dots / norms, 0.0, 1.0)
    errors = fractions**2 * norms - 2 * fractions * dots  # up to a term that all colors share
    best = errors.argmin(-1)
    coverage = np.take_along_axis(fractions, best[..., None], -1)[..., 0]
    # Neighbors vote, weighted by coverage: noise must not tear an object into two colors.
    votes = np.where(
        best[..., None] == np.arange(len(inks)), coverage[..., None], 0
    )  # of each color
    colors = _box_sum(votes).argmax(-1)
    ink = coverage >= MIN_COVERAGE
    # Beside other ink, a faint pixel is an edge.
    faint = ((delta**2).sum(-1) >= MIN_CONTRAST**2) & ~_grow(ink)
    return np.where(ink, colors, np.where(faint, _FAINT, -1)), coverage


def _box_sum(values: Map) -> Map:
    """Sum over 3 x 3 neighborhoods of (height, width, channels)."""
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    total: Map = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return total


def _grow(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Add the eight neighbors of a region, which hold the rest of its anti-aliased edge."""
    return _box_sum(region[..., None].astype(np.float64))[..., 0] > 0


def _label_regions(colors: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Number the connected regions (eight neighbors) of equal color from 1; background is 0."""
    padded = np.pad(colors, 1, constant_values=-1)
    width = padded.shape[1]
    flat = padded.ravel().tolist()  # lists are faster than arrays for single pixels
    labels = [0] * len(flat)
    # Offsets of the eight neighbors in the flat array; the padding of one pixel stops them.
    steps = (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1)
    count = 0
    # Flood fill from every pixel that has no label yet.
    for start in np.flatnonzero(padded >= 0).tolist():
        if labels[start]:
            continue
        count += 1
        labels[start] = count
        stack = [start]
        while stack:
            here = stack.pop()
            for step in steps:
                there = here + step
                if not labels[there] and flat[there] == flat[start]:
                    labels[there] = count
                    stack.append(there)
    return np.array(labels).reshape(width, width)[1:-1, 1:-1], count


def _find_core(coverage: Map) -> NDArray[np.int64]:
    """Choose the third of a region's pixels (coverage: (count,)) that ink covers most."""
    return np.argsort(coverage)[-max(4, len(coverage) // 3) :]


def _read_color(pixels: Map, strength: float, color: int) -> str:
    """Name the color of a region's core pixels (count, 3), "unknown" unless close to it.

    ``strength`` is the fraction of ink in them, ``color`` the palette color that explains them
    best.
    """
    if color == _FAINT or strength < MIN_STRENGTH:
        return "unknown"
    name, rgb = list(COLORS.items())[color]
    # A washed-out color is compared with the equally washed-out palette color.
    mix = np.array(BACKGROUND) + strength * (np.array(rgb) - np.array(BACKGROUND))
    return name if math.dist(np.median(pixels, axis=0), mix) <= MAX_COLOR_ERROR else "unknown"


def _read_object(coverage: Map, color: str) -> ShapeObject:
    """Read shape, size and center from the coverage map of one object."""
    x, y, area = _moments(coverage)
    view = _normalize(coverage, x, y, area)
    names, templates, unit_areas = _templates()
    # Soft intersection over union with every template: (templates,)
    overlaps = np.minimum(view, templates).sum(1) / np.maximum(view, templates).sum(1)
    best = int(overlaps.argmax())
    # The area of the object against that of its template of radius 1.
    radius = math.sqrt(area / unit_areas[best]) / _SIDE
    nearest = min(SIZES, key=lambda name: abs(math.log(radius / SIZES[name])))
    # Between the sizes of the world, and not much beyond: a dot or a wall is no shape.
    in_range = 1 / MAX_SIZE_RATIO < radius / SIZES[nearest] < MAX_SIZE_RATIO
    shape = names[best] if in_range and overlaps[best] >= MIN_OVERLAP else "unknown"
    size = nearest if in_range else "unknown"
    return ShapeObject(shape, color, size, (x / _SIDE, y / _SIDE), radius)


def _moments(coverage: Map) -> tuple[float, float, float]:
    """Compute center x and y, and area, of a coverage map in pixels."""
    area = float(coverage.sum())
    # Pixel i covers [i, i + 1).
    middle = np.arange(len(coverage)) + 0.5
    return float(coverage.sum(0) @ middle) / area, float(coverage.sum(1) @ middle) / area, area


def _normalize(coverage: Map, x: float, y: float, area: float) -> Map:
    """Sample an object, moved to the origin and scaled to equal area, as a flat template."""
    # The disc of the same area sets the scale, so that every shape fills its template alike.
    reach = _TEMPLATE_REACH * math.sqrt(area / math.pi)
    offsets = ((np.arange(_TEMPLATE_SIZE) + 0.5) / _TEMPLATE_SIZE * 2 - 1) * reach
    rows = _interpolation(y + offsets, len(coverage))
    columns = _interpolation(x + offsets, len(coverage))
    view: Map = rows @ coverage @ columns.T
    return view.ravel()


def _interpolation(points: Map, side: int) -> Map:
    """Compute weights (points, side) that interpolate between pixel centers; outside is zero."""
    distances = np.abs(points[:, None] - (np.arange(side) + 0.5))
    weights: Map = np.maximum(0, 1 - distances)
    return weights


@cache
def _templates() -> tuple[tuple[str, ...], Map, Map]:
    """Draw every shape in every size, sharp and blurred, each the mean over sub-pixel shifts.

    Returns the shape of each template, the templates (count, pixels), and the area of each for a
    radius of 1.
    """
    names, views, unit_areas = [], [], []
    for shape in SHAPES:
        for size in SIZES.values():
            for blur in (0.0, 0.6, 1.0):
                # A shape between two pixels looks otherwise than one on a pixel: take the mean.
                shifted = []
                for shift in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
                    coverage = _render_template(shape, size, shift, blur)
                    shifted.append(_normalize(coverage, *_moments(coverage)))
                names.append(shape)
                views.append(np.mean(shifted, axis=0))
                unit_areas.append(float(coverage.mean()) / size**2)
    return tuple(names), np.stack(views), np.array(unit_areas)


def _render_template(shape: str, radius: float, shift: tuple[float, float], blur: float) -> Map:
    """Draw the coverage map of one object; shift and blur are in pixels."""
    center = (0.5 + shift[0] / _SIDE, 0.5 + shift[1] / _SIDE)
    item = ShapeObject(shape, "black", "unknown", center, radius)
    image = render_scene(Scene("single", (item,), seed=0), _SIDE)
    _, coverage = _explain_pixels(_to_pixels(image.filter(ImageFilter.GaussianBlur(blur))))
    # Scaled as in read_objects: full coverage is what the core has.
    inside = coverage[coverage >= MIN_COVERAGE]
    return np.minimum(coverage / np.median(inside[_find_core(inside)]), 1)
