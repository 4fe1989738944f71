"""The fixtures that the tests of several rooms share."""

import os

import numpy as np
import pytest
from helpers import RNG, Stub, blocks, make_checkpoint, make_street, noise, save, trained
from PIL import Image

import dnl
from data import IGNORE


@pytest.fixture
def folder(tmp_path):
    """Three pairs for training and two to validate; three classes, two of them with colours."""
    (tmp_path / "classes.txt").write_text(
        "dry land 200 100 0\nwater 0 0 255\n\nice\n", encoding="utf-8"
    )
    for split, n in (("train", 3), ("val", 2)):
        for i in range(n):
            save(tmp_path / "images" / split / f"a {i}.png", noise(30, 40, i))
            save(
                tmp_path / "labels" / split / f"a {i}.png",
                RNG(i).choice(np.uint8([0, 1, 2, 255]), (30, 40)),
            )
    return tmp_path


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory):
    """One image of the real size in each split; the label of train has every label id in
    columns.
    """
    root = tmp_path_factory.mktemp("cityscapes")
    for split in ("train", "val", "test"):
        stem = f"{split}/ulm/ulm_000000_000019"
        save(
            root / "leftImg8bit" / f"{stem}_leftImg8bit.png",
            noise(16, 32).repeat(64, 0).repeat(64, 1),
        )
        ids = np.r_[np.arange(34), [IGNORE] * 6].repeat(52)[:2048].astype(np.uint8)
        save(root / "gtFine" / f"{stem}_gtFine_labelIds.png", np.tile(ids, (1024, 1)))
    return root


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory):
    """JPEGs of mixed sizes, one grey and one CMYK, labels 0..150."""
    root = tmp_path_factory.mktemp("ade") / "ADEChallengeData2016"
    for folder, short in (("training", "train"), ("validation", "val")):
        for i, (mode, h, w) in enumerate(
            (("RGB", 256, 341), ("L", 683, 512), ("CMYK", 300, 300), ("RGB", 400, 257))
        ):
            save(
                root / "images" / folder / f"ADE_{short}_{i:08}.jpg",
                Image.fromarray(noise(h, w, i)).convert(mode),
            )
            label = (np.arange(h * w) % 151).astype(np.uint8).reshape(h, w)
            save(root / "annotations" / folder / f"ADE_{short}_{i:08}.png", label)
    return root


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What these tests kill is a process, never the power: fsync would be most of their time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def street(tmp_path_factory):
    return make_street(tmp_path_factory.mktemp("street"))


@pytest.fixture
def stub(monkeypatch):
    """Networks of this process and of its copies have the stub, for tests of what is not in the
    network.
    """
    monkeypatch.setattr(dnl, "ResNet", Stub)


@pytest.fixture(scope="session")
def run_folder(street, tmp_path_factory):
    """A finished tiny training, shared by the tests that read it."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert trained(out, street) == 0
    return out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("net") / "best.pt", ["a", "b", "c", "d", "e"])


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(blocks(40, 56)).save(tmp_path / "in" / "photo.png")
    return tmp_path / "in" / "photo.png"
