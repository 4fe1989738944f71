"""The attention noise of a checkpoint in numbers: inter-class and intra-class noise of A, A' and A''.

    python -m paper.noise runs/cityscapes/best.pt                   # the checkpoint's data set, validation split
    python -m paper.noise best.pt --root DIR --queries 256 --json   # one JSON object last

The paper shows them as pictures (Section I, Figs. 1, 11). Here, for a query of class c and its row a, at F's resolution:

    inter-class noise = sum of a outside class c / sum of a       0: nothing leaks to other classes
    intra-class noise = 1 - H(b) / log(n_c)                       0: an even row, without hollows

with b the row within the n_c pixels of class c, normalised, and H its entropy; pixels of label 255 are left out. Averaged
over queries, then over classes. Only rows of sampled queries are made, in fp32: no N x N map.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import dnl
from attention import attention_inputs, require_attention
from checkpoint import load_network, open_like
from data import IGNORE, DataSet, eval_images
from runtime import InputError, Parser, on_terminal, parse_flags, print_line, run_script

MAPS, NOISES = ("A", "A'", "A''"), ("inter", "intra")


def inter_class(rows: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """The share of each row that lies outside its query's class, (R,) float64 in 0..1; pixels of label 255 do not count.
    rows (R, N), not negative, of any scale; label (N,); classes (R,) of the queries. NaN where the row sums to 0."""
    rows = rows.double() * (label != IGNORE)
    return (rows * (label != classes[:, None])).sum(1) / rows.sum(1)


def intra_class(rows: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """1 - H(b) / log(n_c) for each row's part b within its query's class, normalised: (R,) float64, 0 even, 1 one pixel.

    Arguments as of `inter_class`. NaN where the class has fewer than 2 pixels or the row is 0 on all of them.
    """
    inside = label == classes[:, None]  # (R, N)
    b = rows.double() * inside
    entropy = torch.special.entr(b / b.sum(1, keepdim=True)).sum(1)
    return 1 - entropy / inside.sum(1).double().log()  # 0/0 where the class has one pixel


def labels_at(label: Tensor, size: tuple[int, int]) -> Tensor:
    """label (H, W) -> (h*w,), the nearest pixel to each position of F, whose corners are the image's as in `dnl.resize`."""
    y, x = (
        torch.linspace(0, n - 1, m, dtype=torch.float64).round().long()
        for n, m in zip(label.shape, size)
    )
    return label[y.to(label.device)][:, x.to(label.device)].flatten()


