"""Segment your own images with a checkpoint: masks of class ids, overlays, attention maps, a test server's files.

    python predict.py best.pt photo.jpg folder/                    # predictions/NAME.png and NAME_overlay.png
    python predict.py best.pt photo.jpg --confidence --attention 400,300     # the maps of pixel x 400, y 300
    torchrun --nproc-per-node 8 predict.py best.pt cityscapes/leftImg8bit/test --format cityscapes --out results

NAME is the image's name relative to the folder that was given. Masks have the size of the upright image (EXIF). Above
`SIDE` x `SIDE` pixels an image goes by tiles, of which the middle is kept: memory does not grow with its classes.
Each image is computed alone, so that a mask does not depend on what else lay in the folder. A file that cannot be read
is named on standard error and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dnl
from attention import attention_row, attention_sheet, pixel_of, require_attention, require_pixel
from checkpoint import load_network
from classes import ADE20K, CITYSCAPES
from data import IMAGE_ENDINGS, eval_items
from decode import decode_image
from evaluate import predict_ids, tile_side, tiles
from pictures import colorize, overlay
from runtime import (
    AMP,
    InputError,
    Parser,
    choose_amp,
    distributed,
    on_terminal,
    parse_flags,
    print_line,
    quote,
    run_script,
    write,
)

SERVER = {
    "cityscapes": tuple(CITYSCAPES),
    "ade20k": ADE20K,
}  # the classes, in the order of the network's outputs

# ---------------------------------------------------------------------------------------------------- prediction


# ---------------------------------------------------------------------------------------------------------- pictures


def attention_page(
    net: dnl.Network,
    image: Tensor,
    pixel: tuple[int, int],
    caption: str,
    *,
    device: torch.device,
    side: int,
) -> Image.Image:
    """The sheet of one pixel of an image (3, H, W) uint8. Of an image that goes by tiles, the tile that its class is from."""
    rows, columns = next(
        s
        for s, (ys, xs) in tiles(image.shape[1:], side)
        if pixel[1] < ys.stop and pixel[0] < xs.stop
    )
    at = (pixel[0] - columns.start, pixel[1] - rows.start)
    return attention_sheet(
        [attention_row(net, image[:, rows, columns].to(device), at, caption, 2400)]
    )


# ------------------------------------------------------------------------------------------------------------- files


def find_images(
    inputs: Sequence[str | Path], out: Path
) -> tuple[list[tuple[Path, str]], list[Path]]:
    """(file, name of its results) of each image, and the files of folders that have no image's ending.

    Folders are searched to the bottom, without hidden files, linked folders and `out`. InputError: missing, or no image.
    """

    def unreadable(e: OSError) -> None:
        raise InputError(
            f"{quote(e.filename)}: cannot be read ({e.strerror}): check its permissions"
        )

    found, others, results = [], [], os.path.realpath(out)
    for given in map(Path, inputs):
        if not given.exists():
            raise InputError(
                f"{quote(given)}: no such file or folder: give images, or folders of images"
            )
        if not given.is_dir():
            found.append((given, given.stem))
            continue
        for here, folders, files in os.walk(given, onerror=unreadable):
            folders[:] = sorted(
                f for f in folders if f[0] != "." and os.path.realpath(Path(here, f)) != results
            )
            paths = [Path(here, f) for f in sorted(files) if f[0] != "."]
            images = [p for p in paths if p.name.lower().endswith(IMAGE_ENDINGS)]
            found += [(p, (p.parent.relative_to(given) / p.stem).as_posix()) for p in images]
            others += [p for p in paths if p not in images]
    if not found:
        raise InputError(
            f"{', '.join(map(quote, inputs))}: no image; expected files *{', *'.join(IMAGE_ENDINGS)}"
        )
    return found, others


def server_names(found: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Names as cityscapesScripts looks for them: CITY_SEQUENCE_FRAME*.png, one file for each, folders do not matter."""
    frames = [
        (path, re.fullmatch("([^_]+_[0-9]{6}_[0-9]{6})_leftImg8bit", path.stem))
        for path, _ in found
    ]
    wrong = next((path for path, frame in frames if not frame), None)
    if wrong:
        raise InputError(
            f"{quote(wrong)}: --format cityscapes expects images CITY_SEQUENCE_FRAME_leftImg8bit.png: give "
            "leftImg8bit/test, or leave the flag out"
        )
    return [(path, f"{frame[1]}_pred_labelIds") for path, frame in frames]


