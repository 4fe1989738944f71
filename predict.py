"""Segment your own images: masks of class ids, overlays, attention maps, a test server's files.

    python predict.py best.pt photo.jpg folder/        # predictions/NAME.png and NAME_overlay.png
    python predict.py best.pt photo.jpg --confidence --attention 400,300    # x 400, y 300
    python predict.py best.pt photo.jpg --page    # NAME_attention.html: click a pixel, see its maps
    torchrun --nproc-per-node 8 predict.py best.pt leftImg8bit/test --format cityscapes

NAME is the image's name relative to the given folder. Masks have the size of the upright image
(EXIF). A large image is computed tile by tile, so its probabilities need at most 1 GiB. Each image
is computed alone, so a mask does not depend on the other files. NAME_confidence.png holds the
probability of the predicted class as grey, 0 to 255, and nothing else; with it the overlay shows
the same above a scale. A file that cannot be read is named
on standard error, the others are still computed, and the exit status is 1.
"""

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import dnl
from attention import (
    Pixel,
    attention_row,
    attention_sheet,
    pixel_of,
    require_attention,
    require_pixel,
)
from checkpoint import base_of, load_network
from classes import ADE20K, CITYSCAPES
from data import base_factor, eval_items, load_batches
from decode import decode_image
from evaluate import predict_ids, tile_side, tiles
from files import IMAGE_ENDINGS, is_data, list_names
from fold import fold_batchnorm
from page import attention_html
from pictures import colorize, overlay
from ranks import choose_amp, distributed, sum_over_ranks
from runtime import (
    AMP,
    InputError,
    Parser,
    counted,
    failure_line,
    parse_flags,
    print_line,
    print_progress,
    quote,
    run_script,
    write_result,
)

# The classes of each test server, in the order of the network's outputs.
SERVER_CLASSES = {"cityscapes": tuple(CITYSCAPES), "ade20k": ADE20K}
CITYSCAPES_IDS = np.array([values[0] for values in CITYSCAPES.values()], np.uint8)
Found = list[tuple[Path, str]]  # image, name of its results
Save = Callable[[BinaryIO], object]  # writes into an open file
Results = Iterator[tuple[str, Save]]  # ending of the file's name, its content

# ---- files


def find_images(inputs: Sequence[str | Path], out: Path) -> tuple[Found, list[Path]]:
    """The images, and the other files of the given folders.

    Folders are searched to the bottom, but not linked ones, `out` and what is no data (see
    files.is_data). InputError if an input is missing or is `out`, or there is no image.
    """

    def unreadable(error: OSError) -> None:
        name = quote(error.filename)
        raise InputError(f"{name}: cannot be read ({error.strerror}): check its permissions")

    top = os.path.realpath(out)
    found, others = [], []
    for given in map(Path, inputs):
        if not given.exists():
            raise InputError(f"{quote(given)}: no such file or folder: give images or folders")
        if not given.is_dir():
            found.append((given, given.stem))
            continue
        if os.path.realpath(given) == top:
            raise InputError(
                f"--out {quote(out)}: is the folder of the images, so the next run would take the "
                "results for images: name another folder"
            )
        for here, folders, files in os.walk(given, onerror=unreadable):
            folders[:] = sorted(filter(is_data, folders))
            folders[:] = [f for f in folders if os.path.realpath(Path(here, f)) != top]
            for file in sorted(filter(is_data, files)):
                path = Path(here, file)
                if file.lower().endswith(IMAGE_ENDINGS):
                    name = path.relative_to(given).with_suffix("")
                    found.append((path, name.as_posix()))
                else:
                    others.append(path)
    if not found:
        expected = f"expected files *{', *'.join(IMAGE_ENDINGS)}"
        raise InputError(f"{list_names(inputs)}: no image; {expected}")
    return found, others


def server_names(found: Found) -> Found:
    """The names that cityscapesScripts looks for: CITY_SEQUENCE_FRAME*.png, in any folder."""
    renamed = []
    for path, _ in found:
        frame = re.fullmatch("([^_]+_[0-9]{6}_[0-9]{6})_leftImg8bit", path.stem)
        if not frame:
            raise InputError(
                f"{quote(path)}: --format cityscapes expects images named "
                "CITY_SEQUENCE_FRAME_leftImg8bit.png: give leftImg8bit/test, or leave the flag out"
            )
        renamed.append((path, f"{frame[1]}_pred_labelIds"))
    return renamed


