"""data.py, classes.py, decode.py, synthetic.py: files, decoding, augmentation, loading, scenes."""

import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import struct
import unicodedata
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import IMAGE, LABEL, RNG, batches, halve, noise, report_of, save, status_of
from PIL import Image

import check
import classes
import data
import decode
import predict
import recipe
import synthetic
import train
from data import IGNORE
from runtime import InputError

# ---- data sets


def test_classes_and_settings():
    ids = "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33"
    assert " ".join(str(v[0]) for v in classes.CITYSCAPES.values()) == ids
    assert classes.CITYSCAPES["car"][1:] == (0, 0, 142) and list(classes.CITYSCAPES)[13] == "car"
    assert len(set(classes.ADE20K)) == 150 and [classes.ADE20K[i] for i in (0, 12, 20, 149)] == [
        "wall",
        "person",
        "car",
        "flag",
    ]
    assert len(set(classes.palette(255))) == 255 and min(map(min, classes.palette(255))) >= 0
    city, ade = recipe.SETTINGS["cityscapes"], recipe.SETTINGS["ade20k"]
    assert (city.lr, city.weight_decay, city.crop, city.batch, city.epochs, city.channels) == (
        1e-2,
        5e-4,
        768,
        8,
        240,
        512,
    )
    assert (ade.lr, ade.weight_decay, ade.crop, ade.batch, ade.epochs) == (
        2e-2,
        1e-4,
        608,
        16,
        240,
    )


