"""The attention noise of a checkpoint in numbers, and how well GR's gate knows the classes.

    python -m paper.noise runs/cityscapes/best.pt                 # on the validation split
    python -m paper.noise best.pt --root DIR --queries 256 --json # one JSON object as the last line

The paper shows it as pictures (Section I, Figs. 1, 11). Here, for a query pixel of class c and its
row a of a map, at F's resolution, without the pixels of label 255:

    inter-class noise = sum of a outside class c / sum of a       0: nothing leaks to other classes
    intra-class noise = 1 - H(b) / log(n_c)                       0: an even row, without hollows

b is the row on the n_c pixels of class c, normalised; H is its entropy. `paper/gate.py` defines
the three measures of P_class. All are averaged over queries, then over classes. Only the rows of
sampled queries are computed, in fp32: no N x N map.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import dnl
from attention import attention_inputs, require_attention
from checkpoint import base_of, load_network, open_like
from classes import IGNORE
from data import DataSet, base_factor, eval_images
from evaluate import NOT_FINITE
from paper.gate import GATE, gate_values, pair_sums
from ranks import find_device
from runtime import InputError, Parser, parse_flags, print_progress, run_script

MAPS = ("A", "A'", "A''")
NOISES = ("inter", "intra")
MEASURES = (*(f"{noise} {m}" for noise in NOISES for m in MAPS), *GATE)


@dataclass(frozen=True)
class Measured:
    """What a checkpoint's attention does on a data set of n classes."""

    means: Tensor  # (len(MEASURES), n) float64; NaN for a class without a value
    counts: Tensor  # (len(MEASURES), n) int64, the numbers of queries in the means
    gate: Tensor  # (n, n) float64, mean P_class by pair of classes, rows of the query's; NaN: none


