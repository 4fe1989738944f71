"""check.py: each wrong file or tree is one line that names it."""

import os
import struct
import zlib

import numpy as np
import pytest
from helpers import IMAGE, LABEL, RNG, halve, noise, report_of, save, script, status_of

import check
import data
from runtime import InputError


def test_warns_of_0_255_masks(folder, capsys):
    for path in folder.glob("labels/*/*.png"):
        save(path, RNG(0).choice(np.uint8([0, 255]), (30, 40)))
    status, report = report_of(capsys, "--data", "folder", "--root", folder)
    assert (
        status == 0
        and "hold only 0 and 255" in report["warnings"][0]
        and "'water'" in report["warnings"][1]
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


def colours(path):
    table = np.uint8([(200, 100, 0), (0, 0, 255)])
    save(path, table[RNG(0).integers(0, 2, (30, 40))])


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
    "sizes": (
        LABEL,
        lambda p: save(p, np.zeros((40, 30), np.uint8)),
        "label of 40x30 (height x width), image of 30x40",
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
    "class colours": (LABEL, colours, "it has the colours of the classes"),
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


def remove(path):
    for file in path.iterdir():
        file.unlink()


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
    "no classes.txt": (
        lambda r: (r / "classes.txt").unlink(),
        2,
        "classes.txt: cannot be read (FileNotFoundError)",
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
        "images/training/a/abbey/x.jpg",
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
