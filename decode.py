"""Image and label files to arrays, checked."""

import io
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from classes import CITYSCAPES, IGNORE, Color
from runtime import InputError, counted, quote, regular_file

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MARKS = {"GIF": b"GIF8", "HEIC or AVIF": b"ftyp", "JPEG 2000": b"jP  ", "PSD": b"8BPS"}
TURNS = (  # of EXIF's orientations 1..8
    None,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def decode_image(path: Path) -> np.ndarray:
    """Any 8-bit image as RGB (H, W, 3) uint8, upright as its EXIF rotation says.

    Drops alpha, and converts grey, palette and CMYK. Raises InputError if the file is no image, is
    cut off, or has more than 8 bit a channel.
    """
    image = _load(path)
    if image.mode[0] in "IF":
        raise InputError(f"{quote(path)}: got mode {image.mode}; expected 8 bit: convert it")
    image.info.pop("transparency", None)  # otherwise `convert` looks at a palette's alpha
    turn = TURNS[orientation(image) - 1]
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(image.convert("RGB"))


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1..8: 1 is upright. 1 if the EXIF block is missing or broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(0x0112)
    except Exception:  # nearly anything; a broken block costs no pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def header(path: Path) -> tuple[str, bool]:
    """Pillow's mode of an image, and whether EXIF says that it is to be shown turned."""
    with open(path, "rb") as file:
        image = _tolerant(file, partial(Image.open, formats=FORMATS))
        return image.mode, orientation(image) > 1


def decode_label(path: Path, name: str, classes: int, numbers: Mapping[Color, int]) -> np.ndarray:
    """A PNG label to train ids 0..classes-1 and IGNORE, (H, W) uint8.

    name: the data set. numbers: the train id of each colour that classes.txt gives. Reads class
    numbers in one channel: 8-bit grey, a palette's indices, or 16 bit if the values fit. Reads
    colours too, if classes.txt gives each class its own. Raises InputError for anything else.
    """
    image = _load(path)
    place = quote(path)
    if image.format != "PNG":
        raise InputError(
            f"{place}: got a {image.format}; expected a PNG, which has checksums and keeps class "
            "numbers: make it again from the annotation"
        )
    # Pillow reads a 3 of 2 bit as 255. Of 1 bit, white is 1 here and 255 once it is saved as 8 bit.
    if image.info["stored"] in ("1", "L;2", "L;4"):
        raise InputError(
            f"{place}: got grey of 1, 2 or 4 bit, whose numbers are read as brightness; expected "
            "8 bit: save it as 8-bit grey with the class numbers"
        )
    stored = np.asarray(image)
    if image.mode == "P":
        _check_palette(np.reshape(image.getpalette() or [], (-1, 3)), stored, numbers, place)
    if stored.ndim == 3 and stored.shape[2] > 2:
        return _ids_of_colors(stored, name, classes, numbers, place)
    grey = stored if stored.ndim == 2 else stored[..., 0]
    ids = _id_table(name, classes)[grey]
    if ids.min() < 0:
        raise InputError(f"{place}: {_range_error(grey[ids < 0], name, classes)}")
    if stored.ndim == 3:
        raise InputError(f"{place}: got grey + alpha; expected grey: drop the alpha channel")
    return ids.astype(np.uint8)


def _check_palette(
    palette: np.ndarray, indices: np.ndarray, numbers: Mapping[Color, int], place: str
) -> None:
    """InputError if a palette (n, 3) says that its indices are no class numbers."""
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=len(palette)))
    used = used[used < len(palette)]
    # Optimisers keep only the colours in use, so one that is not grey speaks for a real palette.
    moved = used[palette[used, 0] != used]
    if moved.size and (palette == palette[:, :1]).all():
        raise InputError(
            f"{place}: got a palette of greys in which index {moved[0]} is the grey "
            f"{palette[moved[0], 0]}, as if renumbered by a PNG optimiser; expected class numbers: "
            "save it as 8-bit grey: if its greys are numbers, Image.open(FILE).convert('L'); if "
            "the indices are, Image.fromarray(numpy.array(Image.open(FILE)))"
        )
    for i in used[used != IGNORE].tolist():
        r, g, b = palette[i].tolist()
        number = numbers.get((r, g, b), i)
        if number != i:
            raise InputError(
                f"{place}: got a palette in which index {i} has the colour {r} {g} {b}, which "
                f"classes.txt gives to class {number}; expected class numbers: save it as 8-bit "
                "grey with the numbers of classes.txt, or as RGB"
            )


