"""Mutated images, labels, class lists and checkpoints: read right, or refused by one line."""

import io
import os
import re
import signal
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import RNG, noise, png_of_bits, save
from PIL import Image
from torch import nn

import checkpoint
import classes
import data
import decode
import pictures
import recipe
import runtime
from dnl import PAPER, build
from runtime import InputError

# CASES of each kind, drawn from (kind, number of the case) alone. To run more and see the counts:
# `FAULT_CASES=20000 python -m pytest -s -k mutated`. A case is refused by one line that names the
# file, or its result is one that the test computes itself.
CASES = int(os.environ.get("FAULT_CASES", 2000))


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for the error of a decoder."""


def hang(number, frame):
    raise Hang("10 seconds")


def refused(load, path, case):
    """load()'s result, or None if one line that names the file refuses it.

    Anything else is a failure, and so are 10 seconds without an end.
    """
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(10)
    try:
        return load()
    except InputError as e:
        assert str(path) in str(e) and str(e).isprintable() and len(str(e)) < 20_000, (case, str(e))
    except BaseException as e:
        raise AssertionError(f"{case}: {type(e).__name__}: {e}") from e
    finally:
        signal.alarm(0)


def mutated(rng, good, other):
    """One to three changes of the bytes of a file.

    Flips, cuts, insertions, blocks doubled, zeroed or left out, the end of another file.
    """
    b = bytearray(good)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(b) + 1))
        end = min(len(b), at + int(2 ** rng.uniform(0, 9)))
        kind = rng.integers(7)
        if kind == 0 and at < len(b):
            b[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del b[at:]
        elif kind == 2:
            b[at:at] = rng.bytes(end - at)
        elif kind == 3:
            b[at:at] = b[at:end]
        elif kind == 4:
            b[at:end] = bytes(end - at)
        elif kind == 5:
            del b[at:end]
        else:
            b[at:] = other[int(rng.integers(len(other) + 1)) if rng.integers(2) else at :]
    return bytes(b)


def settled(kind, counts):
    """Print the counts. A mutator that does nothing, or spoils everything, has too few of one."""
    print(
        f"\n{kind}: {sum(counts.values())} cases, {counts['correct']} correct, "
        f"{counts['refused']} refused, 0 other"
    )
    assert (
        sum(counts.values()) >= CASES and min(counts["correct"], counts["refused"]) >= CASES // 20
    ), counts


def written(picture, **options):
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


MODES = {  # of each format, that Pillow keeps without loss
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L",),
    "PPM": ("RGB",),
}
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),  # EXIF 2.3
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def drawn_image(rng, h, w, mode, form, turn):
    """The bytes, and the array (H, W, 3) uint8 that they should give.

    None instead of the array: they should be refused. Ellipsis: ask Pillow.
    """
    colors, v = noise(256, 3, rng)[..., 0], noise(h, w, rng, 4)
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 1)
    stored = {
        "1": v[..., 0] > 127,
        "I;16": v[..., 0].astype(np.uint16) * 257,
        "I": v[..., 0].astype(np.int32),
        "F": v[..., 0].astype(np.float32),
    }.get(mode, v[..., :channels] if channels > 1 else v[..., 0])
    picture = Image.fromarray(stored, "CMYK" if mode == "CMYK" else None)
    shown = {
        "1": np.where(v[..., :1] > 127, 255, 0).repeat(3, 2),
        "RGB": v[..., :3],
        "RGBA": v[..., :3],
        "P": colors[v[..., 0]],
        "CMYK": np.rint((255 - v[..., :3].astype(float)) * (255 - v[..., 3:]) / 255),
    }.get(mode, v[..., :1].repeat(3, 2))
    if mode == "P":
        picture.putpalette(colors.tobytes())
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {
        "TIFF": {"compression": ("raw", "tiff_lzw", "tiff_deflate")[rng.integers(3)]},
        "WEBP": {"lossless": True, "exact": True},
    }.get(form, {})
    raw = written(
        picture, format=form, **options, **({} if form in ("BMP", "GIF", "PPM") else {"exif": exif})
    )
    if form in ("GIF", "PPM") or mode[0] in "IF":
        return raw, None
    return raw, ... if form == "JPEG" else (shown if form == "BMP" else UPRIGHT[turn](shown))


def drawn_bits(rng, h, w):
    """As drawn_image, with the depths that Pillow does not write. Grey is scaled to 255."""
    depth, kind = ((2, 0), (4, 0), (16, 2))[rng.integers(3)]
    values = rng.integers(0, 2**depth, (h, w, 3 if kind else 1))
    shown = None if kind else (values * 255 // (2**depth - 1)).repeat(3, 2)
    return png_of_bits(values, depth, kind), shown


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_mutated_images(tmp_path):
    """A PNG, which has checksums, gives the image that was written, or is refused.

    Another format gives what Pillow decodes, or is refused.
    """
    path, counts = tmp_path / "an image", Counter()
    for number in range(CASES):
        rng = RNG((1, number))
        h, w = rng.integers(1, 40, 2)
        form = list(MODES)[rng.integers(len(MODES))] if rng.integers(2) else "PNG"
        mode, turn = MODES[form][rng.integers(len(MODES[form]))], int(rng.integers(1, 9))
        bits = form == "PNG" and rng.random() < 0.2
        (raw, right), (other, second) = (
            drawn_bits(r, h, w) if bits else drawn_image(r, h, w, mode, form, turn)
            for r in (RNG((2, number)), RNG((2, number)) if bits else RNG((3, number)))
        )
        changed = number % 3 > 0
        path.write_bytes(
            rng.bytes(int(rng.integers(200)))
            if number % 50 == 0
            else mutated(rng, raw, other)
            if changed
            else raw
        )
        got, case = (
            refused(lambda: decode.decode_image(path), path, f"image {number}"),
            f"image {number}: {form} {mode}",
        )
        counts["refused" if got is None else "correct"] += 1
        if got is None:
            assert changed or number % 50 == 0 or right is None, case
            continue
        assert (
            got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3 and right is not None
        ), case
        if (changed and form != "PNG") or right is ...:
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                image.info.pop("transparency", None)
                pixels = np.asarray(image.convert("RGB"))
                try:
                    seen = image.getexif().get(0x0112)
                except Exception:  # a broken block costs no pixels
                    seen = 1
                right = second = UPRIGHT.get(seen, UPRIGHT[1])(pixels)
        near = 1 if mode == "CMYK" else 0
        assert any(
            got.shape == r.shape and np.abs(got - r.astype(int)).max() <= near
            for r in (right, second)
        ), case
    settled("images", counts)


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LABEL_VALUES = {  # of each data set: stored value to train id, those that may be
    "folder": {0: 0, 1: 1, 2: 2, 255: 255},
    "ade20k": {0: 255, **{v: v - 1 for v in range(1, 151)}},
    "cityscapes": {
        **dict.fromkeys([*range(34), 255], 255),
        **{label_id: i for i, label_id in enumerate(CITYSCAPES_IDS)},
    },
}


STORES = (  # how a label is saved; the first seven are drawn most
    "L",
    "P",
    "I;16",
    "palette of greys",
    "class colours",
    "palette of class colours",
    "LA",
    "1",
    "RGB",
    "RGBA",
    "blurred",
    "JPEG",
    "TIFF",
    "BMP",
    "grey of 2",
    "grey of 4",
    "other size",
)
CLASS_COLORS = {0: (255, 0, 0), 1: (0, 255, 0), 2: (0, 0, 255), 255: (255, 255, 255)}


def drawn_label(rng, h, w, name, store):
    """(bytes, their train ids, or None to be refused)."""
    values = rng.choice(list(LABEL_VALUES[name]), (h, w))
    for _ in range(rng.integers(3) if store in ("L", "P", "I;16", "class colours") else 0):
        top = 2**16 if store == "I;16" else 256
        values[rng.integers(h), rng.integers(w)] = rng.integers(-1, 2**16) % top
    legal = set(values.ravel().tolist()) <= set(LABEL_VALUES[name])
    stored = values.astype(np.uint16 if store == "I;16" else np.uint8)
    picture = Image.fromarray(stored)
    if store == "P":
        picture.putpalette(rng.bytes(768))
    elif store == "palette of greys":  # as an optimiser makes it, in order or not
        used = np.unique(values) if rng.integers(2) else rng.permutation(np.unique(values))
        if rng.integers(3) == 0:  # in the order of all greys: what it was
            used = np.arange(256)
        picture = Image.fromarray(
            np.argsort(used).astype(np.uint8)[np.searchsorted(np.sort(used), values)]
        )
        picture.putpalette(bytes(used.astype(np.uint8).repeat(3)))
        legal = len(used) == 256 or used.tolist() == list(range(len(used)))
    elif "class colours" in store:
        table = noise(256, 3, rng)[..., 0] | 1  # of numbers without a class: odd, and so no colour
        table[list(CLASS_COLORS)] = list(CLASS_COLORS.values())
        if "palette" not in store:
            picture = Image.fromarray(table[stored])
            legal &= name == "folder"
        else:
            if swapped := rng.integers(2) > 0:
                table[[0, 1]] = table[[1, 0]]
            picture.putpalette(table.tobytes())
            legal &= not (swapped and name == "folder" and (values < 2).any())
    elif store == "blurred":
        size = (w, h)
        large = Image.fromarray(noise(h + 4, w + 4, rng)[..., 0])
        picture = large.resize(size, Image.Resampling.BILINEAR)
        values = np.asarray(picture)
        legal = set(values.ravel().tolist()) <= set(LABEL_VALUES[name])
    elif store == "1":
        picture = Image.fromarray(values % 2 > 0)
    elif store == "other size":
        picture = picture.resize((w, h + 1), Image.Resampling.NEAREST)
    elif store in ("RGB", "RGBA", "LA"):
        picture = picture.convert(store)
    form = store if store in ("JPEG", "TIFF", "BMP") else "PNG"
    raw = written(picture, format=form)
    if store in ("grey of 2", "grey of 4"):
        raw = png_of_bits(values[..., None] % 4, int(store[-1]), 0)
    readable = store in ("L", "P", "I;16", "palette of greys", "class colours")
    readable |= store in ("palette of class colours", "blurred")
    if not (readable and legal):
        return raw, None
    return raw, np.vectorize(LABEL_VALUES[name].get)(values).astype(np.uint8)


def test_mutated_labels(tmp_path):
    """A label gives the train ids of the values that were written, or is refused.

    With a value that is not allowed it is always refused.
    """
    path, counts = tmp_path / "a label", Counter()
    sets = {}
    for name in LABEL_VALUES:
        found = classes.classes_of(name, Path()) if name != "folder" else None
        names = found.names if found else ("a", "b", "c")
        sets[name] = data.DataSet(name, "train", names, (), ())
    numbers = {color: number for number, color in CLASS_COLORS.items()}
    sets["folder"] = replace(sets["folder"], numbers=numbers)
    for number in range(CASES):
        rng = RNG((4, number))
        (h, w), name = rng.integers(2, 40, 2), list(sets)[rng.integers(3)]
        store = STORES[rng.integers(len(STORES) if number % 2 else 7)]
        (raw, right), (other, second) = (
            drawn_label(RNG((s, number)), h, w, name, store) for s in (5, 6)
        )
        changed = number % 3 > 0
        path.write_bytes(mutated(rng, raw, other) if changed else raw)
        save(tmp_path / "image.png", noise(h, w))
        dataset = replace(sets[name], items=(data.Item(tmp_path / "image.png", path),))
        got = refused(partial(data.read, dataset, 0), path, f"label {number}")
        case = f"label {number}: {name} {store}"
        counts["refused" if got is None else "correct"] += 1
        if got is None:
            assert changed or right is None, case
        else:
            assert got[1].dtype == np.uint8, case
            assert any(r is not None and np.array_equal(got[1], r) for r in (right, second)), case
    settled("labels", counts)


def is_list_of_a_tool(names):
    """Whether a name is written as in YAML, JSON or code, or all are behind their own numbers."""
    firsts = []
    for name in names:
        dense = "".join(name.split())
        if any(bracket + mark in dense for bracket in "[({" for mark in "'\""):
            return True
        if name[0] in "'\"" or name in ("[", "(", "{") or name[-1] in ":,":
            return True
        if name[:2] in ("- ", "* ", "\u2022 "):
            return True
        while not (name[0].isalnum() or name[0] == "_"):
            name = name[1:]
        digits = name[: len(name) - len(name.lstrip("0123456789"))]
        rest = name[len(digits) :]
        if 1 <= len(digits) <= 3 and rest and not (rest[0].isalnum() or rest[0] == "_"):
            firsts.append(int(digits))
    from_0 = len(firsts) > 1 and firsts == list(range(len(firsts)))
    return from_0 or firsts == list(range(1, len(names.keys() - {"(ignored)"}) + 1))


def parsed_classes(raw):
    """classes.txt by regular expressions: names, {name: colour or None}, or None to be refused."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None
    rows = []
    number = r"(?:^|(?<=[\s,:;=|(){}\[\]\"']))[-+]?[0-9]+(?:\.[0-9]*)?(?=[\s,:;=|(){}\[\]\"']|$)"
    for line in map(str.strip, text.split("\n")):
        if not line or line[0] == "#":
            continue
        of_colour = re.fullmatch(r"(.*\S)\s+(\S+)\s+(\S+)\s+(\S+)", line, re.S)
        found = re.findall(number, line)
        if line == "__ignore__" or re.search(r"\b(r|red)\W+(g|green)\W+(b|blue)\b", line, re.I):
            return None
        if len(found) < 3:
            rows.append((line, None))
        elif of_colour and list(of_colour.groups()[1:]) == found:
            if not all(re.fullmatch("[0-9]{1,3}", v) and int(v) < 256 for v in found):
                return None
            rows.append((of_colour[1], tuple(map(int, found))))
        else:
            return None
    names = dict(rows)
    if len(names) < len(rows) or not all(n.isprintable() and re.search(r"\w", n) for n in names):
        return None
    if "(ignored)" in names and names["(ignored)"] is None:
        return None
    if is_list_of_a_tool(names):
        return None
    return names if 1 < len(names.keys() - {"(ignored)"}) < 256 else None


