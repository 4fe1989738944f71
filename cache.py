"""The decoded copy of a data set: every image and label as plain bytes in one file.

A copy is NAME.bin, images (H, W, 3) and labels (H, W) one after another, and NAME.json, the place
of each item. NAME.json is written last, so half a copy counts as none.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from runtime import InputError, lock_file, open_lock, print_progress, quote, regular_file, write

Place = tuple[int, int, int]  # the offset of an item in the file, its height and its width
Images = Iterable[tuple[int, Tensor, Tensor | None]]  # index, image (3, H, W), label (H, W)


@dataclass(frozen=True)
class Copy:
    """A whole copy: its file, and the place of each item in it."""

    path: Path
    places: tuple[Place, ...]
    labelled: bool

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Image (H, W, 3) and label (H, W) or None, uint8.

        They are views of the mapped file, so that a crop reads only its pages.
        """
        offset, H, W = self.places[index]
        try:
            image = np.memmap(self.path, np.uint8, "r", offset, (H, W, 3))
            if not self.labelled:
                return image, None
            return image, np.memmap(self.path, np.uint8, "r", offset + H * W * 3, (H, W))
        except (OSError, ValueError) as e:
            raise InputError(
                f"{quote(self.path)}: the decoded copy was removed or cut since the start "
                f"({type(e).__name__}): start again, which makes a new one"
            ) from None


def open_copy(
    folder: Path, name: str, count: int, labelled: bool, images: Callable[[], Images]
) -> Copy:
    """The copy of that name in the folder. Makes it from `images` if it is not there.

    One process makes it, others wait. count: the number of items. Raises InputError for a folder
    that cannot be used, or for a wrong image.
    """
    base = folder / name
    try:
        copy = _find(base, count, labelled)
        if copy is not None:  # needs no lock, so it may lie where nothing can be written
            return copy
        folder.mkdir(parents=True, exist_ok=True)
        with open_lock(Path(f"{base}.lock")) as lock:
            lock_file(lock, wait=True)
            return _find(base, count, labelled) or _make(base, count, labelled, images())
    except OSError as e:
        raise InputError(
            f"--cache {quote(folder)}: {quote(str(e))}; expected a folder with room for the "
            "decoded images: make room, name another, or leave --cache out"
        ) from None


def _find(base: Path, count: int, labelled: bool) -> Copy | None:
    """The copy, or None if it is not there or not whole."""
    try:
        places = tuple(map(tuple, json.loads(regular_file(f"{base}.json").read_text())))
        end = 0
        for place in places:
            offset, H, W = place
            if offset != end or {*map(type, place)} != {int} or H <= 0 or W <= 0:
                return None
            end += H * W * (3 + labelled)
        if len(places) != count or os.path.getsize(f"{base}.bin") != end:
            return None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return Copy(Path(f"{base}.bin"), places, labelled)


def _make(base: Path, count: int, labelled: bool, images: Images) -> Copy:
    """Write the items one after another, then their places."""
    places: list[Place] = []

    def fill(f: BinaryIO) -> None:
        for index, image, label in images:
            places.append((f.tell(), image.shape[1], image.shape[2]))
            f.write(image.permute(1, 2, 0).contiguous().numpy().data)
            if label is not None:
                f.write(label.contiguous().numpy().data)
            line = f"cache {quote(base)}: {index + 1}/{count}, {f.tell() / 2**30:.2f} GiB"
            print_progress(line, last=index + 1 == count)

    write(Path(f"{base}.bin"), fill)
    write(Path(f"{base}.json"), lambda f: f.write(json.dumps(places).encode()))
    return Copy(Path(f"{base}.bin"), tuple(places), labelled)
