"""Scenes of objects in two parts, as a data set of `--data folder`.

    python -m paper.scenes DIR              # 512 images to train on, 128 to validate

An object is two plates of one colour at random places. One plate bears a sign that tells the class;
the other says nothing, so a network has to find the plate of the same colour, wherever it lies.
This is what attention is for, at a size that two cores can train on. A scene depends on
(split, index) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

import synthetic
from runtime import InputError, Parser, print_progress, quote, run_script

SIDE = 112
SIGN = 20  # its side
SIGNS = (2, 3, 4, 5, 6, 7)  # wall, fence, flag, board, ball, ring of `synthetic`
CLASSES = ("ground", *(synthetic.CLASSES[i] for i in SIGNS))
STREAMS = {"train": 0, "val": 1}  # the first number of a scene's seed
Place = tuple[slice, slice]  # rows, columns


def scene(split: str, index: int) -> tuple[ndarray, ndarray]:
    """Image (112, 112, 3) and label (112, 112) of 7 classes, uint8: three objects of two plates.

    Objects differ in class and in colour; all colours come from one distribution. Plates lie over
    one another, but not over a sign. A plate without a sign is left out if 50 draws find no place.
    """
    rng = np.random.default_rng((STREAMS[split], index))
    mix, _ = synthetic.texture(1, SIDE, SIDE, rng)
    first, second = rng.uniform(20, 235, (2, 3))
    image = first + (second - first) * mix[..., None]
    label = np.zeros((SIDE, SIDE), np.uint8)
    free = np.ones((SIDE, SIDE), bool)  # of signs
    classes = rng.permutation(len(SIGNS))[:3]
    bodies = distinct_colors(3, rng)
    for part in range(2):
        for c, body in zip(classes, bodies):
            place = find_place(free, rng)
            if place is None:
                continue
            image[place] = body
            label[place] = c + 1
            if part == 0:
                sign = draw_sign(image[place], SIGNS[c], body, rng)
                free[place][sign] = False
    image += 8 * rng.standard_normal(image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def find_place(free: ndarray, rng: np.random.Generator) -> Place | None:
    """A random place of a plate in the scene without a taken pixel; None after 50 draws."""
    h, w = rng.integers(26, 43, 2)
    for y, x in rng.integers(0, (SIDE - h, SIDE - w), (50, 2)):
        place = np.s_[y : y + h, x : x + w]
        if free[place].all():
            return place
    return None


def draw_sign(plate: ndarray, kind: int, body: ndarray, rng: np.random.Generator) -> Place:
    """Draw a sign at a random place of a plate (h, w, 3) of the colour `body`; return the place."""
    h, w, _ = plate.shape
    top = rng.integers(0, h - SIGN + 1)
    left = rng.integers(0, w - SIGN + 1)
    place = np.s_[top : top + SIGN, left : left + SIGN]
    mix, mask = synthetic.texture(kind, SIGN, SIGN, rng)
    share = (mix * mask)[..., None]
    other = (body + 128) % 256  # equally far in each channel
    plate[place] += (other - body) * share
    return place


def distinct_colors(count: int, rng: np.random.Generator) -> list[ndarray]:
    """Colours that differ by 80 or more in at least one channel."""
    colors: list[ndarray] = []
    while len(colors) < count:
        color = rng.uniform(20, 235, 3)
        if all(np.abs(color - c).max() >= 80 for c in colors):
            colors.append(color)
    return colors


def write_scenes(root: Path, counts: dict[str, int]) -> None:
    """Write images/SPLIT, labels/SPLIT and classes.txt in `root`, counts[split] scenes of each."""
    for split, count in counts.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            name = f"{split}/{i:04}.png"
            for kind, pixels in zip(("images", "labels"), scene(split, i)):
                Image.fromarray(pixels).save(root / kind / name)
            print_progress(f"{split}: {i + 1}/{count} scenes", last=i + 1 == count)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data set. Returns the exit status."""
    p = Parser(prog="python -m paper.scenes", description="Scenes of objects in two parts")
    p.add_argument("root", type=Path, metavar="DIR", help="a new folder")
    p.add_argument("--train", type=int, default=512, help="scenes to train on (%(default)s)")
    p.add_argument("--val", type=int, default=128, help="scenes to validate (%(default)s)")
    args = p.parse_args(argv)
    if min(args.train, args.val) < 1:
        raise InputError(f"--train {args.train}, --val {args.val}: expected 1 or more")
    if args.root.exists():
        raise InputError(f"{quote(args.root)}: exists: name a new folder, or remove it")
    write_scenes(args.root, {"train": args.train, "val": args.val})
    return 0


if __name__ == "__main__":
    run_script(main)