CLASS_LINES = [
    "road 128 64 128",
    "tree",
    "дом 1 2 3",
    "a  b\t0 0 0",
    "# note",
    "",
    "   ",
    "x 256 0 0",
    "y -1 2 3",
    "1 2 3",
    "z 007 1 1",
    "w 1 2",
    "q 1 2 3 4",
    "nul\0name",
    "esc\x1b[2J 1 1 1",
    "long " + "9" * 5000 + " 1 1",
    "\u202eabc 1 1 1",
    "tab\there",
    "zero\u200bwidth",
    "\u00a0nbsp 1 1 1",
    "x\u2028y",
    "٣ ٣ ٣ ٣",
    "1e2 1 1 1",
    "+1 1 1",
    "tree 1 1 1",
    "é",
    "e\u0301",
    "(ignored) 1 1 1",
    "(ignored)",
    "__ignore__",
    "name,r,g,b",
    "Name Red Green Blue",
    "a:1,2,3::",
    "road,1,2,3",
    "1 2 3 road",
    "road (1, 2, 3)",
    "road 0.5 0.5 1.",
    "lane 2 of 3",
    "0: a",
    "1: b",
    "2. c",
    "names:",
    "- d",
    "'e'",
    "[void]",
    "f = ('g',",
]
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1251", "utf-7")


