"""The context modules that the paper compares with (Tables III to V); each replaces Denoised NL.

    torchrun train.py --context paper.peers:ccnet

Every factory takes (channels, num_classes) and returns a module (B, C, H, W) -> (B, C, H, W) on the
stride-16 feature, C = channels, 16 or more. None of them predicts classes: they take num_classes
because a context factory is called with it. The sources give widths at C = 512; here they scale
with C. H and W are free, B may be 0.

The equations are functions (`attention`, `channel_attention`, `criss_cross`); the modules hold the
parameters. A name is used again where its tensor is not needed any more, so that it is freed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnl import at_least_fp32, no_autocast, resize

POOL_SIZES = (1, 2, 3, 6)  # of PPM and of DRANet's tokens: 1 + 4 + 9 + 36 = 50


# ---- functions: the equations


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """sum_i softmax_i(scale * Q_j . K_i) V_i: q (B, c, N), k (B, c, M), v (B, C, M) -> (B, C, N).

    The paper's eq. 4 and 3 without gamma at scale 1. Logits and softmax are in fp32 under autocast
    too.
    """
    with no_autocast(q):
        a = (at_least_fp32(q) * scale).mT @ at_least_fp32(k)  # (B, N, M)
        a = a.softmax(-1)
    return v @ a.to(v.dtype).mT


def channel_attention(x: Tensor, y: Tensor) -> Tensor:
    """softmax(row maximum of E - E) Y with E = X Y^T: x (B, C, N), y (B, M, N) -> (B, C, N).

    The softmax is over Y's channels. DANet's channel attention at Y = X, DRANet's CCAM with Y the
    encoded channels. The row maximum is not computed: softmax does not change when a row is
    shifted. E and softmax are in fp32 under autocast too.
    """
    with no_autocast(x):
        a = -(at_least_fp32(x) @ at_least_fp32(y).mT)  # (B, C, M)
        a = a.softmax(-1)
    return a.to(y.dtype) @ y


def criss_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each position to its column and row: q, k (B, c, H, W), v (B, C, H, W) -> as v.

    One softmax is over the H + W logits of a position. The position itself is in both: its entry in
    the column is -inf, so that it counts once (CCNet). The largest tensors are the logits,
    B*H*W*(H + W) elements. Logits and softmax are in fp32 under autocast too.
    """
    H = q.shape[2]
    with no_autocast(q):
        q, k = at_least_fp32(q), at_least_fp32(k)
        column = torch.einsum("bchw,bciw->bhwi", q, k)  # (B, H, W, H)
        row = torch.einsum("bchw,bchj->bhwj", q, k)  # (B, H, W, W)
        own = torch.eye(H, dtype=torch.bool, device=q.device)
        column = column.masked_fill(own[:, None], -math.inf)
        a = torch.cat([column, row], -1)
        a = a.softmax(-1).to(v.dtype)
    from_column = torch.einsum("bhwi,bciw->bchw", a[..., :H], v)
    from_row = torch.einsum("bhwj,bchj->bchw", a[..., H:], v)
    return from_column + from_row


# ---- parts


def _width(channels: int, divisor: int) -> int:
    """channels // divisor. ValueError if that is 0."""
    if channels < divisor:
        raise ValueError(
            f"context module: got {channels} channels, expected {divisor} or more: "
            "widen the reduction"
        )
    return channels // divisor


def _conv_bn_relu(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    dilation: int = 1,
    bias: bool = False,
) -> nn.Sequential:
    """A convolution that keeps the size, batch norm, ReLU."""
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(
        inputs,
        outputs,
        kernel,
        padding=padding,
        dilation=dilation,
        bias=bias,
    )
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(conv, norm, nn.ReLU())


