"""What the block, the network and the loader cost on this machine (Section III-F, Table V).

    python -m paper.bench block   [--grow] [--runs N] [--json]
    python -m paper.bench network [--backbone resnet101] [--size 256 256] [--batch 2] [--classes 19] [--amp auto] ...
    python -m paper.bench loader  [--images 8] [--crop 768] [--runs N] [--json]

What is compared is timed in turn in one run, so that a ratio holds on a machine that is not quiet; a time is the
median of --runs. A GPU is used where there is one. --json: one object on the last line, with

    machine  cpu, cores, threads, torch, device
    memory   how the peaks were taken and what is subtracted (block, network)
    rows     block: n, dtype, pass (forward, forward+backward), route (value, map, nl; sdpa on a GPU), seconds,
             peak (bytes over the inputs), peak_over_outputs (bytes, the results subtracted as well)
             network: what (training, inference), variant (asked, plain), amp, channels_last, seconds,
             images_per_second, held (bytes of weights, statistics, momentum), peak (bytes over those and the batch),
             flops (of a call), flops_per_second, matrix_flops_per_second (of a large product), share (of the two)
             loader: route (resize_all, crop_first, cached), seconds (an image), images_per_second (of one worker)
    ratios   block: "DTYPE PASS value/nl", "... map/value" of times; network: "WHAT asked/plain" of times;
             loader: "crop_first/resize_all", "cached/crop_first" of images/s
    file_mb  loader: megabytes of a generated PNG
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import data
import dnl
from paper.peers import attention
from recipe import losses
from runtime import AMP, Parser, choose_amp, run_script

SIZE = (48, 48)  # N = 2304, the paper's 768 x 768 at stride 16
LARGE = ((64, 128), (128, 256))  # N = 8192; 32768, of an image of 2048 x 4096
GROW = ((24, 24), (96, 96), (192, 192))  # with SIZE: N four times as large each time
CHANNELS, CLASSES = 512, 19  # C (C' is an eighth of it) and n

SOURCE = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "the profiler's allocations played back",
}

# ---- measuring


def machine(device: torch.device) -> dict[str, str | int]:
    """The machine line: cpu, cores this process may use, threads, torch, device."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": name,
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, s; on a GPU until its work is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turn(
    cases: Mapping[Any, Callable[[], object]], runs: int, device: torch.device
) -> dict[Any, float]:
    """Median seconds of each case over `runs` rounds, every case once a round, after a round that is not counted.

    runs 0: that first round itself, for calls so long that being cold does not show."""
    rounds = [{name: seconds(run, device) for name, run in cases.items()} for _ in range(runs + 1)]
    return {name: statistics.median(r[name] for r in rounds[1:] or rounds) for name in cases}


