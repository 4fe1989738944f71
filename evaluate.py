"""Score a checkpoint: mIoU, pixel accuracy and the IoU of each class, from one confusion matrix.

    python evaluate.py runs/cityscapes/best.pt         # the rest is in the checkpoint
    python evaluate.py best.pt --crop 768 --json       # sliding windows; one JSON object last
    python evaluate.py best.pt --all --images images.csv --confusion confusion.png
    torchrun --nproc-per-node 8 evaluate.py best.pt --scales 0.75 1 1.25 --flip

The result does not depend on the number of ranks, bit for bit. Training calls `evaluate` of this
file, so both report the same mIoU. A *window* (--crop) overlaps others, and their predictions are
averaged. A *tile* is a part of a large image, and only its middle is kept.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dnl
from checkpoint import base_of, load_network, open_like
from data import DataSet, base_factor, eval_images, normalize, resize_smooth, scaled
from fold import fold_batchnorm
from metrics import TITLES, class_counts, class_scores, confusion, image_table, iou_table, scores
from pictures import confusion_picture
from ranks import NARROW, autocast, choose_amp, distributed, fail_on_all_ranks
from runtime import (
    AMP,
    FLAGS,
    InputError,
    Parser,
    counted,
    parse_flags,
    print_line,
    print_progress,
    quote,
    run_script,
    write_result,
)

SIDE = 2048  # of a tile, in pixels, for up to 64 classes
NOT_FINITE = "the network's output is not finite: try --amp off, or train again with a lower --lr"

# ---- prediction


def windows(length: int, crop: int) -> list[slice]:
    """Windows of `crop` pixels that cover 0..length; neighbours share at least a third."""
    if length <= crop:
        return [slice(0, length)]
    step = max(1, crop * 2 // 3)
    count = math.ceil((length - crop) / step)
    starts = [round(i * (length - crop) / count) for i in range(count + 1)]
    return [slice(start, start + crop) for start in starts]


def _views(net: nn.Module, x: Tensor, flip: bool, amp: torch.dtype | None) -> Tensor:
    """Class probabilities (B, n, H, W) of normalised images; flip: averaged with the mirrored."""
    if flip:
        plain, mirrored = _views(net, torch.cat([x, x.flip(3)]), False, amp).chunk(2)
        return (plain + mirrored.flip(3)) / 2
    if x.device.type == "cpu" and min(x.shape[2:]) < NARROW:
        amp = None  # oneDNN's bf16 convolutions read memory that nobody wrote
    with autocast(x.device, amp):
        logits = net(x)
    return logits.float().softmax(1)


def _sliding(
    net: nn.Module, x: Tensor, crop: int | None, flip: bool, amp: torch.dtype | None
) -> Tensor:
    """As `_views`, of one image (1, 3, H, W); crop: averaged over windows, 8 of them at a time."""
    x = x.contiguous(memory_format=torch.channels_last)
    if not crop:
        return _views(net, x, flip, amp)
    _, _, H, W = x.shape
    places = list(product(windows(H, crop), windows(W, crop)))
    count = x.new_zeros(H, W)
    total = x.new_zeros(0)  # until the number of classes is known
    for i in range(0, len(places), 8):
        chosen = places[i : i + 8]
        parts = [x[:, :, rows, columns] for rows, columns in chosen]
        p = _views(net, torch.cat(parts), flip, amp)
        if i == 0:
            total = p.new_zeros(1, p.shape[1], H, W)
        for one, (rows, columns) in zip(p, chosen):
            total[0, :, rows, columns] += one
            count[rows, columns] += 1
    return total / count


@torch.inference_mode()
def predict(
    net: nn.Module,
    image: Tensor,
    *,
    factor: float | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | None = None,
    amp: torch.dtype | None = None,
) -> Tensor:
    """Class probabilities (n, h, w) of one image (3, H, W), 0..255, averaged over scales and flips.

    factor: of `base_factor`, (h, w) are the image's sides times it; None: the image's own. crop:
    side of the sliding windows, which keep the network's memory independent of the image's size;
    None: the whole image at once. The network is in eval mode, on the image's device. An image is
    always computed alone, so its result does not depend on others.
    """
    own = scaled(image.shape[1:], 1)
    whole = scaled(own, factor or 1)
    resize = dnl.resize if factor is None else resize_smooth

    def at_scale(scale: float) -> Tensor:
        size = scaled(whole, scale)
        if factor is not None:  # resized before: a large image is not held as floats twice
            x = normalize(resize_smooth(image[None].float(), size))
        elif size == own:
            x = normalize(image[None])
        else:
            x = dnl.resize(normalize(image[None]), size)
        p = _sliding(net, x, crop, flip, amp)
        return p if size == whole else resize(p, whole)

    total = at_scale(scales[0])
    for scale in scales[1:]:
        total.add_(at_scale(scale))
    return total[0].div_(len(scales))


def top_class(p: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The most probable class, uint8, and its probability, of p (n, h, w) resized to (H, W).

    The classes are resized one by one: all 150 of an image of 8000x6000 would be 27 GiB.
    """
    if p.shape[1:] == size:
        return p.argmax(0).byte(), p.amax(0)
    ids = torch.zeros(*size, dtype=torch.uint8, device=p.device)
    best = torch.full_like(ids, -1, dtype=p.dtype)
    for c, plane in enumerate(p.contiguous()):
        one = resize_smooth(plane[None, None], size)[0, 0]
        ids.masked_fill_(one > best, c)
        best = torch.maximum(best, one)  # nan stays nan
    return ids, best


