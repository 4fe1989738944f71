"""The classes of each data set: names, colours, and the numbers of Cityscapes' label files."""

import colorsys
import re
from pathlib import Path

import synthetic
from runtime import InputError, quote, regular_file

IGNORE = 255  # in a label: no class
Color = tuple[int, int, int]  # R, G, B, 0..255
Classes = tuple[tuple[str, ...], tuple[Color, ...]]  # names and colours

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


def palette(n: int) -> tuple[Color, ...]:
    """n fixed colours. Hues step by the golden ratio, so that neighbours differ."""
    colors = []
    for i in range(n):
        saturation, value = (0.85, 0.5, 0.7)[i % 3], (0.95, 0.75, 0.5)[i // 3 % 3]
        r, g, b = colorsys.hsv_to_rgb(i * 0.618034 % 1, saturation, value)
        colors.append((round(255 * r), round(255 * g), round(255 * b)))
    return tuple(colors)


def classes_of(name: str, root: Path) -> Classes:
    """The classes of a data set, in the order of train ids; only `folder` looks into its root."""
    if name == "folder":
        return read_classes(root / "classes.txt")
    if name == "cityscapes":
        return tuple(CITYSCAPES), tuple((r, g, b) for _, r, g, b in CITYSCAPES.values())
    names = ADE20K if name == "ade20k" else synthetic.CLASSES
    return names, palette(len(names))


def read_classes(path: Path) -> Classes:
    """The classes of a classes.txt: UTF-8, a line `name [R G B]` for each.

    Skips blank lines and lines that start with #. A class without a colour gets one of `palette`.
    Raises InputError that names the file and the line.
    """
    try:
        lines = regular_file(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeError) as e:
        raise InputError(
            f"{quote(path)}: cannot be read ({type(e).__name__}); expected UTF-8 text, a line "
            "`name [R G B]` for each class"
        ) from e
    classes: dict[str, Color] = {}
    defaults = palette(IGNORE)
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        place = f"{quote(path)}: line {number}"
        name, color = _parse_class(line, place)
        if name in classes:
            raise InputError(f"{place}: got the name {name[:60]!r} again; expected each name once")
        if len(classes) == IGNORE:
            raise InputError(f"{place}: more than 255 classes; 255 is ignored: merge classes")
        classes[name] = color or defaults[len(classes)]
    if not classes:
        raise InputError(f"{quote(path)}: no class in it; expected a line `name [R G B]` for each")
    return tuple(classes), tuple(classes.values())


def _parse_class(line: str, place: str) -> tuple[str, Color | None]:
    """Name and colour of `name R G B`, or name and None of `name`. place: for errors."""
    words = line.rsplit(None, 3)
    numbers = words[-3:]
    name = "".join(words[:-3])
    if len(numbers) < 3 or not all(re.fullmatch("-?[0-9]+", v) for v in numbers):
        numbers = []
        name = line
    if not name.isprintable() or not name:
        raise InputError(
            f"{place}: got the name {name[:60]!r}, empty or not printable; expected `name [R G B]`"
        )
    if not all(len(v) < 4 and 0 <= int(v) <= 255 for v in numbers):
        got = " ".join(numbers)[:60]
        raise InputError(f"{place}: got the colour {got}; expected R G B, each 0..255")
    if not numbers:
        return name, None
    r, g, b = map(int, numbers)
    return name, (r, g, b)
