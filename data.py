"""Data sets, augmentation and loading for the Denoised Non-Local network.

A training sample is a function of (seed, epoch, index) alone, whatever the workers, ranks or restarts. Labels are
train ids 0..n-1, IGNORE (255) where there is none.

Layouts beneath --root:
    cityscapes  leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png    gtFine/{train,val}/CITY/*_gtFine_labelIds.png
    ade20k      images/{training,validation}/*.jpg                     annotations/{training,validation}/*.png
    folder      images/{train,val,test}/** (any image)                 labels/{train,val,test}/**.png, classes.txt
    synthetic   none: scenes made in memory
"""

import colorsys
import hashlib
import math
import os
import re
import signal
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

import synthetic
from cache import Copy, open_copy
from runtime import GROUP_SIGNALS, InputError, quote

IGNORE = 255
NAMES = ("synthetic", "cityscapes", "ade20k", "folder")
SPLITS = ("train", "val", "trainval", "test")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, 0..255
PAD = (124, 116, 104)  # MEAN, rounded: close to 0 once normalized


def palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """n fixed colours (R, G, B), 0..255: hues by the golden ratio, so that neighbours differ."""
    hsv = (
        (i * 0.618034 % 1, (0.85, 0.5, 0.7)[i % 3], (0.95, 0.75, 0.5)[i // 3 % 3]) for i in range(n)
    )
    return tuple(tuple(round(255 * v) for v in colorsys.hsv_to_rgb(*x)) for x in hsv)


# ---- settings and classes


CITYSCAPES = {  # train id order: name, label id, colour
    "road": (7, 128, 64, 128),
    "sidewalk": (8, 244, 35, 232),
    "building": (11, 70, 70, 70),
    "wall": (12, 102, 102, 156),
    "fence": (13, 190, 153, 153),
    "pole": (17, 153, 153, 153),
    "traffic light": (19, 250, 170, 30),
    "traffic sign": (20, 220, 220, 0),
    "vegetation": (21, 107, 142, 35),
    "terrain": (22, 152, 251, 152),
    "sky": (23, 70, 130, 180),
    "person": (24, 220, 20, 60),
    "rider": (25, 255, 0, 0),
    "car": (26, 0, 0, 142),
    "truck": (27, 0, 0, 70),
    "bus": (28, 0, 60, 100),
    "train": (31, 0, 80, 100),
    "motorcycle": (32, 0, 0, 230),
    "bicycle": (33, 119, 11, 32),
}
ADE20K = tuple(
    """wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,
earth,door,table,mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,
armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,
chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,grandstand,path,stairs,runway,case,
pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,coffee table,toilet,flower,book,hill,
bench,countertop,stove,palm,kitchen island,computer,swivel chair,boat,bar,arcade machine,hovel,bus,towel,
light,truck,tower,chandelier,awning,streetlight,booth,television receiver,airplane,dirt track,apparel,pole,
land,bannister,escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,conveyer belt,canopy,washer,
plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,
trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,hood,sconce,vase,
traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,radiator,glass,clock,
flag""".replace("\n", "").split(",")
)


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours of a classes.txt: `name [R G B]` a line, UTF-8; blank lines and lines from # on are
    skipped. Classes without a colour get one of `palette`. Raises InputError with the file and the line."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a pipe would be waited for
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeError) as e:
        raise InputError(
            f"{quote(path)}: cannot be read ({type(e).__name__}); expected UTF-8 text, a line "
            "`name [R G B]` for each class"
        ) from e
    classes, defaults = {}, palette(IGNORE)
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        parts = line.rsplit(None, 3)
        color = (
            parts[-3:]
            if len(parts) > 2 and all(re.fullmatch("-?[0-9]+", v) for v in parts[-3:])
            else ()
        )
        name = "".join(parts[:-3]) if color else line
        if not name or not name.isprintable() or name in classes:
            raise InputError(
                f"{quote(path)}: line {number}: got the name {name[:60]!r}, empty, not printable or given "
                "before; expected `name [R G B]` with a name of its own for each class"
            )
        if not all(len(v) < 4 and 0 <= int(v) <= 255 for v in color):
            raise InputError(
                f"{quote(path)}: line {number}: got the colour {' '.join(color)[:60]}; expected R G B, "
                "each 0..255"
            )
        if len(classes) == IGNORE:
            raise InputError(
                f"{quote(path)}: line {number}: more than 255 classes; 255 is ignored: merge classes"
            )
        classes[name] = tuple(map(int, color)) or defaults[len(classes)]
    if not classes:
        raise InputError(
            f"{quote(path)}: no class in it; expected a line `name [R G B]` for each class"
        )
    return tuple(classes), tuple(classes.values())


def _classes(
    name: str, root: Path | str | None
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    if name == "folder":
        path = Path(root, "classes.txt")
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise InputError(
                f"{quote(path)}: a link out of the data set: copy what it leads to in its place"
            )
        return read_classes(path)
    if name == "cityscapes":
        return tuple(CITYSCAPES), tuple(v[1:] for v in CITYSCAPES.values())
    names = ADE20K if name == "ade20k" else synthetic.CLASSES
    return names, palette(len(names))


# ---- finding files


@dataclass(frozen=True)
class Item:
    """Files of an image and of its label (None: no ground truth), and what they were when the data set was opened. Synthetic
    items are names only, not files."""

    image: Path
    label: Path | None
    stamps: tuple[tuple[int, int] | None, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.image,) if self.label is None else (self.image, self.label)


@dataclass(frozen=True)
class DataSet:
    """One split of a data set. colors: (R, G, B), 0..255, of each class."""

    name: str
    split: str
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    items: tuple[Item, ...]
    copy: Copy | None = None  # the decoded copy, where one is kept

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labelled(self) -> bool:
        """Whether the split has ground truth."""
        return self.items[0].label is not None


LAYOUT = {  # folder of images, their endings in lower case, folder of labels, their ending in lower and in true case
    "cityscapes": ("leftImg8bit", ("_leftimg8bit.png",), "gtFine", "_gtFine_labelIds.png"),
    "ade20k": ("images", (".jpg",), "annotations", ".png"),
    "folder": (
        "images",
        (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"),
        "labels",
        ".png",
    ),
}
ADE_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
FULL_ADE = (
    "index_ade20k.*",
    "images/ADE",
    "ADE20K_*",
    "images/training/*_seg.png",
    "images/training/*/",
)


def open_dataset(
    name: str, root: Path | str | None, split: str, cache: Path | str | None = None
) -> DataSet:
    """The split train, val, trainval or test of the data set. Only names, sizes and times of files are looked at, but with
    `cache`, a folder in which a decoded copy is made and kept.
    Raises InputError on a missing folder, an empty split, an image without label or a label without image, the
    full ADE20K in place of the benchmark, a bad classes.txt, a cache of synthetic scenes."""
    if cache is not None and name == "synthetic":
        raise InputError("synthetic scenes are made in memory: leave --cache out")
    dataset, problems = open_split(name, root, split)
    if problems:
        raise InputError(problems[0] + f" (and {len(problems) - 1} more)" * (len(problems) > 1))
    return dataset if cache is None else _with_copy(dataset, Path(cache))


def _with_copy(dataset: DataSet, folder: Path) -> DataSet:
    """The data set, read from its decoded copy in the folder. The copy's name holds the sources' sizes and times, so a
    change of a file makes a new one."""
    stamps = []
    for item in dataset.items:
        for path, stamp in zip(item.files, item.stamps):
            stamps.append((os.path.realpath(path), *(stamp or ())))
    key = hashlib.sha256(
        repr((dataset.classes, stamps)).encode("utf-8", "surrogateescape")
    ).hexdigest()[:16]
    name = f"{dataset.name}-{dataset.split}-{key}"
    workers = os.cpu_count() or 1
    copy = open_copy(
        folder, name, len(dataset), dataset.labelled, lambda: eval_images(dataset, 0, 1, workers)
    )
    return replace(dataset, copy=copy)


def open_split(name: str, root: Path | str | None, split: str) -> tuple[DataSet, list[str]]:
    """As open_dataset, but pairs that are not whole are left out and told in the list."""
    if name not in NAMES or split not in SPLITS:
        raise InputError(
            f"got data set {name!r}, split {split!r}; expected one of {', '.join(NAMES)} and one of "
            f"{', '.join(SPLITS)}"
        )
    if (name == "synthetic") != (root is None):
        raise InputError(
            f"{name} is read from files: name its folder by --root DIR"
            if root is None
            else f"--root {quote(root)}: synthetic scenes are made in memory: name what lies there by --data, or leave --root out"
        )
    items, problems = [], []
    for part in ("train", "val") if split == "trainval" else (split,):
        if name == "synthetic":
            names = [Path(name, part, str(i)) for i in range(synthetic.SIZES[part])]
            items += map(Item, names, names)
            continue
        try:
            items += _scan(name, Path(root), part, problems)
        except OSError as e:
            raise InputError(
                f"{quote(e.filename or root)}: cannot be read ({e.strerror}): check the folder's permissions and --root"
            ) from e
    return DataSet(name, split, *_classes(name, root), tuple(items)), problems


def _scan(name: str, root: Path, split: str, problems: list[str]) -> list[Item]:
    """The pairs of one split, in order of names; adds to problems those that are not whole."""
    image_top, ends, label_top, label_end = LAYOUT[name]
    folder = ADE_FOLDERS[split] if name == "ade20k" else split
    image_dir, label_dir = root / image_top / folder, root / label_top / folder
    if name == "ade20k" and any(True for pattern in FULL_ADE for _ in root.glob(pattern)):
        raise InputError(
            f"{quote(root)}: this is the full ADE20K; expected the benchmark of 150 classes: download "
            "ADEChallengeData2016.zip and name its folder by --root"
        )
    bare = split == "test" and (name == "cityscapes" or not label_dir.is_dir())
    for top in (image_dir,) if bare else (image_dir, label_dir):
        if not top.is_dir():
            raise _missing(name, root, top)
    inside = Path(os.path.realpath(root)) if name == "folder" else None
    images = _walk(image_dir, ends, inside)
    if not images:
        raise InputError(
            f"{quote(image_dir)}: the split {split} is empty; expected images *{', *'.join(ends)}"
        )
    if bare:
        return [Item(images[key], None, (_stamp(images[key]),)) for key in sorted(images)]
    labels = _walk(label_dir, (label_end.lower(),), inside)
    problems += [
        f"{quote(images[key])}: image without label; expected {quote(label_dir / key)}{label_end}: add it or "
        "remove the image"
        for key in sorted(images.keys() - labels)
    ]
    problems += [
        f"{quote(labels[key])}: label without image; expected {quote(image_dir / key)}{ends[0]} or the like: "
        "add it or remove the label"
        for key in sorted(labels.keys() - images)
    ]
    return [
        Item(images[key], labels[key], (_stamp(images[key]), _stamp(labels[key])))
        for key in sorted(images.keys() & labels)
    ]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns; None where there is no file, which reading it will say."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _missing(name: str, root: Path, folder: Path) -> InputError:
    """The error of a missing folder; looks one level up and down for the one that was meant."""
    top = folder.parent.name
    near = [root.parent, root.parent.parent, *(found.parent for found in root.glob(f"*/{top}"))]
    meant = next((quote(c) for c in near if c != root and (c / top / folder.name).is_dir()), None)
    return InputError(
        f"{quote(folder)}: no such folder; expected {name} with {top}/{folder.name} beneath {quote(root)}: "
        + (
            f"give --root {meant}"
            if meant
            else "name another split, or add this one"
            if folder.parent.is_dir()
            else "name the data set's folder by --root"
        )
    )


def _walk(top: Path, ends: tuple[str, ...], inside: Path | None) -> dict[str, Path]:
    """Files beneath top with one of the endings, by relative name without the ending; hidden files are left out.
    With `inside`, a real path, nothing may lead out of it by a link, and folders may not be links. A folder that links to one it lies in
    is not followed round."""
    found = {}
    for here, folders, files in os.walk(top, onerror=_raise, followlinks=inside is None):
        above = Path(here).relative_to(top).parents
        if os.path.realpath(here) in (os.path.realpath(top / p) for p in above):
            folders.clear()
            continue
        links = (
            [p for p in (Path(here, n) for n in (*folders, *files)) if p.is_symlink()]
            if inside
            else []
        )
        for path in [top, *links] if inside else ():
            if (
                path in links
                and path.is_dir()
                or not Path(os.path.realpath(path)).is_relative_to(inside)
            ):
                raise InputError(
                    f"{quote(path)}: a link to a folder or out of the data set; expected every file "
                    "beneath --root: copy what it leads to in its place"
                )
        for name in files:
            end = next((e for e in ends if name.lower().endswith(e)), None)
            if end is None or name.startswith("."):
                continue
            path = Path(here, name)
            key = (path.parent / name[: -len(end)]).relative_to(top).as_posix()
            if key in found:
                raise InputError(
                    f"{quote(path)}: the name of {quote(found[key])} again; expected one file for each "
                    "name, whatever the ending: rename or remove one"
                )
            found[key] = path
    return found


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that it cannot read


# ---- files to arrays


def read(dataset: DataSet, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (H, W, 3) uint8 and label (H, W) uint8 of train ids and IGNORE (None without ground truth), checked.
    Raises InputError that names the file."""
    if dataset.name == "synthetic":
        _, split, number = dataset.items[index].image.parts
        return synthetic.scene(split, int(number))
    if dataset.copy is not None:
        return dataset.copy.read(index)
    return decode(dataset, dataset.items[index])


def decode(dataset: DataSet, item: Item) -> tuple[np.ndarray, np.ndarray | None]:
    """Files to arrays, as `read` returns them."""
    image = decode_image(item.image)
    label = decode_label(item.label, dataset) if item.label else None
    for path, stamp in zip(
        item.files, item.stamps
    ):  # looked at last, so that a change meanwhile is seen too
        if stamp != _stamp(path):
            raise InputError(
                f"{quote(path)}: changed since the data set was opened: size and time {_stamp(path)}, expected "
                f"{stamp}: stop what writes there, and start again"
            )
    if label is not None and label.shape != image.shape[:2]:
        raise InputError(
            "{}: label of {}x{} (height x width), image of {}x{}; expected one size: make the label again "
            "for {} as its EXIF rotation shows it".format(
                quote(item.label), *label.shape, *image.shape[:2], quote(item.image)
            )
        )
    return image, label


def decode_image(path: Path) -> np.ndarray:
    """Any 8-bit image as RGB (H, W, 3) uint8: EXIF rotation applied, alpha dropped; grey, palette, CMYK converted;
    of 16-bit colour PNGs the high byte. Raises InputError: not an image, truncated, 16-bit grey, float."""
    image = _load(path, False)
    if image.mode[0] in "IF":
        raise InputError(
            f"{quote(path)}: got mode {image.mode}, more than 8 bit; expected 8 bit a channel: convert it"
        )
    return np.asarray(image)


def decode_label(path: Path, dataset: DataSet) -> np.ndarray:
    """Label file, a PNG, to train ids (H, W) uint8. One channel: grey of 8 bit, palette (by index), 1 bit, or 16 bit if the
    values fit. Raises InputError: colours, not a PNG, grey of 2 or 4 bit, values out of range."""
    image = _load(path, True)
    if image.format != "PNG":
        raise InputError(
            f"{quote(path)}: got a {image.format}; expected a PNG, which has checksums and keeps class numbers: "
            "make it again from the annotation"
        )
    if image.info["stored"] in ("L;2", "L;4"):  # a 3 of 2 bit would be read as 255
        raise InputError(
            f"{quote(path)}: got grey of 2 or 4 bit, whose numbers are read as brightness; expected 8 bit: save it "
            "as 8-bit grey or palette PNG"
        )
    raw = np.asarray(image)
    if raw.ndim != 2 or image.mode == "F":
        raise InputError(
            f"{quote(path)}: got mode {image.mode}, a label saved as colours; expected one channel of class "
            f"numbers: {_color_remedy(raw, dataset)}"
        )
    raw = raw.astype(np.uint8) if raw.dtype == bool else raw
    table = _id_table(dataset.name, len(dataset.classes))
    ids = (
        table[raw]
        if raw.dtype == np.uint8
        else np.where((raw < 0) | (raw > 255), -1, table[raw.clip(0, 255)])
    )
    if ids.min() < 0:
        raise InputError(f"{quote(path)}: {_range_error(np.unique(raw[ids < 0]), dataset)}")
    return ids.astype(np.uint8)


def _load(path: Path, label: bool) -> Image.Image:
    """The decoded image: as stored for a label, else upright and RGB unless it has more than 8 bit."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise OSError(0, "empty or not a file")  # a pipe would be waited for
        # by an open file: Pillow maps a named one, a rotated raw TIFF in the wrong size, and a file cut meanwhile kills
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; decompression bombs are errors
            Image.open(
                file, formats=FORMATS
            ).verify()  # a PNG's checksums, which load() leaves unread
            image = Image.open(file, formats=FORMATS)
            image.info["stored"] = image.tile[0][3] if image.tile else None  # load() forgets it
            image.load()
            if label:
                return image
            image.info.pop("transparency", None)  # alpha is dropped, of palettes too
            image = ImageOps.exif_transpose(image)
        return image if image.mode[0] in "IF" else image.convert("RGB")
    except Image.DecompressionBombError as e:
        raise InputError(
            f"{quote(path)}: over {2 * Image.MAX_IMAGE_PIXELS} pixels, refused as a decompression bomb: cut "
            "it into tiles"
        ) from e
    except Exception as e:  # decoders of broken files raise nearly anything; each means that this file is not usable
        raise InputError(
            f"{quote(path)}: cannot be read ({getattr(e, 'strerror', None) or type(e).__name__}); expected "
            f"a whole {', '.join(FORMATS)} image: copy it again, or remove it"
        ) from e


def _id_table(name: str, classes: int) -> np.ndarray:
    """(256,) int16: stored value to train id, -1 where the value is not allowed."""
    table = np.full(256, -1, np.int16)
    if name == "cityscapes":
        table[:34] = IGNORE
        table[[v[0] for v in CITYSCAPES.values()]] = np.arange(classes)
    elif name == "ade20k":
        table[: classes + 1] = np.r_[IGNORE, :classes]
        return table
    else:
        table[:classes] = np.arange(classes)
    table[IGNORE] = IGNORE  # in Cityscapes, label id -1 in 8 bit
    return table


def _color_remedy(raw: np.ndarray, dataset: DataSet) -> str:
    if raw.ndim == 3 and raw.shape[2] >= 3:
        if (raw[..., :3] == raw[..., :1]).all():
            return "its channels are equal: keep one of them"
        if {tuple(c) for c in np.unique(raw[..., :3].reshape(-1, 3), axis=0).tolist()} <= {
            (0, 0, 0),
            *dataset.colors,
        }:
            return "its colours are those of the classes: write in place of each colour the number of its class"
    return "write the number of the class in each pixel, as 8-bit grey or palette PNG"


def _range_error(bad: np.ndarray, dataset: DataSet) -> str:
    n = len(dataset.classes)
    expected, mend = {
        "cityscapes": (
            "label ids 0..33",
            "give the *_gtFine_labelIds.png of gtFine_trainvaltest.zip",
        ),
        "ade20k": (
            "0 (ignored) and 1..150",
            "download ADEChallengeData2016.zip; the full ADE20K has more classes",
        ),
    }.get(
        dataset.name,
        (
            f"0..{n - 1} for the {n} classes, or 255 (ignored)",
            "number them in the order of classes.txt",
        ),
    )
    if len(bad) > 8:
        mend = (
            "it looks anti-aliased, resized or once saved as JPEG: make it again with hard edges; or else "
            + mend
        )
    values = ", ".join(map(str, bad[:5].tolist())) + ", ..." * (len(bad) > 5)
    return f"{len(bad)} values out of range: {values}; expected {expected}: {mend}"


# ---- augmentation


def sample(
    dataset: DataSet,
    seed: int,
    epoch: int,
    index: int,
    crop: int,
    scale: tuple[float, float] = (0.5, 2.0),
    relative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training sample: image (3, crop, crop) uint8, label (crop, crop) uint8, colour factors (4,) float32 for
    color_jitter. A pure function of its arguments. Raises InputError that names the file."""
    rng = np.random.default_rng((seed, epoch, index))
    image, label = augment(*read(dataset, index), crop, scale, relative, rng)
    return (
        torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        torch.from_numpy(label),
        draw_jitter(rng),
    )


def augment(
    image: np.ndarray,
    label: np.ndarray,
    crop: int,
    scale: tuple[float, float],
    relative: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Random scale in [min, max] (times crop / short side if relative), crop, flip; image (H, W, 3) and label (H, W)
    uint8 to (crop, crop, 3) and (crop, crop). What lies beyond the image, right and below, is PAD and IGNORE.
    The crop is drawn in the scaled image but taken in the source: only its box is resized."""
    factor = rng.uniform(*scale) * (crop / min(label.shape) if relative else 1)
    y, x = (_window(n, max(1, round(n * factor)), crop, rng) for n in label.shape)
    out, ids = np.full((crop, crop, 3), PAD, np.uint8), np.full((crop, crop), IGNORE, np.uint8)
    out[: y.count, : x.count] = _resize(image, y, x)
    ids[: y.count, : x.count] = label[
        np.ix_(*((w.start + w.pixel * (np.arange(w.count) + 0.5)).astype(int) for w in (y, x)))
    ]
    flip = -1 if rng.random() < 0.5 else 1
    return out[:, ::flip].copy(), ids[:, ::flip].copy()


class _Window(NamedTuple):
    """Along one axis, in source pixels: `count` pixels of the width `pixel` from `start`; `low`..`high` are the source
    pixels that they depend on."""

    start: float
    pixel: float
    count: int
    low: int
    high: int


def _window(n: int, scaled: int, crop: int, rng: np.random.Generator) -> _Window:
    """A random window of at most crop of the pixels of an axis of n pixels, scaled to `scaled`."""
    pixel, count = n / scaled, min(scaled, crop)
    start = int(rng.integers(0, scaled - count + 1)) * pixel
    reach = max(1, pixel) + 1  # of the filter, beyond the window
    return _Window(
        start,
        pixel,
        count,
        max(0, int(start - reach)),
        min(n, math.ceil(start + count * pixel + reach)),
    )


def _resize(image: np.ndarray, y: _Window, x: _Window) -> np.ndarray:
    """The windows' box, bilinear (anti-aliased when shrinking): what resizing the whole image gives there."""
    part = Image.fromarray(np.ascontiguousarray(image[y.low : y.high, x.low : x.high]))
    ends = (
        min(w.start + w.count * w.pixel, w.high) - w.low for w in (x, y)
    )  # min: of rounding at the last pixel
    return np.asarray(
        part.resize(
            (x.count, y.count),
            Image.Resampling.BILINEAR,
            box=(x.start - x.low, y.start - y.low, *ends),
        )
    )


def draw_jitter(rng: np.random.Generator) -> Tensor:
    """Colour factors (4,) float32: brightness, contrast, saturation in [0.7, 1.3], hue in [-0.05, 0.05] turns."""
    return torch.from_numpy(rng.uniform((0.7, 0.7, 0.7, -0.05), (1.3, 1.3, 1.3, 0.05))).float()


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W), 0..255, any type and device, with factors (B, 4) of draw_jitter -> float32, 0..255.
    In this order: times brightness; contrast about the image's mean grey; saturation about the pixel's grey; hue
    turned about the grey axis (in YIQ). All are affine in RGB: one 3x3 matrix and one offset for each image."""
    images, device, factors = (
        images.float(),
        images.device,
        factors.float().cpu(),
    )  # small matrices: no GPU is waited for
    brightness, contrast, saturation, hue = factors.view(-1, 4, 1, 1).unbind(1)  # (B, 1, 1) each
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
    )
    cos, sin = saturation * (2 * math.pi * hue).cos(), saturation * (2 * math.pi * hue).sin()
    one, zero = torch.ones_like(hue), torch.zeros_like(hue)
    turn = torch.cat([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(
        -1, 3, 3
    )  # Y stays
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)  # (B, 3, 3)
    offset = ((1 - contrast) * brightness * to_yiq[0]).to(
        device, non_blocking=True
    )  # (B, 1, 3), of the mean colour
    grey = (images.mean((2, 3))[:, None] * offset).sum(
        2, keepdim=True
    )  # saturation and hue leave it grey
    return (
        (matrix.to(device, non_blocking=True) @ images.flatten(2) + grey)
        .clamp(0, 255)
        .view_as(images)
    )


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), 0..255, to float32 with ImageNet's mean and deviation."""
    mean, std = (
        torch.tensor(v).view(3, 1, 1).to(images.device, non_blocking=True) for v in (MEAN, STD)
    )
    return (images.float() - mean) / std


# ---- loading


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of 0..n-1 in which an epoch goes through the images."""
    return np.random.default_rng((seed, epoch, 0, 1)).permutation(
        n
    )  # the 1 keeps it off the streams of samples


def step_items(
    step: int, *, seed: int, n: int, batch: int, rank: int = 0, world: int = 1
) -> list[tuple[int, int]]:
    """(epoch, index) of each image of a rank's share of a step. An epoch has n // batch steps. InputError if it has none."""
    if n < batch:
        raise InputError(
            f"{n} images are fewer than one batch of {batch}: lower --batch to {n} or less, or add images"
        )
    epoch, k = divmod(step, n // batch)
    first, share = k * batch + rank * (batch // world), batch // world
    return [(epoch, int(i)) for i in order(seed, epoch, n)[first : first + share]]


def train_batches(
    dataset: DataSet,
    *,
    seed: int,
    batch: int,
    start: int,
    stop: int,
    rank: int,
    world: int,
    crop: int,
    scale: tuple[float, float] = (0.5, 2.0),
    relative: bool = False,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share, b = batch // world, of the steps start..stop-1: images (b, 3, crop, crop) uint8, labels
    (b, crop, crop) uint8, factors (b, 4) float32. Raises InputError, at once or at the step of a wrong file."""
    if not dataset.labelled:
        raise InputError(
            f"{dataset.name} {dataset.split} has no ground truth to train on: choose --split train"
        )
    items = partial(step_items, seed=seed, n=len(dataset), batch=batch, rank=rank, world=world)
    items(0)  # raises if there is not one batch
    return _batches(
        partial(_train_item, dataset, seed, crop, scale, relative),
        workers,
        collate_fn=_collate,
        pin_memory=pin,
        batch_sampler=map(items, range(start, stop)),
    )


def eval_items(n: int, rank: int, world: int) -> range:
    """The indices that a rank evaluates: each of n once over all ranks."""
    return range(rank, n, world)


def eval_images(
    dataset: DataSet, rank: int, world: int, workers: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(index, image (3, H, W) uint8, label (H, W) uint8 or None) of this rank's images. Raises InputError."""
    return _batches(
        partial(_eval_item, dataset),
        workers,
        sampler=eval_items(len(dataset), rank, world),
        batch_size=None,
    )


def _train_item(
    dataset: DataSet,
    seed: int,
    crop: int,
    scale: tuple[float, float],
    relative: bool,
    key: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    return sample(dataset, seed, *key, crop, scale, relative)


def _eval_item(dataset: DataSet, index: int) -> tuple[int, np.ndarray, np.ndarray | None]:
    image, label = read(dataset, index)
    return index, image.transpose(2, 0, 1).copy(), None if label is None else np.array(label)


@dataclass(frozen=True)
class _Guard:
    """The map key -> load(key), with an InputError as a value: DataLoader's workers hand on the text of errors only."""

    load: Callable

    def __getitem__(self, key: object) -> object:
        try:
            return self.load(key)
        except InputError as e:
            return e


def _collate(rows: list) -> list[Tensor] | InputError:
    return next((row for row in rows if isinstance(row, InputError)), None) or [
        torch.stack(x) for x in zip(*rows)
    ]


def _leave_signals(worker: int) -> None:
    """Signals that reach the whole process group, Ctrl-C and Slurm's among them, are for the main process, which finishes its
    step. SIGTERM is also how it ends a worker that it has not closed: so that one is put off, by longer than a step takes."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*GROUP_SIGNALS, signal.SIGTERM})


def _batches(load: Callable, workers: int, **options: object) -> Iterator:
    # a generator of its own: DataLoader would otherwise draw from torch's global one
    loader = DataLoader(
        _Guard(load),
        num_workers=workers,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),
        **options,
    )
    for batch in _started(
        loader
    ):  # which no variable holds: in an error's traceback it would keep its workers
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _started(loader: DataLoader) -> Iterator:
    """iter(loader), with signals held back meanwhile: a worker inherits that, until it has its handlers."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {*GROUP_SIGNALS, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