def test_mutated_class_lists(tmp_path):
    path, counts, defaults = tmp_path / "classes.txt", Counter(), classes.palette(255)
    for number in range(CASES):
        rng = RNG((7, number))
        many = int(rng.integers(240, 260)) if number % 10 == 0 else 0
        lines = [f"class_{i} {i} {i} {i}" if number % 20 else f"class {i}" for i in range(many)]
        lines += [
            CLASS_LINES[i]
            for i in rng.integers(0, len(CLASS_LINES) if number % 2 else 8, rng.integers(0, 6))
        ]
        lines += [f"c{i} {i} 2 3" for i in range(rng.integers(0, 4))]
        raw = (
            ("\n", "\r\n", "\r")[rng.integers(3)]
            .join(lines)
            .encode(ENCODINGS[rng.integers(len(ENCODINGS))], "replace")
        )
        path.write_bytes(mutated(rng, raw, b"a 1 2 3\nb 4 5 6\n") if number % 3 == 0 else raw)
        got, right = (
            refused(lambda: classes.read_classes(path), path, f"class list {number}"),
            parsed_classes(path.read_bytes()),
        )
        counts["refused" if got is None else "correct"] += 1
        assert (got is None) == (right is None), f"class list {number}: {got} for {right}"
        if got is not None:
            ignored = right.pop("(ignored)", None)
            given = [*right.values()]
            once = {c: i for i, c in enumerate(given) if c and [*given, ignored].count(c) == 1}
            if ignored and ignored not in given:
                once[ignored] = 255
            assert got.names == tuple(right) and got.numbers == once, f"class list {number}"
            colors = tuple(c or d for c, d in zip(given, defaults))
            assert got.colors == colors, f"class list {number}"
    settled("class lists", counts)


