"""Synthetic scenes: a small data set without files. Each scene is a function of (split, index) alone."""

import numpy as np

CLASSES = ("sky", "ground", "wall", "fence", "flag", "board", "ball", "ring")
SIZES = {"train": 512, "val": 64, "test": 16}
STREAMS = {"train": 0, "val": 1, "test": 3}  # the first number of a scene's seed


def scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic scene: image (128, 160, 3) and label (128, 160), uint8, 8 classes. All objects draw their two colours
    from one distribution: the class is in texture and shape alone. Fences and rings show what is behind them."""
    H, W = 128, 160
    rng = np.random.default_rng((STREAMS[split], index, 0, 2))
    image, label = np.empty((H, W, 3), np.float32), np.empty((H, W), np.uint8)
    horizon = int(rng.integers(40, 80))
    _paint(image, label, rng, 0, 0, 0, horizon, W)
    _paint(image, label, rng, 1, horizon, 0, H - horizon, W)
    # walls and fences first, since they are large; each other class in most scenes, some twice
    others = np.r_[rng.permutation([4, 5, 6, 7]), rng.integers(2, 8, rng.integers(0, 3))]
    for kind in np.r_[2, 3, others][rng.random(len(others) + 2) < 0.9]:
        h, w = (
            rng.integers(28, 60, 2) if kind > 3 else (rng.integers(36, 60), rng.integers(50, 110))
        )
        h = w if kind > 5 else h  # balls and rings are round
        top = rng.integers(0, H - h) if kind > 3 else horizon + rng.integers(8, 40) - h
        _paint(
            image,
            label,
            rng,
            int(kind),
            int(top),
            int(rng.integers(-w // 3, W - 2 * w // 3)),
            int(h),
            int(w),
        )
    image += 8 * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), label


def _paint(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    kind: int,
    top: int,
    left: int,
    h: int,
    w: int,
) -> None:
    """Draw an object of class `kind` in the box, as far as it is in the picture."""
    first = rng.uniform(20, 235, 3)
    choices = rng.uniform(20, 235, (6, 3))
    second = choices[
        np.abs((choices - first).sum(1)).argmax()
    ]  # well apart in brightness, else the texture is lost
    mix, mask = _texture(kind, h, w, int(rng.integers(5, 9)), rng)
    y, x = slice(max(0, -top), label.shape[0] - top), slice(max(0, -left), label.shape[1] - left)
    mix, mask = (
        np.broadcast_to(mix, (h, w))[y, x, None].astype(np.float32),
        np.broadcast_to(mask, (h, w))[y, x],
    )
    box = (
        slice(max(0, top), max(0, top) + mask.shape[0]),
        slice(max(0, left), max(0, left) + mask.shape[1]),
    )
    np.copyto(
        image[box], first + (second - first) * mix, where=mask[..., None], casting="same_kind"
    )
    np.copyto(label[box], np.uint8(kind), where=mask)


def _texture(
    kind: int, h: int, w: int, p: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(mix of the two colours 0..1, where the object is), of period about p pixels; each broadcasts to (h, w)."""
    y, x = np.ogrid[:h, :w]
    solid = np.ones((1, 1), bool)
    if kind == 0:  # sky: smooth
        return y / h, solid
    if kind == 1:  # ground: speckle of 3 pixels
        return rng.random((h // 3 + 1, w // 3 + 1)).repeat(3, 0).repeat(3, 1)[:h, :w], solid
    if kind == 2:  # wall: bricks
        return (y % p < 2) | ((x + y // p % 2 * p) % (2 * p) < 2), solid
    if kind == 3:  # fence: upright bars, nothing between
        return x % (3 * p) / p % 1 < 0.5, (x % (3 * p) < 1.5 * p) & (y >= 0)
    if kind == 4:  # flag: level stripes
        return y // p % 2, solid
    if kind == 5:  # board: checks
        return (y // p + x // p) % 2, solid
    radius = np.hypot(y + 0.5 - h / 2, x + 0.5 - w / 2) / (w / 2)
    if kind == 6:  # ball: shaded from a light at the upper left
        return np.hypot(y - 0.3 * h, x - 0.3 * w) / w, radius < 1
    return np.abs(radius - 0.75) * 4, (radius > 0.5) & (
        radius < 1
    )  # ring: shaded across, nothing inside
