"""Table V: FLOPs, parameters, memory and time of the context modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dnl import DenoisedNonLocal, denoised_maps
from paper import peers
from paper.measure import device_name, in_turn, markdown, peak_memory

# of the block's input for a 768x768 image, at stride 16
CHANNELS = 512
CLASSES = 19
SIDE = 48


class MapRoute(DenoisedNonLocal):
    """Denoised NL as Section III tells it: A, A' and A'' as whole N x N maps. F' is the same."""

    def forward(self, f: Tensor, p: Tensor | None = None) -> Tensor:
        q, k, v, p = self.inputs(f, p)
        size = (f.shape[2], f.shape[3])
        a = denoised_maps(q, k, p, size, self.kernel)[2]  # A'', (B, N, N); A and A' are freed
        return self.gamma * torch.bmm(v, a.mT).view_as(f) + f


class Block(NamedTuple):
    """A row of Table V: how it is made from (channels, num_classes), and the paper's figures.

    given: P is an input of the block, and the convolution that predicts it is not counted.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    given: bool = False
    paper_gflops: float | None = None
    paper_memory: int | None = None  # M


BLOCKS = (
    Block("NL", peers.nl, False, 7.63, 407),
    Block("CCNet, R = 1", partial(peers.ccnet, recurrence=1), False, 1.77, 52),
    Block("CCNet, R = 2", peers.ccnet),
    Block("DANet", peers.danet, False, 10.04, 570),
    Block("DRANet*", peers.dranet, False, 0.76, 30),
    Block("Denoised NL, map route, P given", MapRoute, True, 7.83, 428),
    Block("Denoised NL, value route, P given", DenoisedNonLocal, True, 7.83, 428),
    Block("Denoised NL, value route, own P", DenoisedNonLocal, False, 7.83, 428),
    Block("OCNet", peers.ocnet),
    Block("PPM", peers.ppm),
    Block("ASPP", peers.aspp),
)


def make_block(block: Block, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    """The block in eval mode; its inputs F (1, 512, 48, 48) and, if given, P (1, 19, 48, 48)."""
    own_classes = CLASSES
    widths = [CHANNELS]
    if block.given:
        own_classes = 0
        widths.append(CLASSES)
    with device:
        module = block.make(CHANNELS, own_classes).eval()
        inputs = [torch.randn(1, width, SIDE, SIDE) for width in widths]
    return module, inputs


@torch.no_grad()
def count_costs(block: Block) -> tuple[float, int]:
    """GFLOPs of a forward and the number of parameters, from shapes alone.

    A multiply-add is 2 FLOPs; convolutions and matrix products count.
    """
    module, inputs = make_block(block, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    parameters = sum(p.numel() for p in module.parameters())
    return counter.get_total_flops() / 1e9, parameters


@torch.no_grad()
def complexity(device: torch.device) -> dict[str, Any]:
    """Table V: {"mode": how it is measured, "rows": [{"method", "gflops", "parameters", "memory"
    (MiB), "time" (ms), "paper_gflops", "paper_memory"}]}.
    """
    where = device_name(device)
    if device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"

    def forward(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        return [module(*inputs)]

    runs = {b.name: partial(forward, *make_block(b, device)) for b in BLOCKS}
    # before the memory, because libraries allocate their workspaces in the first calls
    times = in_turn(runs, 10, device)
    rows = []
    for block in BLOCKS:
        gflops, parameters = count_costs(block)
        peak, _ = peak_memory(runs[block.name], device)
        row = {
            "method": block.name,
            "gflops": gflops,
            "parameters": parameters,
            "memory": peak / 2**20,
            "time": 1000 * times[block.name],
            "paper_gflops": block.paper_gflops,
            "paper_memory": block.paper_memory,
        }
        rows.append(row)
    mode = (
        f"The block alone on one input {CHANNELS}x{SIDE}x{SIDE} (a 768x768 image at stride 16), "
        f"{CLASSES} classes, forward in eval mode without gradient, fp32, {where}. GFLOPs: 2 a "
        "multiply-add, convolutions and matrix products. MiB: peak of allocations over the input "
        "and the parameters. ms: median of 10, in turn. P given: without the 1x1 convolution that "
        "predicts P. The paper states neither mode nor unit of its memory (M)."
    )
    return {"mode": mode, "rows": rows}


def complexity_table(result: dict[str, Any]) -> str:
    """What `complexity` returns, as Markdown."""
    header = ("Method", "GFLOPs", "paper", "Parameters", "MiB", "paper, M", "ms")
    rows = []
    for row in result["rows"]:
        cells = [
            row["method"],
            f"{row['gflops']:.2f}",
            row["paper_gflops"] or "",
            f"{row['parameters']:,}",
            f"{row['memory']:.1f}",
            row["paper_memory"] or "",
            f"{row['time']:.1f}",
        ]
        rows.append(cells)
    return f"{markdown(header, rows)}\n\n{result['mode']}"
