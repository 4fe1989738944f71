"""check.py: each wrong file or tree is one line that names it."""

import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from helpers import (
    IMAGE,
    LABEL,
    RNG,
    TINY,
    halve,
    noise,
    png_of_bits,
    report_of,
    save,
    script,
    status_of,
)
from PIL import Image

import check
import data
import train
from runtime import InputError


def labels_of(folder, split, *values):
    for i, path in enumerate(sorted((folder / "labels" / split).glob("*.png"))):
        save(path, RNG(i).choice(np.uint8(values), (30, 40)))


@pytest.mark.parametrize(
    "train, val, warnings",
    [
        ((0, 255), (0, 1, 2), ["train: the labels hold only 0 and 255", "train: .*: water, ice"]),
        ((0, 1), (0, 1, 2), ["train: classes without a pixel: ice"]),
        ((0, 1, 2), (0, 255), ["val: the labels hold only 0 and 255", "val: .*: water, ice"]),
        ((255,), (0, 1, 2), ["train: no pixel has a class, all are ignored"]),
        ((0, 1, 2, 255), (0, 1, 2), []),
    ],
)
def test_warns_of_each_split_by_itself(folder, capsys, train, val, warnings):
    labels_of(folder, "train", *train)
    labels_of(folder, "val", *val)
    status, report = report_of(capsys, "--data", "folder", "--root", folder)
    assert status == 0 and len(report["warnings"]) == len(warnings)
    assert all(map(re.match, warnings, report["warnings"]))