def check_targets(found: list[tuple[Path, str]], out: Path, endings: Sequence[str]) -> None:
    """InputError where `out` is a file, two images would write one file, an image would be overwritten, or a link leads out."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {quote(out)}: is a file: name a folder")
    images, top, owner = {os.path.realpath(path) for path, _ in found}, os.path.realpath(out), {}
    for path, name in found:
        for target in (os.path.join(top, name + end) for end in endings):
            first = owner.setdefault(target, path)
            if first is not path:
                raise InputError(
                    f"{quote(path)} and {quote(first)} would both write {quote(target)}: rename one, or give "
                    "each its own --out"
                )
            real = os.path.realpath(target)
            if real in images or not Path(real).is_relative_to(top):
                raise InputError(
                    f"{quote(target)}: would overwrite an image or leave {quote(out)}: choose another --out"
                )


def check_server(out: Path, names: Sequence[str]) -> None:
    """Says what the Cityscapes server would refuse in `out`: missing or extra files, another size, another count."""
    expected = {name + ".png" for name in names}
    there = {p.relative_to(out).as_posix() for p in out.rglob("*.png")}
    lists = {
        "missing": expected - there,
        "not of this run, remove them": there - expected,
        "not 2048x1024": [
            name for name in expected & there if Image.open(out / name).size != (2048, 1024)
        ],
    }
    for what, files in lists.items():
        if files:
            print_over_progress(f"{len(files)} {what}: {_some(sorted(files))}")
    if len(there) != 1525:
        print_over_progress(f"{len(there)} files; the server expects the 1525 of the test split")


def _some(names: Sequence[Path | str], most: int = 20) -> str:
    """The names for a message, as far as they fit."""
    return ", ".join(map(quote, names[:most])) + f" and {len(names) - most} more" * (
        len(names) > most
    )


@dataclass(frozen=True)
class _Images:
    """index -> (index, image (H, W, 3) uint8, or the error that tells why there is none)."""

    paths: list[Path]

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | Exception]:
        try:
            return index, np.array(decode_image(self.paths[index]))
        except (InputError, MemoryError) as e:
            return index, e


# -------------------------------------------------------------------------------------------------------- the script


def parse_prediction(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    p = Parser(description="Masks and pictures of images")
    p.add_argument("checkpoint")
    p.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        help="folder of the results (default: predictions)",
    )
    p.add_argument(
        "--format",
        choices=["masks", *SERVER],
        default="masks",
        help="palette masks of class ids with overlays, or the files of a test server alone (default: masks)",
    )
    p.add_argument(
        "--confidence", action="store_true", help="also the top class's probability, white is 1"
    )
    p.add_argument("--attention", metavar="X,Y", type=pixel_of, help="also the maps of this pixel")
    args = parse_flags(p, argv, "scales", "flip", "crop", "amp", "context", "workers")
    if args.format != "masks" and (args.confidence or args.attention):
        raise InputError(
            f"--format {args.format} writes the server's files alone: leave out --confidence, --attention"
        )
    return args


def pictures(
    image: Tensor,
    path: Path,
    net: nn.Module,
    checkpoint: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
    amp: torch.dtype | None,
) -> Iterator[tuple[str, Image.Image]]:
    """The results of an image (H, W, 3) uint8, each with the ending of its file's name. InputError, after the others, where the
    pixel of --attention is not in the image."""
    side, x = tile_side(len(checkpoint["classes"]), args.crop), image.permute(2, 0, 1)
    ids, confidence = predict_ids(
        net,
        x,
        quote(path),
        device=device,
        side=side,
        scales=args.scales,
        flip=args.flip,
        crop=args.crop,
        amp=amp,
    )
    if args.format == "cityscapes":
        yield ".png", Image.fromarray(np.array([v[0] for v in CITYSCAPES.values()], np.uint8)[ids])
        return
    if args.format == "ade20k":
        yield ".png", Image.fromarray(ids + np.uint8(1))
        return
    yield ".png", colorize(ids, checkpoint["colors"])
    yield "_overlay.png", overlay(image, quote(path.name), ids, checkpoint)
    if args.confidence:
        yield "_confidence.png", Image.fromarray(confidence)
    if args.attention:
        require_pixel(args.attention, image.shape[1], image.shape[0], path)
        caption = "{},{} {}".format(
            *args.attention, checkpoint["classes"][ids[args.attention[::-1]]]
        )
        yield (
            "_attention.png",
            attention_page(net, x, args.attention, caption, device=device, side=side),
        )


def endings(args: argparse.Namespace) -> list[str]:
    """The endings of the files that `pictures` makes, before there are any."""
    if args.format != "masks":
        return [".png"]
    return (
        [".png", "_overlay.png"]
        + ["_confidence.png"] * args.confidence
        + ["_attention.png"] * bool(args.attention)
    )


def save(picture: Image.Image, target: Path) -> None:
    """Write a PNG as a whole or not at all. InputError where it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, lambda f: picture.save(f, "PNG"))
    except OSError as e:
        raise InputError(
            f"{quote(target)}: cannot be written ({e.strerror}): make room or choose another --out"
        ) from e


