"""The paper's figures from your own checkpoints and images, as PNG.

    python -m paper.figures attention best.pt street.jpg --pixel 120,200           # Figs. 1 and 11
    python -m paper.figures compare nl.pt dnl.pt --names NL Ours --images 0 7 30   # Figs. 5 to 9
    python -m paper.figures region nl.pt dnl.pt --class road --images 0 7          # Fig. 10
    python -m paper.figures curves runs/nl runs/dnl                                # loss and mIoU
    python -m paper.figures gate best.pt                                           # P_class

The data set is the checkpoint's; --data and --root name another. A pixel is X,Y, counted from 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.Image import Resampling

import dnl
from attention import attention_row, attention_sheet, pixel_of, require_attention, require_pixel
from checkpoint import base_of, load_network, open_like, read_checkpoint
from classes import IGNORE, Color
from data import DataSet, base_factor, read
from decode import decode_image
from evaluate import predict_ids
from paper.curves import curves
from paper.noise import measure
from pictures import GAP, colorize, matrix_picture, sheet, with_ignored
from ranks import choose_amp, find_device
from runtime import AMP, InputError, Parser, add_flags, quote, run_script, write_result

Pixel = tuple[int, int]  # (x, y)
Box = tuple[int, int, int]  # (left, top, side)
PERCENT = ("0 %", "25 %", "50 %", "75 %", "100 %")
DIFFERENT = "white boxes: where the predictions differ most"
WRONG = "white boxes: where the prediction differs from the truth most"


def load(
    path: str, device: torch.device, contexts: Sequence[str]
) -> tuple[dnl.Network, dict[str, Any]]:
    """`checkpoint.load_network`; contexts: what --context allows to import."""
    context = read_checkpoint(path)["config"]["context"]
    return load_network(path, device, context if context in contexts else None)


# ---- attention


def draw_pixels(ids: np.ndarray, count: int, rng: np.random.Generator) -> list[Pixel]:
    """A random pixel (x, y) from each of `count` random classes of a prediction (H, W).

    Fewer if fewer classes cover 1 % of it.
    """
    classes, sizes = np.unique(ids, return_counts=True)
    large = classes[sizes >= ids.size / 100]
    pixels = []
    for c in rng.permutation(large)[:count]:
        place = rng.choice(np.flatnonzero(ids == c))
        y, x = divmod(int(place), ids.shape[1])
        pixels.append((x, y))
    return pixels


def attention(args: argparse.Namespace, device: torch.device) -> Image.Image:
    """A row for each image and chosen pixel; by default two pixels of different classes."""
    net, checkpoint = load(args.checkpoint, device, args.context)
    require_attention(net, args.checkpoint)
    amp, base = AMP[choose_amp(checkpoint["amp"], device)], base_of(checkpoint)
    rows = []
    for path in args.images:
        decoded = torch.tensor(decode_image(Path(path)), device=device)
        image = decoded.permute(2, 0, 1)
        _, H, W = image.shape
        for pixel in args.pixel or ():
            require_pixel(pixel, W, H, path)
        ids, _ = predict_ids(net, image, path, device=device, base=base, amp=amp)
        rng = np.random.default_rng(args.seed)
        for x, y in args.pixel or draw_pixels(ids, 2, rng):
            caption = f"{x},{y} {checkpoint['classes'][ids[y, x]]}"
            factor = base_factor((H, W), base)
            row = attention_row(net, image, (x, y), caption, args.width, factor)
            rows.append(row)
    return attention_sheet(rows)


def gate(args: argparse.Namespace, device: torch.device) -> Image.Image:
    """Mean P_class of pixels of two classes, for each pair of classes. InputError without GR."""
    net, checkpoint = load(args.checkpoint, device, args.context)
    require_attention(net, args.checkpoint)
    if not net.context.gr:
        raise InputError(
            f"{quote(args.checkpoint)}: trained without GR, so it has no P_class: give a "
            "checkpoint of --context dnl without --no-gr"
        )
    dataset = open_like(checkpoint, args.data, args.root, args.split, args.checkpoint)
    base = base_of(checkpoint)
    measured = measure(net, dataset, queries=64, seed=0, device=device, workers=2, base=base)
    means = measured.gate.numpy()
    title = "mean P_class: rows are the query pixel's class, columns the other pixel's; in percent"
    return matrix_picture(means, means, dataset.classes, title, PERCENT)


# ---- predictions, compared


def largest_boxes(weight: np.ndarray, count: int = 2) -> list[Box]:
    """Up to `count` squares without overlap, each with the largest sum of weight (H, W), 0..1.

    The side is a quarter of the short side. Squares of a mean weight below 0.02 are left out.
    """
    side = max(1, min(weight.shape) // 4)
    weight = weight.astype(np.float64)
    boxes: list[Box] = []
    for _ in range(count):
        table = np.pad(weight, ((1, 0), (1, 0)))
        table = table.cumsum(0).cumsum(1)  # the sum of all above and to the left
        rows = table[side:] - table[:-side]
        sums = rows[:, side:] - rows[:, :-side]
        top, left = divmod(int(sums.argmax()), sums.shape[1])
        if sums[top, left] < 0.02 * side * side:
            break
        boxes.append((left, top, side))
        # so low that no later square gains by touching this one
        weight[top : top + side, left : left + side] = -weight.size
    return boxes


def boxed(image: Image.Image, boxes: Sequence[Box], width: int) -> Image.Image:
    """The picture, `width` wide, with the boxes in white, edged in black."""
    scale = width / image.width
    height = max(1, round(image.height * scale))
    how = Resampling.NEAREST if image.mode == "P" else Resampling.BILINEAR
    out = image.convert("RGB").resize((width, height), how)
    draw = ImageDraw.Draw(out)
    for box in boxes:
        left, top, side = [round(v * scale) for v in box]
        for outset, color, line in ((1, "black", 4), (0, "white", 2)):
            ends = (
                max(0, left - outset),
                max(0, top - outset),
                min(width - 1, left + side + outset),
                min(height - 1, top + side + outset),
            )
            draw.rectangle(ends, outline=color, width=line)
    return out


def region(image: np.ndarray, mask: np.ndarray, color: Color) -> Image.Image:
    """The pixels of a mask (H, W) in a colour over the darkened grey image (H, W, 3) (Fig. 10)."""
    photo = Image.fromarray(image).convert("L")
    grey = np.asarray(photo, np.float32)[..., None]
    inside = 0.35 * grey + 0.65 * np.asarray(color)
    outside = 0.5 * grey
    shown = np.where(mask[..., None], inside, outside)
    return Image.fromarray(shown.round().astype(np.uint8))


def disagreement(guesses: Sequence[np.ndarray], truth: np.ndarray | None) -> np.ndarray:
    """Where the predictions differ, (H, W) bool; False at label 255.

    A single prediction is compared with the truth (H, W).
    """
    against = guesses[0]
    if len(guesses) == 1 and truth is not None:
        against = truth
    differ = np.any([g != against for g in guesses], 0)
    if truth is None:
        return differ
    return differ & (truth != IGNORE)


def choose_images(dataset: DataSet, images: list[int] | None) -> list[int]:
    """The numbers given, or three from the first image to the last. InputError: no such image."""
    last = len(dataset) - 1
    if not images:
        places = np.linspace(0, last, min(3, len(dataset)))
        return places.round().astype(int).tolist()
    if not all(0 <= i <= last for i in images):
        raise InputError(
            f"--images {' '.join(map(str, images))}: expected numbers in 0..{last}, the images of "
            f"{dataset.name} {dataset.split}"
        )
    return images


def predictions(
    args: argparse.Namespace, device: torch.device
) -> tuple[DataSet, list[int], list[list[np.ndarray]]]:
    """The data set, the chosen image numbers, and each checkpoint's class ids (H, W) of each image.

    One network at a time is held. InputError: unequal classes, no such image.
    """
    guesses = []
    for path in args.checkpoints:
        net, checkpoint = load(path, device, args.context)
        dataset = open_like(checkpoint, args.data, args.root, args.split, path)
        chosen = choose_images(dataset, args.images)
        amp, base = AMP[choose_amp(checkpoint["amp"], device)], base_of(checkpoint)
        predicted = []
        for i in chosen:
            image, _ = read(dataset, i)
            pixels = torch.tensor(image).permute(2, 0, 1)
            ids, _ = predict_ids(net, pixels, path, device=device, base=base, amp=amp)
            predicted.append(ids)
        guesses.append(predicted)
    return dataset, chosen, guesses


def compare(args: argparse.Namespace, device: torch.device) -> Image.Image:
    """Image, each checkpoint's prediction and the ground truth, if there is one.

    Boxes mark the regions that differ most (Figs. 5 to 9), and a line below says so. With --class
    only the region of that class is shown, without boxes (Fig. 10).
    """
    titles = ["image", *titles_of(args.checkpoints, args.names)]
    dataset, chosen, guesses = predictions(args, device)
    classes, colors = dataset.classes, dataset.colors
    if args.name not in (None, *classes):
        raise InputError(f"--class {args.name}: expected one of {', '.join(classes)}")
    if args.name is not None:
        c = classes.index(args.name)
        classes, colors = (classes[c],), (colors[c],)
    if dataset.labelled:
        titles.append("ground truth")
    width = (args.width - GAP) // len(titles) - GAP
    rows, masks, note = [], [], ""
    for i, predicted in zip(chosen, zip(*guesses)):
        image, truth = read(dataset, i)
        shown = list(predicted)
        if truth is not None:
            shown.append(truth)
        if args.name is None:
            boxes = largest_boxes(disagreement(predicted, truth))
            if boxes:
                note = DIFFERENT if len(guesses) > 1 else WRONG
            masks += shown
            cells = [colorize(ids, colors) for ids in shown]
        else:
            boxes = []
            cells = [region(image, ids == c, colors[0]) for ids in shown]
        cells.insert(0, Image.fromarray(image))
        rows.append([boxed(cell, boxes, width) for cell in cells])
    return sheet(rows, titles, *with_ignored(classes, colors, masks), width, note)


def titles_of(paths: list[str], names: list[str] | None) -> list[str]:
    """A title for each path: --names, or the path's last two parts. InputError: unequal numbers."""
    if not names:
        ends = [Path(path).parts[-2:] for path in paths]
        return [str(Path(*end)) for end in ends]
    if len(names) != len(paths):
        raise InputError(
            f"--names: got {len(names)} names for {len(paths)} paths: give one for each"
        )
    return names


