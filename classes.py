"""The classes of each data set: names, colours, and the numbers of Cityscapes' label files."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

import synthetic
from runtime import InputError, quote, regular_file

IGNORE = 255  # in a label: no class
Color = tuple[int, int, int]  # R, G, B, 0..255


class Classes(NamedTuple):
    """The classes of a data set, in the order of train ids."""

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    numbers: dict[Color, int]  # the train id of each colour that classes.txt gives to one class


# A line holds two or three classes: fmt would give each its own.
# fmt: off
CITYSCAPES = {  # in the order of train ids: label id and colour
    "road": (7, 128, 64, 128), "sidewalk": (8, 244, 35, 232), "building": (11, 70, 70, 70),
    "wall": (12, 102, 102, 156), "fence": (13, 190, 153, 153), "pole": (17, 153, 153, 153),
    "traffic light": (19, 250, 170, 30), "traffic sign": (20, 220, 220, 0),
    "vegetation": (21, 107, 142, 35), "terrain": (22, 152, 251, 152), "sky": (23, 70, 130, 180),
    "person": (24, 220, 20, 60), "rider": (25, 255, 0, 0), "car": (26, 0, 0, 142),
    "truck": (27, 0, 0, 70), "bus": (28, 0, 60, 100), "train": (31, 0, 80, 100),
    "motorcycle": (32, 0, 0, 230), "bicycle": (33, 119, 11, 32),
}
# fmt: on
ADE20K = tuple(
    """wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,