def small_checkpoint(seed):
    """A checkpoint as train.py writes it, of 3 classes."""
    torch.manual_seed(seed)
    net = build(replace(PAPER, backbone="resnet18", channels=4, num_classes=3))
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return {
        "version": checkpoint.VERSION,
        "model": dict(net.state_dict()),
        "optimizer": {"state": {0: torch.rand(3)}, "lr": 0.1},
        "config": asdict(net.config),
        "settings": {"lr": 0.1},
        "data": "folder",
        "root": f"/somewhere/{seed}",
        "classes": ["a", "b", f"c{seed}"],
        "colors": [[seed, 2, 3], [4, 5, 6], [7, 8, 9]],
        "amp": "off",
        "step": 7,
        "epoch": 1,
        "best": 0.5,
        "sums": torch.rand(3),
        "history": [{"miou": 0.5}],
    }


class Evil:
    """A pickle that would make a folder where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("touched by a checkpoint",)


def garbage(rng):
    """A value that a field should not have, or might."""
    nested = []
    for _ in range(200):
        nested = [nested]
    some = [
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        5,
        4,
        7,
        256,
        10**6 + 1,
        10**12,
        10**30,
        -(10**30),
        0.5,
        1.0,
        float("nan"),
        float("inf"),
        "",
        "x",
        "a",
        "dnl",
        "nl",
        "none",
        "res3",
        "feature",
        "resnet34",
        "os:system",
        "a\nb",
        "\0",
        "fp16",
        "bf16",
        "synthetic",
        b"x",
        (1,),
        [],
        [1],
        [[1, 2, 3]] * 3,
        ["a", "b"],
        ["a", "a", "b"],
        ["d", "e", "f"],
        ["x\ny", "b", "c"],
        {},
        {"a": 1},
        {1: 2},
        nested,
        Evil(),
        torch.zeros(0),
        torch.zeros(3),
        torch.zeros(3).half(),
        torch.rand(3).double(),
        torch.full((3,), float("nan")),
        torch.zeros(1).expand(10**12),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64),
        nn.Parameter(torch.zeros(3)),
    ]
    return some[rng.integers(len(some))]


def warp(rng, tensor):
    """A tensor of another kind, shape or type, or of the same and other values."""
    kinds = [
        tensor.double,
        tensor.half,
        tensor.flatten,
        lambda: tensor[None],
        lambda: tensor.flatten()[:0],
        lambda: tensor.to("meta"),
        lambda: tensor * float("nan"),
        lambda: tensor.new_zeros(1).expand(10**9, *tensor.shape),
        lambda: tensor + 1,
        lambda: tensor.new_zeros(()).expand(tensor.shape),
        tensor.to_sparse,
        lambda: tensor.flip(0) if tensor.dim() else tensor + 2,
    ]
    return kinds[rng.integers(len(kinds))]()


def spoiled(rng, value, depth=0):
    """The nested value with one thing in it replaced, left out, added or warped.

    The top fields are drawn as often as the deep ones.
    """
    if isinstance(value, dict) and value and depth < 3 and rng.random() < 0.95:
        value, keys = dict(value), list(value)
        key, kind = keys[rng.integers(len(keys))], rng.integers(8)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[("extra", "a\nb", 5)[rng.integers(3)]] = garbage(rng)
        else:
            value[key] = spoiled(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = int(rng.integers(len(value)))
        return [
            value[:at] + value[at + 1 :],
            [*value, garbage(rng)],
            [*value[:at], spoiled(rng, value[at], 2), *value[at + 1 :]],
        ][rng.integers(3)]
    return (
        warp(rng, value) if isinstance(value, torch.Tensor) and rng.random() < 0.7 else garbage(rng)
    )


def alike(a, b, within=()):
    """Whether two nested values are the same, tensors bit for bit and of one type.

    within: the values around these; a value can lie in itself.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        plain = all(
            t.layout is torch.strided and t.device.type == "cpu" and t.numel() < 10**6
            for t in (a, b)
        )
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and (not plain or a.detach().numpy().tobytes() == b.detach().numpy().tobytes())
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, (dict, list, tuple)):
        pairs = zip(a.items(), b.items()) if isinstance(a, dict) else zip(a, b)
        return len(a) == len(b) and (
            id(a) in within or all(alike(x, y, (*within, id(a))) for x, y in pairs)
        )
    return a == b or (a != a and b != b)