def peak_memory(run: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[int, int]:
    """The most bytes that tensors held during a call over what they held before it, and the bytes of its results.

    On a CPU temporary copies inside operators count, what oneDNN or MKL allocate for themselves does not."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = sum(x.nbytes for x in run())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, results
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = sum(x.nbytes for x in run())
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([0, *(e.nbytes() for e in events)]).max()), results


# ---- the block


def routes(size: tuple[int, int], names: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """The ways to the sum in eq. 3, each (q, k, v, p) -> (B, C, N). nl and sdpa have no GR and no LR: p is left
    alone; sdpa includes the change of layout that its kernels need."""
    every = {
        "value": lambda q, k, v, p: dnl.denoised_attention(q, k, v, p, size),
        "map": lambda q, k, v, p: torch.bmm(v, dnl.denoised_maps(q, k, p, size)[2].to(v.dtype).mT),
        "nl": lambda q, k, v, p: attention(q, k, v),
        "sdpa": lambda q, k, v, p: (
            F.scaled_dot_product_attention(
                *(x.mT.contiguous()[:, None] for x in (q, k, v)), scale=1.0
            )[:, 0].mT
        ),
    }
    return {name: every[name] for name in names}


def block_rows(
    size: tuple[int, int],
    names: Sequence[str],
    runs: int,
    device: torch.device,
    dtype: torch.dtype,
    channels: int = CHANNELS,
    classes: int = CLASSES,
) -> list[dict[str, Any]]:
    """Rows (module docstring) of the routes on drawn Q, K, V, P at batch 1, channels innermost, as the network hands them."""
    N = size[0] * size[1]
    widths = (channels // 8, channels // 8, channels, classes, channels)
    draw = torch.Generator().manual_seed(0)
    q, k, v, p, grad = (torch.randn(1, N, c, generator=draw).to(device, dtype).mT for c in widths)
    inputs = [
        x.requires_grad_() for x in (q / 4, k / 4, v, p)
    ]  # logits of deviation 0.5 sqrt(C'/64)

    def forward(route: Callable[..., Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [route(*inputs)]

    def both(route: Callable[..., Tensor]) -> list[Tensor]:
        out = route(*inputs)
        grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        return [out.detach(), *(g for g in grads if g is not None)]

    rows = []
    for name, call in (("forward", forward), ("forward+backward", both)):
        cases = {route: partial(call, f) for route, f in routes(size, names).items()}
        times = in_turn(cases, runs, device)
        for route, run in cases.items():
            peak, results = peak_memory(run, device)
            rows.append(
                {
                    "n": N,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": name,
                    "route": route,
                    "seconds": times[route],
                    "peak": peak,
                    "peak_over_outputs": peak - results,
                }
            )
    return rows


def block(runs: int, device: torch.device, grow: bool = False) -> dict[str, Any]:
    """The report (module docstring) at N = 2304, fp32 and on a GPU bf16 too, and of the value route at larger N."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (device.type == "cuda")]:
        names = ("value", "map", "nl", "sdpa")[: 3 + (device.type == "cuda")]
        rows += block_rows(SIZE, names, runs, device, dtype)
        for size in GROW if grow else LARGE:
            rows += block_rows(
                size, ("value",), runs if device.type == "cuda" else 0, device, dtype
            )
    return {
        "memory": "peak over Q, K, V, P and the gradient that comes in, by " + SOURCE[device.type],
        "rows": rows,
        "ratios": block_ratios(rows),
    }


def block_ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Times of value over nl and of map over value, for each dtype and pass that has them."""
    times = {
        (r["dtype"], r["pass"], r["route"]): r["seconds"] for r in rows if r["n"] == rows[0]["n"]
    }
    pairs = (("value", "nl"), ("map", "value"))
    return {
        f"{d} {p} {a}/{b}": t / times[d, p, b]
        for a, b in pairs
        for (d, p, route), t in times.items()
        if route == a
    }


# ---- the network


def network_cases(
    config: dnl.Config,
    size: tuple[int, int],
    batch: int,
    amp: str,
    channels_last: bool,
    device: torch.device,
) -> tuple[dict[str, Callable[[], list[Tensor]]], int]:
    """{"training", "inference": a call of one step}, and the bytes of weights, statistics and momentum.

    A step is train.py's: eq. 5 by its `losses` on stride-8 outputs, SGD; inference ends with full-size logits.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    net = dnl.build(config).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, fused=device.type == "cuda")
    x = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=layout)
    label = torch.randint(config.num_classes, (batch, *size), device=device, dtype=torch.uint8)
    autocast = partial(
        torch.autocast, device.type, AMP[amp] or torch.bfloat16, enabled=AMP[amp] is not None
    )

    def training() -> list[Tensor]:
        net.train()
        with autocast():
            outputs = net(x, full_size=False)
        losses(outputs, label, label.numel()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return []

    def inference() -> list[Tensor]:
        net.eval()
        with torch.inference_mode(), autocast():
            return [net(x)]

    weights = sum(p.nbytes for p in net.parameters())
    return {"training": training, "inference": inference}, 2 * weights + sum(
        b.nbytes for b in net.buffers()
    )


def matrix_product(amp: str, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A large matrix product of the type that `amp` computes in, and its floating-point operations."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=AMP[amp] or torch.float32)
    return lambda: a @ b, 2 * n**3


def network(
    config: dnl.Config, size: tuple[int, int], batch: int, amp: str, runs: int, device: torch.device
) -> dict[str, Any]:
    """The report (module docstring): asked is `amp` in channels_last, plain is fp32 without channels_last."""
    variants = {"asked": (amp, True), "plain": ("off", False)}
    made = {v: network_cases(config, size, batch, *how, device) for v, how in variants.items()}
    products = {v: matrix_product(how[0], device) for v, how in variants.items()}
    calls = {(what, v): call for v, (cases, _) in made.items() for what, call in cases.items()}
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        times = in_turn(
            calls | {("product", v): run for v, (run, _) in products.items()}, runs, device
        )
        rows = [
            network_row(what, v, call, times[what, v], products[v][1] / times["product", v], device)
            | {"images_per_second": batch / times[what, v], "held": made[v][1]}
            | dict(zip(("amp", "channels_last"), variants[v]))
            for (what, v), call in calls.items()
        ]
    return {
        "memory": "peak over weights, statistics, momentum (held) and the batch, by "
        + SOURCE[device.type],
        "rows": rows,
        "ratios": {
            f"{what} asked/plain": times[what, "asked"] / times[what, "plain"]
            for what in ("training", "inference")
        },
    }


def network_row(
    what: str,
    variant: str,
    call: Callable[[], list[Tensor]],
    took: float,
    rate: float,
    device: torch.device,
) -> dict[str, Any]:
    """A row's figures: peak, FLOPs (2 a multiply-add; recomputed ones count, for they are done) and share."""
    with FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    return {
        "what": what,
        "variant": variant,
        "seconds": took,
        "peak": peak_memory(call, device)[0],
        "flops": flops,
        "flops_per_second": flops / took,
        "matrix_flops_per_second": rate,
        "share": flops / took / rate,
    }


# ---- the loader


def make_tree(root: Path, images: int, size: tuple[int, int]) -> float:
    """Write a `cityscapes` tree of drawn images and labels, split train; returns the mean size of a PNG image, MB.

    Shades of all scales under a camera's noise, so that a PNG is as large, and as slow to decode, as one of a street.
    """
    H, W = size
    paths = [root / top / "train" / "drawn" for top in ("leftImg8bit", "gtFine")]
    for path in paths:
        path.mkdir(parents=True)
    for i in range(images):
        rng = np.random.default_rng(i)
        image = 118 + 0.5 * rng.standard_normal((H, W, 3), np.float32)
        for cell in (
            8,
            32,
            128,
        ):  # a smooth field of features of about that many pixels, in each channel
            coarse = 20 * rng.standard_normal((3, H // cell + 2, W // cell + 2), np.float32)
            image += np.stack(
                [Image.fromarray(c).resize((W, H), Image.Resampling.BICUBIC) for c in coarse], 2
            )
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(paths[0] / f"{i}_leftImg8bit.png")
        ids = Image.fromarray(
            rng.integers(0, 34, (H // 64 + 1, W // 64 + 1), np.uint8)
        )  # label ids
        ids.resize((W, H), Image.Resampling.NEAREST).save(paths[1] / f"{i}_gtFine_labelIds.png")
    return sum(f.stat().st_size for f in paths[0].iterdir()) / images / 1e6


def resize_all(dataset: data.DataSet, index: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """data.sample(dataset, 0, 0, index, crop) in the usual order: image and label resized whole, then cropped."""
    rng = np.random.default_rng((0, 0, index))
    image, label = data.read(dataset, index)
    scale = rng.uniform(0.5, 2)
    H, W = (max(1, round(n * scale)) for n in label.shape)
    whole = [
        np.asarray(Image.fromarray(x).resize((W, H), how))
        for x, how in ((image, Image.Resampling.BILINEAR), (label, Image.Resampling.NEAREST))
    ]
    y, x = (int(rng.integers(0, max(0, n - crop) + 1)) for n in (H, W))
    out, ids = (
        np.full((crop, crop, 3), data.PAD, np.uint8),
        np.full((crop, crop), data.IGNORE, np.uint8),
    )
    out[:H, :W], ids[:H, :W] = (a[y : y + crop, x : x + crop] for a in whole)
    flip = -1 if rng.random() < 0.5 else 1
    return np.ascontiguousarray(out[:, ::flip].transpose(2, 0, 1)), np.ascontiguousarray(
        ids[:, ::flip]
    )


def loader(
    images: int, crop: int, runs: int, size: tuple[int, int] = (1024, 2048)
) -> dict[str, Any]:
    """The report (module docstring): training samples made one after the other in this process, as by one worker."""
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "tree"), Path(folder, "cache")
        file_mb = make_tree(root, images, size)
        files, cached = (data.open_dataset("cityscapes", root, "train", c) for c in (None, cache))
        make = {
            "resize_all": lambda i: resize_all(files, i, crop),
            "crop_first": lambda i: data.sample(files, 0, 0, i, crop),
            "cached": lambda i: data.sample(cached, 0, 0, i, crop),
        }
        cases = {route: (lambda f=f: [f(i) for i in range(images)]) for route, f in make.items()}
        rates = {r: images / t for r, t in in_turn(cases, runs, torch.device("cpu")).items()}
    pairs = (("crop_first", "resize_all"), ("cached", "crop_first"))
    return {
        "rows": [{"route": r, "seconds": 1 / v, "images_per_second": v} for r, v in rates.items()],
        "ratios": {f"{a}/{b}": rates[a] / rates[b] for a, b in pairs},
        "file_mb": file_mb,
    }


# ---- the command

UNITS = {
    "seconds": ("ms", 1e3),
    "peak": ("peak MiB", 2**-20),
    "peak_over_outputs": ("over outputs too", 2**-20),
    "held": ("held MiB", 2**-20),
    "flops": ("GFLOP", 1e-9),
    "flops_per_second": ("GFLOP/s", 1e-9),
    "matrix_flops_per_second": ("matrix GFLOP/s", 1e-9),
    "images_per_second": ("images/s", 1),
    "share": ("share", 1),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns also line up as plain text, all but the first to the right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    padded = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in cells
    ]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def bench_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people: a column for each key, figures in the units that its head names."""
    return markdown(
        [UNITS[key][0] if key in UNITS else key for key in rows[0]],
        [
            [f"{v * UNITS[key][1]:.2f}" if key in UNITS else v for key, v in row.items()]
            for row in rows
        ],
    )


def parse_bench(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for what cannot be measured."""
    p = Parser(
        prog="python -m paper.bench", description="Time, memory and throughput on this machine"
    )
    which = p.add_subparsers(dest="what", required=True)
    subs = {name: which.add_parser(name) for name in ("block", "network", "loader")}
    subs["block"].add_argument(
        "--grow", action="store_true", help="N = 576 ... 36864 instead of 8192 and 32768"
    )
    add = subs["network"].add_argument
    add("--backbone", choices=list(dnl.LAYOUTS), default="resnet101")
    add("--channels", type=int, default=CHANNELS, help="of F")
    add("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"))
    add("--batch", type=int, default=2)
    add("--classes", type=int, default=CLASSES)
    add("--amp", choices=["auto", *AMP], default="auto", help="precision")
    subs["loader"].add_argument("--images", type=int, default=8)
    subs["loader"].add_argument("--crop", type=int, default=768)
    for sub in subs.values():
        sub.add_argument(
            "--runs", type=int, default=5, help="repetitions, of which the median is taken"
        )
        sub.add_argument("--json", action="store_true", help="one object on the last line")
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, list) and np.min(value) < 1:
            raise data.InputError(f"--{name} {value}: expected 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its table."""
    args = parse_bench(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"machine": machine(device)}
    if args.what == "block":
        report |= block(args.runs, device, args.grow)
    elif args.what == "network":
        config = replace(
            dnl.PAPER, backbone=args.backbone, channels=args.channels, num_classes=args.classes
        )
        amp = choose_amp(args.amp, device)
        report |= network(config, tuple(args.size), args.batch, amp, args.runs, device)
    else:
        report |= loader(args.images, args.crop, args.runs)
    print(*(f"{k} {v}" for k, v in report["machine"].items()), sep=" · ")
    print(bench_table(report["rows"]))
    print(*(f"{name}: {value:.3f}" for name, value in report["ratios"].items()), sep="\n")
    print(*(f"{key}: {report[key]}" for key in ("memory", "file_mb") if key in report), sep="\n")
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_script(main)
