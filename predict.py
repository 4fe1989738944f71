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
from data import ADE20K, CITYSCAPES, LAYOUT, decode_image, eval_items, normalize
from evaluate import NOT_FINITE, load_network, predict
from pictures import HEAT, colorize, marked, overlay, overlay_map, sheet
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

SIDE = 2048  # of a tile, for up to 64 classes
SERVER = {"cityscapes": tuple(CITYSCAPES), "ade20k": ADE20K}  # the classes, in the order of the network's outputs

# ---------------------------------------------------------------------------------------------------- prediction


def tile_side(num_classes: int, crop: int | None) -> int:
    """Side of the largest square computed at once: SIDE, less where its probabilities would exceed 1 GiB, but no less
    than --crop: who asks for larger windows has the memory."""
    return max(min(SIDE, int((2**28 / num_classes) ** 0.5)), crop or 0)


def spans(length: int, side: int) -> list[tuple[slice, slice]]:
    """Tiles of at most `side` along an axis, as (seen, kept). Kept parts cover 0..length once; side // 8 pixels beyond a
    kept part are seen, unless the image ends there."""
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    margin = side // 8
    count = -(-length // (side - 2 * margin))
    cuts = [round(i * length / count) for i in range(count + 1)]
    return [(slice(max(0, a - margin), min(length, b + margin)), slice(a, b)) for a, b in zip(cuts, cuts[1:])]


def tiles(size: tuple[int, int], side: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """((rows, columns) seen, (rows, columns) kept) of each tile of an image; one tile up to side^2 pixels."""
    if size[0] * size[1] <= side * side:
        side = max(size)
    return [((ys, xs), (yk, xk)) for ys, yk in spans(size[0], side) for xs, xk in spans(size[1], side)]


def predict_ids(net: nn.Module, image: Tensor, source: str, *, device: torch.device, side: int = SIDE,
                **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (H, W) uint8 and the top class's probability (H, W) uint8, 255 for 1, of an image (3, H, W) uint8.

    Up to side^2 pixels, the argmax of `evaluate.predict`, whose options these are. Beyond, tile by tile, so that only one
    tile's probabilities are held. InputError, which names the source, where the network's output is not finite.
    """
    size = tuple(image.shape[1:])
    ids, confidence = np.empty(size, np.uint8), np.empty(size, np.uint8)
    for seen, kept in tiles(size, side):
        inner = tuple(slice(k.start - s.start, k.stop - s.start) for s, k in zip(seen, kept))
        p = predict(net, image[:, *seen].to(device), **options)[:, *inner]  # (n, h, w)
        if not p[0].isfinite().all():  # nan in one class is in all
            raise InputError(f"{source}: {NOT_FINITE}")
        ids[kept] = p.argmax(0).byte().cpu().numpy()
        confidence[kept] = (p.amax(0) * 255).round().byte().cpu().numpy()
    return ids, confidence


# ---------------------------------------------------------------------------------------------------------- pictures


def attention_inputs(net: dnl.Network, image: Tensor) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
    """Q, K (1, C', N), P (1, n, N) or None without GR, in fp32, and F's size, of an image (3, H, W), 0..255, on the
    network's device."""
    *_, f, p = net.features(normalize(image[None]).contiguous(memory_format=torch.channels_last))
    q, k, _, p = net.context.inputs(f, p)
    return q, k, p, tuple(f.shape[2:])


@torch.inference_mode()
def attention_maps(net: dnl.Network, image: Tensor, pixel: tuple[int, int]) -> dict[str, Tensor]:
    """What a pixel (x, y) of an image (3, H, W) receives: its rows of A, A', A'' (Fig. 4) and P_class, title -> (h, w) at
    F's size, float32 on the CPU. Maps of parts that the network lacks are left out. The image is taken whole."""
    q, k, p, size = attention_inputs(net, image)
    # nearest, corners on corners
    x, y = (round(at * (n - 1) / max(1, m - 1)) for at, n, m in zip(pixel, size[::-1], (image.shape[2], image.shape[1])))
    query = torch.tensor([y * size[1] + x], device=image.device)
    a, rectified, retained = dnl.denoised_maps(q, k, p, size, net.context.kernel, query)
    maps = {"A": a}
    if p is not None:
        maps["A' (after GR)"] = rectified
    if net.context.kernel:
        maps["A'' (after LR)"] = retained
    if p is not None:
        maps["P_class"] = dnl.class_affinity(p, query)
    return {title: m[0, 0].unflatten(0, size).cpu() for title, m in maps.items()}


def attention_row(net: dnl.Network, image: Tensor, pixel: tuple[int, int], caption: str,
                  width: int) -> dict[str, Image.Image]:
    """Title -> picture of the image, with its caption, and of each of `attention_maps` over it, the pixel marked, for a
    sheet `width` wide. image (3, H, W) uint8 on the network's device; more than 4 times as high as wide it is squeezed."""
    (H, W), maps = image.shape[1:], attention_maps(net, image, pixel)
    across = max(1, (width - 6) // (len(maps) + 1) - 6)
    small = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).resize(
        (across, max(1, min(4 * across, round(H * across / W)))), Image.Resampling.BILINEAR)
    at = ((pixel[0] + 0.5) * small.width / W, (pixel[1] + 0.5) * small.height / H)
    return {"pixel, predicted class": marked(small, at, caption)} | {
        title: marked(overlay_map(small, m), at, f"max {m.max():.3g}") for title, m in maps.items()}


def attention_sheet(rows: Sequence[dict[str, Image.Image]]) -> Image.Image:
    """Rows of `attention_row` under their titles, and the colour scale: each map goes to its own maximum (Figs. 1, 11)."""
    return sheet([[*row.values()] for row in rows], [*rows[0]], ("0", "1/4", "1/2", "3/4", "max"), HEAT,
                 next(iter(rows[0].values())).width)


def attention_page(net: dnl.Network, image: Tensor, pixel: tuple[int, int], caption: str, *, device: torch.device,
                   side: int) -> Image.Image:
    """The sheet of one pixel of an image (3, H, W) uint8. Of an image that goes by tiles, the tile that its class is from."""
    rows, columns = next(s for s, (ys, xs) in tiles(image.shape[1:], side) if pixel[1] < ys.stop and pixel[0] < xs.stop)
    at = (pixel[0] - columns.start, pixel[1] - rows.start)
    return attention_sheet([attention_row(net, image[:, rows, columns].to(device), at, caption, 2400)])


# ------------------------------------------------------------------------------------------------------------- files


def find_images(inputs: Sequence[str | Path], out: Path) -> tuple[list[tuple[Path, str]], list[Path]]:
    """(file, name of its results) of each image, and the files of folders that have no image's ending.

    Folders are searched to the bottom, without hidden files, linked folders and `out`. InputError: missing, or no image.
    """
    def unreadable(e: OSError) -> None:
        raise InputError(f"{quote(e.filename)}: cannot be read ({e.strerror}): check its permissions")

    found, others, results = [], [], os.path.realpath(out)
    for given in map(Path, inputs):
        if not given.exists():
            raise InputError(f"{quote(given)}: no such file or folder: give images, or folders of images")
        if not given.is_dir():
            found.append((given, given.stem))
            continue
        for here, folders, files in os.walk(given, onerror=unreadable):
            folders[:] = sorted(f for f in folders if f[0] != "." and os.path.realpath(Path(here, f)) != results)
            paths = [Path(here, f) for f in sorted(files) if f[0] != "."]
            images = [p for p in paths if p.name.lower().endswith(LAYOUT["folder"][1])]
            found += [(p, (p.parent.relative_to(given) / p.stem).as_posix()) for p in images]
            others += [p for p in paths if p not in images]
    if not found:
        raise InputError(f"{', '.join(map(quote, inputs))}: no image; expected files *{', *'.join(LAYOUT['folder'][1])}")
    return found, others


def server_names(found: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Names as cityscapesScripts looks for them: CITY_SEQUENCE_FRAME*.png, one file for each, folders do not matter."""
    frames = [(path, re.fullmatch("([^_]+_[0-9]{6}_[0-9]{6})_leftImg8bit", path.stem)) for path, _ in found]
    wrong = next((path for path, frame in frames if not frame), None)
    if wrong:
        raise InputError(f"{quote(wrong)}: --format cityscapes expects images CITY_SEQUENCE_FRAME_leftImg8bit.png: give "
                        "leftImg8bit/test, or leave the flag out")
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
                raise InputError(f"{quote(path)} and {quote(first)} would both write {quote(target)}: rename one, or give "
                                "each its own --out")
            real = os.path.realpath(target)
            if real in images or not Path(real).is_relative_to(top):
                raise InputError(f"{quote(target)}: would overwrite an image or leave {quote(out)}: choose another --out")


def check_server(out: Path, names: Sequence[str]) -> None:
    """Says what the Cityscapes server would refuse in `out`: missing or extra files, another size, another count."""
    expected = {name + ".png" for name in names}
    there = {p.relative_to(out).as_posix() for p in out.rglob("*.png")}
    lists = {"missing": expected - there, "not of this run, remove them": there - expected,
             "not 2048x1024": [name for name in expected & there if Image.open(out / name).size != (2048, 1024)]}
    for what, files in lists.items():
        if files:
            say(f"{len(files)} {what}: {_some(sorted(files))}")
    if len(there) != 1525:
        say(f"{len(there)} files; the server expects the 1525 of the test split")


def _some(names: Sequence[Path | str], most: int = 20) -> str:
    """The names for a message, as far as they fit."""
    return ", ".join(map(quote, names[:most])) + f" and {len(names) - most} more" * (len(names) > most)


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


def pixel_of(text: str) -> tuple[int, int]:
    """X,Y as given on the command line."""
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected X,Y in whole pixels, as 120,200") from None
    return x, y


def require_pixel(pixel: tuple[int, int], W: int, H: int, source: Path | str) -> None:
    """InputError unless the pixel (x, y) lies in the image of W x H that `source` names."""
    x, y = pixel
    if not (0 <= x < W and 0 <= y < H):
        raise InputError(f"{quote(source)}: pixel {x},{y} is outside of the image of {W}x{H} (width x height); expected X "
                        f"0..{W - 1}, Y 0..{H - 1}")


def require_attention(net: dnl.Network, source: str) -> None:
    """InputError unless the network has the maps A, A', A''. source: the checkpoint, for the message."""
    if not isinstance(net.context, dnl.DenoisedNonLocal):
        raise InputError(f"{source}: context {net.config.context!r} has no attention maps A, A', A''; "
                        "give a checkpoint trained with --context dnl or nl")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    p = Parser(description="Masks and pictures of images")
    p.add_argument("checkpoint")
    p.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    p.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the results (default: predictions)")
    p.add_argument("--format", choices=["masks", *SERVER], default="masks",
                   help="palette masks of class ids with overlays, or the files of a test server alone (default: masks)")
    p.add_argument("--confidence", action="store_true", help="also the top class's probability, white is 1")
    p.add_argument("--attention", metavar="X,Y", type=pixel_of, help="also the maps of this pixel")
    args = parse_flags(p, argv, "scales", "flip", "crop", "amp", "context", "workers")
    if args.format != "masks" and (args.confidence or args.attention):
        raise InputError(f"--format {args.format} writes the server's files alone: leave out --confidence, --attention")
    return args


def pictures(image: Tensor, path: Path, net: nn.Module, checkpoint: dict[str, Any], args: argparse.Namespace,
             device: torch.device, amp: torch.dtype | None) -> Iterator[tuple[str, Image.Image]]:
    """The results of an image (H, W, 3) uint8, each with the ending of its file's name. InputError, after the others, where the
    pixel of --attention is not in the image."""
    side, x = tile_side(len(checkpoint["classes"]), args.crop), image.permute(2, 0, 1)
    ids, confidence = predict_ids(net, x, quote(path), device=device, side=side, scales=args.scales, flip=args.flip, crop=args.crop,
                                  amp=amp)
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
        caption = "{},{} {}".format(*args.attention, checkpoint["classes"][ids[args.attention[::-1]]])
        yield "_attention.png", attention_page(net, x, args.attention, caption, device=device, side=side)


def endings(args: argparse.Namespace) -> list[str]:
    """The endings of the files that `pictures` makes, before there are any."""
    if args.format != "masks":
        return [".png"]
    return [".png", "_overlay.png"] + ["_confidence.png"] * args.confidence + ["_attention.png"] * bool(args.attention)


def save(picture: Image.Image, target: Path) -> None:
    """Write a PNG as a whole or not at all. InputError where it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, lambda f: picture.save(f, "PNG"))
    except OSError as e:
        raise InputError(f"{quote(target)}: cannot be written ({e.strerror}): make room or choose another --out") from e


def say(line: str, end: str = "\n") -> None:
    """A line on standard error; on a terminal it replaces the progress line, and end "" makes it one."""
    terminal = on_terminal(sys.stderr)
    if end or terminal:
        print_line(("\r\033[K" if terminal else "") + line, error=True, end=end)


def reason(e: Exception, path: Path) -> str:
    """The line that tells why an image has no result. Raises e where it does not come from the image."""
    if isinstance(e, InputError):
        return str(e)
    if isinstance(e, MemoryError) or "out of memory" in str(e) or "allocate memory" in str(e):  # the GPU's; the CPU's
        return f"{quote(path)}: out of memory: give --crop 768, or less"
    if isinstance(e, RuntimeError):
        raise e
    return f"{quote(path)}: no result ({type(e).__name__}: {e}): convert it, or remove it"


def work(found: list[tuple[Path, str]], net: nn.Module, checkpoint: dict[str, Any], args: argparse.Namespace, rank: int,
         world: int, device: torch.device) -> int:
    """Do images rank, rank + world, ... Returns how many failed, over all ranks."""
    counts, start = torch.zeros(2, dtype=torch.int64), time.monotonic()
    amp = AMP[choose_amp(args.amp or checkpoint["amp"], device)]
    loader = DataLoader(_Images([path for path, _ in found]), batch_size=None, num_workers=args.workers,
                        sampler=eval_items(len(found), rank, world))
    for index, image in loader:
        path, name = found[index]
        try:
            if isinstance(image, Exception):
                raise image
            for end, picture in pictures(image, path, net, checkpoint, args, device, amp):
                save(picture, args.out / (name + end))
            counts[0] += 1
        except (ValueError, OSError, SystemError, RuntimeError, MemoryError) as e:  # of this image; the others go on
            counts[1] += 1
            say(reason(e, path))
        if rank == 0:
            rate = counts.sum() * world / (time.monotonic() - start)
            say(f"{index + 1}/{len(found)} images, {rate:.2f} images/s", end="")
    if world > 1:
        dist.all_reduce(counts)
    done, failed = counts.tolist()
    if rank == 0:
        say(f"{done} images to {quote(args.out)}, {done / (time.monotonic() - start):.2f} images/s"
            + f"; {failed} failed, named above" * (failed > 0))
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Predict every image. Exit status 1 where one of them failed."""
    args = parse(argv)
    found, others = find_images(args.images, args.out)
    found = server_names(found) if args.format == "cityscapes" else found
    check_targets(found, args.out, endings(args))
    with distributed(timedelta(days=1)) as (rank, world, device):  # until the slowest rank has done its largest image
        net, checkpoint = load_network(args.checkpoint, device, args.context)
        if tuple(checkpoint["classes"]) != SERVER.get(args.format, tuple(checkpoint["classes"])):
            raise InputError(f"{args.checkpoint}: trained on {checkpoint['data']}; --format {args.format} expects the "
                            f"classes of {args.format}: leave the flag out")
        if args.attention:
            require_attention(net, args.checkpoint)
        if others and rank == 0:
            say(f"left out, without an image's ending: {_some(others)}")
        if world > 1:
            dist.barrier()  # no rank writes while another still looks for images
        failed = work(found, net, checkpoint, args, rank, world, device)
        if args.format == "cityscapes" and rank == 0:
            check_server(args.out, [name for _, name in found])
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
