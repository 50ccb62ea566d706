"""The things of the world: their names in English and Korean, and their sprites from emoji."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_mini_impl.builtin_datasets.emoji.styles import images
from dalle_mini_impl.builtin_datasets.scenes.colors import colorable, recolor
from dalle_mini_impl.errors import UserError

# Sprites are kept at this size, or smaller where a style's images are.
_SPRITE_SIZE = 128


@dataclass(frozen=True)
class Thing:
    """What can stand in a scene."""

    name: str
    """English, and its name in facts."""
    korean: str
    kind: str
    """"animal", "vehicle", "tree", "flower", "object", or "plural" and "mass" for nouns that are
    not counted."""
    hexcode: str
    """Of its emoji."""
    plural: str
    synonym: str | None = None
    """English; training captions use it now and then."""
    unseen_synonym: str | None = None
    """English; only the split ``test_words`` uses it."""

    @property
    def is_counted(self) -> bool:
        """Whether there can be two of it."""
        return self.kind not in ("plural", "mass")


@cache
def all_things() -> dict[str, Thing]:
    """Read the table of things: by name, in its order.

    Each thing is the one whose nearest earlier sprite is the farthest; the first are everyday ones.
    """
    table = json.loads(Path(__file__).with_name("things.json").read_text(encoding="utf-8"))
    return {
        row["name"]: Thing(**{"hexcode": code, "plural": regular_plural(row["name"]), **row})
        for code, row in table.items()
    }


def regular_plural(noun: str) -> str:
    """Form the plural of an English noun by rule: cats, ponies, buses."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


@cache
def load_sprites(style: str, npm_dir: Path | None = None) -> dict[str, Image.Image]:
    """Load the sprite of each thing that a style has: RGBA, cropped to what is visible."""
    names = {thing.hexcode: thing.name for thing in all_things().values()}
    sprites = {}
    for hexcode, render in images(style, npm_dir):
        if hexcode in names:
            sprite = render(_SPRITE_SIZE).convert("RGBA")
            # Faint shadows are no part of a thing's size.
            box = sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 32)).getbbox()
            sprites[names[hexcode]] = sprite.crop(box)
    # In the order of the table, which scenes choose from.
    found = {name: sprites[name] for name in all_things() if name in sprites}
    if not found:
        raise UserError(f"style: {style!r} has none of the {len(names)} things of the scenes")
    return found


@cache
def color_weights(style: str, npm_dir: Path | None, thing: str) -> NDArray[np.float64]:
    """Tell which fraction of each pixel of a sprite takes on a color: (height, width)."""
    return colorable(np.asarray(load_sprites(style, npm_dir)[thing]))


@cache
def _colored_sprite(style: str, npm_dir: Path | None, thing: str, color: str) -> Image.Image:
    sprite = np.asarray(load_sprites(style, npm_dir)[thing])
    return Image.fromarray(recolor(sprite, color, color_weights(style, npm_dir, thing)))


def render_thing(
    thing: str, color: str, side: int, *, style: str = "twemoji", npm_dir: Path | None = None
) -> NDArray[np.float32]:
    """Render a thing: premultiplied RGBA, 0 to 1, (height, width, 4).

    Its longer side has ``side`` pixels.
    """
    sprite = _colored_sprite(style, npm_dir, thing, color)
    scale = side / max(sprite.size)
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    pixels = np.asarray(
        sprite.resize(size, Image.Resampling.LANCZOS), dtype=np.float32
    ) / np.float32(255)
    return np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)