def print_over_progress(line: str, end: str = "\n") -> None:
    """A line on standard error; on a terminal it replaces the progress line, and end "" makes it one."""
    terminal = on_terminal(sys.stderr)
    if end or terminal:
        print_line(("\r\033[K" if terminal else "") + line, error=True, end=end)


def failure_line(e: Exception, path: Path) -> str:
    """The line that tells why an image has no result. Raises e where it does not come from the image."""
    if isinstance(e, InputError):
        return str(e)
    if (
        isinstance(e, MemoryError) or "out of memory" in str(e) or "allocate memory" in str(e)
    ):  # the GPU's; the CPU's
        return f"{quote(path)}: out of memory: give --crop 768, or less"
    if isinstance(e, RuntimeError):
        raise e
    return f"{quote(path)}: no result ({type(e).__name__}: {e}): convert it, or remove it"


def predict_all(
    found: list[tuple[Path, str]],
    net: nn.Module,
    checkpoint: dict[str, Any],
    args: argparse.Namespace,
    rank: int,
    world: int,
    device: torch.device,
) -> int:
    """Do images rank, rank + world, ... Returns how many failed, over all ranks."""
    counts, start = torch.zeros(2, dtype=torch.int64), time.monotonic()
    amp = AMP[choose_amp(args.amp or checkpoint["amp"], device)]
    loader = DataLoader(
        _Images([path for path, _ in found]),
        batch_size=None,
        num_workers=args.workers,
        sampler=eval_items(len(found), rank, world),
    )
    for index, image in loader:
        path, name = found[index]
        try:
            if isinstance(image, Exception):
                raise image
            for end, picture in pictures(image, path, net, checkpoint, args, device, amp):
                save(picture, args.out / (name + end))
            counts[0] += 1
        except (
            ValueError,
            OSError,
            SystemError,
            RuntimeError,
            MemoryError,
        ) as e:  # of this image; the others go on
            counts[1] += 1
            print_over_progress(failure_line(e, path))
        if rank == 0:
            rate = counts.sum() * world / (time.monotonic() - start)
            print_over_progress(f"{index + 1}/{len(found)} images, {rate:.2f} images/s", end="")
    if world > 1:
        dist.all_reduce(counts)
    done, failed = counts.tolist()
    if rank == 0:
        print_over_progress(
            f"{done} images to {quote(args.out)}, {done / (time.monotonic() - start):.2f} images/s"
            + f"; {failed} failed, named above" * (failed > 0)
        )
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Predict every image. Exit status 1 where one of them failed."""
    args = parse_prediction(argv)
    found, others = find_images(args.images, args.out)
    found = server_names(found) if args.format == "cityscapes" else found
    check_targets(found, args.out, endings(args))
    with distributed(timedelta(days=1)) as (
        rank,
        world,
        device,
    ):  # until the slowest rank has done its largest image
        net, checkpoint = load_network(args.checkpoint, device, args.context)
        if tuple(checkpoint["classes"]) != SERVER.get(args.format, tuple(checkpoint["classes"])):
            raise InputError(
                f"{args.checkpoint}: trained on {checkpoint['data']}; --format {args.format} expects the "
                f"classes of {args.format}: leave the flag out"
            )
        if args.attention:
            require_attention(net, args.checkpoint)
        if others and rank == 0:
            print_over_progress(f"left out, without an image's ending: {_some(others)}")
        if world > 1:
            dist.barrier()  # no rank writes while another still looks for images
        failed = predict_all(found, net, checkpoint, args, rank, world, device)
        if args.format == "cityscapes" and rank == 0:
            check_server(args.out, [name for _, name in found])
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