def tile_side(num_classes: int, crop: int | None) -> int:
    """Side of a tile: SIDE, or less if its probabilities would exceed 1 GiB, but at least crop."""
    return max(min(SIDE, int((2**28 / num_classes) ** 0.5)), crop or 0)


class Tile(NamedTuple):
    """A tile along one axis: computed on the pixels `seen`, used for the pixels `kept`."""

    seen: slice
    kept: slice
    inner: slice  # `kept`, counted from the start of `seen`


def tile_axis(length: int, side: int) -> list[Tile]:
    """Tiles of at most `side` pixels, whose kept parts cover 0..length once.

    A tile sees side // 8 pixels beyond its kept part, unless the image ends there.
    """
    margin = side // 8
    count = math.ceil(length / (side - 2 * margin)) if length > side else 1
    cuts = [round(i * length / count) for i in range(count + 1)]
    axis = []
    for start, stop in pairwise(cuts):
        first = max(0, start - margin)
        seen = slice(first, min(length, stop + margin))
        axis.append(Tile(seen, slice(start, stop), slice(start - first, stop - first)))
    return axis


def tiles(height: int, width: int, side: int) -> list[tuple[Tile, Tile]]:
    """(rows, columns) of each tile of an image. Up to side^2 pixels are one tile."""
    if height * width <= side * side:
        side = max(height, width)
    return list(product(tile_axis(height, side), tile_axis(width, side)))


