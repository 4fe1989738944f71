"""Image and label files to arrays, checked."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from classes import CITYSCAPES, IGNORE, Color
from runtime import InputError, counted, quote, regular_file

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def decode_image(path: Path) -> np.ndarray:
    """Any 8-bit image as RGB (H, W, 3) uint8, upright as its EXIF rotation says.

    Drops alpha, converts grey, palette and CMYK, and takes the high byte of 16-bit colour PNGs.
    Raises InputError if the file is no image, is cut off, or is 16-bit grey or float.
    """
    image = _load(path, upright=True)
    if image.mode[0] in "IF":
        raise InputError(f"{quote(path)}: got mode {image.mode}; expected 8 bit: convert it")
    return np.asarray(image)


def decode_label(path: Path, name: str, colors: Sequence[Color]) -> np.ndarray:
    """A PNG of class numbers to train ids 0..n-1 and IGNORE, (H, W) uint8.

    name, colors: the data set, and its n classes. Reads one channel: 8-bit grey, palette (its
    indices), 1 bit, or 16 bit if the values fit. Raises InputError for another format, colours,
    grey of 2 or 4 bit, or values out of range.
    """
    image = _load(path, upright=False)
    if image.format != "PNG":
        raise InputError(
            f"{quote(path)}: got a {image.format}; expected a PNG, which has checksums and keeps "
            "class numbers: make it again from the annotation"
        )
    if image.info["stored"] in ("L;2", "L;4"):  # Pillow reads a 3 of 2 bit as 255
        raise InputError(
            f"{quote(path)}: got grey of 2 or 4 bit, whose numbers are read as brightness; "
            "expected 8 bit: save it as 8-bit grey or palette PNG"
        )
    stored = np.asarray(image)
    if stored.ndim != 2:
        raise InputError(
            f"{quote(path)}: got mode {image.mode}, a label saved as colours; expected one channel "
            f"of class numbers: {_color_remedy(stored, colors)}"
        )
    if stored.dtype == bool:
        stored = stored.astype(np.uint8)
    ids = _id_table(name, len(colors))[stored]
    if ids.min() < 0:
        raise InputError(f"{quote(path)}: {_range_error(stored[ids < 0], name, len(colors))}")
    return ids.astype(np.uint8)


def _load(path: Path, upright: bool) -> Image.Image:
    """The image: as it is stored, or upright, and RGB unless it has more than 8 bit."""
    try:
        if regular_file(path).stat().st_size == 0:
            raise OSError(0, "empty")
        # Pillow gets an open file. It would map a named one into memory: then it reads a rotated
        # raw TIFF in the wrong size, and the process dies if the file is cut during the read.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; decompression bombs are errors
            Image.open(file, formats=FORMATS).verify()  # a PNG's checksums: load() skips some
            image = Image.open(file, formats=FORMATS)
            image.info["stored"] = image.tile[0][3] if image.tile else None  # load() forgets it
            image.load()
        if not upright:
            return image
        image.info.pop("transparency", None)  # otherwise `convert` looks at a palette's alpha
        turned = ImageOps.exif_transpose(image)
        return turned if turned.mode[0] in "IF" else turned.convert("RGB")
    except Image.DecompressionBombError as e:
        raise InputError(f"{quote(path)}: {str(e).rstrip('.')}: cut it into tiles") from e
    except Exception as e:  # decoders raise nearly anything for a broken file
        reason = getattr(e, "strerror", None) or type(e).__name__
        raise InputError(
            f"{quote(path)}: cannot be read ({reason}); expected a whole {', '.join(FORMATS)} "
            "image: copy it again, or remove it"
        ) from e


def _id_table(name: str, classes: int) -> np.ndarray:
    """(65536,) int16: stored value to train id, -1 where the value is not allowed."""
    table = np.full(65536, -1, np.int16)
    if name == "ade20k":
        table[0] = IGNORE
        table[1 : classes + 1] = np.arange(classes)
        return table
    if name == "cityscapes":
        table[:34] = IGNORE
        table[[label_id for label_id, *_ in CITYSCAPES.values()]] = np.arange(classes)
    else:
        table[:classes] = np.arange(classes)
    table[IGNORE] = IGNORE  # in Cityscapes: label id -1, in 8 bit
    return table


def _color_remedy(stored: np.ndarray, colors: Sequence[Color]) -> str:
    if stored.shape[2] >= 3:
        if (stored[..., :3] == stored[..., :1]).all():
            return "its channels are equal: keep one of them"
        seen = np.unique(stored[..., :3].reshape(-1, 3), axis=0).tolist()
        if set(map(tuple, seen)) <= {(0, 0, 0), *colors}:
            return "it has the colours of the classes: replace each colour by its class number"
    return "write the number of the class in each pixel, as 8-bit grey or palette PNG"


def _range_error(values: np.ndarray, name: str, classes: int) -> str:
    """Why the values are wrong, and what to do."""
    if name == "cityscapes":
        expected = "label ids 0..33"
        mend = "give the *_gtFine_labelIds.png of gtFine_trainvaltest.zip"
    elif name == "ade20k":
        expected = "0 (ignored) and 1..150"
        mend = "download ADEChallengeData2016.zip; the full ADE20K has more classes"
    else:
        expected = f"0..{classes - 1}, a number for each class, or 255 (ignored)"
        mend = "number them in the order of classes.txt"
    bad = np.unique(values).tolist()
    if len(bad) > 8:
        mend = (
            "it looks anti-aliased, resized or once saved as JPEG: make it again with hard edges; "
            f"otherwise {mend}"
        )
    listed = ", ".join(map(str, bad[:5]))
    if len(bad) > 5:
        listed += ", ..."
    return f"{counted(len(bad), 'value')} out of range: {listed}; expected {expected}: {mend}"
