"""Synthetic scenes: a small data set without files. A scene depends on (split, index) alone."""

import numpy as np
from numpy import ndarray
from numpy.random import Generator, default_rng

CLASSES = (
    "sky",  # smooth
    "ground",  # speckle of 3 pixels
    "wall",  # bricks
    "fence",  # upright bars, nothing between
    "flag",  # level stripes
    "board",  # checks
    "ball",  # shaded from a light at the upper left
    "ring",  # shaded across, nothing inside
)
SIZES = {"train": 512, "val": 64, "test": 16}
STREAMS = {"train": 0, "val": 1, "test": 3}  # the first number of a scene's seed
H, W = 128, 160
MARGIN = 40  # drawn around the picture and cut off: objects may reach out of it
Box = tuple[int, int, int, int]  # top, left, height, width


def scene(split: str, index: int) -> tuple[ndarray, ndarray]:
    """Image (128, 160, 3) and label (128, 160) of 8 classes, uint8.

    All objects draw their two colours from one distribution, so only texture and shape tell the
    class. Fences and rings show what is behind them.
    """
    rng = default_rng((STREAMS[split], index, 0, 2))

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high))

    label = np.empty((H + 2 * MARGIN, W + 2 * MARGIN), np.uint8)
    image = np.empty((*label.shape, 3), np.float32)
    horizon = draw(40, 80)
    _paint(image, label, 0, (0, 0, horizon, W), rng)
    _paint(image, label, 1, (horizon, 0, H - horizon, W), rng)
    # Walls and fences come first, because they are large; then each small class, some twice.
    small = rng.permutation([4, 5, 6, 7])
    again = rng.integers(2, 8, draw(0, 3))
    kinds = np.r_[2, 3, small, again]
    kept = rng.random(len(kinds)) < 0.9
    for kind in kinds[kept].tolist():
        if kind <= 3:  # a wall or a fence stands on the ground
            h = draw(36, 60)
            w = draw(50, 110)
            top = horizon + draw(8, 40) - h
        else:
            h = draw(28, 60)
            w = draw(28, 60)
            if kind >= 6:  # balls and rings are round
                h = w
            top = draw(0, H - h)
        left = draw(-w // 3, W - 2 * w // 3)
        _paint(image, label, kind, (top, left, h, w), rng)
    inside = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
    image = image[inside]
    image += 8 * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), label[inside].copy()


def _paint(
    image: ndarray,
    label: ndarray,
    kind: int,
    box: Box,
    rng: Generator,
) -> None:
    """Draw an object of class `kind` in the box."""
    top, left, h, w = box
    first = rng.uniform(20, 235, 3)
    choices = rng.uniform(20, 235, (6, 3))
    contrast = np.abs((choices - first).sum(1))
    second = choices[contrast.argmax()]  # well apart in brightness, or the texture is lost
    mix, mask = texture(kind, h, w, rng)
    share = mix.astype(np.float32)[..., None]
    color = first + (second - first) * share
    top += MARGIN
    left += MARGIN
    place = np.s_[top : top + h, left : left + w]
    np.copyto(image[place], color, "same_kind", mask[..., None])
    np.copyto(label[place], np.uint8(kind), where=mask)


def texture(kind: int, h: int, w: int, rng: Generator) -> tuple[ndarray, ndarray]:
    """Mix of a class's two colours, 0..1, and where the object is; each broadcasts to (h, w)."""
    y, x = np.ogrid[:h, :w]
    p = int(rng.integers(5, 9))  # the period in pixels
    radius = np.hypot(y + 0.5 - h / 2, x + 0.5 - w / 2) / (w / 2)
    mask: ndarray = np.ones((1, 1), bool)
    mix: ndarray
    match CLASSES[kind]:
        case "sky":
            mix = y / h
        case "ground":
            dots = rng.random((h // 3 + 1, w // 3 + 1))
            dots = dots.repeat(3, 0).repeat(3, 1)
            mix = dots[:h, :w]
        case "wall":
            level = y % p < 2
            shift = y // p % 2 * p
            upright = (x + shift) % (2 * p) < 2
            mix = level | upright
        case "fence":
            bar = x % (3 * p)
            mix = bar / p % 1 < 0.5
            mask = bar < 1.5 * p
        case "flag":
            mix = y // p % 2
        case "board":
            mix = (y // p + x // p) % 2
        case "ball":
            light = np.hypot(y - 0.3 * h, x - 0.3 * w)
            mix = light / w
            mask = radius < 1
        case _:
            mix = np.abs(radius - 0.75) * 4
            mask = (radius > 0.5) & (radius < 1)
    return mix, mask