# ---- the command


def figures_parser() -> Parser:
    """The flags of the five figures."""
    parser = Parser(prog="python -m paper.figures", description="The paper's figures")
    figures = parser.add_subparsers(dest="figure", required=True)
    p = figures.add_parser("attention", help="A, A', A'' and P_class of chosen pixels")
    p.add_argument("checkpoint")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    p.add_argument("--pixel", type=pixel_of, nargs="+", metavar="X,Y", help="(default: two drawn)")
    p.add_argument("--seed", type=int, default=0, help="of drawn pixels")
    p = figures.add_parser("gate", help="mean P_class by pair of classes")
    p.add_argument("checkpoint")
    add_flags(p, "data", "root", "split")
    compared = figures.add_parser("compare", help="predictions side by side")
    compared.set_defaults(name=None)
    regions = figures.add_parser("region", help="the region predicted as one class")
    regions.add_argument("--class", dest="name", required=True)
    for p in (compared, regions):
        p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
        p.add_argument("--names", nargs="+", help="titles of the checkpoints")
        add_flags(p, "data", "root", "split")
        p.add_argument(
            "--images",
            type=int,
            nargs="+",
            metavar="I",
            help="numbers of images, from 0 (default: three)",
        )
    p = figures.add_parser("curves", help="loss and mIoU of runs")
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log.jsonl")
    p.add_argument("--names", nargs="+", help="titles of the runs")
    for name, p in figures.choices.items():
        text = f"the picture to write (default: {name}.png)"
        p.add_argument("--out", default=f"{name}.png", help=text)
        if name != "gate":  # its cells decide its width
            p.add_argument("--width", type=int, default=900, help="in pixels (default: 900)")
        if name != "curves":
            add_flags(p, "device")
            p.add_argument(
                "--context",
                nargs="+",
                default=[],
                help="MODULE:FACTORY, again, if training was given one",
            )
    return parser


