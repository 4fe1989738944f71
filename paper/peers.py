"""The context modules that the paper compares with (Tables III to V), each to be put in the place of Denoised NL.

    torchrun train.py --context paper.peers:ccnet

Every factory takes (channels, num_classes) and returns a module (B, C, H, W) -> (B, C, H, W) on the stride-16
feature, C = channels, 16 or more. None of them predicts classes: num_classes is there because a context factory is
called with it. Widths are given at C = 512 in the sources and scale with C here. H and W are free, B may be 0.

The equations are functions (`attention`, `channel_attention`, `criss_cross`); the modules hold the parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnl import at_least_fp32, no_autocast

POOL_SIZES = (1, 2, 3, 6)  # of PPM and of DRANet's tokens: 1 + 4 + 9 + 36 = 50


# ---- functions: the equations


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """out_j = sum_i softmax_i(scale * Q_j . K_i) V_i: q (B, c, N), k (B, c, M), v (B, C, M) -> (B, C, N).

    The paper's eq. 4 and 3 without gamma at scale 1. Logits and softmax are in fp32 under autocast too.
    """
    with no_autocast(q):
        a = ((at_least_fp32(q) * scale).mT @ at_least_fp32(k)).softmax(-1)  # (B, N, M)
    return v @ a.to(v.dtype).mT


def channel_attention(x: Tensor, y: Tensor) -> Tensor:
    """softmax(row maximum of E - E) Y, E = X Y^T, over Y's channels: x (B, C, N), y (B, M, N) -> (B, C, N).

    DANet's channel attention at Y = X, DRANet's CCAM with Y the encoded channels. The row maximum is not written
    out: softmax does not change when a row is shifted. E and softmax are in fp32 under autocast too.
    """
    with no_autocast(x):
        a = (-(at_least_fp32(x) @ at_least_fp32(y).mT)).softmax(-1)  # (B, C, M)
    return a.to(y.dtype) @ y


def criss_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A position attends to its column and row under one softmax: q, k (B, c, H, W), v (B, C, H, W) -> as v.

    Of the H + W logits of a position, the column's own entry is -inf, so that it counts once (CCNet). The largest
    tensors are those of the logits, B*H*W*(H + W) elements. Logits and softmax are in fp32 under autocast too.
    """
    H = q.shape[2]
    with no_autocast(q):
        q, k = at_least_fp32(q), at_least_fp32(k)
        column = torch.einsum("bchw,bciw->bhwi", q, k)  # (B, H, W, H)
        row = torch.einsum("bchw,bchj->bhwj", q, k)  # (B, H, W, W)
        own = torch.eye(H, dtype=torch.bool, device=q.device)[:, None]  # (H, 1, H)
        a = torch.cat([column.masked_fill(own, float("-inf")), row], dim=-1).softmax(-1).to(v.dtype)
    return torch.einsum("bhwi,bciw->bchw", a[..., :H], v) + torch.einsum(
        "bhwj,bchj->bchw", a[..., H:], v
    )


# ---- parts


def _width(channels: int, divisor: int) -> int:
    """channels // divisor; ValueError where nothing would be left."""
    if channels < divisor:
        raise ValueError(
            f"context module: got {channels} channels, expected {divisor} or more: widen the reduction"
        )
    return channels // divisor


