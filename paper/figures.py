"""The paper's figures from your own checkpoints and images, as PNG.

    python -m paper.figures attention best.pt street.jpg --pixel 120,200 --out attention.png       # Figs. 1 and 11
    python -m paper.figures compare nl.pt ccnet.pt dnl.pt --names NL CCNet Ours --images 0 7 30    # Figs. 5 to 9
    python -m paper.figures region nl.pt dnl.pt --class road --images 0 7                          # Fig. 10
    python -m paper.figures curves runs/nl runs/dnl                                                # loss and mIoU

Checkpoints bring their data set with them (--data and --root name another place). Pixels are X,Y in the image, from 0.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import dnl
from attention import attention_row, attention_sheet, pixel_of, require_attention, require_pixel
from checkpoint import load_network, open_like, read_checkpoint
from classes import IGNORE, palette
from data import DataSet, read
from decode import decode_image
from evaluate import predict_ids
from pictures import colorize, load_font, sheet, shorten
from runtime import AMP, InputError, Parser, add_flags, choose_amp, run_script
from train import save

# ------------------------------------------------------------------------------------------ predictions, compared


def load(path: str, device: torch.device, contexts: Sequence[str]) -> tuple[dnl.Network, dict]:
    """`evaluate.load_network`, where the checkpoint's context may be any that --context names."""
    context = read_checkpoint(path)["config"]["context"]
    return load_network(path, device, context if context in contexts else None)


def draw_pixels(ids: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(x, y) of one pixel from each of `count` classes of a prediction (H, W), or of as many as cover 1 % of it."""
    classes, sizes = np.unique(ids, return_counts=True)
    large = rng.permutation(classes[sizes >= ids.size / 100])[:count]
    places = [int(rng.choice(np.flatnonzero(ids == c))) for c in large]
    return [(i % ids.shape[1], i // ids.shape[1]) for i in places]


def largest_boxes(weight: np.ndarray, count: int = 2) -> list[tuple[int, int, int]]:
    """(left, top, side) of up to `count` squares that do not overlap, each with the largest sum of the weights (H, W), 0..1,
    that is left. side is a quarter of the short side; squares with a mean weight below 0.02 are left out."""
    side, found = max(1, min(weight.shape) // 4), []
    weight = weight.astype(np.float64)
    for _ in range(count):
        total = np.pad(weight, ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # summed-area table
        sums = (
            total[side:, side:]
            - total[:-side, side:]
            - total[side:, :-side]
            + total[:-side, :-side]
        )
        top, left = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
        if sums[top, left] < 0.02 * side * side:
            break
        found.append((left, top, side))
        weight[top : top + side, left : left + side] = -float(
            weight.size
        )  # no later square gains by touching this one
    return found


def boxed(image: Image.Image, boxes: Sequence[tuple[int, int, int]], width: int) -> Image.Image:
    """The picture, `width` wide, with the boxes of `largest_boxes` in white, edged in black."""
    scale = width / image.width
    how = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BILINEAR
    out = image.convert("RGB").resize((width, max(1, round(image.height * scale))), how)
    for box in boxes:
        x, y, s = (round(v * scale) for v in box)
        for outset, color, line in ((1, "black", 4), (0, "white", 2)):
            ends = (
                max(0, x - outset),
                max(0, y - outset),
                min(out.width - 1, x + s + outset),
                min(out.height - 1, y + s + outset),
            )
            ImageDraw.Draw(out).rectangle(ends, outline=color, width=line)
    return out


def region(image: np.ndarray, mask: np.ndarray, color: Sequence[int]) -> Image.Image:
    """The pixels of a mask (H, W) in a colour over the darkened grey image (H, W, 3), as Fig. 10 shows one class."""
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    shown = np.where(mask[..., None], 0.35 * grey + 0.65 * np.asarray(color), 0.5 * grey)
    return Image.fromarray(shown.round().astype(np.uint8))


def disagreement(guesses: Sequence[np.ndarray], truth: np.ndarray | None) -> np.ndarray:
    """(H, W) bool: where predictions are not all equal, a single one: where it is not the truth. False at label 255."""
    against = truth if len(guesses) == 1 and truth is not None else guesses[0]
    differ = np.any([g != against for g in guesses], 0)
    return differ if truth is None else differ & (truth != IGNORE)


def predictions(
    args: argparse.Namespace, device: torch.device
) -> tuple[DataSet, list[int], list[list[np.ndarray]]]:
    """The data set, the chosen image numbers, and each checkpoint's class ids (H, W) of each. One network at a time is held.
    InputError: unequal classes, no such image."""
    guesses = []
    for path in args.checkpoints:
        net, checkpoint = load(path, device, args.context)
        dataset = open_like(checkpoint, args.data, args.root, args.split, path)
        chosen = (
            args.images
            or np.linspace(0, len(dataset) - 1, min(3, len(dataset))).round().astype(int).tolist()
        )
        if not all(0 <= i < len(dataset) for i in chosen):
            raise InputError(
                f"--images {' '.join(map(str, chosen))}: expected numbers in 0..{len(dataset) - 1}, the images of "
                f"{dataset.name} {args.split}"
            )
        amp = AMP[choose_amp(checkpoint["amp"], device)]
        images = (torch.tensor(read(dataset, i)[0]).permute(2, 0, 1) for i in chosen)
        guesses.append(
            [predict_ids(net, image, path, device=device, amp=amp)[0] for image in images]
        )
    return dataset, chosen, guesses


def compare(args: argparse.Namespace, device: torch.device) -> Image.Image:
    """Image, each checkpoint's prediction and ground truth, the regions that differ most boxed (Figs. 5 to 9); with --class
    the region of that class in each, without boxes (Fig. 10)."""
    names = ["image", *named(args.names, args.checkpoints), "ground truth"]
    dataset, chosen, guesses = predictions(args, device)
    if args.name not in (None, *dataset.classes):
        raise InputError(f"--class {args.name}: expected one of {', '.join(dataset.classes)}")
    names = names if dataset.labelled else names[:-1]
    rows, width = [], (args.width - 6) // len(names) - 6
    for i, row in zip(chosen, zip(*guesses)):
        image, truth = read(dataset, i)
        shown = row if truth is None else (*row, truth)
        if args.name is None:
            boxes, cells = (
                largest_boxes(disagreement(row, truth)),
                [colorize(ids, dataset.colors) for ids in shown],
            )
        else:
            c = dataset.classes.index(args.name)
            boxes, cells = [], [region(image, ids == c, dataset.colors[c]) for ids in shown]
        rows.append([boxed(cell, boxes, width) for cell in (Image.fromarray(image), *cells)])
    legend = [(n, c) for n, c in zip(dataset.classes, dataset.colors) if args.name in (None, n)]
    return sheet(rows, names, *zip(*legend), width)


def named(names: Sequence[str] | None, paths: Sequence[str]) -> Sequence[str]:
    """A title for each path: --names, or the end of the path. InputError when they are not as many."""
    if names and len(names) != len(paths):
        raise InputError(
            f"--names: got {len(names)} names for {len(paths)} paths: give one for each"
        )
    return names or [str(Path(*Path(p).parts[-2:])) for p in paths]


# --------------------------------------------------------------------------------------------------------- curves


def read_log(run: str) -> list[dict]:
    """The epochs of a run's log.jsonl (the run's folder, or the file). InputError: none there, or not such a file."""
    path = Path(run, "log.jsonl") if Path(run).is_dir() else Path(run)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError(0, "no such file")
        epochs = [
            e
            for e in map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if "settings" not in e
        ]
        if not epochs or not all(
            type(e["epoch"]) is int
            and e["epoch"] > 0
            and is_value(e["loss"])
            and is_value(e["miou"])
            for e in epochs
        ):
            raise ValueError("no epoch in it, or other values than train.py writes")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise InputError(
            f"{path}: not the log of a run ({getattr(e, 'strerror', None) or e}): name the folder that train.py "
            "wrote, after its first epoch"
        ) from None
    return epochs


def is_value(x: object) -> bool:
    """Whether a log's loss or mIoU can be drawn: a finite number, or None where there was none."""
    return x is None or isinstance(x, (int, float)) and abs(x) < 1e30


