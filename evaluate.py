"""Score a checkpoint: mIoU, pixel accuracy and the IoU of each class, from one integer confusion matrix.

    python evaluate.py runs/cityscapes/best.pt                                    # all else is in the checkpoint
    torchrun --nproc-per-node 8 evaluate.py best.pt --scales 0.75 1 1.25 --flip   # the figure of one rank, bit for bit
    python evaluate.py best.pt --crop 768 --json                                  # sliding windows; one JSON object last

Training calls `evaluate` of this file, so its mIoU is the tested one. What the scripts share (ranks, precision, reading
checkpoints, error lines, pictures) is here too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dnl
from checkpoint import load_network, open_like
from data import IGNORE, DataSet, eval_images, normalize
from runtime import (
    AMP,
    FLAGS,
    InputError,
    Parser,
    choose_amp,
    distributed,
    fail_on_all_ranks,
    on_terminal,
    parse_flags,
    print_line,
    quote,
    run_script,
)

SIDE = 2048  # of a tile, for up to 64 classes
NOT_FINITE = "the network's output is not finite: try --amp off; where it stays so, its weights are spoiled: train again, at a lower --lr"

# ------------------------------------------------------------------------------------------------------- metrics


def confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(n, n) int64 counts, row the true class, column the predicted one. Both (H, W); pixels of label 255 are left out."""
    known = label != IGNORE
    pairs = label[known].long() * num_classes + prediction[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(matrix: Tensor) -> dict[str, Any]:
    """{'miou', 'accuracy', 'iou'} in 0..1 of a confusion matrix. A class neither true nor predicted anywhere has IoU None
    and is left out of the mean; with no labelled pixel at all, miou and accuracy are None."""
    m = matrix.cpu().numpy().astype(np.int64)
    hit, union = m.diagonal(), m.sum(0) + m.sum(1) - m.diagonal()
    iou = [float(h) / float(u) if u else None for h, u in zip(hit, union)]
    known = [i for i in iou if i is not None]
    return {
        "miou": sum(known) / len(known) if known else None,
        "accuracy": float(hit.sum()) / float(m.sum()) if m.sum() else None,
        "iou": iou,
    }


def iou_table(result: dict[str, Any], classes: Sequence[str]) -> str:
    """The scores as lines for people: a row per class, then mIoU and pixel accuracy, in percent."""
    width = max(len("pixel accuracy"), *map(len, classes))
    rows = [
        *zip(classes, result["iou"]),
        ("mIoU", result["miou"]),
        ("pixel accuracy", result["accuracy"]),
    ]
    lines = [f"{name:<{width}}  {'-' if x is None else f'{100 * x:.2f}':>6}" for name, x in rows]
    note = ["- neither in the labels nor predicted: not in the mean"] * (None in result["iou"])
    return "\n".join([f"{'class':<{width}}  {'IoU %':>6}", *lines, *note])


# ---------------------------------------------------------------------------------------------------- prediction


def windows(length: int, crop: int) -> list[int]:
    """Starts of windows of `crop` (at most `length`) that cover 0..length, at least a third of each shared with the next."""
    if length <= crop:
        return [0]
    count = -(-(length - crop) // max(1, crop * 2 // 3)) + 1
    return [round(i * (length - crop) / (count - 1)) for i in range(count)]


def _views(net: nn.Module, x: Tensor, flip: bool, amp: torch.dtype | None) -> Tensor:
    """Class probabilities (B, n, H, W) of normalised images, averaged with those of the mirrored ones if `flip`."""
    with torch.autocast(x.device.type, amp or torch.bfloat16, enabled=amp is not None):
        logits = net(torch.cat([x, x.flip(3)]) if flip else x)
    p = logits.float().softmax(1)
    return (p[: len(x)] + p[len(x) :].flip(3)) / 2 if flip else p


def _sliding(
    net: nn.Module, x: Tensor, crop: int, flip: bool, amp: torch.dtype | None, together: int = 8
) -> Tensor:
    """As `_views`, from overlapping windows of one image (1, 3, H, W), `together` of them in a batch."""
    H, W = x.shape[2:]
    h, w = min(crop, H), min(crop, W)
    places = [
        (slice(t, t + h), slice(l, l + w)) for t in windows(H, crop) for l in windows(W, crop)
    ]
    total = count = 0
    for i in range(0, len(places), together):
        p = _views(net, torch.cat([x[:, :, r, c] for r, c in places[i : i + together]]), flip, amp)
        if i == 0:
            total, count = p.new_zeros(1, p.shape[1], H, W), p.new_zeros(H, W)
        for one, (r, c) in zip(p, places[i:]):
            total[0, :, r, c] += one
            count[r, c] += 1
    return total / count


@torch.inference_mode()
def predict(
    net: nn.Module,
    image: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | None = None,
    amp: torch.dtype | None = None,
) -> Tensor:
    """Class probabilities (n, H, W) of one image (3, H, W), 0..255, on its device, averaged over scales and flips.

    crop: sliding windows of that size, for memory that does not grow with the image; None: the whole image at once. The
    network must be in eval mode. An image is always computed alone, so its result does not depend on the others.
    """
    x, size = normalize(image[None]), tuple(image.shape[1:])
    total = None
    for scale in scales:
        at = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        scaled = x if at == size else dnl.resize(x, at)
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        p = _sliding(net, scaled, crop, flip, amp) if crop else _views(net, scaled, flip, amp)
        p = p if at == size else dnl.resize(p, size)
        total = p if total is None else total.add_(p)
    return total[0].div_(len(scales))


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
    return [
        (slice(max(0, a - margin), min(length, b + margin)), slice(a, b))
        for a, b in zip(cuts, cuts[1:])
    ]


def tiles(
    size: tuple[int, int], side: int
) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """((rows, columns) seen, (rows, columns) kept) of each tile of an image; one tile up to side^2 pixels."""
    if size[0] * size[1] <= side * side:
        side = max(size)
    return [
        ((ys, xs), (yk, xk)) for ys, yk in spans(size[0], side) for xs, xk in spans(size[1], side)
    ]


def predict_ids(
    net: nn.Module,
    image: Tensor,
    source: str,
    *,
    device: torch.device,
    side: int = SIDE,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
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


def evaluate(
    net: nn.Module,
    dataset: DataSet,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, n: None,
    **options: Any,
) -> Tensor:
    """The confusion matrix (n, n) of the network on a labelled data set, int64 on the CPU, summed over all ranks.

    Rank r takes images r, r + world, ...: none twice. options are `predict`'s. Leaves the network in eval mode.
    Raises InputError, on every rank, for a split without ground truth or a file that cannot be used.
    """
    if not dataset.labelled:
        raise InputError(
            f"split {dataset.split!r} of {dataset.name} has no ground truth, so it cannot be scored: "
            "take a labelled split, or write masks with predict.py"
        )
    net.eval()
    n, finite = len(dataset.classes), {}
    matrix = torch.zeros(n, n, dtype=torch.int64, device=device)
    with (
        fail_on_all_ranks(),
        torch.backends.cudnn.flags(enabled=True, deterministic=True),
    ):  # the same kernels whoever calls, on any rank
        for index, image, label in eval_images(dataset, rank, world, workers):
            probabilities = predict(net, image.to(device, non_blocking=True), **options)
            finite[index] = (
                probabilities[0].isfinite().all()
            )  # nan in one class is in all; looked at last: no GPU is waited for
            matrix += confusion(probabilities.argmax(0), label.to(device, non_blocking=True), n)
            progress(index + 1, len(dataset))
        for index, fine in finite.items():
            if not fine:
                raise InputError(f"{quote(dataset.items[index].image)}: {NOT_FINITE}")
    matrix = matrix.cpu()
    if world > 1:
        dist.all_reduce(matrix)
    return matrix


# ------------------------------------------------------------------------------------------- what the scripts share


# -------------------------------------------------------------------------------------------------------- pictures


# ---------------------------------------------------------------------------------------------------------- the script


def parse_evaluation(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    p = Parser(description="mIoU of a checkpoint")
    p.add_argument("checkpoint")
    return parse_flags(p, argv, *FLAGS)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and print the table from rank 0. Returns the exit status."""
    args = parse_evaluation(argv)
    with distributed(timedelta(days=1)) as (
        rank,
        world,
        device,
    ):  # until the slowest rank has done its share
        net, checkpoint = load_network(args.checkpoint, device, args.context)
        dataset = open_like(checkpoint, args.data, args.root, args.split, args.checkpoint)
        amp = choose_amp(args.amp or checkpoint["amp"], device)
        live = rank == 0 and on_terminal(sys.stderr)
        matrix = evaluate(
            net,
            dataset,
            device=device,
            rank=rank,
            world=world,
            workers=args.workers,
            scales=args.scales,
            flip=args.flip,
            crop=args.crop,
            amp=AMP[amp],
            progress=lambda done, n: (
                live and print_line(f"\r{done}/{n} images", error=True, end="")
            ),
        )
        if live:
            print_line("", error=True)
        result = scores(matrix)
        if rank == 0:
            print(iou_table(result, dataset.classes))
            if args.json:
                print(
                    json.dumps(
                        {
                            "miou": result["miou"],
                            "accuracy": result["accuracy"],
                            "iou": dict(zip(dataset.classes, result["iou"])),
                            "images": len(dataset),
                            "split": args.split,
                            "amp": amp,
                            "confusion": matrix.tolist(),
                        }
                    )
                )
    return 0


if __name__ == "__main__":
    run_script(main)