class Pooled(nn.Module):
    """Average pool to size x size, 1x1 conv, BN, ReLU: (B, C, H, W) -> (B, width, size, size).

    ValueError in training if batch norm gets one value a channel: size 1 and a batch of one image
    over all synchronised ranks.
    """

    def __init__(self, channels: int, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = _conv_bn_relu(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, self.size)
        try:
            return self.layers(pooled)
        except ValueError as error:  # only batch norm knows if it is synchronised over ranks
            raise ValueError(
                f"context module: got a training batch of {len(x)} image, expected 2 or more for "
                f"the batch norm after pooling to {self.size}x{self.size}: raise --batch"
            ) from error


class Dual(nn.Module):
    """position(x) + channel(x), two branches that each map (B, C, H, W) to the same."""

    def __init__(self, position: nn.Module, channel: nn.Module) -> None:
        super().__init__()
        self.position = position
        self.channel = channel

    def forward(self, x: Tensor) -> Tensor:
        return self.position(x) + self.channel(x)


# ---- modules


class NonLocal(nn.Module):
    """gamma * A V + x, gamma 0 at the start: (B, C, H, W) -> same.

    Q, K (C/8 channels) and V (C) are 1x1 convolutions of x.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 8)
        self.query = nn.Conv2d(channels, width, 1)
        self.key = nn.Conv2d(channels, width, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).flatten(2)  # (B, C/8, N)
        k = self.key(x).flatten(2)
        v = self.value(x).flatten(2)  # (B, C, N)
        out = attention(q, k, v).view_as(x)
        out = self.gamma * out
        return out + x


class CrissCross(NonLocal):
    """gamma * criss_cross + x, `recurrence` times: (B, C, H, W) -> same.

    Each time with the same layers and gamma, NonLocal's.
    """

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
    """gamma * channel_attention(x, x) + x, gamma 0 at the start: (B, C, H, W) -> same."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, C, N)
        out = channel_attention(flat, flat).view_as(x)
        out = self.gamma * out
        return out + x


class CompactPosition(nn.Module):
    """DRANet's CPAM: gamma * A V + x, (B, C, H, W) -> same.

    Every position attends to 50 pooled tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 4)
        self.encoders = nn.ModuleList()
        for size in POOL_SIZES:
            self.encoders.append(Pooled(channels, channels, size))
        self.query = nn.Conv2d(channels, width, 1)
        self.key = nn.Conv1d(channels, width, 1)  # of kernel 1 over tokens: a linear layer
        self.value = nn.Conv1d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat(
            [encoder(x).flatten(2) for encoder in self.encoders],
            dim=2,
        )  # (B, C, 50)
        out = attention(
            self.query(x).flatten(2),
            self.key(tokens),
            self.value(tokens),
        )
        out = self.gamma * out.view_as(x)
        return out + x


class CompactChannel(nn.Module):
    """DRANet's CCAM: gamma * A Y + x, (B, C, H, W) -> same.

    Every channel attends to C/16 encoded ones.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = _conv_bn_relu(channels, _width(channels, 16))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)  # (B, C/16, H, W)
        out = channel_attention(x.flatten(2), y.flatten(2))
        out = self.gamma * out.view_as(x)
        return out + x


class ObjectContext(nn.Module):
    """OCNet's base: attention whose query is its key, fused with x: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 2)
        self.shared = _conv_bn_relu(channels, width, bias=True)
        self.value = nn.Conv2d(channels, width, 1)
        self.expand = nn.Conv2d(width, channels, 1)
        for parameter in self.expand.parameters():
            nn.init.zeros_(parameter)
        fuse = _conv_bn_relu(2 * channels, channels, bias=True)
        self.fuse = nn.Sequential(fuse, nn.Dropout2d(0.05))

    def forward(self, x: Tensor) -> Tensor:
        q = self.shared(x).flatten(2)  # also the key
        v = self.value(x)  # (B, C/2, H, W)
        scale = q.shape[1] ** -0.5
        out = attention(q, q, v.flatten(2), scale)
        out = self.expand(out.view_as(v))
        out = torch.cat([out, x], 1)
        return self.fuse(out)


class PyramidPooling(nn.Module):
    """PPM: x and four pooled maps of C/4 channels, fused by a 3x3: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 4)
        self.levels = nn.ModuleList()
        for size in POOL_SIZES:
            self.levels.append(Pooled(channels, width, size))
        joined = channels + len(POOL_SIZES) * width
        fuse = _conv_bn_relu(joined, channels, kernel=3)
        self.fuse = nn.Sequential(fuse, nn.Dropout2d(0.1))

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        parts = [x]
        for level in self.levels:
            parts.append(resize(level(x), size))
        return self.fuse(torch.cat(parts, 1))


class AtrousPyramid(nn.Module):
    """ASPP: a 1x1, 3x3s of dilation 6, 12, 18 (stride 16) and the pooled image, fused.

    (B, C, H, W) -> same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _width(channels, 2)
        self.branches = nn.ModuleList([_conv_bn_relu(channels, width)])
        for rate in (6, 12, 18):
            branch = _conv_bn_relu(channels, width, kernel=3, dilation=rate)
            self.branches.append(branch)
        self.image = Pooled(channels, width, 1)
        fuse = _conv_bn_relu(5 * width, channels)
        self.fuse = nn.Sequential(fuse, nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        branches = (branch(x) for branch in self.branches)
        image = self.image(x)
        image = image.expand(-1, -1, *x.shape[2:])
        out = torch.cat([*branches, image], dim=1)
        return self.fuse(out)


# ---- factories: what --context names


def nl(channels: int, num_classes: int) -> nn.Module:
    """Plain non-local attention, DANet's position branch. 328,321 parameters at 512 channels."""
    return NonLocal(channels)


def ccnet(channels: int, num_classes: int, *, recurrence: int = 2) -> nn.Module:
    """Recurrent criss-cross attention; Table V's figure is for recurrence 1."""
    return CrissCross(channels, recurrence=recurrence)


def danet(channels: int, num_classes: int) -> nn.Module:
    """Position plus channel attention, without convolutions around them: 2x at the start."""
    return Dual(NonLocal(channels), ChannelAttention())


def dranet(channels: int, num_classes: int) -> nn.Module:
    """DRANet*: the sum of its compact modules, CPAM and CCAM: 2x at the start."""
    return Dual(CompactPosition(channels), CompactChannel(channels))


def ocnet(channels: int, num_classes: int) -> nn.Module:
    """OCNet's base object context."""
    return ObjectContext(channels)


def ppm(channels: int, num_classes: int) -> nn.Module:
    """PSPNet's pyramid pooling module."""
    return PyramidPooling(channels)


def aspp(channels: int, num_classes: int) -> nn.Module:
    """DeepLabv3's atrous spatial pyramid pooling."""
    return AtrousPyramid(channels)
