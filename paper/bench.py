"""What the block, the network and the loader cost on this machine (Section III-F, Table V).

    python -m paper.bench block   [--grow] [--runs N] [--json]
    python -m paper.bench network [--backbone resnet101] [--size 256 256] [--batch 2] [--classes 19] [--amp auto] [--runs N] [--json]
    python -m paper.bench loader  [--images 8] [--crop 768] [--runs N] [--json]

What is compared is timed in turn in one run, so that a ratio holds on a machine that is not quiet; a time is the median
of --runs. A GPU is used where there is one. --json: one object on the last line, with

    machine   cpu, cores, threads, torch, device: text and whole numbers
    memory    what the peaks are: how they were taken and what is subtracted
    rows      block: n, dtype, pass (forward, forward+backward), route (value, map, nl; sdpa on a GPU), seconds, peak (bytes
              over the inputs), peak_over_outputs (bytes, the results subtracted as well)
              network: what (training, inference), variant (asked, plain), amp, channels_last, seconds, images_per_second,
              held (bytes of weights, statistics and momentum), peak (bytes over those and the batch), flops (of one
              call), flops_per_second, matrix_flops_per_second (of a large product of that type), share (of the two)
              loader: route (resize_all, crop_first, cached), images_per_second (one worker)
    ratios    block: "DTYPE PASS value/nl" and "... map/value" of times; network: "WHAT asked/plain" of times; loader:
              "crop_first/resize_all" and "cached/crop_first" of images/s
    file_mb   loader: megabytes of a generated PNG
"""
from __future__ import annotations

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
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import data
import dnl
from evaluate import AMP, Parser, choose_amp, run_script
from paper.peers import attention
from train import losses

SIZE = (48, 48)  # N = 2304, the paper's 768 x 768 at stride 16
LARGE = ((64, 128), (128, 256))  # N = 8192; 32768, of an image of 2048 x 4096
GROW = ((24, 24), (48, 48), (96, 96), (192, 192))  # N four times as large each time
CHANNELS, CLASSES = 512, 19  # C (C' is an eighth of it) and n

# ---------------------------------------------------------------------------------------------------- measuring


