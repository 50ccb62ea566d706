"""A grid of images with their captions beneath."""

import functools
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dalle_mini_impl.data.images import WHITE, to_rgb

_PADDING = 2  # pixels of white between and around the images
_CAPTION_FONT_SIZE = 11  # pixels
# With Hangul; Pillow finds them by name where each system keeps its fonts.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NanumGothic.ttf", "malgun.ttf", "AppleSDGothicNeo.ttc")
_CAPTION_MAX_LINES = 4
_LEGIBLE_SIDE = 96  # pixels; narrower images are doubled when captions go under them


def make_grid(
    images: Sequence[Image.Image],
    *,
    columns: int,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Lay images out in rows on white, with captions under them if given.

    With captions, images narrower than 96 pixels are doubled (nearest) until the text fits.
    Pillow's built-in font knows Latin only. Other letters are rendered in the first font of
    ``_WIDE_FONTS`` that is installed, or as "?" where none is.
    """
    if not images or columns < 1:
        raise ValueError(
            f"got {len(images)} images in {columns} columns, expected 1 or more of both"
        )
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions, expected {len(images)}, one per image")
    # Sheets are RGB; other modes would be pasted with other colors.
    tiles = [to_rgb(image) for image in images]
    if captions is not None:
        tiles = [_double_until_legible(tile) for tile in tiles]
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles)
    # Every row of the sheet has room for the longest caption.
    texts = [_wrap(text, width) for text in captions] if captions is not None else []
    text_height = _text_height(max((text.count("\n") + 1 for text in texts), default=0))
    # All cells of the sheet are as large as the widest and the highest tile.
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    step_x, step_y = width + _PADDING, height + text_height + _PADDING
    sheet = Image.new("RGB", (columns * step_x + _PADDING, rows * step_y + _PADDING), WHITE)
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        x, y = _PADDING + column * step_x, _PADDING + row * step_y
        sheet.paste(tile, (x, y))
        if texts:
            text = texts[index]
            draw.multiline_text((x, y + height), text, "black", font=_font(text), spacing=1)
    return sheet


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font for a text: Pillow's own for Latin letters, else one that knows Hangul."""
    own = ImageFont.load_default(size=_CAPTION_FONT_SIZE)
    return own if _is_latin(text) else _wide_font() or own


@functools.cache
def _wide_font() -> ImageFont.FreeTypeFont | None:
    for name in _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, _CAPTION_FONT_SIZE)
        except OSError:  # not installed
            continue
    return None


def _is_latin(text: str) -> bool:
    return all(ord(letter) < 256 for letter in text)


def _double_until_legible(tile: Image.Image) -> Image.Image:
    factor = 1
    while tile.width * factor < _LEGIBLE_SIDE:
        factor *= 2
    if factor == 1:
        return tile
    size = (tile.width * factor, tile.height * factor)
    return tile.resize(size, Image.Resampling.NEAREST)


def _text_height(num_lines: int) -> int:
    return num_lines * (_CAPTION_FONT_SIZE + 4)


def _wrap(text: str, width: int) -> str:
    """Break a caption into lines of at most ``width`` pixels; what does not fit ends in "..."."""
    # A letter is wider than a pixel: what is cut here would not fit anyway.
    text = text[: width * (_CAPTION_MAX_LINES + 1)]
    if _wide_font() is None:
        # Without such a font Pillow would show empty boxes.
        text = text.encode("latin-1", "replace").decode("latin-1")
    font = _font(text)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > _CAPTION_MAX_LINES:
        lines = [*lines[: _CAPTION_MAX_LINES - 1], lines[_CAPTION_MAX_LINES - 1] + " ..."]
    return "\n".join(_shorten(line, width, font) for line in lines)


def _shorten(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    # Letters differ in width: only measuring tells what fits.
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
