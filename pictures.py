"""Pictures: masks in the colours of the classes, overlays, heat maps, sheets with a legend."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

Picture = Image.Image
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colors = Sequence[Sequence[int]]  # (R, G, B), 0..255, of each class
HEAT = (  # even steps of CIE lightness (L* 15 35 55 75 95) look like even steps of attention
    (42, 12, 111),
    (151, 22, 121),
    (229, 78, 95),
    (251, 167, 57),
    (249, 244, 166),
)
GAP = 6  # between the pictures of a sheet, in pixels
LINE = 22  # height of a line of text, in pixels


def colorize(ids: np.ndarray, colors: Colors) -> Picture:
    """Class ids (H, W) uint8 as a palette image: its pixels stay the ids. 255 is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colors)] = colors
    image = Image.fromarray(ids)
    image.putpalette(palette.tobytes())
    return image


def load_font(size: int) -> Font:
    """A system font with the letters of many languages, or else Pillow's own, which is ASCII."""
    for name in ("DejaVuSans.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def shorten(text: str, font: Font, width: float) -> str:
    """The text; if it is wider than `width` pixels, dots replace its end."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def resize_to_width(picture: Picture, width: int) -> Picture:
    """The picture in RGB, `width` wide, squeezed to at most 4 times as high (or 2048 pixels)."""
    height = round(picture.height * width / picture.width)
    height = max(1, min(height, max(4 * width, 2048)))
    method = Resampling.BILINEAR
    if picture.mode == "P":
        method = Resampling.NEAREST
    picture = picture.convert("RGB")
    return picture.resize((width, height), method)


def sheet(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[str],
    classes: Sequence[str],
    colors: Colors,
    width: int = 320,
) -> Picture:
    """Rows of pictures, each `width` wide, under titles; below them a legend of the classes."""
    font = load_font(14)
    across = GAP + len(titles) * (width + GAP)
    lefts = range(GAP, across, width + GAP)
    resized = []
    height = LINE
    for row in rows:
        pictures = [resize_to_width(picture, width) for picture in row]
        resized.append(pictures)
        height += pictures[0].height + GAP
    legend = draw_legend(classes, colors, across - GAP, max(width, 200))
    height += legend.height + GAP
    out = Image.new("RGB", (across, height), "white")
    draw = ImageDraw.Draw(out)
    for x, title in zip(lefts, titles):
        title = shorten(title, font, width)
        draw.text((x, 3), title, "black", font)
    y = LINE
    for pictures in resized:
        for x, picture in zip(lefts, pictures):
            out.paste(picture, (x, y))
        y += pictures[0].height + GAP
    out.paste(legend, (GAP, y))
    return out


def draw_legend(classes: Sequence[str], colors: Colors, width: int, widest: int) -> Picture:
    """Each class with its colour, in columns of at most `widest` pixels."""
    font = load_font(14)
    longest = int(max(map(font.getlength, classes)))
    column = min(longest + 40, widest)
    per_line = max(1, width // column)
    lines = math.ceil(len(classes) / per_line)
    out = Image.new("RGB", (width, lines * LINE), "white")
    draw = ImageDraw.Draw(out)
    for i, name in enumerate(classes):
        line, place = divmod(i, per_line)
        x = place * column
        y = line * LINE
        box = (x, y + 2, x + 16, y + 16)
        draw.rectangle(box, tuple(colors[i]), "black")
        name = shorten(name, font, column - 28)
        draw.text((x + 22, y), name, "black", font)
    return out


def overlay(
    image: np.ndarray, title: str, ids: np.ndarray, classes: Sequence[str], colors: Colors
) -> Picture:
    """An image (H, W, 3) uint8, half covered by the colours of its class ids (H, W) uint8.

    At most 2048 pixels wide and high, with a title and a legend of the classes that occur.
    """
    photo = Image.fromarray(image)
    photo.thumbnail((2048, 2048), Resampling.BILINEAR)
    mask = colorize(ids, colors)
    mask = mask.resize(photo.size, Resampling.NEAREST)
    mask = mask.convert("RGB")
    width = max(320, photo.width)  # room for the title and the legend
    padded = Image.new("RGB", (width, photo.height), "white")
    padded.paste(Image.blend(photo, mask, 0.5))
    present = np.unique(ids).tolist()
    classes = [classes[i] for i in present]
    colors = [colors[i] for i in present]
    return sheet([[padded]], [title], classes, colors, width)


def heat(x: np.ndarray) -> np.ndarray:
    """Values 0..1 of any shape to colours (..., 3) uint8, whose lightness is even in the value."""
    points = np.linspace(0, 1, len(HEAT))
    colors = np.empty((*x.shape, 3))
    for i, channel in enumerate(zip(*HEAT)):
        colors[..., i] = np.interp(x, points, channel)
    return colors.round().astype(np.uint8)


def mark_pixel(image: Picture, at: tuple[float, float], caption: str) -> Picture:
    """A copy with a green cross, edged in black, at (x, y), and the caption below."""
    font = load_font(14)
    x, y = at
    width, height = image.size
    size = (width, height + 20)
    out = Image.new("RGB", size, "white")
    out.paste(image)
    draw = ImageDraw.Draw(out)
    arm = max(5, width // 28)
    for color, line, reach in (("black", 5, arm + 1), ("lime", 3, arm)):
        draw.line((x - reach, y, x + reach, y), color, line)
        draw.line((x, y - reach, x, y + reach), color, line)
    draw.rectangle((0, height, *size), "white")  # the cross may reach below the image
    caption = shorten(caption, font, width)
    draw.text((0, height + 1), caption, "dimgray", font)
    return out
