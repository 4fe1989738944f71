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
LAYER = 0.35  # how much of an overlay's colour is the class's
SHARES = ("0 %", "6 %", "25 %", "56 %", "100 %")  # whose square roots have the colours HEAT


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


def text_size(width: int) -> int:
    """The size of letters that are legible when a picture this wide is shown 1000 pixels wide."""
    return max(14, round(14 * width / 1000))


def line_height(size: int) -> int:
    """The height of a line of letters of this size, in pixels."""
    return round(1.6 * size)


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
    note: str = "",
) -> Picture:
    """Rows of pictures, each `width` wide, under titles; below them a legend of the classes, and
    the note in a line of its own.
    """
    across = GAP + len(titles) * (width + GAP)
    size = text_size(across)
    font = load_font(size)
    line = line_height(size)
    lefts = range(GAP, across, width + GAP)
    resized = []
    height = line
    for row in rows:
        pictures = [resize_to_width(picture, width) for picture in row]
        resized.append(pictures)
        height += pictures[0].height + GAP
    legend = draw_legend(classes, colors, across - GAP, max(width, 14 * size), size)
    end = height + legend.height + GAP
    height = end
    if note:
        height += line
    out = Image.new("RGB", (across, height), "white")
    draw = ImageDraw.Draw(out)
    for x, title in zip(lefts, titles):
        title = shorten(title, font, width)
        draw.text((x, 3), title, "black", font)
    y = line
    for pictures in resized:
        for x, picture in zip(lefts, pictures):
            out.paste(picture, (x, y))
        y += pictures[0].height + GAP
    out.paste(legend, (GAP, y))
    note = shorten(note, font, across - 2 * GAP)
    draw.text((GAP, end), note, "black", font)
    return out