@pytest.mark.parametrize(
    "values, words", [((255,), "only 255"), ((0, 255), "the class 'dry land'")]
)
def test_training_needs_two_classes(folder, tmp_path, values, words):
    labels_of(folder, "train", *values)
    with pytest.raises(InputError, match=f"labels/train/a 0.png: .*{words}.*nothing to tell apart"):
        train.main([*TINY, "--root", str(folder), "--batch", "2", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    labels_of(folder, "train", *values, 1, 2)
    data.require_classes(data.open_dataset("folder", folder, "train"))


def test_warns_of_train_ids(cityscapes, tmp_path, capsys):
    root = shutil.copytree(cityscapes, tmp_path / "c")
    for values, expected in (
        ([*range(19), 255], True),
        (range(19), False),  # label ids of a street without a tree, a car and 255
        ([*range(20), 255], False),
    ):
        for path in root.glob("gtFine/*/*/*.png"):
            save(path, RNG(0).choice(np.uint8([*values]), (1024, 2048)))
        _, report = report_of(capsys, "--data", "cityscapes", "--root", root, "--split", "val")
        assert expected == any("these look like labelTrainIds" in w for w in report["warnings"])


def test_lists_what_it_leaves_out(folder, capsys):
    (folder / "images/train/b.HEIC").write_bytes(b"")
    save(folder / "labels/val/old.tif", noise(3, 3))
    _, report = report_of(capsys, "--data", "folder", "--root", folder)
    assert report["splits"]["train"]["left_out"] == [str(folder / "images/train/b.HEIC")]
    assert report["splits"]["val"]["left_out"] == [str(folder / "labels/val/old.tif")]
    assert status_of(check.main, "--data", "folder", "--root", folder, "--workers", 0) == 0
    assert (
        f"left out (no image or label)  {folder / 'images/train/b.HEIC'}" in capsys.readouterr().out
    )


def bomb(path):
    """A PNG of a few bytes that says it has 40000 x 40000 pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
        )
    )


IDS = RNG(0).integers(0, 3, (30, 40), np.uint8)


def colours(path):
    table = np.uint8([(200, 100, 0), (0, 0, 255)])
    save(path, table[IDS % 2])


def palette(*colors):
    """A label whose palette is exactly these colours."""

    def spoil(path):
        image = Image.fromarray(IDS % len(colors))
        image.putpalette([v for color in colors for v in color])
        save(path, image)

    return spoil


def grey_alpha(path, ids=IDS):
    save(path, Image.merge("LA", [Image.fromarray(ids), Image.new("L", (40, 30), 255)]))


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the sizes stay
    save(path.parents[2] / IMAGE, noise(30, 40), exif=exif)
    save(path, np.zeros((15, 20), np.uint8))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


WRONG_FILES = {  # name: the file, what is done to it, words of the line
    "truncated": (IMAGE, halve, "cannot be read"),
    "wrong checksum": (
        LABEL,
        lambda p: p.write_bytes(p.read_bytes()[:-16] + b"oops" + p.read_bytes()[-12:]),
        "cannot be read",
    ),
    "truncated label": (LABEL, halve, "cannot be read"),
    "not an image": (
        IMAGE,
        lambda p: p.write_text("hello"),
        "cannot be read (UnidentifiedImageError)",
    ),
    "empty": (LABEL, lambda p: p.write_bytes(b""), "empty"),
    "pipe": (IMAGE, pipe, "not a file"),
    "dangling": (
        IMAGE,
        lambda p: (p.unlink(), p.symlink_to(p.parent / "gone.png")),
        "no such file",
    ),
    "bomb": (IMAGE, bomb, "decompression bomb"),
    "16 bit": (IMAGE, lambda p: save(p, np.zeros((30, 40), np.uint16)), "mode I;16"),
    "float": (IMAGE, lambda p: save(p, np.zeros((30, 40), np.float32), format="TIFF"), "mode F"),
    "GIF": (IMAGE, lambda p: save(p, noise(30, 40), format="GIF"), "got a GIF; expected"),
    "HEIC": (IMAGE, lambda p: p.write_bytes(b"\0\0\0\x24ftypheic"), "got a HEIC or AVIF; expected"),
    "16 bit colours": (
        IMAGE,
        lambda p: p.write_bytes(png_of_bits(np.zeros((30, 40, 3), int), 16, 2)),
        "got colours of 16 bit; expected 8 bit",
    ),
    "16 bit colour label": (
        LABEL,
        lambda p: p.write_bytes(png_of_bits(np.zeros((30, 40, 3), int), 16, 2)),
        "got colours of 16 bit; expected 8 bit",
    ),
    "sizes": (
        LABEL,
        lambda p: save(p, np.zeros((20, 30), np.uint8)),
        "label of 20x30 (height x width), image of 30x40; expected one size: make the label again",
    ),
    "sizes swapped": (
        LABEL,
        lambda p: save(p, np.zeros((40, 30), np.uint8)),
        "a 1.png as its EXIF rotation shows it",
    ),
    "sizes of a turned image": (LABEL, turned, "a 1.png as its EXIF rotation shows it"),
    "palette of greys": (
        LABEL,
        palette((0, 0, 0), (5, 5, 5), (15, 15, 15)),
        "index 1 is the grey 5, as if renumbered by a PNG optimiser; expected class numbers",
    ),
    "palette of another class": (
        LABEL,
        palette((9, 9, 9), (200, 100, 0)),
        "index 1 has the colour 200 100 0, which classes.txt gives to class 0",
    ),
    "1 bit": (LABEL, lambda p: save(p, IDS > 1), "got grey of 1, 2 or 4 bit"),
    "grey and alpha": (LABEL, grey_alpha, "got grey + alpha; expected grey: drop the alpha"),
    "grey and alpha, range": (
        LABEL,
        lambda p: grey_alpha(p, IDS + 1),
        "1 value out of range: 3; expected 0..2",
    ),
    "range": (
        LABEL,
        lambda p: save(p, np.full((30, 40), 3, np.uint8)),
        "1 value out of range: 3; expected 0..2",
    ),
    "16 bit range": (
        LABEL,
        lambda p: save(p, np.full((30, 40), 300, np.uint16)),
        "out of range: 300;",
    ),
    "anti-aliased": (LABEL, lambda p: save(p, noise(30, 40)[..., 0]), "looks anti-aliased"),
    "jpeg label": (
        LABEL,
        lambda p: save(p, np.zeros((30, 40), np.uint8), format="JPEG"),
        "got a JPEG",
    ),
    "class colours": (LABEL, colours, "give each class a colour of its own in classes.txt"),
    "grey as RGB": (
        LABEL,
        lambda p: save(p, np.zeros((30, 40, 3), np.uint8)),
        "its channels are equal",
    ),
    "RGBA": (LABEL, lambda p: save(p, noise(30, 40, channels=4)), "saved as colours"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file(folder, case, capsys):
    name, spoil, words = WRONG_FILES[case]
    spoil(folder / name)
    dataset = data.open_dataset("folder", folder, "train")  # reads no file
    with pytest.raises(InputError) as error:
        data.sample(dataset, 0, 0, 1, 16)
    line = str(error.value)
    assert line.startswith(str(folder / name) + ": ") and words in line and "\n" not in line
    status, report = report_of(capsys, "--data", "folder", "--root", folder)
    assert status == 1 and report["problems"] == [line] and report["splits"]["train"]["pairs"] == 2


def test_progress_counts_the_wrong_files_of_its_split(folder, capsys):
    halve(folder / IMAGE)
    (folder / "labels/train/a 2.png").unlink()
    halve(folder / "images/val/a 1.png")
    assert status_of(check.main, "--data", "folder", "--root", folder, "--workers", 0) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == ["check train: 2/2, 2 wrong", "check val: 2/2, 1 wrong"]
    assert out.splitlines()[-1] == "3 wrong files"


@pytest.mark.parametrize("case", WRONG_FILES)
def test_exif_is_named_only_of_turned_images(folder, case):
    name, spoil, words = WRONG_FILES[case]
    spoil(folder / name)
    with pytest.raises(InputError) as error:
        data.read(data.open_dataset("folder", folder, "train"), 1)
    assert ("EXIF" in str(error.value)) == ("EXIF" in words)


def remove(path):
    for file in path.iterdir():
        file.unlink()


def renamed(kind, form):
    """Give each file of a kind a name by its stem."""

    def spoil(root):
        for path in (root / kind).glob("*/*.png"):
            path.rename(path.with_name(form.format(path.stem)))

    return spoil


def classes_are(text):
    return lambda root: (root / "classes.txt").write_text(text)


WRONG_TREES = {  # name: what is done to the root, status of check, words of the line
    "no labels folder": (
        lambda r: (r / "labels").rename(r / "label"),
        2,
        "labels/train: no such folder",
    ),
    "empty split": (
        lambda r: (remove(r / "images/val"), remove(r / "labels/val")),
        2,
        "the split val is empty",
    ),
    "image alone": (
        lambda r: (r / "labels/val/a 1.png").unlink(),
        1,
        "images/val/a 1.png: image without label",
    ),
    "label alone": (
        lambda r: (r / "images/val/a 1.png").unlink(),
        1,
        "labels/val/a 1.png: label without image",
    ),
    "a name twice": (
        lambda r: save(r / "images/val/a 1.JPG", noise(3, 3)),
        2,
        "one file for each name",
    ),
    "HEIC beside a label": (
        lambda r: (r / "images/val/a 1.png").rename(r / "images/val/a 1.heic"),
        1,
        "images/val/a 1.heic",
    ),
    "TIFF labels": (renamed("labels", "{}.tif"), 2, "no label; expected *.png, one for each image"),
    "suffix": (renamed("labels", "{}_mask.png"), 2, "labels carry the suffix _mask: got the label"),
    "image's ending": (renamed("labels", "{}.jpg.png"), 2, "labels carry the suffix .jpg: got"),
    "prefix": (
        renamed("labels", "gt_{}.png"),
        2,
        "labels carry the prefix gt_: got the label gt_a",
    ),
    "both named": (
        lambda r: (renamed("images", "img_{}.png")(r), renamed("labels", "lbl_{}.png")(r)),
        2,
        "got the label lbl_a 0.png and the image img_a 0; expected img_a 0.png: rename all labels",
    ),
    "HEIC alone": (renamed("images", "{}.heic"), 2, "is empty; expected images *.jpg"),
    "one class": (classes_are("building 9 9 9\n(ignored) 1 1 1"), 2, "one class, nothing to tell"),
    "labelme": (classes_are("__ignore__\n_background_\na"), 2, "line 1: got labelme's __ignore__"),
    "CVAT": (classes_are("a:0,0,0::\nb:1,1,1::"), 2, "line 1: got 3 numbers in 'a:0,0,0::'"),
    "CSV head": (classes_are("name,r,g,b\na,0,0,0"), 2, "line 1: got the head of a table, 'name"),
    "YAML map": (classes_are("names:\n  0: a\n  1: b"), 2, "got the name 'names:', as in YAML"),
    "numbered": (classes_are("1. a\n2. b"), 2, "numbers before the names, such as '1. a'; the o"),
    "CSV of ids": (classes_are("id,name\n0,a\n1,b"), 2, "numbers before the names, such as '0,a'"),
    "YAML list": (classes_are("- a\n- b"), 2, "line 1: got the name '- a', as in YAML"),
    "JSON": (classes_are('["a", "b"]'), 2, """line 1: got the name '["a", "b"]', as in YAML"""),
    "CSV": (classes_are("a\nb,0,0,0"), 2, "line 2: got 3 numbers in 'b,0,0,0'; expected `name R"),
    "RGBA": (classes_are("a 1 2 3 255\nb"), 2, "line 1: got 4 numbers in 'a 1 2 3 255'; expected"),
    "colour first": (classes_are("b\n128 64 128 road"), 2, "line 2: got 3 numbers in '128 64 128"),
    "brackets": (classes_are("b\nroad (128, 64, 128)"), 2, "line 2: got 3 numbers in 'road (128,"),
    "shares": (classes_are("b\nroad 0.5 0.25 1"), 2, "line 2: got the colour 0.5 0.25 1; expected"),
    "ignored": (classes_are("a\nb\n(ignored)"), 2, "line 3: got no colour; expected `(ignored) R"),
    "no classes.txt": (
        lambda r: (r / "classes.txt").unlink(),
        2,
        "classes.txt: no such file; expected a line",
    ),
    "no class": (lambda r: (r / "classes.txt").write_text("\n"), 2, "no class in it"),
    "not text": (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfe"), 2, "expected UTF-8"),
    "colour": (
        lambda r: (r / "classes.txt").write_text("a\nb 0 0 256"),
        2,
        "line 2: got the colour 0 0 256",
    ),
    "negative": (
        lambda r: (r / "classes.txt").write_text("b -1 0 0"),
        2,
        "line 1: got the colour -1 0 0",
    ),
    "no name": (
        lambda r: (r / "classes.txt").write_text("a\n\n1 2 3"),
        2,
        "line 3: got the name ''",
    ),
    "same name": (
        lambda r: (r / "classes.txt").write_text("a\na 1 2 3"),
        2,
        "line 2: got the name 'a'",
    ),
    "256 classes": (
        lambda r: (r / "classes.txt").write_text("\n".join(map(str, range(256)))),
        2,
        "line 256: more than 255",
    ),
}


@pytest.mark.parametrize("case", WRONG_TREES)
def test_wrong_tree(folder, case, capsys):
    spoil, expected, words = WRONG_TREES[case]
    spoil(folder)
    with pytest.raises(InputError) as error:
        for split in ("train", "val"):
            data.open_dataset("folder", folder, split)
    assert (
        words in str(error.value)
        and "\n" not in str(error.value)
        and str(folder) in str(error.value)
    )
    assert status_of(check.main, "--data", "folder", "--root", folder, "--workers", 0) == expected
    out, err = capsys.readouterr()
    lines = (
        err.splitlines()
        if expected == 2
        else [n for n in out.splitlines() if n.startswith("wrong: ")]
    )
    assert len(lines) == 1 and str(error.value) in lines[0]


@pytest.mark.parametrize(
    "sign",
    [
        "images/ADE/training/x.jpg",
        "index_ade20k.mat",
        "images/training/a/abbey/x_seg.png",
        "images/training/ADE_train_1_seg.png",
        "ADE20K_2016_07_26/images/training/x.jpg",
    ],
)
def test_full_ade20k_is_recognised(tmp_path, sign, capsys):
    save(tmp_path / sign, noise(4, 4), format="PNG")
    assert status_of(check.main, "--data", "ade20k", "--root", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "full ADE20K" in line and "ADEChallengeData2016.zip" in line and str(tmp_path) in line


def test_check_names_each_of_a_hundred_broken_files(tmp_path):
    """In every second file a bit between a PNG's signature and its end is changed.

    Exactly these files are listed, by name.
    """
    (tmp_path / "classes.txt").write_text("a\nb\n")
    broken = set()
    for number in range(200):
        path = (
            tmp_path
            / ("images", "labels")[number % 2]
            / ("train", "val")[number // 2 % 2]
            / f"{number // 4}.png"
        )
        save(
            path,
            noise(20, 30, number)
            if number % 2 == 0
            else RNG(number).integers(0, 2, (20, 30), np.uint8),
        )
        if number % 4 in (0, 3):  # of each pair one
            raw = bytearray(path.read_bytes())
            raw[RNG(number).integers(8, len(raw) - 12)] ^= 1 << number % 8
            path.write_bytes(raw)
            broken.add(str(path))
    status, out, err = script("check.py", "--data", "folder", "--root", tmp_path, "--workers", 2)
    wrong = [
        line.removeprefix("wrong: ") for line in out.splitlines() if line.startswith("wrong: ")
    ]
    assert (
        status == 1
        and "Traceback" not in err
        and "100 wrong files" in out
        and len(wrong) == len(broken) == 100
    )
    assert {line.split(": ")[0] for line in wrong} == broken
