"""What the loader costs: training samples from a generated Cityscapes tree, three ways."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling

from classes import IGNORE
from data import PAD, DataSet, open_dataset, read, sample
from paper.measure import in_turn
from runtime import InputError

Size = tuple[int, int]  # (H, W)


def draw_image(rng: np.random.Generator, size: Size) -> Image.Image:
    """An RGB image whose PNG is as large, and as slow to decode, as a photograph of a street.

    It has smooth features of 8, 32 and 128 pixels in each channel, under a camera's noise.
    """
    H, W = size
    image = 118 + 0.5 * rng.standard_normal((H, W, 3), np.float32)
    for cell in (8, 32, 128):
        grid = (3, H // cell + 2, W // cell + 2)
        coarse = 20 * rng.standard_normal(grid, np.float32)
        for channel, values in enumerate(coarse):
            smooth = Image.fromarray(values).resize((W, H), Resampling.BICUBIC)
            image[..., channel] += np.asarray(smooth)
    image = image.clip(0, 255)
    return Image.fromarray(image.astype(np.uint8))


def make_tree(root: Path, images: int, size: Size) -> float:
    """Write a `cityscapes` tree, split train, of drawn images and labels of size (H, W).

    Returns the mean size of an image's PNG in megabytes.
    """
    H, W = size
    image_folder = root / "leftImg8bit/train/drawn"
    label_folder = root / "gtFine/train/drawn"
    image_folder.mkdir(parents=True)
    label_folder.mkdir(parents=True)
    written = 0
    for i in range(images):
        rng = np.random.default_rng(i)
        path = image_folder / f"{i}_leftImg8bit.png"
        draw_image(rng, size).save(path)
        written += path.stat().st_size
        grid = (H // 64 + 1, W // 64 + 1)
        ids = rng.integers(0, 34, grid, np.uint8)  # label ids
        label = Image.fromarray(ids).resize((W, H), Resampling.NEAREST)
        label.save(label_folder / f"{i}_gtFine_labelIds.png")
    return written / images / 1e6


def resize_all(
    dataset: DataSet,
    index: int,
    crop: int,
) -> tuple[np.ndarray, np.ndarray]:
    """data.sample(dataset, 0, 0, index, crop) in the usual order: resize all, then crop.

    Image (3, crop, crop) and label (crop, crop), uint8. The split must have labels.
    """
    rng = np.random.default_rng((0, 0, index))
    image, label = read(dataset, index)
    if label is None:
        raise InputError(f"split {dataset.split!r} of {dataset.name} has no labels to resize")
    scale = rng.uniform(0.5, 2)
    H = round(image.shape[0] * scale)
    W = round(image.shape[1] * scale)
    top = rng.integers(max(0, H - crop) + 1)
    left = rng.integers(max(0, W - crop) + 1)
    box = np.s_[top : top + crop, left : left + crop]
    whole = Image.fromarray(image).resize((W, H), Resampling.BILINEAR)
    out = np.full((crop, crop, 3), PAD, np.uint8)
    out[:H, :W] = np.asarray(whole)[box]
    whole = Image.fromarray(label).resize((W, H), Resampling.NEAREST)
    ids = np.full((crop, crop), IGNORE, np.uint8)
    ids[:H, :W] = np.asarray(whole)[box]
    if rng.random() < 0.5:
        out = out[:, ::-1]
        ids = ids[:, ::-1]
    out = out.transpose(2, 0, 1)
    return np.ascontiguousarray(out), np.ascontiguousarray(ids)


def loader(
    images: int,
    crop: int,
    runs: int,
    size: Size = (1024, 2048),
) -> dict[str, Any]:
    """The report (bench's docstring): this process makes training samples, as one worker does."""
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "tree"), Path(folder, "cache")
        file_mb = make_tree(root, images, size)
        files = open_dataset("cityscapes", root, "train")
        cached = open_dataset("cityscapes", root, "train", cache)
        routes: dict[str, Callable[[int], object]] = {
            "resize_all": partial(resize_all, files, crop=crop),
            "crop_first": partial(sample, files, 0, 0, crop=crop),
            "cached": partial(sample, cached, 0, 0, crop=crop),
        }

        def make_all(route: str) -> None:
            for i in range(images):
                routes[route](i)

        cases = {route: partial(make_all, route) for route in routes}
        times = in_turn(cases, runs, torch.device("cpu"))
    rows, rates = [], {}
    for route, seconds in times.items():
        rates[route] = images / seconds
        row = {
            "route": route,
            "seconds": seconds / images,
            "images_per_second": rates[route],
        }
        rows.append(row)
    ratios = {
        "crop_first/resize_all": rates["crop_first"] / rates["resize_all"],
        "cached/crop_first": rates["cached"] / rates["crop_first"],
    }
    return {"rows": rows, "ratios": ratios, "file_mb": file_mb}