def sample_queries(label: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of at most `count` pixels with a known label (N,), drawn in turn from each class until all its are taken."""
    order = rng.permutation(np.flatnonzero(label != IGNORE))
    turn = np.empty(len(order), np.int64)  # how many of the pixel's class come before it
    for c in np.unique(label[order]):
        same = label[order] == c
        turn[same] = np.arange(same.sum())
    return order[np.argsort(turn, kind="stable")[:count]]


@torch.inference_mode()
def image_noise(
    net: dnl.Network, image: Tensor, label: Tensor, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Both noises of A, A', A'' for sampled queries of one image: (3, 2, R) float64, and their classes (R,) int64.
    image (3, H, W) 0..255, label (H, W), both on the network's device."""
    q, k, p, size = attention_inputs(net, image)
    label = labels_at(label, size).long()  # (N,)
    queries = torch.from_numpy(sample_queries(label.cpu().numpy(), count, rng)).to(label.device)
    maps = dnl.denoised_maps(q, k, p, size, net.context.kernel, queries)  # 3 times (1, R, N)
    values = [
        torch.stack([f(a[0], label, label[queries]) for f in (inter_class, intra_class)])
        for a in maps
    ]
    return torch.stack(values), label[queries]


def measure(
    net: dnl.Network,
    dataset: DataSet,
    *,
    queries: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, n: None,
) -> tuple[Tensor, Tensor]:
    """Mean noise (3, 2, n) of each map and class over the data set, NaN for a class without a query, and the numbers of
    queries that counted (3, 2, n). The queries of image i depend on (seed, i) alone. InputError: no ground truth."""
    if not dataset.labelled:
        raise InputError(
            f"split {dataset.split!r} of {dataset.name} has no ground truth: take a labelled one"
        )
    sums = torch.zeros(3, 2, len(dataset.classes), dtype=torch.float64, device=device)
    counts = torch.zeros_like(sums)
    for index, image, label in eval_images(dataset, 0, 1, workers):
        progress(index + 1, len(dataset))
        if (label == IGNORE).all():
            continue  # no query
        values, classes = image_noise(
            net, image.to(device), label.to(device), queries, np.random.default_rng((seed, index))
        )
        sums.index_add_(2, classes, values.nan_to_num(0))
        counts.index_add_(2, classes, (~values.isnan()).double())
    return (sums / counts).cpu(), counts.long().cpu()


def noise_table(means: Tensor, counts: Tensor, classes: Sequence[str]) -> str:
    """means and counts of `measure` as lines for people: a row per class, then the mean over classes."""
    width = max(len("mean"), *map(len, classes))
    heads = [f"{noise} {m}" for noise in NOISES for m in MAPS]
    rows = [
        *zip(classes, means.permute(2, 1, 0).flatten(1).tolist(), counts[0, 0].tolist()),
        ("mean", means.nanmean(2).T.flatten().tolist(), int(counts[0, 0].sum())),
    ]
    lines = [
        f"{name:<{width}}  {n:>7}  "
        + "  ".join(f"{'-' if v != v else f'{v:.4f}':>9}" for v in values)
        for name, values, n in rows
    ]
    return "\n".join(
        [f"{'class':<{width}}  queries  " + "  ".join(f"{h:>9}" for h in heads), *lines]
    )


def as_plain(means: Tensor, counts: Tensor, classes: Sequence[str]) -> dict[str, dict]:
    """{"A": {"inter": {"mean": x, "classes": {name: x}, "queries": {name: n}}, "intra": ...}, ...}, None for NaN."""

    def one(row: Tensor, n: Tensor) -> dict:
        mean, *each = [None if v != v else v for v in [float(row.nanmean()), *row.tolist()]]
        return {
            "mean": mean,
            "classes": dict(zip(classes, each)),
            "queries": dict(zip(classes, n.tolist())),
        }

    return {m: dict(zip(NOISES, map(one, row, n))) for m, row, n in zip(MAPS, means, counts)}


def parse_noise(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    p = Parser(prog="python -m paper.noise", description="Attention noise of a checkpoint")
    p.add_argument("checkpoint")
    p.add_argument(
        "--queries",
        type=int,
        default=64,
        help="query pixels of an image, even over its classes (default: 64)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the choice of query pixels")
    args = parse_flags(p, argv, "data", "root", "split", "context", "workers", "json")
    if args.queries < 1 or args.seed < 0:
        raise InputError("--queries must be 1 or more, --seed 0 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a checkpoint and print its table."""
    args = parse_noise(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, checkpoint = load_network(args.checkpoint, device, args.context)
    require_attention(net, args.checkpoint)
    dataset = open_like(checkpoint, args.data, args.root, args.split, args.checkpoint)
    live = on_terminal(sys.stderr)
    means, counts = measure(
        net,
        dataset,
        queries=args.queries,
        seed=args.seed,
        device=device,
        workers=args.workers,
        progress=lambda i, n: (
            live and print_line(f"\r{i}/{n} images", error=True, end="\n" * (i == n))
        ),
    )
    print(noise_table(means, counts, dataset.classes))
    if args.json:
        print(
            json.dumps(
                {
                    "maps": as_plain(means, counts, dataset.classes),
                    "data": dataset.name,
                    "split": args.split,
                    "images": len(dataset),
                    "queries": args.queries,
                    "seed": args.seed,
                }
            )
        )
    return 0


if __name__ == "__main__":
    run_script(main)
