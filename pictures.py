"""Pictures: masks in the classes' colours, overlays, heat over a grey photograph, sheets with titles and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# from dark to light in even steps of CIE lightness (L* 15 35 55 75 95), so that equal steps of attention look equal
HEAT = ((42, 12, 111), (151, 22, 121), (229, 78, 95), (251, 167, 57), (249, 244, 166))


def colorize(ids: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Class ids (H, W) uint8 in the classes' colours, 255 black, as a palette image: its pixels remain the ids."""
    image = Image.fromarray(ids)
    image.putpalette([c for color in colors for c in color] + [0] * (768 - 3 * len(colors)))
    return image


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """A font of the system with the letters of many languages, where there is one; else Pillow's own, which has ASCII alone."""
    for name in ("DejaVuSans.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, with dots for its end where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    return next(
        (
            text[:n] + "..."
            for n in range(len(text), 0, -1)
            if font.getlength(text[:n] + "...") <= width
        ),
        "...",
    )


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    classes: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    width: int = 320,
) -> Image.Image:
    """Rows of pictures under titles, and below them a legend of the classes. Each picture is `width` wide; one that would be
    higher than 4 times that, and than 2048 pixels, is squeezed."""
    font, gap, line = load_font(14), 6, 22
    rows = [
        [
            im.convert("RGB").resize(
                (width, max(1, min(max(4 * width, 2048), round(im.height * width / im.width)))),
                Image.Resampling.NEAREST if im.mode == "P" else Image.Resampling.BILINEAR,
            )
            for im in row
        ]
        for row in rows
    ]
    across = len(titles) * (width + gap) + gap
    column = min(max(int(font.getlength(c)) for c in classes) + 40, max(width, 200))
    per_line = max(1, (across - gap) // column)
    tall = (
        line + sum(row[0].height + gap for row in rows) + line * -(-len(classes) // per_line) + gap
    )
    out = Image.new("RGB", (across, tall), "white")
    draw, y = ImageDraw.Draw(out), line
    for i, title in enumerate(titles):
        draw.text((gap + i * (width + gap), 3), shorten(title, font, width), "black", font)
    for row in rows:
        for i, im in enumerate(row):
            out.paste(im, (gap + i * (width + gap), y))
        y += row[0].height + gap
    for i, (name, color) in enumerate(zip(classes, colors)):
        left, top = gap + i % per_line * column, y + i // per_line * line
        draw.rectangle((left, top + 2, left + 16, top + 16), tuple(color), "black")
        draw.text((left + 22, top), shorten(name, font, column - 28), "black", font)
    return out


def overlay(image: Tensor, title: str, ids: np.ndarray, checkpoint: dict[str, Any]) -> Image.Image:
    """An image (H, W, 3) uint8, brought to 2048 pixels at most, half covered by its classes' colours, under a title and
    over a legend of the classes in ids (H, W)."""
    photo = Image.fromarray(image.numpy())
    photo.thumbnail((2048, 2048), Image.Resampling.BILINEAR)  # it is to be looked at
    mask = (
        colorize(ids, checkpoint["colors"])
        .resize(photo.size, Image.Resampling.NEAREST)
        .convert("RGB")
    )
    padded = Image.new(
        "RGB", (max(320, photo.width), photo.height), "white"
    )  # room for title and legend
    padded.paste(Image.blend(photo, mask, 0.5))
    legend = ([checkpoint[key][i] for i in np.unique(ids)] for key in ("classes", "colors"))
    return sheet([[padded]], [title], *legend, padded.width)


def heat(x: np.ndarray) -> np.ndarray:
    """Values 0..1 of any shape to colours (..., 3) uint8, their lightness even in the value."""
    points = np.linspace(0, 1, len(HEAT))
    return (
        np.stack([np.interp(x, points, channel) for channel in zip(*HEAT)], -1)
        .round()
        .astype(np.uint8)
    )


def marked(image: Image.Image, at: tuple[float, float], caption: str) -> Image.Image:
    """A copy with a green cross, edged in black, at (x, y), over its caption."""
    out = Image.new("RGB", (image.width, image.height + 20), "white")
    out.paste(image)
    draw, (x, y), arm = ImageDraw.Draw(out), at, max(5, image.width // 28)
    for color, width, reach in (("black", 5, arm + 1), ((0, 255, 0), 3, arm)):
        draw.line((x - reach, y, x + reach, y), color, width)
        draw.line((x, y - reach, x, y + reach), color, width)
    draw.rectangle((0, image.height, *out.size), "white")
    draw.text(
        (0, image.height + 1),
        shorten(caption, load_font(14), image.width),
        "dimgray",
        load_font(14),
    )
    return out