def predict_ids(
    net: nn.Module,
    image: Tensor,
    source: str,
    *,
    device: torch.device,
    side: int = SIDE,
    base: int = 0,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (H, W) uint8 and their probability (H, W) uint8, 255 for 1, of an image.

    image: (3, H, W) uint8. base: of `base_factor`. options: as of `predict`. An image that has more
    than side^2 pixels at a scale of 1 is computed tile by tile, and only one tile's probabilities
    are held. InputError, which names the source, if the network's output is not finite.
    """
    _, H, W = image.shape
    factor = base_factor((H, W), base)
    side = max(1, int(side / (factor or 1)))
    ids = np.empty((H, W), np.uint8)
    confidence = np.empty((H, W), np.uint8)
    for rows, columns in tiles(H, W, side):
        part = image[:, rows.seen, columns.seen].to(device)
        p = predict(net, part, factor=factor, **options)
        found, top = top_class(p, part.shape[1:])
        top = top[rows.inner, columns.inner]
        if not top.isfinite().all():
            raise InputError(f"{source}: {NOT_FINITE}")
        ids[rows.kept, columns.kept] = found[rows.inner, columns.inner].cpu().numpy()
        confidence[rows.kept, columns.kept] = (top * 255).round().byte().cpu().numpy()
    return ids, confidence


def evaluate(
    net: nn.Module,
    dataset: DataSet,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    base: int = 0,
    each: Callable[[int, Tensor], None] = lambda index, matrix: None,
    **options: Any,
) -> Tensor:
    """The confusion matrix (n, n) of a labelled data set, int64 on the CPU, summed over all ranks.

    Rank r takes the images r, r + world, ... base: of `base_factor`. options: as of `predict`.
    each(index, matrix) is called after each image of this rank, with its own confusion matrix, on
    the device. A folded copy predicts (fold.py). InputError on every rank: no ground truth, an
    unusable file, or an output that is not finite.
    """
    if not dataset.labelled:
        raise InputError(
            f"split {dataset.split!r} of {dataset.name} has no ground truth, so it cannot be "
            "scored: choose a labelled split, or write masks with predict.py"
        )
    net = fold_batchnorm(net)
    n = len(dataset.classes)
    matrix = torch.zeros(n, n, dtype=torch.int64, device=device)
    finite = {}
    repeatable = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with fail_on_all_ranks(), repeatable:  # the same kernels on any rank and in training
        for index, image, label in eval_images(dataset, rank, world, workers):
            size = image.shape[1:]
            image = image.to(device, non_blocking=True)
            p = predict(net, image, factor=base_factor(size, base), **options)
            ids, top = top_class(p, size)
            finite[index] = top.isfinite().all()
            one = confusion(ids, cast(Tensor, label).to(device, non_blocking=True), n)
            matrix += one
            each(index, one)
        for index, is_finite in finite.items():  # after the loop, in which no GPU is waited for
            if not is_finite:
                raise InputError(f"{quote(dataset.items[index].image)}: {NOT_FINITE}")
    total = all_ranks(matrix, world)
    warn_of_labels(total, dataset.split, rank)
    return total


def warn_of_labels(matrix: Tensor, split: str, rank: int) -> None:
    """Warn, on rank 0, if the pixels are of fewer than two classes, as 0/255 masks have them."""
    if rank == 0 and (matrix.sum(1) > 0).sum() < 2:
        what = f"the labels of {split!r} hold fewer than two classes"
        told = f"warning: {what}, so the mIoU says nothing: look at them with check.py"
        print_line(told, error=True)


def all_ranks(counts: Tensor, world: int) -> Tensor:
    """The counts, int64, summed over the ranks, on the CPU."""
    counts = counts.cpu()
    if world > 1:
        dist.all_reduce(counts)
    return counts


# ---- the command


def parse_scoring(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    parser = Parser(description="mIoU of a checkpoint")
    add = parser.add_argument
    add("checkpoint")
    add("--all", action="store_true", help="also precision, recall and Dice in the table")
    images = "also a table of the images, the lowest mIoU first"
    add("--images", type=Path, metavar="FILE.csv", help=images)
    picture = "also a picture of which classes are taken for which"
    add("--confusion", type=Path, metavar="FILE.png", help=picture)
    args = parse_flags(parser, argv, *FLAGS)
    for path, ending in (args.images, ".csv"), (args.confusion, ".png"):
        if path and path.suffix.lower() != ending:
            raise InputError(f"{quote(path)}: expected the name of a {ending} file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; rank 0 prints the table and writes the files. Returns the exit status."""
    args = parse_scoring(argv)
    day = timedelta(days=1)  # for the slowest rank
    with distributed(args.device, day) as (rank, world, device):
        net, checkpoint = load_network(args.checkpoint, device, args.context)
        dataset = open_like(checkpoint, args.data, args.root, args.split, args.checkpoint)
        amp = choose_amp(args.amp or checkpoint["amp"], device)
        base = base_of(checkpoint, args.base)
        n = len(dataset)
        counts = torch.zeros(n, 3, len(dataset.classes), dtype=torch.int64, device=device)

        def note(index: int, matrix: Tensor) -> None:
            counts[index] = class_counts(matrix)
            if rank == 0:
                print_progress(f"{index + 1}/{n} images")

        views = {"scales": args.scales, "flip": args.flip, "crop": args.crop, "amp": AMP[amp]}
        matrix = evaluate(
            net,
            dataset,
            device=device,
            rank=rank,
            world=world,
            workers=args.workers,
            base=base,
            each=note,
            **views,
        )
        counts = all_ranks(counts, world)
    if rank == 0:
        print_progress(f"{counted(n, 'image')} scored", last=True)
        facts = {"images": n, "split": args.split, "amp": amp, "base": base}
        report(args, dataset, matrix, counts, facts)
    return 0


def report(
    args: argparse.Namespace,
    dataset: DataSet,
    matrix: Tensor,
    counts: Tensor,
    facts: dict[str, Any],
) -> None:
    """Print the scores, then write the files that the flags ask for.

    matrix: of the data set. counts: `metrics.class_counts` of each image. facts: what else --json
    has.
    """
    classes = dataset.classes
    result = scores(matrix) | class_scores(class_counts(matrix))
    columns = list(TITLES) if args.all else ["iou"]
    print(iou_table(result, classes, columns))
    if args.json:
        for name in TITLES:
            result[name] = dict(zip(classes, result[name]))
        result |= facts
        result["confusion"] = matrix.tolist()
        print(json.dumps(result))
    if args.images:
        table = image_table([item.image for item in dataset.items], classes, counts)
        content = table.encode("utf-8", "surrogateescape")  # a file's name may be no UTF-8
        write_result(args.images, lambda f: f.write(content))
    if args.confusion:
        picture = confusion_picture(matrix.numpy(), classes)
        write_result(args.confusion, lambda f: picture.save(f, "PNG"))


if __name__ == "__main__":
    run_script(main)
