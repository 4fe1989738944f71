"""The network's part of `paper.bench`: training, inference, and the share of the matrix rate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dnl
from fold import fold_batchnorm
from paper.measure import SOURCE, in_turn, peak_memory
from recipe import losses
from runtime import AMP

TORCHVISION = ("fcn", "deeplabv3")  # networks of torchvision, beside ours if it is installed
Size = tuple[int, int]  # (H, W)
Report = dict[str, Any]
Call = Callable[[], list[Tensor]]


def torchvision_net(name: str, config: dnl.Config, batch: int) -> nn.Module | None:
    """torchvision's network of the same backbone and classes, with random weights.

    None without torchvision, for a backbone that its networks do not have, and for DeepLabV3 with a
    batch of one, on which it does not train: it has a BatchNorm of one pixel an image.
    """
    try:
        models = import_module("torchvision.models.segmentation")
    except (ImportError, RuntimeError):  # a torchvision of another torch
        return None
    build = getattr(models, f"{name}_{config.backbone}", None)
    if build is None or (name == "deeplabv3" and batch == 1):
        return None
    options = {"weights": None, "weights_backbone": None, "aux_loss": True}
    return TorchvisionNet(build(num_classes=config.num_classes, **options))


class TorchvisionNet(nn.Module):
    """A network of torchvision with the call of `dnl.Network`. Outputs always have full size."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, full_size: bool = True) -> Tensor | tuple[Tensor, ...]:
        """image (B, 3, H, W) -> logits (B, n, H, W); in training the auxiliary ones too."""
        outputs = self.net(image)
        if self.training:
            return tuple(outputs.values())
        return outputs["out"]


def network_cases(
    net: nn.Module,
    classes: int,
    size: Size,
    batch: int,
    amp: str,
    channels_last: bool,
    device: torch.device,
) -> tuple[dict[str, Call], int]:
    """One step of training and of inference, and the bytes of weights, statistics and momentum.

    Training is as in train.py: eq. 5 on stride-8 outputs (full-size ones of torchvision's), SGD.
    Inference is as in evaluate.py: full-size logits, BatchNorm folded (not in torchvision's).
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(device)
    net.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    folded = fold_batchnorm(copy.deepcopy(net))
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, fused=device.type == "cuda")
    x = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=layout)
    label = torch.randint(classes, (batch, *size), device=device, dtype=torch.uint8)
    dtype = AMP[amp]
    autocast = partial(
        torch.autocast, device.type, dtype or torch.bfloat16, enabled=dtype is not None
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
        with torch.inference_mode(), autocast():
            return [folded(x)]

    held = 2 * sum(p.nbytes for p in net.parameters())  # weights and momentum
    held += sum(b.nbytes for b in net.buffers())
    return {"training": training, "inference": inference}, held


def matrix_product(amp: str, device: torch.device) -> tuple[Call, int]:
    """A large matrix product of the type that `amp` computes in, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = AMP[amp] or torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: [a @ b], 2 * n**3


def network(
    config: dnl.Config,
    size: Size,
    batch: int,
    amp: str,
    runs: int,
    device: torch.device,
) -> Report:
    """The report (module docstring). asked: `amp` and channels_last; plain: fp32 without it."""
    variants = {"asked": (amp, True), "plain": ("off", False)}
    variants |= dict.fromkeys(TORCHVISION, (amp, True))
    calls, products, held, flops = {}, {}, {}, {}
    for name, (precision, last) in variants.items():
        torch.manual_seed(0)
        net = torchvision_net(name, config, batch) if name in TORCHVISION else dnl.build(config)
        if net is None:
            continue
        n = config.num_classes
        cases, held[name] = network_cases(net, n, size, batch, precision, last, device)
        for what, call in cases.items():
            calls[what, name] = call
        products["product", name], flops[name] = matrix_product(precision, device)
    rows = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        times = in_turn({**calls, **products}, runs, device)
        for (what, name), call in calls.items():
            seconds = times[what, name]
            row: Report = {"what": what, "variant": name, "seconds": seconds}
            row |= call_costs(call, seconds, device)
            rate = flops[name] / times["product", name]
            row["matrix_flops_per_second"] = rate
            row["share"] = row["flops_per_second"] / rate
            row["images_per_second"] = batch / seconds
            row["held"] = held[name]
            row["amp"], row["channels_last"] = variants[name]
            rows.append(row)
    ratios = {}
    for what in ("training", "inference"):
        ratios[f"{what} asked/plain"] = times[what, "asked"] / times[what, "plain"]
    memory = "peak over weights, statistics, momentum (held) and the batch, by "
    return {"memory": memory + SOURCE[device.type], "rows": rows, "ratios": ratios}


def call_costs(call: Call, seconds: float, device: torch.device) -> Report:
    """Peak and FLOPs of a call that takes these seconds.

    A multiply-add is 2 FLOPs. Recomputed ones count, since they are done.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    return {
        "peak": peak_memory(call, device)[0],
        "flops": flops,
        "flops_per_second": flops / seconds,
    }