def check_targets(found: Found, out: Path, endings: Sequence[str]) -> None:
    """InputError if a result would overwrite an image or another result, or lie outside `out`."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {quote(out)}: is a file: name a folder")
    images = {os.path.realpath(path) for path, _ in found}
    top = os.path.realpath(out)
    owner: dict[str, Path] = {}
    for path, name in found:
        for ending in endings:
            target = os.path.join(top, name + ending)
            first = owner.setdefault(target, path)
            if first is not path:
                both = f"{quote(path)} and {quote(first)} would both write {quote(target)}"
                raise InputError(f"{both}: rename one, or give each its own --out")
            real = os.path.realpath(target)
            if real in images or not Path(real).is_relative_to(top):
                wrong = f"{quote(target)}: would overwrite an image or leave {quote(out)}"
                raise InputError(f"{wrong}: choose another --out")


def check_server(out: Path, names: Sequence[str]) -> None:
    """Print what the Cityscapes server would refuse in `out`: wrong files, sizes, or number."""
    expected = {f"{name}.png" for name in names}
    present = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    written = expected & present
    problems = {
        "missing": expected - present,
        "not of this run, remove them": present - expected,
        "not 2048x1024": {f for f in written if Image.open(out / f).size != (2048, 1024)},
    }
    for problem, files in problems.items():
        if files:
            print_line(f"{len(files)} {problem}: {list_names(sorted(files))}", error=True)
    if len(present) != 1525:
        line = f"{counted(len(present), 'file')}; the server expects the 1525 of the test split"
        print_line(line, error=True)


def load_image(paths: Sequence[Path], index: int) -> tuple[int, np.ndarray | Exception]:
    """The index and the image (H, W, 3) uint8, or the error that tells why there is none."""
    try:
        return index, np.array(decode_image(paths[index]))
    except (InputError, MemoryError) as e:
        return index, e


# ---- results


def pixel_sheet(
    net: dnl.Network,
    image: Tensor,
    pixel: Pixel,
    caption: str,
    *,
    device: torch.device,
    side: int,
    base: int = 0,
) -> Image.Image:
    """The sheet of a pixel of an image (3, H, W) uint8, or of its tile if there are several.

    The maps are of what the network is fed at a scale of 1.
    """
    x, y = pixel
    _, H, W = image.shape
    factor = base_factor((H, W), base)
    for rows, columns in tiles(H, W, max(1, int(side / (factor or 1)))):
        if y < rows.kept.stop and x < columns.kept.stop:
            break
    part = image[:, rows.seen, columns.seen].to(device)
    at = (x - columns.seen.start, y - rows.seen.start)
    return attention_sheet([attention_row(net, part, at, caption, 2400, factor)])


def result_endings(args: argparse.Namespace) -> list[str]:
    """The endings of the files that `results` makes of each image."""
    endings = [".png"]
    if args.format == "masks":
        endings.append("_overlay.png")
    if args.confidence:
        endings.append("_confidence.png")
    if args.attention:
        endings.append("_attention.png")
    if args.page:
        endings.append("_attention.html")
    return endings


def png(picture: Image.Image) -> Save:
    """What writes a picture as a PNG."""
    return partial(picture.save, format="PNG")


def results(
    image: Tensor,
    path: Path,
    net: dnl.Network,
    folded: nn.Module,
    checkpoint: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
) -> Results:
    """The files that the flags ask for, of an image (H, W, 3) uint8.

    folded: `fold_batchnorm` of the network, which predicts. The attention is of the network itself.
    InputError, after the other files, if the pixel of --attention is not in the image.
    """
    classes, colors = checkpoint["classes"], checkpoint["colors"]
    amp = AMP[choose_amp(args.amp or checkpoint["amp"], device)]
    views = {"scales": args.scales, "flip": args.flip, "crop": args.crop, "amp": amp}
    side = tile_side(len(classes), args.crop)
    x = image.permute(2, 0, 1)
    where: dict[str, Any] = {"device": device, "side": side, "base": base_of(checkpoint, args.base)}
    ids, confidence = predict_ids(folded, x, quote(path), **where, **views)
    if args.format == "cityscapes":
        yield ".png", png(Image.fromarray(CITYSCAPES_IDS[ids]))
        return
    if args.format == "ade20k":
        yield ".png", png(Image.fromarray(ids + np.uint8(1)))
        return
    yield ".png", png(colorize(ids, colors))
    shown = confidence if args.confidence else None
    drawn = overlay(image.numpy(), quote(path.name), ids, classes, colors, shown)
    yield "_overlay.png", png(drawn)
    if args.confidence:
        yield "_confidence.png", png(Image.fromarray(confidence))
    if args.page:
        html = attention_html(
            net, image.numpy(), ids, confidence, checkpoint, quote(path.name), args.label, args.base
        )
        yield "_attention.html", lambda file: file.write(html.encode())
    if args.attention:
        column, row = args.attention
        require_pixel(args.attention, ids.shape[1], ids.shape[0], path)
        caption = f"{column},{row} {classes[ids[row, column]]}"
        sheet = pixel_sheet(net, x, args.attention, caption, **where)
        yield "_attention.png", png(sheet)


def image_failure(error: Exception, path: Path) -> str:
    """Why an image has no result, as a line. Raises an error that every image would have."""
    if isinstance(error, InputError):
        return str(error)
    line = failure_line(error)
    if line is None:
        if isinstance(error, RuntimeError):
            raise error
        line = f"no result ({type(error).__name__}: {error}): convert it, or remove it"
    return f"{quote(path)}: {quote(line)}"


# ---- the script


def parse_prediction(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    parser = Parser(description="Masks and pictures of images")
    add = parser.add_argument
    add("checkpoint")
    add("images", nargs="+", metavar="IMAGE|FOLDER")
    out = Path("predictions")
    add("--out", type=Path, default=out, help=f"folder of the results (default: {out})")
    formats = "palette masks with overlays, or only the files of a test server (default: masks)"
    add("--format", choices=["masks", *SERVER_CLASSES], default="masks", help=formats)
    confidence = "also the probability of the predicted class: grey, 0 is 0 and 255 is 1"
    add("--confidence", action="store_true", help=confidence)
    add("--attention", metavar="X,Y", type=pixel_of, help="also the attention maps of this pixel")
    page = "also a page of the maps of any pixel; an image above 1024x2048 pixels is reduced"
    add("--page", action="store_true", help=page)
    label = "with --page and one image: its label file, to measure the attention noise against"
    add("--label", type=Path, metavar="FILE", help=label)
    flags = ("scales", "base", "flip", "crop", "amp", "context", "workers", "device")
    args = parse_flags(parser, argv, *flags)
    if args.format != "masks" and (args.confidence or args.attention or args.page):
        raise InputError(f"--format {args.format}: leave out --confidence, --attention and --page")
    one = len(args.images) == 1 and not Path(args.images[0]).is_dir()
    if args.label and not (args.page and one):
        raise InputError(f"--label {quote(args.label)}: expected --page and one image")
    return args


def predict_all(
    found: Found, make: Callable[..., Results], args: argparse.Namespace, rank: int, world: int
) -> int:
    """Write what `make` gives for images rank, rank + world, ... Returns all ranks' failures."""
    done = failed = 0
    start = time.monotonic()
    load = partial(load_image, [path for path, _ in found])
    keys = [(index,) for index in eval_items(len(found), rank, world)]
    for index, image in load_batches(load, args.workers, sampler=keys, batch_size=None):
        path, name = found[index]
        written = 0
        try:
            if isinstance(image, Exception):
                raise image
            for ending, save in make(image, path):
                write_result(args.out / (name + ending), save)
                written += 1
            done += 1
        except (ValueError, OSError, SystemError, RuntimeError, MemoryError) as e:
            failed += 1  # this image; the others are still computed
            line = image_failure(e, path)
            if written:
                line += f" ({written} of its {len(result_endings(args))} files were written)"
            print_line(line, error=True)
        if rank == 0:
            rate = (done + failed) * world / (time.monotonic() - start)
            print_progress(f"{index + 1}/{len(found)} images, {rate:.2f} images/s")
    done, failed = map(int, sum_over_ranks([done, failed]))
    if rank == 0:
        rate = done / (time.monotonic() - start)
        line = f"{counted(done, 'image')} to {quote(args.out)}, {rate:.2f} images/s"
        if failed:
            line += f"; {failed} failed, named above"
        print_progress(line, last=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Predict every image. Exit status 1 if one of them failed."""
    args = parse_prediction(argv)
    found, others = find_images(args.images, args.out)
    if args.format == "cityscapes":
        found = server_names(found)
    check_targets(found, args.out, result_endings(args))
    with distributed(args.device, timedelta(days=1)) as (
        rank,
        world,
        device,
    ):  # for the slowest rank
        net, checkpoint = load_network(args.checkpoint, device, args.context)
        classes = tuple(checkpoint["classes"])
        if classes != SERVER_CLASSES.get(args.format, classes):
            got = f"{quote(args.checkpoint)}: trained on {checkpoint['data']}"
            raise InputError(f"{got}; expected {args.format}: leave out --format {args.format}")
        if args.attention or args.page:
            require_attention(net, args.checkpoint)
        if others and rank == 0:
            print_line(f"left out, names without an image ending: {list_names(others)}", error=True)
        sum_over_ranks([])  # no rank writes before every rank has looked for images
        folded = fold_batchnorm(net)
        make = partial(
            results, net=net, folded=folded, checkpoint=checkpoint, args=args, device=device
        )
        failed = predict_all(found, make, args, rank, world)
        if args.format == "cityscapes" and rank == 0:
            check_server(args.out, [name for _, name in found])
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