def lab(color):
    """CIE Lab of an sRGB colour for D65, by the formulas of IEC 61966-2-1 and CIE 15."""
    r, g, b = (v / 3294.6 if v <= 10.31475 else ((v + 14.025) / 269.025) ** 2.4 for v in color)
    x = (0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047
    y = 0.2126729 * r + 0.7151522 * g + 0.0721750 * b
    z = (0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883
    x, y, z = (t ** (1 / 3) if t > (6 / 29) ** 3 else t * 841 / 108 + 4 / 29 for t in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_any_two_colours_of_ade20k_differ(ade20k):
    colors = data.open_dataset("ade20k", ade20k, "train").colors
    points = [lab(c) for c in ((0, 0, 0), (255, 255, 255), *colors)]
    assert len(colors) == 150 and classes.palette(20) == colors[:20]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i]) >= 12


def test_cityscapes_all_splits(cityscapes, capsys):
    status, report = report_of(capsys, "--data", "cityscapes", "--root", cityscapes)
    assert status == 0 and not report["problems"]
    assert {s: r["pairs"] for s, r in report["splits"].items()} == {"train": 1, "val": 1, "test": 1}
    train = report["splits"]["train"]
    assert train["sizes"] == {"1024x2048": 1} and train["modes"] == {"RGB L": 1}
    assert train["pixels"] == [52 * 1024] * 19 and train["ignored"] == (2048 - 19 * 52) * 1024
    assert report["splits"]["test"]["modes"] == {"RGB": 1}
    for split, n in (("train", 1), ("val", 1), ("trainval", 2), ("test", 1)):
        dataset = data.open_dataset("cityscapes", cityscapes, split)
        assert len(dataset) == n and dataset.labelled == (split != "test")
        image, label = data.read(dataset, 0)
        assert image.shape == (1024, 2048, 3) and image.dtype == np.uint8
    assert label is None  # of test, whose files of ground truth are blank
    image, label, jitter = data.sample(
        data.open_dataset("cityscapes", str(cityscapes), "val"), 0, 0, 0, 768
    )
    assert image.shape == (3, 768, 768) and label.shape == (768, 768) and jitter.shape == (4,)
    with pytest.raises(InputError, match="no ground truth"):
        data.train_batches(
            dataset, seed=0, batch=1, start=0, stop=1, rank=0, world=1, crop=64, workers=0
        )


def test_ade20k_all_splits(ade20k, capsys):
    status, report = report_of(capsys, "--data", "ade20k", "--root", ade20k)
    assert status == 0 and list(report["splits"]) == ["train", "val"]
    assert report["splits"]["val"]["modes"] == {"RGB L": 2, "L L": 1, "CMYK L": 1}
    assert set(report["splits"]["train"]["sizes"]) == {"256x341", "683x512", "300x300", "400x257"}
    sizes = (256 * 341, 683 * 512, 300 * 300, 400 * 257)
    assert report["splits"]["val"]["ignored"] == sum(-(-n // 151) for n in sizes)
    assert report["splits"]["val"]["pixels"][0] == sum(-(-(n - 1) // 151) for n in sizes)
    for split, n in (("train", 4), ("val", 4), ("trainval", 8)):
        dataset = data.open_dataset("ade20k", ade20k, split)
        assert len(dataset) == n
        for index in range(n):
            image, label, _ = data.sample(dataset, 0, 0, index, 96)
            assert image.shape == (3, 96, 96) and label.shape == (96, 96)
    _, label = data.read(dataset, 0)
    assert label.ravel()[:4].tolist() == [255, 0, 1, 2] and label.ravel()[150] == 149


def test_folder(folder, capsys):
    dataset = data.open_dataset("folder", folder, "train")
    assert dataset.classes == ("dry land", "water", "ice") and dataset.colors[:2] == (
        (200, 100, 0),
        (0, 0, 255),
    )
    assert dataset.colors[2] == classes.palette(255)[2]
    image, label = data.read(dataset, 1)
    assert (image == noise(30, 40, 1)).all() and (
        label == np.asarray(Image.open(folder / "labels/train/a 1.png"))
    ).all()
    save(
        folder / "images/test/deep er/b.JPG", noise(8, 8)
    )  # no labels/test: a test split without ground truth
    assert not data.open_dataset("folder", folder, "test").labelled
    assert len(data.open_dataset("folder", folder, "trainval")) == 5
    status, report = report_of(capsys, "--data", "folder", "--root", folder)
    truth = np.bincount(
        np.concatenate([RNG(i).choice(np.uint8([0, 1, 2, 255]), 1200) for i in range(3)]),
        minlength=256,
    )
    assert status == 0 and report["splits"]["train"]["pixels"] == truth[:3].tolist()
    assert (
        report["splits"]["train"]["ignored"] == truth[255]
        and report["splits"]["test"]["pairs"] == 1
    )
    assert check.check("folder", folder, workers=2) == report  # processes change nothing
    assert status_of(check.main, "--data", "folder", "--root", folder, "--workers", 0) == 0
    out = capsys.readouterr()
    assert (
        "dry land" in out.out
        and "0 wrong files" in out.out
        and "check train: 3/3, 0 wrong" in out.err
    )


def test_class_weights():
    weights = check.class_weights(np.array([900, 100, 0]))  # shares 0.9 and 0.1
    assert (
        np.allclose(weights[:2] @ [0.9, 0.1], 1)
        and np.isclose(weights[1] / weights[0], 3)
        and weights[2] == 1
    )
    assert check.class_weights(np.zeros(2)).tolist() == [1, 1]


# ---- files to arrays


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("L", "png"),
        ("P", "png"),
        ("1", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "tif"),
        ("RGB", "bmp"),
        ("RGB", "webp"),
        ("L", "JPEG"),
    ],
)
def test_image_modes(tmp_path, mode, suffix):
    flat = np.full((6, 5, 3), (200, 60, 20), np.uint8)
    stored = (
        Image.fromarray(flat).quantize(4) if mode == "P" else Image.fromarray(flat).convert(mode)
    )
    if "A" in mode:
        stored.putalpha(7)  # nearly transparent: dropped, not blended
    save(tmp_path / f"x.{suffix}", stored, **({"lossless": True} if suffix == "webp" else {}))
    image = decode.decode_image(tmp_path / f"x.{suffix}")
    grey = round(0.299 * 200 + 0.587 * 60 + 0.114 * 20)
    expected = {"L": (grey,) * 3, "LA": (grey,) * 3}.get(mode, (200, 60, 20))
    assert image.shape == (6, 5, 3) and image.dtype == np.uint8
    if mode == "1":
        assert set(np.unique(image)) <= {0, 255}
    else:
        assert np.abs(image.astype(int) - expected).max() <= 2


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    save(tmp_path / "x.png", noise(6, 9), exif=exif)
    assert (decode.decode_image(tmp_path / "x.png") == np.rot90(noise(6, 9), -1)).all()


def label_of(path, dataset):
    return decode.decode_label(path, dataset.name, len(dataset.classes), dataset.numbers)


def test_label_modes(folder):
    dataset = data.open_dataset("folder", folder, "val")
    ids = RNG(1).choice(np.uint8([0, 1, 2, 255]), (7, 9))
    palettes = {  # the index counts
        "of colours": noise(256, 3, 1)[..., 0],
        "of greys in order": np.arange(256).repeat(3),
        "of 0 and 7 in VOC's": [0, 0, 0, 128, 128, 128, 128, 128, 128, 1, 2, 3],
        "of dataset's own": [v for c in dataset.colors for v in c],
    }
    for stored in (ids, ids.astype(np.uint16)):
        save(folder / "x.png", stored)
        assert (label_of(folder / "x.png", dataset) == ids).all()
    for colors in palettes.values():
        picture = Image.fromarray(ids)
        picture.putpalette(bytes(np.uint8(colors)).ljust(768, b"\1"))
        save(folder / "x.png", picture)
        assert (label_of(folder / "x.png", dataset) == ids).all()


def test_colours_as_labels(folder):
    """RGB labels are read where classes.txt gives each class a colour of its own."""
    (folder / "classes.txt").write_text("a 9 9 9\n(ignored) 224 224 192\nb 0 0 0\nc 9 9 10\n")
    ids = RNG(1).choice(np.uint8([0, 1, 2, 255]), (30, 40))
    table = np.zeros((256, 4), np.uint8)
    table[[0, 1, 2, 255]] = (9, 9, 9, 255), (0, 0, 0, 255), (9, 9, 10, 255), (224, 224, 192, 255)
    for channels in (3, 4):
        save(folder / LABEL, table[ids][..., :channels])
        dataset = data.open_dataset("folder", folder, "train")
        assert dataset.classes == ("a", "b", "c") and dataset.colors[1] == (0, 0, 0)
        assert (data.read(dataset, 1)[1] == ids).all()
    (folder / "classes.txt").write_text("a 9 9 9\nb 0 0 0\nc 9 9 10\n")
    n = (ids == 255).sum()
    dataset = data.open_dataset("folder", folder, "train")
    line = f"{folder / LABEL}: .* {n} pixels of the colour 224 224 192; .*`.ignored. R G B`"
    with pytest.raises(InputError, match=line):
        data.read(dataset, 1)
    for lacking in ("a 9 9 9\nb 0 0 0\nc\n", "a 9 9 9\nb 0 0 0\nc 0 0 0\n"):
        (folder / "classes.txt").write_text(lacking)
        dataset = data.open_dataset("folder", folder, "train")
        with pytest.raises(
            InputError, match=r"give each class a colour of its own in classes\.txt"
        ):
            data.read(dataset, 1)


def test_a_new_colour_in_the_class_list_makes_a_new_copy(folder, tmp_path):
    """Of labels that are saved as colours, the list decides what the copy holds."""
    save(folder / "classes.txt.png", noise(2, 2))  # beside the data: no part of it
    for path in (folder / "labels").rglob("*.png"):
        save(path, np.uint8([(1, 1, 1), (2, 2, 2)])[RNG(0).integers(0, 2, (30, 40))])
    for text, first in (("a 1 1 1\nb 2 2 2\n", 0), ("a 2 2 2\nb 1 1 1\n", 1)):
        (folder / "classes.txt").write_text(text)
        dataset = data.open_dataset("folder", folder, "val", tmp_path / "cache")
        assert (data.read(dataset, 0)[1] == RNG(0).integers(0, 2, (30, 40)) ^ first).all()


def test_wrong_values_by_data_set(cityscapes, ade20k, folder):
    for name, root, value, words in (
        ("cityscapes", cityscapes, 34, "_gtFine_labelIds.png"),
        ("ade20k", ade20k, 151, "ADEChallengeData2016"),
    ):
        save(folder / "x.png", np.full((2, 2), value, np.uint8))
        with pytest.raises(InputError, match=f"out of range: {value}; .*{words}"):
            label_of(folder / "x.png", data.open_dataset(name, root, "train"))


def png_chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def test_metadata_costs_no_pixels(tmp_path):
    """Texts and a profile above Pillow's limits, before and after the pixels; broken EXIF."""
    path = tmp_path / "x.png"
    save(path, noise(6, 9))
    raw = path.read_bytes()
    long = zlib.compress(bytes(3_000_000))
    for chunk in (
        png_chunk(b"zTXt", b"notes\0\0" + long),
        png_chunk(b"iTXt", b"notes\0\1\0\0\0" + long),
        png_chunk(b"iCCP", b"profile\0\0" + long),
        png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff broken"),
        png_chunk(b"eXIf", b"no EXIF at all"),
    ):
        for place in (33, len(raw) - 12):
            path.write_bytes(raw[:place] + chunk + raw[place:])
            assert (decode.decode_image(path) == noise(6, 9)).all()
            assert decode.header(path) == ("RGB", False)
    save(tmp_path / "x.webp", noise(6, 9), lossless=True, exif=b"Exif\0\0no EXIF at all")
    assert (decode.decode_image(tmp_path / "x.webp") == noise(6, 9)).all()


def tiff_of_16_bit(path, pixels, planar):
    """An uncompressed RGB TIFF, which Pillow does not write, of pixels (H, W, 3) uint16."""
    H, W, _ = pixels.shape
    data, size, start = pixels.tobytes(), pixels.nbytes, 160
    tags = [(256, W), (257, H), (259, 1), (262, 2), (277, 3), (278, H), (284, 2 if planar else 1)]
    rows = [(tag, 3, 1, value) for tag, value in tags] + [(258, 3, 3, 134)]
    if planar:
        data = pixels.transpose(2, 0, 1).tobytes()
        rows += [(273, 4, 3, 140), (279, 3, 3, 152)]
    else:
        rows += [(273, 4, 1, start), (279, 4, 1, size)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(rows))
    head += b"".join(struct.pack("<HHII", *row) for row in sorted(rows)) + bytes(4)
    bits = struct.pack("<3H", 16, 16, 16)
    offsets = struct.pack("<3I", *(start + i * size // 3 for i in range(3)))
    counts = struct.pack("<3H", *[size // 3] * 3)
    path.write_bytes(head.ljust(134, b"\0") + bits + offsets + counts.ljust(8, b"\0") + data)


def test_16_bit_colours_are_refused(tmp_path):
    """Pillow would keep the high byte, which is 0..15 in pixels of 12 bit."""
    pixels = RNG(0).integers(0, 4096, (6, 9, 3)).astype("<u2")
    for planar in (False, True):
        tiff_of_16_bit(tmp_path / "x.tif", pixels, planar)
        with pytest.raises(InputError, match=r"x\.tif: got colours of 16 bit; expected 8 bit"):
            decode.decode_image(tmp_path / "x.tif")


def test_linked_folders(cityscapes, tmp_path):
    """A link to a folder that it lies in adds nothing.

    Two links to one folder are two names of it, in whatever order the system lists them, and
    --root may lead through the folders themselves.
    """
    root = shutil.copytree(cityscapes, tmp_path / "c")
    before = [item.files for item in data.open_dataset("cityscapes", root, "train").items]
    for top in ("leftImg8bit/train", "gtFine/train"):
        for name in ("again", "and_again"):
            (root / top / name).symlink_to(root / top)
    assert [item.files for item in data.open_dataset("cityscapes", root, "train").items] == before
    for top, order in (("leftImg8bit/train", 1), ("gtFine/train", -1)):
        for name in ("one", "two")[::order]:
            (root / top / name).symlink_to("ulm")
    for way in (root, root / "leftImg8bit" / "train" / ".." / ".."):
        assert len(data.open_dataset("cityscapes", way, "train").items) == 3 * len(before)


def test_links_in_a_folder_are_followed(folder, tmp_path):
    """People link files, folders and classes.txt of a data set from elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    before = data.open_dataset("folder", folder, "train")
    elsewhere.mkdir()
    for name in ("classes.txt", "images/train", "labels/train/a 0.png"):
        path = folder / name
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    after = data.open_dataset("folder", folder, "train")
    assert after.classes == before.classes and len(after) == len(before)
    assert all(
        np.array_equal(a, b)
        for i in range(len(before))
        for a, b in zip(data.read(before, i), data.read(after, i))
    )


def test_a_sample_without_ground_truth_is_refused(folder):
    save(folder / "images/test/b.png", noise(8, 8))
    dataset = data.open_dataset("folder", folder, "test")
    with pytest.raises(InputError, match="folder test has no ground truth"):
        data.sample(dataset, 0, 0, 0, 4)


def test_root_one_level_off(ade20k):
    for root in (ade20k.parent, ade20k / "images", ade20k / "images/training"):
        with pytest.raises(InputError) as error:
            data.open_dataset("ade20k", root, "train")
        assert str(error.value).endswith(f"give --root {ade20k}")
    for name, root in (
        ("nothing", None),
        ("folder", None),
        ("folder", ade20k / "gone"),
        ("folder", "x" * 300),
    ):
        with pytest.raises(InputError, match=r"got data set 'nothing'|--root"):
            data.open_dataset(name, root, "train")


def test_a_folder_without_the_name_of_its_data_set(folder):
    for main in (check.main, train.main):
        with pytest.raises(
            InputError, match="synthetic scenes are made in memory: name what lies there by --data"
        ):
            main(["--root", str(folder)])


def test_a_split_that_is_not_there(folder):
    with pytest.raises(
        InputError, match=r"images/test: no such folder; .* name another split, or add this one"
    ):
        data.open_dataset("folder", folder, "test")


def test_names_that_differ_in_unicode_form_are_pairs(folder):
    """As a Mac writes the one and Windows the other: Straße é."""
    for kind, form in (("images", "NFC"), ("labels", "NFD")):
        name = unicodedata.normalize(form, "Stra\u00dfe \u00e9.png")
        (folder / kind / "val/a 1.png").rename(folder / kind / "val" / name)
    dataset = data.open_dataset("folder", folder, "val")
    assert len(dataset) == 2 and (data.read(dataset, 0)[0] == noise(30, 40, 1)).all()


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".Trash-1000", "@eaDir", "__MACOSX"])
def test_folders_of_a_system_are_no_data(folder, ade20k, tmp_path, name):
    save(folder / f"images/train/{name}/b.png", noise(3, 3))
    save(folder / f"labels/train/deeper/{name}/c.png", np.zeros((3, 3), np.uint8))
    save(folder / "images/train/._a 0.png", noise(3, 3))
    assert len(data.open_dataset("folder", folder, "train")) == 3
    root = shutil.copytree(ade20k, tmp_path / "ade")
    save(root / f"images/training/{name}/ADE_train_1.jpg", noise(3, 3))
    (root / "images/training/empty").mkdir()
    assert len(data.open_dataset("ade20k", root, "train")) == 4
    found, others = predict.find_images([folder / "images/train"], tmp_path / "out")
    assert len(found) == 3 and not others


def test_odd_names(folder):
    odd = ["новый снимок", "with\nnewline", "写真", "tab\t", "q'uote\"", os.fsdecode(b"\xff\xfe")]
    for stem in odd:
        save(folder / "images/val" / f"{stem}.png", noise(5, 5))
        save(folder / "labels/val" / f"{stem}.png", np.zeros((5, 5), np.uint8))
    dataset = data.open_dataset("folder", folder, "val")
    assert {i.image.stem for i in dataset.items} == {"a 0", "a 1", *odd}
    for index, item in enumerate(dataset.items):
        data.read(dataset, index)
        item.image.unlink()  # vanished while training
        with pytest.raises(InputError, match="no such file") as error:
            data.read(dataset, index)
        assert str(error.value).isprintable() and str(error.value).encode()
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


# ---- augmentation


def ramps(h, w):
    """Image whose red is the column and green the row, and both as labels."""
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    return np.stack([x, y, 0 * x], 2), x, y


@pytest.mark.parametrize("relative, crop", [(False, 96), (False, 300), (True, 64)])
def test_label_and_image_stay_aligned(relative, crop):
    image, columns, rows = ramps(120, 200)
    steps, flips = [], []
    for seed in range(60):
        out, x = data.augment(image, columns, crop, (0.5, 2), relative, RNG(seed))
        same, y = data.augment(image, rows, crop, (0.5, 2), relative, RNG(seed))
        assert (out == same).all() and out.shape == (crop, crop, 3) and x.shape == (crop, crop)
        known = x != IGNORE
        assert (known == (y != IGNORE)).all() and (out[~known] == data.PAD).all()
        assert known.any(1).sum() * known.any(0).sum() == known.sum()  # a box
        # At a shrunken border the bilinear filter is cut off, hence 1.5 and not 1.
        assert np.abs(out[..., 0] - x.astype(float))[known].max() <= 1.5
        assert np.abs(out[..., 1] - y.astype(float))[known].max() <= 1.5
        line = x[0][known[0]].astype(float)
        steps.append(abs(line[-1] - line[0]) / (len(line) - 1) if len(line) > 1 else 1)
        flips.append(line[-1] < line[0])
    scales = 1 / np.array(steps) / (crop / 120 if relative else 1)
    assert 0.45 < scales.min() < 0.65 and 1.7 < scales.max() < 2.1 and 0.3 < np.mean(flips) < 0.7


@pytest.mark.parametrize("seed", range(6))
def test_box_equals_resizing_the_whole(seed):
    image, rng = noise(90, 130, seed), RNG(seed)
    h, w = round(90 * (scale := (0.5, 0.77, 1, 1.3, 1.9, 2)[seed])), round(130 * scale)
    y, x = data._draw_crop(90, h, 48, rng), data._draw_crop(130, w, 48, rng)
    whole = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)).astype(int)
    top, left = round(y.start / y.pixel), round(x.start / x.pixel)
    expected = whole[top : top + y.size, left : left + x.size]
    assert y.size == min(48, h) and np.abs(data._resize(image, y, x) - expected).max() <= 1


def test_color_jitter_equals_loops():
    images = torch.from_numpy(RNG(0).uniform(60, 190, (3, 3, 4, 5)))
    factors = torch.tensor([[1, 1, 1, 0], [1.2, 0.8, 1.1, 0.04], [0.75, 1.25, 0.7, -0.05]])
    out = data.color_jitter(images, factors)
    assert out.dtype == torch.float32 and torch.allclose(out[0], images[0].float(), atol=1e-3)
    luma = np.array([0.299, 0.587, 0.114])
    for b, (brightness, contrast, saturation, hue) in enumerate(factors.double().tolist()):
        pixels = images[b].flatten(1).T.numpy() * brightness
        mean = np.mean([luma @ p for p in pixels])
        for i, p in enumerate(pixels):
            p = mean + contrast * (p - mean)
            grey = luma @ p
            r, g, b_ = grey + saturation * (p - grey)
            u, v = 0.5959 * r - 0.2746 * g - 0.3213 * b_, 0.2115 * r - 0.5227 * g + 0.3112 * b_
            c, s = np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)
            yiq = np.array([grey, c * u - s * v, s * u + c * v])
            p = np.linalg.solve([luma, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], yiq)
            assert np.allclose(out[b].flatten(1)[:, i], p.clip(0, 255), atol=1e-2)
    extreme = data.color_jitter(noise_tensor(), torch.tensor([[1.3, 1.3, 1.3, 0.05]]))
    assert extreme.min() == 0 and extreme.max() == 255
    draws = torch.stack([data.draw_jitter(RNG(i)) for i in range(300)])
    assert (
        (draws[:, :3] - 1).abs().max() <= 0.3
        and draws[:, 3].abs().max() <= 0.05
        and draws.std(0).min() > 0.02
    )


def test_padding_is_no_colour():
    """It is 0 after normalising, and does not count in the mean that contrast is about."""
    factors = torch.stack([data.draw_jitter(RNG(i)) for i in range(2)])
    part = torch.from_numpy(noise(9, 7)).permute(2, 0, 1)
    padded = torch.tensor(data.PAD, dtype=torch.uint8).view(3, 1, 1).repeat(2, 1, 16, 16)
    padded[0, :, :9, :7] = part
    padded[1, :, :9, 9:] = part.flip(2)  # as of a flipped sample
    out = data.normalize(data.color_jitter(padded, factors))
    plain = data.normalize(data.color_jitter(torch.stack([part, part.flip(2)]), factors))
    assert torch.allclose(out[0, :, :9, :7], plain[0], atol=1e-5)
    assert torch.allclose(out[1, :, :9, 9:], plain[1], atol=1e-5)
    assert (out != 0).any(1).sum() == 2 * 9 * 7
    nothing = data.color_jitter(padded[:1, :, 10:], factors[:1])
    assert not data.normalize(nothing).any()


def noise_tensor():
    return torch.from_numpy(noise(20, 20)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("seed", range(4))
def test_a_crop_of_one_pixel(seed):
    """Flipped or not, it has no stride that torch would refuse."""
    x, y, _ = data.sample(data.open_dataset("synthetic", None, "train"), seed, 0, 0, 1)
    assert x.shape == (3, 1, 1) and y.shape == (1, 1)


def test_normalize():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (noise_tensor() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(data.normalize(noise_tensor()), expected, atol=1e-5)


# ---- loading


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


def scenes(n, split="train"):
    dataset = data.open_dataset("synthetic", None, split)
    return replace(dataset, items=dataset.items[:n])


def test_samples_depend_on_seed_epoch_and_index_alone():
    dataset = scenes(14)  # two steps an epoch, two images left over
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = batches(dataset)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [tuple(t.shape) for t in whole[0]] == [(6, 3, 32, 32), (6, 32, 32), (6, 4)]
    assert [t.dtype for t in whole[0]] == [torch.uint8, torch.uint8, torch.float32]
    assert equal(whole, batches(dataset, workers=2)) and equal(
        whole[3:], batches(dataset, start=3, workers=2)
    )
    assert not equal(whole, batches(dataset, seed=4)) and not equal(whole[:2], whole[2:])
    draws = [
        data.sample(dataset, *key, 32)[2] for key in ((3, 0, 1), (3, 1, 1), (4, 0, 1), (3, 0, 2))
    ]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    for world in (2, 3):
        shares = [batches(dataset, world=world, rank=rank) for rank in range(world)]
        assert equal(whole, [[torch.cat(t) for t in zip(*step)] for step in zip(*shares)])
    for epoch, index in data.step_items(3, seed=3, n=14, batch=6)[:1]:
        assert all(
            torch.equal(a[0], b)
            for a, b in zip(whole[3], data.sample(dataset, 3, epoch, index, 32))
        )


def test_order_of_steps():
    steps = [data.step_items(s, seed=1, n=10, batch=3) for s in range(6)]
    assert [e for step in steps for e, _ in step] == [0] * 9 + [1] * 9
    first, second = ([i for step in part for _, i in step] for part in (steps[:3], steps[3:]))
    assert (
        len(set(first)) == len(set(second)) == 9
        and first != second
        and set(first) <= set(range(10))
    )
    assert sorted(data.order(5, 2, 100)) == list(range(100)) and data.order(
        5, 2, 100
    ).tolist() != list(range(100))
    with pytest.raises(InputError, match="got 4 images for a batch of 8: lower --batch"):
        data.train_batches(
            scenes(4), seed=0, batch=8, start=0, stop=1, rank=0, world=1, crop=8, workers=0
        )


def test_start_is_instant(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        data, "sample", lambda *a, **options: drawn.append(a) or (torch.zeros(1),) * 3
    )
    next(
        data.train_batches(
            scenes(14),
            seed=0,
            batch=6,
            start=10**6,
            stop=10**6 + 9,
            rank=0,
            world=1,
            crop=8,
            workers=0,
        )
    )
    assert len(drawn) == 6 and drawn[0][2] == 500_000


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_hand_on_errors(folder, workers):
    halve(folder / IMAGE)
    dataset = data.open_dataset("folder", folder, "train")
    with pytest.raises(InputError) as error:
        batches(dataset, batch=3, stop=1, workers=workers)
    with pytest.raises(InputError) as other:
        list(data.eval_images(dataset, 0, 1, workers))
    assert str(error.value) == str(other.value) and str(error.value).startswith(str(folder / IMAGE))
    # Both errors, and what their tracebacks hold, are still here.
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: save(p, np.zeros((30, 40), np.uint8)), "changed since"),  # whole, but another
        (lambda p: os.utime(p, ns=(0, 10**9)), "changed since"),
        # A worker that has just read the whole file says that it has changed since.
        (lambda p: p.unlink(), "(cannot be read .[Nn]o such file|changed since)"),
        (halve, "(cannot be read|changed since)"),
    ],
)
def test_files_that_change_while_training_are_named(folder, change, words):
    """Two workers, and the file is read in the second epoch only after it was changed."""
    dataset = data.open_dataset("folder", folder, "train")
    steps = data.train_batches(
        dataset, seed=0, batch=3, start=0, stop=50, rank=0, world=1, crop=16, workers=2
    )
    next(steps)
    change(folder / LABEL)
    with pytest.raises(InputError) as error:
        for _ in steps:
            pass
    assert re.match(f"{re.escape(str(folder / LABEL))}: {words}", str(error.value))
    assert "\n" not in str(error.value)
    if words == "changed since":  # opened again, it is what it is
        assert data.read(data.open_dataset("folder", folder, "train"), 1)[1].shape == (30, 40)


def test_workers_outlive_signals_to_the_group_from_their_first_moment(monkeypatch):
    numbers, ready = (
        (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM),
        data._prepare_worker,
    )

    def signalled(worker):  # before the handlers are set
        for number in numbers:
            os.kill(os.getpid(), number)
        ready(worker)

    monkeypatch.setattr(data, "_prepare_worker", signalled)
    steps = data.train_batches(
        scenes(6), seed=0, batch=6, start=0, stop=40, rank=0, world=1, crop=8, workers=2
    )
    next(steps)
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in numbers:
            os.kill(worker.pid, number)
    assert len(workers) == 2 and len(list(steps)) == 39
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()).intersection(numbers)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_each_image_once(world, folder):
    assert sorted(i for rank in range(world) for i in data.eval_items(7, rank, world)) == list(
        range(7)
    )
    dataset = scenes(4, "val")
    for rank in range(world):
        for index, image, label in data.eval_images(dataset, rank, world, workers=rank):
            truth = synthetic.scene("val", index)
            assert (image.permute(1, 2, 0).numpy() == truth[0]).all() and (
                label.numpy() == truth[1]
            ).all()
    save(folder / "images/test/b.png", noise(5, 6))
    ((index, image, label),) = data.eval_images(
        data.open_dataset("folder", folder, "test"), 0, 1, 0
    )
    assert index == 0 and image.shape == (3, 5, 6) and label is None


# ---- synthetic scenes


def test_scenes(capsys):
    status, report = report_of(capsys, "--data", "synthetic", "--split", "val")
    assert status == 0 and min(report["splits"]["val"]["pixels"]) > 0.02 * 64 * 128 * 160
    for split, n in (("train", 512), ("val", 64), ("test", 16), ("trainval", 576)):
        assert len(data.open_dataset("synthetic", None, split)) == n
    images = [
        data.read(data.open_dataset("synthetic", None, s), i)[0].tobytes()
        for s in ("train", "val", "test")
        for i in (0, 1)
    ]
    assert len(set(images)) == 6 and synthetic.scene("val", 1)[0].tobytes() == images[3]
    present = np.mean(
        [np.bincount(synthetic.scene("train", i)[1].ravel(), minlength=8) > 0 for i in range(60)], 0
    )
    assert len(present) == 8 and present.min() > 0.6


@pytest.mark.parametrize("radius", [0, 4])
def test_colour_alone_does_not_tell_the_class(radius):
    """The nearest class-mean colour, of the pixel or of its surroundings, fitted on train."""

    def colours(index, split):
        image, label = synthetic.scene(split, index)
        pixels = torch.from_numpy(image).permute(2, 0, 1).double()
        mean = torch.nn.functional.avg_pool2d(
            pixels, 2 * radius + 1, 1, radius, count_include_pad=False
        )
        return mean.flatten(1).T[::7], torch.from_numpy(label).long().flatten()[::7]

    train = [torch.cat(x) for x in zip(*(colours(i, "train") for i in range(60)))]
    centres = torch.stack([train[0][train[1] == c].mean(0) for c in range(8)])
    confusion = torch.zeros(64)
    for index in range(64):
        pixels, label = colours(index, "val")
        confusion += torch.bincount(
            8 * label + torch.cdist(pixels, centres).argmin(1), minlength=64
        )
    confusion = confusion.view(8, 8)
    iou = confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())
    assert iou.mean() < 0.30