def _conv_bn_relu(
    inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, bias: bool = False
) -> nn.Sequential:
    """A convolution that keeps the size, batch norm, ReLU."""
    conv = nn.Conv2d(
        inputs, outputs, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Pooled(nn.Module):
    """Adaptive average pool to size x size, 1x1 conv, BN, ReLU: (B, C, H, W) -> (B, width, size, size).

    In training, size 1 and a (synchronised) batch of one image leave batch norm one value per channel: ValueError.
    """

    def __init__(self, channels: int, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = _conv_bn_relu(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, self.size)
        try:
            return self.layers(pooled)
        except (
            ValueError
        ) as error:  # only batch norm knows whether it is synchronised with other ranks
            raise ValueError(
                f"context module: got a training batch of {len(x)} image, expected 2 or more for the "
                f"batch norm after pooling to {self.size}x{self.size}: raise --batch"
            ) from error


class Dual(nn.Module):
    """position(x) + channel(x), two branches that each map (B, C, H, W) to the same."""

    def __init__(self, *, position: nn.Module, channel: nn.Module) -> None:
        super().__init__()
        self.position = position
        self.channel = channel

    def forward(self, x: Tensor) -> Tensor:
        return self.position(x) + self.channel(x)


# ---- modules


class NonLocal(nn.Module):
    """gamma * A V + x, gamma 0 at the start; q, k (C/8) and v (C) 1x1 convolutions: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, _width(channels, 8), 1)
        self.key = nn.Conv2d(channels, _width(channels, 8), 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).flatten(2) for layer in (self.query, self.key, self.value)
        )  # (B, C/8 or C, N)
        return self.gamma * attention(q, k, v).view_as(x) + x


class CrissCross(NonLocal):
    """gamma * criss_cross + x, `recurrence` times over NonLocal's layers and gamma: (B, C, H, W) -> same."""

    def __init__(self, channels: int, *, recurrence: int) -> None:
        super().__init__(channels)
        if recurrence < 1:
            raise ValueError(f"ccnet: got recurrence {recurrence}, expected 1 or more")
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            x = self.gamma * criss_cross(self.query(x), self.key(x), self.value(x)) + x
        return x


class ChannelAttention(nn.Module):
    """gamma * channel_attention(x, x) + x, gamma 0 at the start; no layers: (B, C, H, W) -> same."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, C, N)
        return self.gamma * channel_attention(flat, flat).view_as(x) + x


class CompactPosition(nn.Module):
    """DRANet's CPAM: every position attends to 50 pooled tokens; gamma * A V + x: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(Pooled(channels, channels, size) for size in POOL_SIZES)
        self.query = nn.Conv2d(channels, _width(channels, 4), 1)
        self.key = nn.Conv1d(
            channels, _width(channels, 4), 1
        )  # of width 1 over tokens: a linear layer
        self.value = nn.Conv1d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat(
            [encoder(x).flatten(2) for encoder in self.encoders], dim=2
        )  # (B, C, 50)
        context = attention(self.query(x).flatten(2), self.key(tokens), self.value(tokens))
        return self.gamma * context.view_as(x) + x


class CompactChannel(nn.Module):
    """DRANet's CCAM: every channel attends to C/16 encoded ones; gamma * A Y + x: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = _conv_bn_relu(channels, _width(channels, 16))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)  # (B, C/16, H, W)
        return self.gamma * channel_attention(x.flatten(2), y.flatten(2)).view_as(x) + x


class ObjectContext(nn.Module):
    """OCNet's base: attention with a shared query and key, concatenated with x and fused: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 2)
        self.shared = _conv_bn_relu(channels, width, bias=True)
        self.value = nn.Conv2d(channels, width, 1)
        self.expand = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        self.fuse = nn.Sequential(
            _conv_bn_relu(2 * channels, channels, bias=True), nn.Dropout2d(0.05)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.shared(x).flatten(2), self.value(x)  # the query is the key: computed once
        context = attention(q, q, v.flatten(2), scale=q.shape[1] ** -0.5).view_as(
            v
        )  # (B, C/2, H, W)
        return self.fuse(torch.cat([self.expand(context), x], dim=1))


class PyramidPooling(nn.Module):
    """PPM: x and four pooled maps of C/4 channels at its size, fused by a 3x3: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 4)
        self.levels = nn.ModuleList(Pooled(channels, width, size) for size in POOL_SIZES)
        fused = channels + len(POOL_SIZES) * width
        self.fuse = nn.Sequential(_conv_bn_relu(fused, channels, kernel=3), nn.Dropout2d(0.1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        levels = [
            F.interpolate(level(x), size, mode="bilinear", align_corners=True)
            for level in self.levels
        ]
        return self.fuse(torch.cat([x, *levels], dim=1))


class AtrousPyramid(nn.Module):
    """ASPP: a 1x1, 3x3s of dilation 6, 12, 18 (stride 16) and the pooled image, fused: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 2)
        self.branches = nn.ModuleList(
            [
                _conv_bn_relu(channels, width),
                *(_conv_bn_relu(channels, width, 3, rate) for rate in (6, 12, 18)),
            ]
        )
        self.image = Pooled(channels, width, 1)
        self.fuse = nn.Sequential(_conv_bn_relu(5 * width, channels), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        image = self.image(x).expand(-1, -1, *x.shape[2:])
        return self.fuse(torch.cat([*(branch(x) for branch in self.branches), image], dim=1))


# ---- factories: what --context names


def nl(channels: int, num_classes: int) -> nn.Module:
    """Plain non-local attention (as DANet's position branch). 328,321 parameters at 512 channels."""
    return NonLocal(channels)


def ccnet(channels: int, num_classes: int, *, recurrence: int = 2) -> nn.Module:
    """Recurrent criss-cross attention; Table V's figure is that of recurrence 1. ValueError below 1."""
    return CrissCross(channels, recurrence=recurrence)


def danet(channels: int, num_classes: int) -> nn.Module:
    """Position plus channel attention, summed, without convolutions of their own: 2x at the start."""
    return Dual(position=NonLocal(channels), channel=ChannelAttention())


def dranet(channels: int, num_classes: int) -> nn.Module:
    """DRANet*: its two compact modules, CPAM and CCAM, summed: 2x at the start."""
    return Dual(position=CompactPosition(channels), channel=CompactChannel(channels))


def ocnet(channels: int, num_classes: int) -> nn.Module:
    """OCNet's base object context."""
    return ObjectContext(channels)


def ppm(channels: int, num_classes: int) -> nn.Module:
    """PSPNet's pyramid pooling module."""
    return PyramidPooling(channels)


def aspp(channels: int, num_classes: int) -> nn.Module:
    """DeepLabv3's atrous spatial pyramid pooling."""
    return AtrousPyramid(channels)