def ticks(low: float, high: float, about: int = 8) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, at most `about` + 1 of them."""
    rough = max(high - low, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [
        round(i * step, 12)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def panel(
    title: str,
    lines: Sequence[Sequence[tuple[float, float]]],
    colors: Sequence[tuple[int, int, int]],
    x_end: int,
    size: tuple[int, int],
) -> Image.Image:
    """A diagram of lines of points (epoch, value) over the epochs 0..x_end, of the size (width, height)."""
    out, font = Image.new("RGB", size, "white"), load_font(24)
    draw, (left, top, right, bottom) = ImageDraw.Draw(out), (90, 50, size[0] - 30, size[1] - 60)
    ys = [y for line in lines for _, y in line] or [0, 1]
    margin = 0.05 * (max(ys) - min(ys) or 1)
    low, high = min(ys) - margin, max(ys) + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_end, bottom - (bottom - top) * (y - low) / (high - low)

    draw.text((left, 8), title, "black", font)
    for y in ticks(low, high):
        draw.line((left, place(0, y)[1], right, place(0, y)[1]), (225, 225, 225), 2)
        draw.text((left - 10, place(0, y)[1]), f"{y:g}", "black", font, anchor="rm")
    for x in ticks(0, x_end, min(8, x_end)):  # whole epochs
        draw.text((place(x, low)[0], bottom + 8), f"{x:g}", "black", font, anchor="mt")
    draw.text((right, size[1] - 26), "epoch", "black", font, anchor="rt")
    draw.line((left, top, left, bottom, right, bottom), "black", 2)
    for line, color in zip(lines, colors):
        points = [place(*p) for p in line]
        draw.line(points, color, 4, "curve")
        for x, y in points if len(points) < 80 else ():
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), color)
    return out


def curves(
    runs: Sequence[str], names: Sequence[str] | None = None, width: int = 900
) -> Image.Image:
    """Training loss and validation mIoU of runs over their epochs, side by side. InputError: a run without a log."""
    logs, colors = [read_log(run) for run in runs], palette(len(runs))
    last = max(log[-1]["epoch"] for log in logs)
    out = Image.new(
        "RGB", (2 * width, 760 + 40 * len(runs)), "white"
    )  # drawn twice as large: smooth lines
    for i, (key, title) in enumerate((("loss", "training loss"), ("miou", "validation mIoU"))):
        lines = [[(e["epoch"], e[key]) for e in log if e[key] is not None] for log in logs]
        out.paste(panel(title, lines, colors, last, (width, 760)), (i * width, 0))
    draw, font = ImageDraw.Draw(out), load_font(28)
    for i, (name, color) in enumerate(zip(named(names, runs), colors)):
        best = max((e["miou"] for e in logs[i] if e["miou"] is not None), default=None)
        draw.rectangle((90, 770 + 40 * i, 130, 790 + 40 * i), color)
        text = name if best is None else f"{name}   best mIoU {best:.4f}"
        draw.text(
            (145, 780 + 40 * i), shorten(text, font, 2 * width - 160), "black", font, anchor="lm"
        )
    return out.resize((width, out.height // 2), Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------------------ the script


def attention(args: argparse.Namespace, device: torch.device) -> Image.Image:
    """One row for each image and chosen pixel; without --pixel two pixels of different predicted classes."""
    net, checkpoint = load(args.checkpoint, device, args.context)
    require_attention(net, args.checkpoint)
    amp, rows = AMP[choose_amp(checkpoint["amp"], device)], []
    for path in args.images:
        image = torch.tensor(decode_image(Path(path)), device=device).permute(2, 0, 1)
        for pixel in args.pixel or ():
            require_pixel(pixel, image.shape[2], image.shape[1], path)
        ids = predict_ids(net, image, path, device=device, amp=amp)[0]
        for x, y in args.pixel or draw_pixels(ids, 2, np.random.default_rng(args.seed)):
            rows.append(
                attention_row(
                    net, image, (x, y), f"{x},{y} {checkpoint['classes'][ids[y, x]]}", args.width
                )
            )
    return attention_sheet(rows)


def parse_figure(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the four figures."""
    main = Parser(prog="python -m paper.figures", description="The paper's figures")
    figures = main.add_subparsers(dest="figure", required=True)
    a = figures.add_parser("attention", help="A, A', A'' and P_class of chosen pixels")
    a.add_argument("checkpoint")
    a.add_argument("images", nargs="+", metavar="IMAGE")
    a.add_argument(
        "--pixel",
        type=pixel_of,
        nargs="+",
        metavar="X,Y",
        help="(default: from the predicted classes)",
    )
    a.add_argument("--seed", type=int, default=0, help="of drawn pixels")
    for name, text in (
        ("compare", "predictions side by side"),
        ("region", "the region predicted as one class"),
    ):
        c = figures.add_parser(name, help=text)
        c.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
        c.add_argument("--names", nargs="+", help="titles of the checkpoints")
        add_flags(c, "data", "root", "split")
        c.add_argument(
            "--images",
            type=int,
            nargs="+",
            metavar="I",
            help="numbers of images, from 0 (default: three)",
        )
        c.add_argument(
            "--class", dest="name", required=True
        ) if name == "region" else c.set_defaults(name=None)
    c = figures.add_parser("curves", help="loss and mIoU of runs")
    c.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log.jsonl")
    c.add_argument("--names", nargs="+", help="titles of the runs")
    for name, p in figures.choices.items():
        p.add_argument(
            "--out", default=f"{name}.png", help=f"the picture to write (default: {name}.png)"
        )
        p.add_argument(
            "--width", type=int, default=900, help="of the picture, in pixels (default: 900)"
        )
        if name != "curves":
            p.add_argument(
                "--context",
                nargs="+",
                default=[],
                help="MODULE:FACTORY, again, where training was given one",
            )
    args = main.parse_args(argv)
    if not 200 <= args.width <= 20000:
        raise InputError(f"--width {args.width}: expected 200 to 20000")
    least = 40 * (len(args.checkpoints) + 2) if args.figure in ("compare", "region") else 0
    if args.width < least:
        raise InputError(
            f"--width {args.width}: too narrow for {len(args.checkpoints)} checkpoints; expected {least} or more"
        )
    if args.figure == "attention" and args.seed < 0:
        raise InputError(f"--seed {args.seed}: expected 0 or more")
    if not args.out.lower().endswith(".png"):
        raise InputError(f"--out {args.out}: expected the name of a .png file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one figure."""
    args = parse_figure(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.figure == "curves":
        out = curves(args.runs, args.names, args.width)
    else:
        out = {"attention": attention, "compare": compare, "region": compare}[args.figure](
            args, device
        )
    save(out, Path(args.out))
    print(f"wrote {args.out}, {out.width}x{out.height}")
    return 0


if __name__ == "__main__":
    run_script(main)