def inter_class(rows: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """The share of each row outside its query's class, (R,) float64 in 0..1, without label 255.

    rows (R, N), not negative, of any scale; label (N,); classes (R,) of the queries. NaN for a row
    that sums to 0.
    """
    rows = rows.double() * (label != IGNORE)
    outside = rows * (label != classes[:, None])
    return outside.sum(1) / rows.sum(1)


def intra_class(rows: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """1 - H(b) / log(n_c) of each row, (R,) float64: 0 if even in its class, 1 if on one pixel.

    Arguments as in `inter_class`. NaN if the class has fewer than 2 pixels or the row is 0 on them.
    """
    inside = label == classes[:, None]  # (R, N)
    b = rows.double() * inside
    b = b / b.sum(1, keepdim=True)
    entropy = torch.special.entr(b).sum(1)
    return 1 - entropy / inside.sum(1).double().log()  # 0/0 if the class has one pixel


def labels_at(label: Tensor, size: tuple[int, int]) -> Tensor:
    """label (H, W) at the positions of F, (h * w,): the nearest pixels, corners on corners."""
    picked = []
    for length, count in zip(label.shape, size):
        places = torch.linspace(0, length - 1, count, dtype=torch.float64)
        picked.append(places.round().long())
    return label[picked[0]][:, picked[1]].flatten()


def sample_queries(label: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of at most `count` random pixels with a known label, label (N,).

    The classes take turns until all their pixels are taken.
    """
    order = rng.permutation(np.flatnonzero(label != IGNORE))
    turn = np.empty(len(order), np.int64)  # pixels of the same class that come before
    for c in np.unique(label[order]):
        same = label[order] == c
        turn[same] = np.arange(same.sum())
    chosen = np.argsort(turn, kind="stable")
    return order[chosen[:count]]


@torch.inference_mode()
def image_values(
    net: dnl.Network,
    image: Tensor,
    label: Tensor,
    count: int,
    rng: np.random.Generator,
    base: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """MEASURES of sampled queries of an image, the queries' classes, and `gate.pair_sums`.

    image (3, H, W) 0..255 on the network's device, label (H, W) -> (len(MEASURES), R) float64,
    (R,) int64, (2, n, n) float64, on the CPU. base: of `base_factor`. Without GR the gate's
    measures are NaN, its sums 0. InputError if the network's features are not finite.
    """
    block = cast(dnl.DenoisedNonLocal, net.context)  # require_attention has checked this
    q, k, p, size = attention_inputs(net, image, base_factor(label.shape, base))
    label = labels_at(label, size).long()  # (N,)
    queries = torch.from_numpy(sample_queries(label.numpy(), count, rng))
    classes = label[queries]
    n = net.config.num_classes
    sums = torch.zeros(2, n, n, dtype=torch.float64)
    gate = sums.new_full((len(GATE), len(queries)), torch.nan)
    if not len(queries):  # no labelled pixel lies on F's grid
        return gate.new_zeros(len(MEASURES), 0), classes, sums
    for x in (q, k, p):
        if x is not None and not x.isfinite().all():
            raise InputError(NOT_FINITE)
    at = queries.to(q.device)
    maps = [rows[0].cpu() for rows in dnl.denoised_maps(q, k, p, size, block.kernel, at)]  # (R, N)
    values = []
    for noise in (inter_class, intra_class):
        values += [noise(rows, label, classes) for rows in maps]
    if p is not None:
        p_class = dnl.class_affinity(p, at)[0].cpu()
        gate = gate_values(p_class, label, queries)
        sums = pair_sums(p_class, label, queries, n)
    return torch.cat([torch.stack(values), gate]), classes, sums


def measure(
    net: dnl.Network,
    dataset: DataSet,
    *,
    queries: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
    base: int = 0,
) -> Measured:
    """All measures of a network on a data set.

    The queries of image i depend on (seed, i) only. InputError for a split without ground truth.
    """
    if not dataset.labelled:
        raise InputError(
            f"split {dataset.split!r} of {dataset.name} has no ground truth: take a labelled one"
        )
    n, images = len(dataset.classes), len(dataset)
    sums = torch.zeros(len(MEASURES), n, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    pairs = torch.zeros(2, n, n, dtype=torch.float64)
    for index, image, label in eval_images(dataset, 0, 1, workers):
        print_progress(f"{index + 1}/{images} images", last=index + 1 == images)
        label = cast(Tensor, label)  # the split is labelled
        rng = np.random.default_rng((seed, index))
        image = image.to(device)
        values, classes, image_pairs = image_values(net, image, label, queries, rng, base)
        sums.index_add_(1, classes, values.nan_to_num(0))
        counts.index_add_(1, classes, (~values.isnan()).double())
        pairs += image_pairs
    gate = pairs[0] / pairs[1]
    return Measured(sums / counts, counts.long(), gate)


def noise_table(measured: Measured, classes: Sequence[str]) -> str:
    """The measures as lines for people: a row per class, then the mean."""
    width = max(len("mean"), *map(len, classes))
    numbers = measured.counts[0].tolist()
    means = measured.means
    rows = list(zip(classes, numbers, means.T.tolist()))
    rows.append(("mean", sum(numbers), means.nanmean(1).tolist()))
    lines = [f"{'class':<{width}}  queries{row_of(MEASURES)}"]
    for name, number, values in rows:
        texts = ["-" if math.isnan(v) else f"{v:.4f}" for v in values]
        lines.append(f"{name:<{width}}  {number:>7}{row_of(texts)}")
    return "\n".join(lines)


def row_of(texts: Sequence[str]) -> str:
    """The texts in columns of equal width."""
    return "".join(f"  {text:>9}" for text in texts)


def as_plain(measured: Measured, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{"inter A": {"mean": x, "classes": {name: x}, "queries": {name: n}}, ...}, all of MEASURES.

    None for NaN.
    """
    report = {}
    for name, values, counts in zip(MEASURES, measured.means, measured.counts):
        report[name] = {
            "mean": none_if_nan(values.nanmean().item()),
            "classes": dict(zip(classes, map(none_if_nan, values.tolist()))),
            "queries": dict(zip(classes, counts.tolist())),
        }
    return report


def none_if_nan(x: float) -> float | None:
    """The number, as JSON has it."""
    return None if math.isnan(x) else x


def parse_noise(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for values out of range."""
    p = Parser(prog="python -m paper.noise", description="Attention noise and gate of a checkpoint")
    p.add_argument("checkpoint")
    p.add_argument(
        "--queries",
        type=int,
        default=64,
        help="query pixels an image, evenly from its classes (default: 64)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the choice of query pixels")
    args = parse_flags(p, argv, "data", "root", "split", "context", "workers", "device", "json")
    if args.queries < 1 or args.seed < 0:
        raise InputError("--queries must be 1 or more, --seed 0 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a checkpoint and print its table."""
    args = parse_noise(argv)
    device = find_device(args.device)
    net, checkpoint = load_network(args.checkpoint, device, args.context)
    require_attention(net, args.checkpoint)
    dataset = open_like(checkpoint, args.data, args.root, args.split, args.checkpoint)
    measured = measure(
        net,
        dataset,
        queries=args.queries,
        seed=args.seed,
        device=device,
        workers=args.workers,
        base=base_of(checkpoint),
    )
    print(noise_table(measured, dataset.classes))
    if args.json:
        report = {
            "measures": as_plain(measured, dataset.classes),
            "data": dataset.name,
            "split": args.split,
            "images": len(dataset),
            "queries": args.queries,
            "seed": args.seed,
        }
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_script(main)