def usable(net, checkpoint, case):
    """A network that was loaded is what the file says, and the scripts can use it."""
    assert asdict(net.config) == checkpoint["config"] and not net.training, case
    state = net.state_dict()
    assert all(
        torch.equal(v, state[k]) and v.dtype == state[k].dtype
        for k, v in checkpoint["model"].items()
    ), case
    assert all(k in checkpoint["model"] or k.endswith("num_batches_tracked") for k in state), case
    names, colors = checkpoint["classes"], checkpoint["colors"]
    assert len(set(names)) == len(names) == len(colors) == net.config.num_classes and all(
        n.isprintable() for n in names
    ), case
    assert (
        pictures.colorize(np.zeros((2, 2), np.uint8), colors).mode == "P"
        and runtime.AMP.get(checkpoint["amp"], 0) != 0
    ), case
    with torch.inference_mode():
        out = net(torch.rand(1, 3, 33, 40))
    assert out.shape == (1, len(names), 33, 40) and out.isfinite().all(), case
    assert checkpoint["data"] in recipe.SETTINGS and (
        checkpoint["root"] is None or isinstance(checkpoint["root"], str)
    ), case


def zipped_again(rng, raw, other):
    """The file with its pickle mutated and the checksums made right.

    Now and then all entries are compressed.
    """
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED * int(rng.random() < 0.1)) as new,
    ):
        for entry in old.namelist():
            data_of = old.read(entry)
            new.writestr(
                entry, mutated(rng, data_of, other) if entry.endswith("data.pkl") else data_of
            )
    return file.getvalue()