def _ids_of_colors(
    stored: np.ndarray, name: str, classes: int, numbers: Mapping[Color, int], place: str
) -> np.ndarray:
    """Train ids (H, W) of an RGB or RGBA label whose colours are all in classes.txt."""
    got = f"{place}: got a label saved as colours"
    complete = len({*numbers.values()} - {IGNORE}) == classes
    opaque = stored.shape[2] == 3 or (stored[..., 3] == 255).all()
    codes = stored[..., :3].astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    if complete and opaque:
        listed = sorted(numbers)
        keys = np.array(listed) @ [1 << 16, 1 << 8, 1]
        places = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
        wrong = codes[keys[places] != codes]
        if not wrong.size:
            return np.array([numbers[c] for c in listed], np.uint8)[places]
    if (stored[..., :3] == stored[..., :1]).all():
        raise InputError(f"{got}; its channels are equal: keep one of them")
    if name != "folder":
        raise InputError(f"{got}; expected class numbers: {_expected(name, classes)[1]}")
    if not complete:
        raise InputError(
            f"{got}; expected one channel of class numbers: save it as 8-bit grey with the number "
            "of the class in each pixel, or give each class a colour of its own in classes.txt, "
            "`name R G B`"
        )
    if not opaque:
        raise InputError(f"{got}, with pixels that are not opaque: drop the alpha channel")
    raise InputError(f"{got}: {_color_error(wrong)}")


def _color_error(codes: np.ndarray) -> str:
    """Which colours, as numbers 0xRRGGBB, are not in classes.txt, and what to do."""
    found, counts = np.unique(codes, return_counts=True)
    most = counts.argmax()
    r, g, b = found[most] >> 16, found[most] >> 8 & 255, found[most] & 255
    text = f"{counted(counts[most], 'pixel')} of the colour {r} {g} {b}"
    if len(found) > 1:
        text += f" and {counted(counts.sum() - counts[most], 'pixel')} of other colours"
    mend = "add its line `name R G B`, or `(ignored) R G B` if the pixels have no class"
    if len(found) > 8:
        mend = "anti-aliased, resized or once a JPEG? Make it again with hard edges"
    return f"{text}; expected those of classes.txt: {mend}"


def _load(path: Path) -> Image.Image:
    """The image as it is stored. InputError if it is broken or a colour has 16 bit."""
    head = b""
    try:
        if regular_file(path).stat().st_size == 0:
            raise OSError(0, "empty")
        # Pillow gets an open file. It would map a named one into memory: then it reads a rotated
        # raw TIFF in the wrong size, and the process dies if the file is cut during the read.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; decompression bombs are errors
            head = file.read(12)
            image = _tolerant(file, _open_whole)
    except Image.DecompressionBombError as e:
        raise InputError(f"{quote(path)}: {str(e).rstrip('.')}: cut it into tiles") from e
    except Exception as e:  # decoders raise nearly anything for a broken file
        reason = getattr(e, "strerror", None) or type(e).__name__
        got, mend = f"cannot be read ({reason})", "copy it again, or remove it"
        if isinstance(e, UnidentifiedImageError):
            for kind, mark in MARKS.items():
                if mark in head:
                    got, mend = f"got a {kind}", "convert it"
        raise InputError(
            f"{quote(path)}: {got}; expected a whole {', '.join(FORMATS)} image: {mend}"
        ) from e
    if image.info["deep"] and image.mode[0] not in "IF":  # Pillow takes the high byte
        raise InputError(f"{quote(path)}: got colours of 16 bit; expected 8 bit: convert it")
    return image


def _open_whole(file: BinaryIO) -> Image.Image:
    """The image with its pixels. info: `stored`, Pillow's name of how, and `deep`, above 8 bit."""
    Image.open(file, formats=FORMATS).verify()  # a PNG's checksums: load() skips some
    image = Image.open(file, formats=FORMATS)
    stored = image.tile[0][3] if image.tile else ""  # load() forgets it
    bits = image.tag_v2.get(258, (8,)) if isinstance(image, TiffImageFile) else (8,)
    image.info["stored"] = stored
    image.info["deep"] = str(stored).endswith(";16B") or max(bits) > 8
    image.load()
    return image


def _tolerant(file: BinaryIO, opener: Callable[[BinaryIO], Image.Image]) -> Image.Image:
    """opener(file), again without a PNG's text if Pillow refuses that."""
    try:
        return opener(file)
    except ValueError:
        return opener(_without_text(file))


def _without_text(file: BinaryIO) -> BinaryIO:
    """The file; of a PNG without text and colour profile, which Pillow refuses above 1 MB."""
    file.seek(0)
    raw = file.read()
    if not raw.startswith(b"\x89PNG"):
        return io.BytesIO(raw)
    at = 8
    kept = [raw[:at]]
    while at < len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4], "big")
        if raw[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(raw[at:end])
        at = end
    return io.BytesIO(b"".join(kept))


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


def _expected(name: str, classes: int) -> tuple[str, str]:
    """The values that a label may hold, and what to do if it holds others."""
    if name == "cityscapes":
        return "label ids 0..33", "give the *_gtFine_labelIds.png of gtFine_trainvaltest.zip"
    if name == "ade20k":
        mend = "download ADEChallengeData2016.zip; the full ADE20K has more classes"
        return "0 (ignored) and 1..150", mend
    expected = f"0..{classes - 1}, a number for each class, or 255 (ignored)"
    return expected, "number them in the order of classes.txt"


def _range_error(values: np.ndarray, name: str, classes: int) -> str:
    """Why the values are wrong, and what to do."""
    expected, mend = _expected(name, classes)
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
