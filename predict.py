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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dnl
from data import ADE20K, CITYSCAPES, LAYOUT, InputError, decode_image, eval_items, normalize, show
from evaluate import AMP, Parser, choose_amp, colorize, distributed, load_network, predict, run_script, sheet, write

SIDE = 2048  # of a tile, for up to 64 classes
SERVER = {"cityscapes": tuple(CITYSCAPES), "ade20k": ADE20K}  # the classes, in the order of the network's outputs

# ---------------------------------------------------------------------------------------------------- prediction


def tile_side(num_classes: int, crop: int | None) -> int:
    """Side of the largest square computed at once: SIDE, less where its probabilities would exceed 1 GiB, but no less
    than --crop: who asks for larger windows has the memory."""
    return max(min(SIDE, int((2**28 / num_classes) ** 0.5)), crop or 0)


def spans(length: int, side: int) -> list[tuple[slice, slice]]:
    """Tiles of `side` along an axis, as (seen, kept). Kept parts cover 0..length once; at least side // 8 pixels beyond
    a kept part are seen, unless the image ends there."""
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    margin = side // 8
    count = -(-(length - 2 * margin) // (side - 2 * margin))
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    cuts = [0, *((a + side + b) // 2 for a, b in zip(starts, starts[1:])), length]
    return [(slice(s, s + side), slice(a, b)) for s, a, b in zip(starts, cuts, cuts[1:])]


def tiles(size: tuple[int, int], side: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """((rows, columns) seen, (rows, columns) kept) of each tile of an image; one tile up to side^2 pixels."""
    if size[0] * size[1] <= side * side:
        side = max(size)
    return [((ys, xs), (yk, xk)) for ys, yk in spans(size[0], side) for xs, xk in spans(size[1], side)]


def predict_ids(net: nn.Module, image: Tensor, *, device: torch.device, side: int = SIDE,
                **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (H, W) uint8 and the top class's probability (H, W) uint8, 255 for 1, of an image (3, H, W) uint8.

    Up to side^2 pixels, the argmax of `evaluate.predict`, whose options these are. Beyond, tile by tile, so that only one
    tile's probabilities are held.
    """
    size = tuple(image.shape[1:])
    ids, confidence = np.empty(size, np.uint8), np.empty(size, np.uint8)
    for seen, kept in tiles(size, side):
        inner = tuple(slice(k.start - s.start, k.stop - s.start) for s, k in zip(seen, kept))
        p = predict(net, image[:, *seen].to(device), **options)[:, *inner]  # (n, h, w)
        ids[kept] = p.argmax(0).byte().cpu().numpy()
        confidence[kept] = (p.amax(0) * 255).round().byte().cpu().numpy()
    return ids, confidence


# ---------------------------------------------------------------------------------------------------------- pictures


def overlay(image: Image.Image, ids: np.ndarray, colors: Sequence[Sequence[int]]) -> Image.Image:
    """The image half covered by its classes' colours."""
    return Image.blend(image, colorize(ids, colors).resize(image.size, Image.Resampling.NEAREST).convert("RGB"), 0.5)


def page(panels: Sequence[Image.Image], titles: Sequence[str], ids: np.ndarray, checkpoint: dict[str, Any],
         limit: int) -> Image.Image:
    """Pictures of one size side by side, at most `limit` pixels long each, over a legend of the classes in ids."""
    fit = min(1, limit / max(panels[0].size))
    size = tuple(max(1, round(n * fit)) for n in panels[0].size)
    padded = [Image.new("RGB", (max(320, size[0]), size[1]), "white") for _ in panels]  # room for title and legend
    for whole, panel in zip(padded, panels):
        whole.paste(panel.resize(size, Image.Resampling.BILINEAR))
    present = np.unique(ids)
    legend = ([checkpoint[key][i] for i in present] for key in ("classes", "colors"))
    return sheet([padded], titles, *legend, padded[0].width)


@torch.inference_mode()
def attention_maps(net: nn.Module, image: Tensor, at: tuple[int, int]) -> dict[str, Tensor]:
    """What the pixel (x, y) of an image (3, H, W) receives: its rows of A, P_class, A', A'' (Fig. 4), each (h, w) as F.

    The image is taken whole, in fp32. P_class only with GR. The network's context must be a DenoisedNonLocal.
    """
    *_, f, p = net.features(normalize(image[None]).contiguous(memory_format=torch.channels_last))
    q, k, _, p = net.context.inputs(f, p)
    size = (h, w) = tuple(f.shape[2:])
    x, y = (round(a * (n - 1) / max(1, m - 1)) for a, n, m in zip(at, (w, h), (image.shape[2], image.shape[1])))
    queries = torch.tensor([y * w + x], device=f.device)
    a, rectified, retained = dnl.denoised_maps(q, k, p, size, net.context.kernel, queries)
    gate = {} if p is None else {"P_class": dnl.class_affinity(p, queries)}
    rows = {"A": a} | gate | {"A'": rectified, "A''": retained}
    return {name: row[0, 0].unflatten(0, size) for name, row in rows.items()}


def attention_page(net: nn.Module, image: Tensor, ids: np.ndarray, at: tuple[int, int], checkpoint: dict[str, Any], *,
                   device: torch.device, side: int) -> Image.Image:
    """The prediction with the pixel marked, and its maps over the image, each from 0 to its largest value, told in the
    title. Of an image that goes by tiles, the tile that the pixel's class is from."""
    seen = next(s for s, (rows, columns) in tiles(ids.shape, side) if at[1] < rows.stop and at[0] < columns.stop)
    image, ids = image[:, *seen], ids[seen]
    x, y = at[0] - seen[1].start, at[1] - seen[0].start
    maps = attention_maps(net, image.to(device), (x, y))
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    marked, r = overlay(photo, ids, checkpoint["colors"]), max(2, photo.width // 60)
    ImageDraw.Draw(marked).ellipse((x - r, y - r, x + r, y + r), outline="white", width=max(1, r // 3))
    titles = [f"pixel {at[0]},{at[1]}", *(f"{name}, max {float(m.max()):.2g}" for name, m in maps.items())]
    return page([marked, *(_heat(photo, m) for m in maps.values())], titles, ids, checkpoint, limit=480)


def _heat(photo: Image.Image, m: Tensor) -> Image.Image:
    """A map (h, w) over the photo in grey: from nothing over red to yellow."""
    level = Image.fromarray((m / m.max().clamp_min(1e-30) * 255).byte().cpu().numpy())
    level = level.resize(photo.size, Image.Resampling.BILINEAR)
    color = Image.merge("RGB", (level.point(lambda v: min(255, 2 * v)), level.point(lambda v: max(0, 2 * v - 255)),
                                Image.new("L", photo.size)))
    return Image.composite(color, photo.convert("L").point(lambda v: 0.6 * v).convert("RGB"), level)


# ------------------------------------------------------------------------------------------------------------- files


def find_images(inputs: Sequence[str | Path], out: Path) -> tuple[list[tuple[Path, str]], list[Path]]:
    """(file, name of its results) of each image, and the files of folders that have no image's ending.

    Folders are searched to the bottom, without hidden files, linked folders and `out`. InputError: missing, or no image.
    """
    def unreadable(e: OSError) -> None:
        raise InputError(f"{show(e.filename)}: cannot be read ({e.strerror}); mend its permissions")

    found, others, results = [], [], os.path.realpath(out)
    for given in map(Path, inputs):
        if not given.exists():
            raise InputError(f"{show(given)}: no such file or folder: give images, or folders of images")
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
        raise InputError(f"{', '.join(map(show, inputs))}: no image; expected files *{', *'.join(LAYOUT['folder'][1])}")
    return found, others


def server_names(found: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Names as cityscapesScripts looks for them: CITY_SEQUENCE_FRAME*.png, one file for each, folders do not matter."""
    frames = [(path, re.fullmatch("([^_]+_[0-9]{6}_[0-9]{6})_leftImg8bit", path.stem)) for path, _ in found]
    wrong = next((path for path, frame in frames if not frame), None)
    if wrong:
        raise InputError(f"{show(wrong)}: --format cityscapes expects images CITY_SEQUENCE_FRAME_leftImg8bit.png: give "
                        "leftImg8bit/test, or leave the flag out")
    return [(path, f"{frame[1]}_pred_labelIds") for path, frame in frames]


def check_targets(found: list[tuple[Path, str]], out: Path, endings: Sequence[str]) -> None:
    """InputError where two images would write one file, an image would be overwritten, or a link leads out of `out`."""
    images, top, owner = {os.path.realpath(path) for path, _ in found}, os.path.realpath(out), {}
    for path, name in found:
        for target in (os.path.join(top, name + end) for end in endings):
            first = owner.setdefault(target, path)
            if first is not path:
                raise InputError(f"{show(path)} and {show(first)} would both write {show(target)}: rename one, or give "
                                "each its own --out")
            real = os.path.realpath(target)
            if real in images or not Path(real).is_relative_to(top):
                raise InputError(f"{show(target)}: would overwrite an image or leave {show(out)}: choose another --out")


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
    return ", ".join(map(show, names[:most])) + f" and {len(names) - most} more" * (len(names) > most)


@dataclass(frozen=True)
class _Images:
    """index -> (index, image (H, W, 3) uint8, or the InputError that tells why there is none)."""
    paths: list[Path]

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | InputError]:
        try:
            return index, np.array(decode_image(self.paths[index]))
        except InputError as e:
            return index, e


# -------------------------------------------------------------------------------------------------------- the script


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    p = Parser(description="Masks and pictures of images", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint")
    p.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    p.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the results")
    p.add_argument("--format", choices=["masks", *SERVER], default="masks",
                   help="palette masks of class ids with overlays, or the files of a test server alone")
    p.add_argument("--confidence", action="store_true", help="also the top class's probability, white is 1")
    p.add_argument("--attention", metavar="X,Y", help="also the maps of this pixel")
    p.add_argument("--scales", type=float, nargs="+", default=[1.0])
    p.add_argument("--flip", action="store_true", help="average with the mirrored image")
    p.add_argument("--crop", type=int, help="sliding windows of this size (default: the whole image, or tile)")
    p.add_argument("--amp", choices=["auto", *AMP], help="precision (default: the checkpoint's)")
    p.add_argument("--context", help="MODULE:FACTORY, again, where training was given one")
    p.add_argument("--workers", type=int, default=2, help="processes that read images, per rank")
    args = p.parse_args(argv)
    if min(args.scales) <= 0 or (args.crop is not None and args.crop < 1) or args.workers < 0:
        raise InputError("--scales and --crop must be above 0, --workers 0 or more")
    if args.attention and not re.fullmatch("[0-9]+,[0-9]+", args.attention):
        raise InputError(f"--attention {args.attention}: expected X,Y, whole pixels from the upper left, as 400,300")
    if args.format != "masks" and (args.confidence or args.attention):
        raise InputError(f"--format {args.format} writes the server's files alone: leave out --confidence, --attention")
    args.attention = args.attention and tuple(map(int, args.attention.split(",")))
    return args


def pictures(image: Tensor, path: Path, net: nn.Module, checkpoint: dict[str, Any], args: argparse.Namespace,
             device: torch.device, amp: torch.dtype | None) -> dict[str, Image.Image]:
    """All results of an image (H, W, 3) uint8, by the ending of their file's name. InputError: no such pixel in it."""
    if args.attention and not (args.attention[0] < image.shape[1] and args.attention[1] < image.shape[0]):
        raise InputError(f"{show(path)}: --attention {args.attention[0]},{args.attention[1]} is outside of the image, "
                        f"{image.shape[1]} wide and {image.shape[0]} high")
    side, x, colors = tile_side(len(checkpoint["classes"]), args.crop), image.permute(2, 0, 1), checkpoint["colors"]
    ids, confidence = predict_ids(net, x, device=device, side=side, scales=args.scales, flip=args.flip, crop=args.crop,
                                  amp=amp)
    if args.format == "cityscapes":
        return {".png": Image.fromarray(np.array([v[0] for v in CITYSCAPES.values()], np.uint8)[ids])}
    if args.format == "ade20k":
        return {".png": Image.fromarray(ids + np.uint8(1))}
    photo = Image.fromarray(image.numpy())
    photo.thumbnail((2048, 2048), Image.Resampling.BILINEAR)  # an overlay is to be looked at
    out = {".png": colorize(ids, colors),
           "_overlay.png": page([overlay(photo, ids, colors)], [show(path.name)], ids, checkpoint, limit=2048)}
    if args.confidence:
        out["_confidence.png"] = Image.fromarray(confidence)
    if args.attention:
        out["_attention.png"] = attention_page(net, x, ids, args.attention, checkpoint, device=device, side=side)
    return out


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
        raise InputError(f"{show(target)}: cannot be written ({e.strerror}): mend that, or choose another --out") from e


def say(line: str, end: str = "\n") -> None:
    """A line on standard error; on a terminal it replaces the progress line, and end "" makes it one."""
    terminal = sys.stderr.isatty()
    if end or terminal:
        print(("\r\033[K" if terminal else "") + line, end=end, file=sys.stderr, flush=True)


def work(found: list[tuple[Path, str]], net: nn.Module, checkpoint: dict[str, Any], args: argparse.Namespace, rank: int,
         world: int, device: torch.device) -> tuple[int, int]:
    """Do images rank, rank + world, ... Returns how many were done and how many failed, over all ranks."""
    counts, start = torch.zeros(2, dtype=torch.int64), time.monotonic()
    amp = AMP[choose_amp(args.amp or checkpoint["amp"], device)]
    loader = DataLoader(_Images([path for path, _ in found]), batch_size=None, num_workers=args.workers,
                        sampler=eval_items(len(found), rank, world))
    for index, image in loader:
        path, name = found[index]
        try:
            if isinstance(image, InputError):
                raise image
            for end, picture in pictures(image, path, net, checkpoint, args, device, amp).items():
                save(picture, args.out / (name + end))
            counts[0] += 1
        except InputError as e:
            counts[1] += 1
            say(str(e))
        except torch.OutOfMemoryError:
            counts[1] += 1
            say(f"{show(path)}: out of memory of the GPU: give --crop 768, or less")
        if rank == 0:
            rate = counts.sum() * world / (time.monotonic() - start)
            say(f"{index + 1}/{len(found)} images, {rate:.2f} images/s", end="")
    if world > 1:
        dist.all_reduce(counts)
    done, failed = counts.tolist()
    if rank == 0:
        say(f"{done} images to {show(args.out)}, {len(found) / (time.monotonic() - start):.2f} images/s"
            + f"; {failed} failed, named above" * (failed > 0))
    return done, failed


def main(argv: Sequence[str] | None = None) -> int:
    """Predict every image. Exit status 1 where one of them failed."""
    args = parse(argv)
    found, others = find_images(args.images, args.out)
    found = server_names(found) if args.format == "cityscapes" else found
    check_targets(found, args.out, endings(args))
    with distributed() as (rank, world, device):
        net, checkpoint = load_network(args.checkpoint, device, args.context)
        if tuple(checkpoint["classes"]) != SERVER.get(args.format, tuple(checkpoint["classes"])):
            raise InputError(f"{args.checkpoint}: trained on {checkpoint['data']}; --format {args.format} expects the "
                            f"classes of {args.format}: leave the flag out")
        if args.attention and not isinstance(net.context, dnl.DenoisedNonLocal):
            raise InputError(f"{args.checkpoint}: has no non-local block, so no --attention: leave the flag out")
        if others and rank == 0:
            say(f"left out, without an image's ending: {_some(others)}")
        if world > 1:
            dist.barrier()  # no rank writes while another still looks for images
        _, failed = work(found, net, checkpoint, args, rank, world, device)
        if args.format == "cityscapes" and rank == 0:
            check_server(args.out, [name for _, name in found])
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