def test_mutated_checkpoints(tmp_path, monkeypatch, stub):
    """A checkpoint gives the weights and fields that were written, or is refused.

    If the mutated file has right checksums, it gives those that torch reads.
    """
    monkeypatch.chdir(tmp_path)
    path, counts = tmp_path / "a checkpoint.pt", Counter()
    whole = [small_checkpoint(seed) for seed in (1, 2)]
    raws = []
    for fields in whole:
        file = io.BytesIO()
        torch.save(fields, file)
        raws.append(file.getvalue())
    for number in range(CASES):
        rng, case, legal = RNG((8, number)), f"checkpoint {number}", whole
        if number % 3 == 0:  # of bytes: noticed by checksums
            path.write_bytes(mutated(rng, raws[0], raws[1]) if number % 30 else raws[0])
        elif number % 3 == 1:  # of bytes, with right checksums
            path.write_bytes(zipped_again(rng, raws[0], b"(lp0\n."))
            legal = None
        else:  # of structure
            key = (*whole[0], "config", "config", "config", "config", "model", "classes", "colors")[
                rng.integers(len(whole[0]) + 7)
            ]
            legal = [
                whole[0] | {key: spoiled(rng, whole[0][key], 1)}
                if number % 2
                else spoiled(rng, whole[0])
            ]
            torch.save(legal[0], path)
        got = refused(lambda: checkpoint.load_network(path, torch.device("cpu")), path, case)
        counts["refused" if got is None else "correct"] += 1
        assert got is not None or number % 30, case  # the file as it was written
        if got is not None:
            assert any(
                alike(got[1], x)
                for x in legal or [torch.load(path, map_location="cpu", weights_only=True)]
            ), case
            usable(*got, case)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a checkpoint wrote something"
    settled("checkpoints", counts)