def machine(device: torch.device) -> dict[str, str | int]:
    """The machine line: cpu, cores this process may use, threads, torch, device."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), "torch": torch.__version__, "device": name}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, s; on a GPU until its work is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turn(cases: Mapping[str, Callable[[], object]], runs: int, device: torch.device, warm: bool = True) -> dict[str, float]:
    """Median seconds of each case over `runs` rounds, every case once a round; before them a round that is not counted."""
    rounds = [{name: seconds(run, device) for name, run in cases.items()} for _ in range(runs + warm)]
    return {name: statistics.median(r[name] for r in rounds[warm:]) for name in cases}


def peak_memory(run: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[int, int]:
    """The most bytes that tensors held during a call over what they held before it, and the bytes of its results.

    GPU: max_memory_allocated. CPU: every allocation and release that the profiler recorded, played back in order; so
    temporary copies inside operators count, what oneDNN or MKL allocate for themselves does not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = sum(x.nbytes for x in run())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, results
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = sum(x.nbytes for x in run())
    events = sorted((e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return int(np.cumsum([0, *(e.nbytes() for e in events)]).max()), results


def memory_note(device: torch.device, over: str) -> str:
    """How `peak_memory` took its figures, for the output."""
    how = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "the profiler's allocations played back"
    return f"peak by {how}, over {over}"


# ------------------------------------------------------------------------------------------------------- the block


def routes(size: tuple[int, int], names: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """The ways to the sum in eq. 3, each (q, k, v, p) -> (B, C, N). nl and sdpa have no GR and no LR: p is left alone;
    sdpa includes the change of layout that its kernels need."""
    every = {
        "value": lambda q, k, v, p: dnl.denoised_attention(q, k, v, p, size),
        "map": lambda q, k, v, p: torch.bmm(v, dnl.denoised_maps(q, k, p, size)[2].to(v.dtype).mT),
        "nl": lambda q, k, v, p: attention(q, k, v),
        "sdpa": lambda q, k, v, p: F.scaled_dot_product_attention(
            *(x.mT.contiguous()[:, None] for x in (q, k, v)), scale=1.0)[:, 0].mT}
    return {name: every[name] for name in names}


def block_rows(size: tuple[int, int], names: Sequence[str], runs: int, device: torch.device, dtype: torch.dtype,
               channels: int = CHANNELS, classes: int = CLASSES) -> list[dict[str, Any]]:
    """Rows (module docstring) of the routes on drawn Q, K, V, P at batch 1. runs 0: once, cold, for sizes that take seconds."""
    N = size[0] * size[1]
    widths = (channels // 8, channels // 8, channels, classes, channels)
    draw = torch.Generator().manual_seed(0)
    q, k, v, p, grad = (torch.randn(1, c, N, generator=draw).to(device, dtype) for c in widths)
    inputs = [x.requires_grad_() for x in (q / 4, k / 4, v, p)]  # logits of deviation 0.5 sqrt(C'/64)

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
        times = in_turn(cases, max(1, runs), device, warm=runs > 0)
        for route, run in cases.items():
            peak, results = peak_memory(run, device)
            rows.append({"n": N, "dtype": str(dtype).removeprefix("torch."), "pass": name, "route": route,
                         "seconds": times[route], "peak": peak, "peak_over_outputs": peak - results})
    return rows


def block(runs: int, device: torch.device, grow: bool = False) -> dict[str, Any]:
    """The report (module docstring) at N = 2304, fp32 and on a GPU bf16 too, and of the value route at larger N."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16)[:1 + (device.type == "cuda")]:
        rows += block_rows(SIZE, ("value", "map", "nl", "sdpa")[:3 + (device.type == "cuda")], runs, device, dtype)
        for size in GROW if grow else LARGE:
            rows += block_rows(size, ("value",), runs if device.type == "cuda" else 0, device, dtype) if size != SIZE else []
    return {"memory": memory_note(device, "Q, K, V, P (and the gradient that comes in)"), "rows": rows,
            "ratios": block_ratios(rows)}


def block_ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Times of value over nl and of map over value, for each dtype and pass that has them."""
    times = {(r["dtype"], r["pass"], r["route"]): r["seconds"] for r in rows if r["n"] == rows[0]["n"]}
    pairs = (("value", "nl"), ("map", "value"))
    return {f"{d} {p} {a}/{b}": t / times[d, p, b] for a, b in pairs for (d, p, route), t in times.items() if route == a}


# ------------------------------------------------------------------------------------------------------ the network


def network_cases(config: dnl.Config, size: tuple[int, int], batch: int, amp: str, channels_last: bool,
                  device: torch.device) -> tuple[dict[str, Callable[[], list[Tensor]]], int]:
    """{"training", "inference": a call of one step}, and the bytes of weights, statistics and momentum.

    A step is train.py's: eq. 5 by its `losses` on stride-8 outputs, SGD; inference ends with full-size logits.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    net = dnl.build(config).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, fused=device.type == "cuda")
    x = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=layout)
    label = torch.randint(config.num_classes, (batch, *size), device=device, dtype=torch.uint8)
    autocast = partial(torch.autocast, device.type, AMP[amp] or torch.bfloat16, enabled=AMP[amp] is not None)

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
    return {"training": training, "inference": inference}, 2 * weights + sum(b.nbytes for b in net.buffers())


def matrix_product(amp: str, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A large matrix product of the type that `amp` computes in, and its floating-point operations."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=AMP[amp] or torch.float32)
    return lambda: a @ b, 2 * n ** 3


def network(config: dnl.Config, size: tuple[int, int], batch: int, amp: str, runs: int, device: torch.device) -> dict[str, Any]:
    """The report (module docstring) of the asked precision in channels_last beside the plain: fp32, not channels_last."""
    variants = {"asked": (amp, True), "plain": ("off", False)}
    made = {v: network_cases(config, size, batch, *how, device) for v, how in variants.items()}
    products = {v: matrix_product(how[0], device) for v, how in variants.items()}
    calls = {(what, v): call for v, (cases, _) in made.items() for what, call in cases.items()}
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        times = in_turn(calls | {("product", v): run for v, (run, _) in products.items()}, runs, device)
        rows = [network_row(what, v, call, times[what, v], products[v][1] / times["product", v], device)
                | {"amp": variants[v][0], "channels_last": variants[v][1], "images_per_second": batch / times[what, v],
                   "held": made[v][1]} for (what, v), call in calls.items()]
    return {"memory": memory_note(device, "weights, statistics, momentum (held) and the batch"), "rows": rows,
            "ratios": {f"{what} asked/plain": times[what, "asked"] / times[what, "plain"] for what in made["asked"][0]}}


def network_row(what: str, variant: str, call: Callable[[], list[Tensor]], took: float, rate: float,
                device: torch.device) -> dict[str, Any]:
    """A row's figures of the call alone: peak, FLOPs (2 a multiply-add; recomputed ones count, they are done) and share."""
    with FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    return {"what": what, "variant": variant, "seconds": took, "peak": peak_memory(call, device)[0], "flops": flops,
            "flops_per_second": flops / took, "matrix_flops_per_second": rate, "share": flops / took / rate}


# ------------------------------------------------------------------------------------------------------- the loader


def make_tree(root: Path, images: int, size: tuple[int, int] = (1024, 2048)) -> float:
    """Write a `cityscapes` tree of drawn images and labels, split train; returns the mean size of a PNG image, MB.

    Shades of all scales under a camera's noise, so that a PNG is as large, and as slow to decode, as one of a street.
    """
    H, W = size
    paths = [root / top / "train" / "drawn" for top in ("leftImg8bit", "gtFine")]
    for path in paths:
        path.mkdir(parents=True)
    for i in range(images):
        rng = np.random.default_rng(i)
        image = 118 + 0.9 * rng.standard_normal((H, W, 3), np.float32)
        for cell in (8, 32, 128):
            image += np.stack([shades(rng, size, cell) for _ in range(3)], 2)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(paths[0] / f"{i}_leftImg8bit.png")
        ids = np.digitize(shades(rng, size, 64), np.linspace(-40, 40, 33)).astype(np.uint8)  # label ids 0..33
        Image.fromarray(ids).save(paths[1] / f"{i}_gtFine_labelIds.png")
    return sum(f.stat().st_size for f in paths[0].iterdir()) / images / 1e6


def shades(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    """A smooth field (H, W) float32, of features about `cell` pixels wide and a deviation of about 10."""
    H, W = size
    coarse = Image.fromarray(20 * rng.standard_normal((H // cell + 2, W // cell + 2), np.float32))
    return np.asarray(coarse.resize((W, H), Image.Resampling.BICUBIC))


def resize_all(dataset: data.DataSet, index: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """The usual order, to compare with: the whole image and label resized, then cropped, padded and flipped."""
    rng = np.random.default_rng(index)
    image, label = data.read(dataset, index)
    to = tuple(max(1, round(n * scale)) for scale in [rng.uniform(0.5, 2)] for n in label.shape)
    whole = [np.asarray(Image.fromarray(x).resize(to[::-1], how))
             for x, how in ((image, Image.Resampling.BILINEAR), (label, Image.Resampling.NEAREST))]
    y, x = (int(rng.integers(0, max(1, n - crop + 1))) for n in to)
    out, ids = np.full((crop, crop, 3), data.PAD, np.uint8), np.full((crop, crop), data.IGNORE, np.uint8)
    part = (slice(y, y + crop), slice(x, x + crop))
    out[:to[0], :to[1]], ids[:to[0], :to[1]] = whole[0][part], whole[1][part]
    flip = -1 if rng.random() < 0.5 else 1
    return np.ascontiguousarray(out[:, ::flip].transpose(2, 0, 1)), np.ascontiguousarray(ids[:, ::flip])


def loader(images: int, crop: int, runs: int, size: tuple[int, int] = (1024, 2048)) -> dict[str, Any]:
    """The report (module docstring): training samples made one after the other in this process, as one worker does."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "tree")
        file_mb = make_tree(root, images, size)
        files, cached = (data.open_dataset("cityscapes", root, "train", **kw) for kw in ({}, {"cache": Path(folder, "cache")}))
        make = {"resize_all": lambda i: resize_all(files, i, crop),
                "crop_first": lambda i: data.sample(files, 0, 0, i, crop, False),
                "cached": lambda i: data.sample(cached, 0, 0, i, crop, False)}
        cases = {route: (lambda f=f: [f(i) for i in range(images)]) for route, f in make.items()}
        times = in_turn(cases, runs, torch.device("cpu"))
    rates = {route: images / t for route, t in times.items()}
    pairs = (("crop_first", "resize_all"), ("cached", "crop_first"))
    return {"memory": "not taken", "rows": [{"route": r, "images_per_second": v} for r, v in rates.items()],
            "ratios": {f"{a}/{b}": rates[a] / rates[b] for a, b in pairs}, "file_mb": file_mb}


# ------------------------------------------------------------------------------------------------------ the command

UNITS = {"seconds": ("ms", 1e3), "peak": ("peak MiB", 2**-20), "peak_over_outputs": ("over outputs too, MiB", 2**-20),
         "held": ("held MiB", 2**-20), "flops": ("GFLOP", 1e-9), "flops_per_second": ("GFLOP/s", 1e-9),
         "matrix_flops_per_second": ("matrix GFLOP/s", 1e-9), "images_per_second": ("images/s", 1.0)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people: a column for each key, figures in the units that its head names."""
    lines = [[UNITS.get(key, (key,))[0] for key in rows[0]]]
    for row in rows:
        scaled = ((v * UNITS.get(key, (key, 1.0))[1] if isinstance(v, float) or key in UNITS else v) for key, v in row.items())
        lines.append([f"{v:.4g}" if isinstance(v, float) and abs(v) < 1000 else f"{v:.0f}" if isinstance(v, float) else str(v)
                      for v in scaled])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in lines)


def parse(argv: Sequence[str] | None = None) -> Any:
    """The arguments. DataError for what cannot be measured."""
    p = Parser(prog="python -m paper.bench", description="Time, memory and throughput on this machine")
    which = p.add_subparsers(dest="what", required=True)
    block_, network_, loader_ = (which.add_parser(name) for name in ("block", "network", "loader"))
    block_.add_argument("--grow", action="store_true", help="the value route at N = 576 ... 36864 instead of 8192 and 32768")
    network_.add_argument("--backbone", choices=list(dnl.LAYOUTS), default="resnet101")
    network_.add_argument("--channels", type=int, default=CHANNELS, help="of F")
    network_.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"))
    network_.add_argument("--batch", type=int, default=2)
    network_.add_argument("--classes", type=int, default=CLASSES)
    network_.add_argument("--amp", choices=["auto", *AMP], default="auto", help="precision")
    loader_.add_argument("--images", type=int, default=8)
    loader_.add_argument("--crop", type=int, default=768)
    for sub in (block_, network_, loader_):
        sub.add_argument("--runs", type=int, default=5, help="repetitions, of which the median is taken")
        sub.add_argument("--json", action="store_true", help="one object on the last line")
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, list) and min([value] if type(value) is int else value) < 1:
            raise data.DataError(f"--{name} {value}: expected 1 or more")
    if args.what == "network" and args.batch < 2:
        raise data.DataError(f"--batch {args.batch}: expected 2 or more, as BatchNorm over one pooled image cannot train")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"machine": machine(device)}
    if args.what == "block":
        report |= block(args.runs, device, args.grow)
    elif args.what == "network":
        config = replace(dnl.PAPER, backbone=args.backbone, channels=args.channels, num_classes=args.classes)
        report |= network(config, tuple(args.size), args.batch, choose_amp(args.amp, device), args.runs, device)
    else:
        report |= loader(args.images, args.crop, args.runs)
    print(*(f"{k} {v}" for k, v in report["machine"].items()), f"memory: {report['memory']}", sep=" · ")
    print(table(report["rows"]))
    print(*(f"{name}: {value:.3f}" for name, value in report["ratios"].items()), sep="\n")
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_script(main)