def draw_legend(
    classes: Sequence[str], colors: Colors, width: int, widest: int, size: int = 14
) -> Picture:
    """Each class with its colour, in columns of at most `widest` pixels. size: of the letters."""
    font = load_font(size)
    line = line_height(size)
    longest = int(max(map(font.getlength, classes)))
    column = min(longest + 3 * size, widest)
    per_line = max(1, width // column)
    lines = math.ceil(len(classes) / per_line)
    out = Image.new("RGB", (width, lines * line), "white")
    draw = ImageDraw.Draw(out)
    for i, name in enumerate(classes):
        row, place = divmod(i, per_line)
        x = place * column
        y = row * line
        box = (x, y + 2, x + size + 2, y + size + 2)
        draw.rectangle(box, tuple(colors[i]), "black")
        name = shorten(name, font, column - 2 * size)
        draw.text((x + 1.6 * size, y), name, "black", font)
    return out


def with_ignored(
    classes: Sequence[str], colors: Colors, masks: Sequence[np.ndarray]
) -> tuple[Sequence[str], Colors]:
    """Classes and colours of a legend: black too, if one of the masks shows ignored pixels."""
    if any((mask == 255).any() for mask in masks):
        return [*classes, "(ignored)"], [*colors, (0, 0, 0)]
    return classes, colors


def overlay(
    image: np.ndarray,
    title: str,
    ids: np.ndarray,
    classes: Sequence[str],
    colors: Colors,
    confidence: np.ndarray | None = None,
) -> Picture:
    """An image (H, W, 3) uint8 under a thin layer of the colours of its class ids (H, W) uint8.

    The borders of the classes have their full colour, so that the layer can be thin. confidence:
    (H, W) uint8, shown below, over its scale. At most 2048 pixels wide and high, with a title and a
    legend of the classes that occur.
    """
    photo = Image.fromarray(image)
    photo.thumbnail((2048, 2048), Resampling.BILINEAR)
    mask = colorize(ids, colors)
    mask = mask.resize(photo.size, Resampling.NEAREST)
    border = Image.fromarray(borders(np.asarray(mask)))
    mask = mask.convert("RGB")
    mixed = Image.blend(photo, mask, LAYER)
    mixed.paste(mask, mask=border)
    width = max(320, photo.width)  # room for the title and the legend
    padded = Image.new("RGB", (width, photo.height), "white")
    padded.paste(mixed)
    rows = [[padded]]
    if confidence is not None:
        grey = Image.fromarray(confidence).resize(photo.size, Resampling.BILINEAR)
        rows.append([over_scale(grey, width)])
    present = np.unique(ids).tolist()
    classes = [classes[i] for i in present]
    colors = [colors[i] for i in present]
    return sheet(rows, [title], classes, colors, width)


def borders(ids: np.ndarray) -> np.ndarray:
    """(H, W) bool: whether a pixel's neighbour, at a side, above or below, has another class."""
    out = np.zeros(ids.shape, bool)
    down = ids[1:] != ids[:-1]
    across = ids[:, 1:] != ids[:, :-1]
    out[1:] |= down
    out[:-1] |= down
    out[:, 1:] |= across
    out[:, :-1] |= across
    return out


def over_scale(grey: Picture, width: int) -> Picture:
    """A grey picture of probabilities on a white one, above a bar from black, 0, to white, 1."""
    size = text_size(width)
    font = load_font(size)
    out = Image.new("RGB", (width, grey.height + line_height(size)), "white")
    out.paste(grey)
    draw = ImageDraw.Draw(out)
    text = "probability of the class: 0"
    left = round(font.getlength(text)) + size // 2
    right = left + 8 * size
    bar = Image.linear_gradient("L").rotate(90)  # black at the left
    bar = bar.resize((right - left, size))
    y = grey.height + 1
    box = (left, y + 3, right, y + 3 + size)
    out.paste(bar, box[:2])
    draw.rectangle(box, outline="black")
    draw.text((0, y), text, "black", font)
    draw.text((right + size // 2, y), "1", "black", font)
    return out


def confusion_picture(matrix: np.ndarray, classes: Sequence[str]) -> Picture:
    """A confusion matrix (n, n): a row for each true class, a column for each predicted one.

    A cell's value is its share of the row's pixels. The row of a class without pixels is white.
    """
    share = np.full(matrix.shape, np.nan)
    total = matrix.sum(1, keepdims=True)
    np.divide(matrix, total, out=share, where=total > 0)
    title = "rows: true class; columns: predicted class; colour: share of the true class's pixels"
    return matrix_picture(share, np.sqrt(share), classes, title, SHARES)


def matrix_picture(
    values: np.ndarray,
    brightness: np.ndarray,
    classes: Sequence[str],
    title: str,
    scale: Sequence[str],
) -> Picture:
    """Values (n, n), 0..1, by pair of classes, as coloured cells with names on all sides.

    brightness: (n, n), 0..1, positions on HEAT. scale: the labels of the positions 0, 1/4, 1/2, 3/4
    and 1. Numbers are percent, if there is room, none for 0. NaN is white.
    """
    n = len(classes)
    side = max(14, min(56, 900 // n))  # of a cell
    font = load_font(min(14, side - 2))
    longest = math.ceil(max(map(font.getlength, classes)))
    margin = min(longest, 240) + 2 * GAP
    left = draw_names(classes, side, font, margin, "rm")
    right = draw_names(classes, side, font, margin, "lm")
    top = right.rotate(90, expand=True)
    bottom = left.rotate(90, expand=True)
    far = margin + n * side
    whole = far + margin
    width = max(whole, 600)  # room for the title
    out = Image.new("RGB", (width, whole), "white")
    cells = matrix_cells(values, brightness, side, font)
    out.paste(cells, (margin, margin))
    out.paste(left, (0, margin))
    out.paste(right, (far, margin))
    out.paste(top, (margin, 0))
    out.paste(bottom, (margin, far))
    return sheet([[out]], [title], scale, HEAT, width)


def draw_names(classes: Sequence[str], side: int, font: Font, width: int, anchor: str) -> Picture:
    """Names below each other, every `side` pixels, in a picture `width` wide.

    anchor: "lm" at its left, "rm" at its right.
    """
    out = Image.new("RGB", (width, len(classes) * side), "white")
    draw = ImageDraw.Draw(out)
    x = GAP
    if anchor == "rm":
        x = width - GAP
    y = side / 2
    for name in classes:
        name = shorten(name, font, width - 2 * GAP)
        draw.text((x, y), name, "black", font, anchor)
        y += side
    return out


def matrix_cells(values: np.ndarray, brightness: np.ndarray, side: int, font: Font) -> Picture:
    """The coloured cells of `matrix_picture`, each `side` pixels wide and high."""
    n = len(values)
    absent = np.isnan(values)
    colors = heat(np.where(absent, 0, brightness))
    colors[absent] = 255
    out = Image.fromarray(colors)
    out = out.resize((n * side, n * side), Resampling.NEAREST)
    draw = ImageDraw.Draw(out)
    for i in range(1, n):
        at, end = i * side, n * side
        color = "dimgray"
        if n > 30 and i % 10 == 0:
            color = "white"  # leads the eye to the names
        draw.line((0, at, end, at), color)
        draw.line((at, 0, at, end), color)
    if side < 32:
        return out
    for i, j in np.argwhere(values > 0):
        ink = "white"
        if brightness[i, j] > 0.55:
            ink = "black"
        x = (j + 0.5) * side
        y = (i + 0.5) * side
        percent = f"{100 * values[i, j]:.0f}"
        draw.text((x, y), percent, ink, font, "mm")
    return out


def heat(x: np.ndarray) -> np.ndarray:
    """Values 0..1 of any shape to colours (..., 3) uint8, whose lightness is even in the value."""
    points = np.linspace(0, 1, len(HEAT))
    colors = np.empty((*x.shape, 3))
    for i, channel in enumerate(zip(*HEAT)):
        colors[..., i] = np.interp(x, points, channel)
    return colors.round().astype(np.uint8)


def mark_pixel(image: Picture, at: tuple[float, float], caption: str, letters: int = 14) -> Picture:
    """A copy with a green cross, edged in black, at (x, y), and the caption below.

    letters: size of the caption's letters.
    """
    font = load_font(letters)
    x, y = at
    width, height = image.size
    below = line_height(letters)
    size = (width, height + below)
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