earth,door,table,mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,
rug,field,armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,
signboard,chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,grandstand,
path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,
coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,
swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,
streetlight,booth,television receiver,airplane,dirt track,apparel,pole,land,bannister,
escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,conveyer belt,canopy,washer,
plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,
step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,
hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,
shower,radiator,glass,clock,flag""".replace("\n", "").split(",")
)


@cache
def palette(n: int) -> tuple[Color, ...]:
    """n fixed colours, n <= 255; palette(m) begins with them for m > n.

    Each lies as far as can be, in CIE Lab, from those before it, from black and from white. 150
    colours differ by at least 16, 255 by at least 13 (delta E 1976).
    """
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    lab = _lab(grid)

    def distance(i: int) -> np.ndarray:
        return np.linalg.norm(lab - lab[i], axis=1)

    nearest = np.minimum(distance(0), distance(-1))  # to black and to white
    colors = []
    for _ in range(n):
        i = int(nearest.round(3).argmax())  # rounded, so that each machine takes the same
        nearest = np.minimum(nearest, distance(i))
        r, g, b = grid[i].tolist()
        colors.append((r, g, b))
    return tuple(colors)


def _lab(colors: np.ndarray) -> np.ndarray:
    """sRGB colours (n, 3), 0..255, in CIE Lab (n, 3), for the white D65."""
    c = colors / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = linear @ np.array(to_xyz).T / (0.9505, 1, 1.089)
    x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def classes_of(name: str, root: Path) -> Classes:
    """The classes of a data set; only `folder` looks into its root."""
    if name == "folder":
        return read_classes(root / "classes.txt")
    if name == "cityscapes":
        colors = tuple((r, g, b) for _, r, g, b in CITYSCAPES.values())
        return Classes(tuple(CITYSCAPES), colors, {})
    names = ADE20K if name == "ade20k" else synthetic.CLASSES
    return Classes(names, palette(len(names)), {})


IGNORED = "(ignored)"  # in classes.txt: not a class, the colour of pixels without one
# Numbers may be separated as other tools do it: `road:128,64,128::`.
SEPARATORS = r"[\s,:;=|()\[\]{}\"']+"
NUMBER = r"[-+]?[0-9]+(\.[0-9]*)?"
# Quotes or a bullet at the start, a bracket that opens a list, a colon or comma at the end.
SYNTAX = r"^['\"]|^[-*\u2022] |[\[({]\s*['\"]|^[\[({]$|[:,]$"


def read_classes(path: Path) -> Classes:
    """The classes of a classes.txt: UTF-8, a line `name [R G B]` for each.

    Skips blank lines and lines that start with #. A line `(ignored) R G B` gives the colour of 255
    in labels that are saved as colours. A class without a colour gets one of `palette`. Raises
    InputError that names the file and the line.
    """
    try:
        lines = regular_file(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(
            f"{quote(path)}: no such file; expected a line `name [R G B]` for each class, in the "
            "order of the numbers in the labels: write it"
        ) from None
    except (OSError, UnicodeError) as e:
        raise InputError(
            f"{quote(path)}: cannot be read ({type(e).__name__}); expected UTF-8 text, a line "
            "`name [R G B]` for each class"
        ) from e
    given: dict[str, Color | None] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        place = f"{quote(path)}: line {number}"
        name, color = _parse_class(line, place)
        if name in given:
            raise InputError(f"{place}: got the name {name[:60]!r} again; expected each name once")
        given[name] = color
        if len(given.keys() - {IGNORED}) > IGNORE:
            raise InputError(f"{place}: more than 255 classes; 255 is ignored: merge classes")
    ignored = given.pop(IGNORED, None)
    if len(given) < 2:
        raise InputError(
            f"{quote(path)}: {'one class' if given else 'no class in it'}, nothing to tell apart; "
            "expected a line `name [R G B]` for each class: add a line for the background"
        )
    _refuse_numbers([*given], path)
    colors = tuple(color or default for color, default in zip(given.values(), palette(IGNORE)))
    return Classes(tuple(given), colors, numbers_of([*given.values()], ignored))


def _refuse_numbers(names: Sequence[str], path: Path) -> None:
    """InputError if numbers that count the classes stand before the names, as in `0: road`."""
    numbered = {}
    for name in names:
        found = re.match(r"\W*([0-9]{1,3})\W", name)
        if found:
            numbered[name] = int(found[1])
    count = len(numbered)
    from_0 = count > 1 and [*numbered.values()] == [*range(count)]  # perhaps below a head
    from_1 = [*numbered.values()] == [*range(1, len(names) + 1)]
    if from_0 or from_1:
        raise InputError(
            f"{quote(path)}: got numbers before the names, such as {min(numbered)[:60]!r}; the "
            "order of the lines gives them: leave them out, and any line above the first class"
        )


def numbers_of(
    colors: Sequence[Sequence[int] | None], ignored: Color | None = None
) -> dict[Color, int]:
    """The train id of each colour. Leaves out a colour that two classes share."""
    every = [None if c is None else (c[0], c[1], c[2]) for c in (*colors, ignored)]
    ids = [*range(len(colors)), IGNORE]
    numbers = {}
    for color, number in zip(every, ids):
        if color is not None and every.count(color) == 1:
            numbers[color] = number
    return numbers


def _parse_class(line: str, place: str) -> tuple[str, Color | None]:
    """Name and colour of `name R G B`, or name and None of `name`. place: for errors."""
    expected = "expected `name R G B`, such as `road 128 64 128`, or `name`"
    if line.split()[0] == "__ignore__":
        raise InputError(
            f"{place}: got labelme's __ignore__, which is 255 in labels and no class: remove the "
            "line"
        )
    if re.search(r"\br(ed)?\W+g(reen)?\W+b(lue)?\b", line, re.I):
        raise InputError(f"{place}: got the head of a table, {line[:60]!r}: remove it; {expected}")
    words = line.rsplit(None, 3)
    name = "".join(words[:-3])
    numbers = [word for word in re.split(SEPARATORS, line) if re.fullmatch(NUMBER, word)]
    if len(numbers) < 3:
        numbers = []
        name = line
    elif numbers != words[-3:]:
        raise InputError(
            f"{place}: got {len(numbers)} numbers in {line[:60]!r}; {expected}, with spaces between"
        )
    _check_name(name, f"{place}: got the name {name[:60]!r}", expected)
    if not all(len(v) < 4 and v.isdecimal() and int(v) <= 255 for v in numbers):
        got = " ".join(numbers)[:60]
        raise InputError(f"{place}: got the colour {got}; expected R G B, each 0..255")
    if numbers:
        r, g, b = map(int, numbers)
        return name, (r, g, b)
    if name == IGNORED:
        raise InputError(f"{place}: got no colour; expected `{IGNORED} R G B`")
    return name, None


def _check_name(name: str, got: str, expected: str) -> None:
    """Raise InputError if a name is none. got, expected: parts of its text."""
    if re.search(SYNTAX, name):
        what = f"as in YAML, JSON or code; {expected}: leave quotes, brackets and signs out"
        raise InputError(f"{got}, {what}")
    if not name.isprintable() or not re.search(r"\w", name):
        raise InputError(f"{got}, without a letter or not printable; {expected}")
