"""What the block, the network and the loader cost on this machine (Section III-F, Table V).

    python -m paper.bench block   [--grow] [--busy] [--runs N] [--json]
    python -m paper.bench network [--backbone resnet101] [--size 256 256] [--amp auto] ...
    python -m paper.bench loader  [--images 8] [--crop 768] [--runs N] [--json]

Everything that is compared is timed in turn in one run, so that the ratios hold on a busy machine
too. A time is the median of --runs. A GPU is used if there is one. --json prints one object as the
last line:

    machine  cpu, cores, threads, torch, device
    memory   how the peaks were taken and what is subtracted (block, network)
    rows     block: n, dtype, layout (what is innermost in memory: channels, as in the network, or
             pixels), pass (forward, forward+backward), route (value, map, nl; on a GPU sdpa),
             seconds, peak (bytes over the inputs), peak_over_outputs (over the results too)
             network: what (training, inference), variant (asked, plain; fcn and deeplabv3 of
             torchvision, if it is installed, as asked), seconds, peak (bytes over held and the
             batch), flops (of a call), flops_per_second, matrix_flops_per_second (of a large
             product), share (their quotient), images_per_second, held (bytes of weights,
             statistics, momentum), amp, channels_last
             loader: route (resize_all, crop_first, cached), seconds (an image), images_per_second
             (of one worker)
    ratios   block: "DTYPE LAYOUT PASS value/nl", "... map/value" of times
             network: "WHAT asked/plain" of times
             loader: "crop_first/resize_all", "cached/crop_first" of images per second
    file_mb  loader: megabytes of a generated PNG
    busy     block: whether another process kept a core busy
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dnl
from paper.bench_loader import loader
from paper.bench_network import Report, Size, network
from paper.measure import SOURCE, in_turn, machine, markdown, peak_memory
from paper.peers import attention
from ranks import choose_amp, find_device
from runtime import AMP, InputError, Parser, add_flags, run_script

SIZE = (48, 48)  # N = 2304: the paper's 768 x 768 at stride 16
LARGE = ((64, 128), (128, 256))  # N = 8192; N = 32768: an image of 2048 x 4096
GROW = ((24, 24), (96, 96), (192, 192))  # with SIZE: each N is four times the one before
CHANNELS = 512  # C; C' is an eighth of it
CLASSES = 19
LAYOUTS = ("channels", "pixels")  # what is innermost in memory
SPIN = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
parent = os.getppid()
while os.getppid() == parent:  # not beyond the parent's own end
    pass
"""


# ---- the block


def map_route(q: Tensor, k: Tensor, v: Tensor, p: Tensor, size: Size) -> Tensor:
    """The sum in eq. 3 by A'' as a whole map, (B, C, N)."""
    a = dnl.denoised_maps(q, k, p, size)[2]
    return torch.bmm(v, a.to(v.dtype).mT)


def plain_route(q: Tensor, k: Tensor, v: Tensor, p: Tensor, size: Size) -> Tensor:
    """Plain attention, (B, C, N): no GR, so p is not used, and no LR."""
    return attention(q, k, v)


def fused_route(q: Tensor, k: Tensor, v: Tensor, p: Tensor, size: Size) -> Tensor:
    """As `plain_route` by PyTorch's fused kernel, with the change of layout that it needs."""
    q, k, v = q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous()
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)
    return out[:, 0].mT


ROUTES: dict[str, Callable[..., Tensor]] = {
    "value": dnl.denoised_attention,
    "map": map_route,
    "nl": plain_route,
    "sdpa": fused_route,
}