def parse_figure(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    args = figures_parser().parse_args(argv)
    if args.figure != "gate" and not 200 <= args.width <= 20000:
        raise InputError(f"--width {args.width}: expected 200 to 20000")
    if args.figure in ("compare", "region"):
        least = 40 * (len(args.checkpoints) + 2)
        if args.width < least:
            raise InputError(
                f"--width {args.width}: too narrow for {len(args.checkpoints)} checkpoints; "
                f"expected {least} or more"
            )
    if args.figure == "attention" and args.seed < 0:
        raise InputError(f"--seed {args.seed}: expected 0 or more")
    if not args.out.lower().endswith(".png"):
        raise InputError(f"--out {args.out}: expected the name of a .png file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one figure."""
    args = parse_figure(argv)
    if args.figure == "curves":
        titles = titles_of(args.runs, args.names)
        picture = curves(args.runs, titles, args.width)
    elif args.figure == "attention":
        picture = attention(args, find_device(args.device))
    elif args.figure == "gate":
        picture = gate(args, find_device(args.device))
    else:
        picture = compare(args, find_device(args.device))
    write_result(Path(args.out), lambda f: picture.save(f, "PNG"))
    print(f"wrote {args.out}, {picture.width}x{picture.height}")
    return 0


if __name__ == "__main__":
    run_script(main)