def draw_inputs(
    n: int,
    channels: int,
    classes: int,
    device: torch.device,
    dtype: torch.dtype,
    layout: str = "channels",
) -> tuple[list[Tensor], Tensor]:
    """Random [Q, K, V, P] of one image with n pixels, and a gradient of the sum in eq. 3.

    layout: one of LAYOUTS.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for width in (channels // 8, channels // 8, channels, classes, channels):
        x = torch.randn(1, n, width, generator=generator)
        x = x.to(device, dtype).mT
        if layout == "pixels":
            x = x.contiguous()
        drawn.append(x)
    q, k, v, p, grad = drawn
    inputs = [q / 4, k / 4, v, p]  # logits of deviation sqrt(C'/64) / 2
    for x in inputs:
        x.requires_grad_()
    return inputs, grad


def block_rows(
    size: Size,
    names: Sequence[str],
    runs: int,
    device: torch.device,
    dtype: torch.dtype,
    channels: int = CHANNELS,
    classes: int = CLASSES,
    layout: str = "channels",
) -> list[Report]:
    """Rows (module docstring) of the named ROUTES on random Q, K, V, P at batch 1."""
    n = size[0] * size[1]
    inputs, grad = draw_inputs(n, channels, classes, device, dtype, layout)

    def forward(name: str) -> list[Tensor]:
        with torch.no_grad():
            return [ROUTES[name](*inputs, size)]

    def forward_backward(name: str) -> list[Tensor]:
        out = ROUTES[name](*inputs, size)
        grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        return [out.detach(), *(g for g in grads if g is not None)]

    rows = []
    for what, call in (("forward", forward), ("forward+backward", forward_backward)):
        cases = {name: partial(call, name) for name in names}
        times = in_turn(cases, runs, device)
        for name, run in cases.items():
            peak, results = peak_memory(run, device)
            row = {
                "n": n,
                "dtype": str(dtype).removeprefix("torch."),
                "layout": layout,
                "pass": what,
                "route": name,
                "seconds": times[name],
                "peak": peak,
                "peak_over_outputs": peak - results,
            }
            rows.append(row)
    return rows


def block(runs: int, device: torch.device, grow: bool = False) -> Report:
    """The report (module docstring): all routes at N = 2304 in both layouts, the value route at
    larger N too.

    In fp32; on a GPU in bf16 as well.
    """
    dtypes = [torch.float32]
    names = ["value", "map", "nl"]
    large_runs = 0  # on a CPU one call takes long enough
    if device.type == "cuda":
        dtypes.append(torch.bfloat16)
        names.append("sdpa")
        large_runs = runs
    rows = []
    for dtype in dtypes:
        for layout in LAYOUTS:
            rows += block_rows(SIZE, names, runs, device, dtype, layout=layout)
        for size in GROW if grow else LARGE:
            rows += block_rows(size, ["value"], large_runs, device, dtype)
    return {
        "memory": f"peak over Q, K, V, P and the incoming gradient, by {SOURCE[device.type]}",
        "rows": rows,
        "ratios": block_ratios(rows),
    }


def block_ratios(rows: Sequence[Report]) -> dict[str, float]:
    """Times of value over nl and of map over value, for each case of the first N."""
    times = {}
    for row in rows:
        if row["n"] == rows[0]["n"]:
            case = f"{row['dtype']} {row['layout']} {row['pass']}"
            times[case, row["route"]] = row["seconds"]
    ratios = {}
    for above, below in (("value", "nl"), ("map", "value")):
        for (case, route), seconds in times.items():
            if route == above:
                ratios[f"{case} {above}/{below}"] = seconds / times[case, below]
    return ratios


@contextmanager
def spinning() -> Iterator[subprocess.Popen]:
    """Keep one core busy during the block, as reading processes do beside a training."""
    with subprocess.Popen([sys.executable, "-c", SPIN]) as child:
        try:
            yield child
        finally:
            child.kill()


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


def bench_table(rows: Sequence[Report]) -> str:
    """The rows for people: a column for each key, figures in the units that its head names."""
    head, columns = [], []
    for key in rows[0]:
        values = [row[key] for row in rows]
        title = key
        if key in UNITS:
            title, factor = UNITS[key]
            values = [f"{v * factor:.2f}" for v in values]
        head.append(title)
        columns.append(values)
    return markdown(head, list(zip(*columns)))


def parse_bench(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. InputError for what cannot be measured."""
    parser = Parser(
        prog="python -m paper.bench", description="Time, memory and throughput on this machine"
    )
    which = parser.add_subparsers(dest="what", required=True)
    p = which.add_parser("block")
    p.add_argument("--grow", action="store_true", help="N = 576 ... 36864, not 8192 and 32768")
    p.add_argument("--busy", action="store_true", help="while another process spins on one core")
    p = which.add_parser("network")
    p.add_argument("--backbone", choices=list(dnl.LAYOUTS), default="resnet101")
    p.add_argument("--channels", type=int, default=CHANNELS, help="of F")
    p.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"))
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--classes", type=int, default=CLASSES)
    p.add_argument("--amp", choices=["auto", *AMP], default="auto", help="precision")
    p = which.add_parser("loader")
    p.add_argument("--images", type=int, default=8)
    p.add_argument("--crop", type=int, default=768)
    for p in which.choices.values():
        add_flags(p, "device")
        p.add_argument("--runs", type=int, default=5, help="repetitions; a time is their median")
        p.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, list) and np.min(value) < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its table."""
    args = parse_bench(argv)
    device = find_device(args.device)
    report: dict[str, Any] = {"machine": machine(device)}
    if args.what == "block":
        with spinning() if args.busy else nullcontext():
            report |= block(args.runs, device, args.grow) | {"busy": args.busy}
    elif args.what == "network":
        config = replace(
            dnl.PAPER, backbone=args.backbone, channels=args.channels, num_classes=args.classes
        )
        amp = choose_amp(args.amp, device)
        report |= network(config, tuple(args.size), args.batch, amp, args.runs, device)
    else:
        report |= loader(args.images, args.crop, args.runs)
    print(" · ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(bench_table(report["rows"]))
    for name, value in report["ratios"].items():
        print(f"{name}: {value:.3f}")
    for key in ("memory", "file_mb"):
        if key in report:
            print(f"{key}: {report[key]}")
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_script(main)
