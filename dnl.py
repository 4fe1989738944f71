"""Denoised Non-Local network for semantic segmentation (Song, Li, Guo, Huang), in one file.

The paper's equations are functions, the modules over them hold the parameters. Copy this file alone into any project:
it needs torch and nothing else, and does nothing on import.

    net = build(replace(PAPER, num_classes=19))             # a whole network
    block = DenoisedNonLocal(channels=256, num_classes=19)  # or the block, F (B, C, H, W) -> F' of the same shape

Symbols, channel-first, N = H*W: Q, K (B, C', N), V (B, C, N), P (B, n, N); a map A is (B, N, N), its row j the
receiving pixel; S_l is (B, k*k, N). `size` is always (H, W).

The map route (`denoised_maps`) makes A, A', A'' as Section III tells it, with F.unfold; it defines what is right and draws
pictures of chosen pixels. Networks run the value route (`denoised_attention`): LR is linear in A' and its window slides over
the keys, so it can act on the values instead, A''V = A'V~, and queries can go in chunks: exact, and no N x N map is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------- the paper's equations


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """A = softmax over the keys of Q_j . K_i, unscaled (eq. 4). q (B, C', R), k (B, C', N) -> (B, R, N), rows sum to 1.

    R = N for the whole map, or fewer columns of Q for chosen query pixels. Computed in fp32 or better.
    """
    q, k = at_least_fp32(q), at_least_fp32(k)
    with no_autocast(q):
        return torch.bmm(q.transpose(1, 2), k).softmax(-1)


def class_affinity(p: Tensor, queries: Tensor | None = None) -> Tensor:
    """P_class = sigmoid(P^T P) (Section III-D): near 1 where two pixels are of one class. p (B, n, N) -> (B, R, N).

    queries: (R,) indices of the query pixels, all N by default.
    """
    p = at_least_fp32(p)
    with no_autocast(p):
        rows = p if queries is None else p[:, :, queries]
        return torch.bmm(rows.transpose(1, 2), p).sigmoid()


def global_rectify(a: Tensor, p_class: Tensor) -> Tensor:
    """GR: A' = A * P_class, element-wise and not renormalised (Section III-E). Both (B, R, N)."""
    return a * p_class


def local_similarity(q: Tensor, k: Tensor, size: tuple[int, int], kernel: int = 3) -> Tensor:
    """S_l[d, p] = sigmoid(Q_p . K_{p+d}) for the kernel*kernel offsets d around p, K zero-padded (Section III-E).

    q, k (B, C', N) -> (B, kernel*kernel, N) in (0, 1), offsets in row-major order.
    """
    r = kernel // 2
    q, k = (at_least_fp32(x).unflatten(2, size) for x in (q, k))  # (B, C', H, W)
    near = F.pad(k, (r, r, r, r))
    return (
        torch.stack([(q * near[:, :, y, x]).sum(1) for y, x in _windows(size, kernel)], 1)
        .flatten(2)
        .sigmoid()
    )


def local_retention(a: Tensor, s: Tensor, size: tuple[int, int], kernel: int = 3) -> Tensor:
    """LR: A''[j, p] = sum_d S_l[d, p] A'[j, p+d], A' zero-padded (Section III-E). The window slides over the keys.

    a (B, R, N), s (B, kernel*kernel, N) -> (B, R, N).
    """
    near = F.unfold(a.unflatten(2, size), kernel, padding=kernel // 2)  # (B, R*k*k, N)
    near = near.unflatten(1, (a.shape[1], kernel * kernel))  # (B, R, k*k, N)
    return (near * s[:, None]).sum(2)


def spread_values(v: Tensor, s: Tensor, size: tuple[int, int], kernel: int = 3) -> Tensor:
    """V~[r] = sum_d S_l[d, r-d] V[r-d]: LR moved from the map onto the values, the adjoint of `local_retention`.

    v (B, C, N), s (B, kernel*kernel, N) -> V~ (B, C, N) with local_retention(A', s) V = A' V~.
    """
    return _Spread.apply(v, s.to(v.dtype), size, kernel)


def denoised_maps(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    size: tuple[int, int],
    kernel: int = 3,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The map route: A, A' and A'' (Fig. 4), each (B, R, N), for the R query pixels of the (R,) indices `queries`.

    All N by default, at about 20 maps of memory. p None: no GR, so A' is A. kernel 0: no LR, so A'' is A'.
    """
    a = affinity(q if queries is None else q[:, :, queries], k)
    rectified = a if p is None else global_rectify(a, class_affinity(p, queries))
    if not kernel:
        return a, rectified, rectified
    return (
        a,
        rectified,
        local_retention(rectified, local_similarity(q, k, size, kernel), size, kernel),
    )


def denoised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor | None,
    size: tuple[int, int],
    kernel: int = 3,
    chunk: int | None = None,
) -> Tensor:
    """The value route: A''V (the sum in eq. 3), (B, C, N), in memory linear in N, forward and backward.

    q, k (B, C', N), v (B, C, N), p (B, n, N) or None for no GR; kernel 0 for no LR. chunk: query pixels at a time, chosen
    from N, batch and device by default; the result does not depend on it beyond rounding. Logits, softmax and sigmoids
    are fp32 or better whatever autocast says, the product with V~ is of v's type. Differentiable once.
    """
    if kernel:
        v = spread_values(v, local_similarity(q, k, size, kernel), size, kernel)
    chunk = chunk or default_chunk(q.shape[0], q.shape[2], q.device.type)
    return _RectifiedAttention.apply(q, k, v, p, chunk)


def default_chunk(batch: int, n: int, device: str) -> int:
    """Query pixels at a time so that one (B, chunk, N) fp32 map is 4 MiB on a CPU, to stay in its cache, else 256 MiB; but
    128 or more, for matrix products worth the name: memory stays linear in N."""
    if torch.compiler.is_compiling() and not isinstance(n, int):
        return 0  # a loop over an unknown size cannot be exported: one chunk of all
    elements = 2**20 if device == "cpu" else 2**26
    return min(max(n, 1), max(128, elements // max(1, batch * n)))


def at_least_fp32(x: Tensor) -> Tensor:
    """x, widened where it is bf16 or fp16: logits of trained networks reach 1e4, where bf16 steps by 64 and fp16 overflows."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> torch.autocast | nullcontext:
    """A block in which autocast leaves the types as they are. x: a tensor of the device in question."""
    device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # a saved program that holds an autocast block cannot be loaded


def _windows(size: tuple[int, int], kernel: int) -> list[tuple[slice, slice]]:
    """For each offset d, where p + d falls in a plane padded by kernel // 2."""
    H, W = size
    return [(slice(y, y + H), slice(x, x + W)) for y in range(kernel) for x in range(kernel)]


def _frame(x: Tensor, r: int) -> Tensor:
    """Zeros (B, C, H + 2r, W + 2r) for x (B, C, H, W), channels innermost where they are in x. F.pad does not see that of a batch
    of one, and strides that differ cost ten times the sums."""
    B, C, H, W = x.shape
    if x.stride(1) == 1:
        return x.new_zeros(B, H + 2 * r, W + 2 * r, C).permute(0, 3, 1, 2)
    return x.new_zeros(B, C, H + 2 * r, W + 2 * r)


class _Spread(torch.autograd.Function):
    """V~ by k*k shifted adds into one padded plane: no unfolded copy of V, no saved product."""

    @staticmethod
    def forward(ctx, v, s, size, kernel):
        """V~ (B, C, N) of V (B, C, N) and S_l (B, k*k, N), N the pixels of size (H, W)."""
        ctx.save_for_backward(v, s)
        ctx.size, ctx.kernel = size, kernel
        (H, W), r = size, kernel // 2
        plane = v.unflatten(2, size)  # (B, C, H, W)
        out = _frame(plane, r)
        for d, (y, x) in enumerate(_windows(size, kernel)):
            out[:, :, y, x].addcmul_(s[:, d, None].unflatten(2, size), plane)
        spread = torch.empty_like(v)  # (B, C, N); to flatten `out` would put the pixels innermost
        spread.unflatten(2, size).copy_(out[:, :, r : r + H, r : r + W])
        return spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradients of V and S_l, in their shapes, from that of V~ (B, C, N)."""
        v, s = ctx.saved_tensors
        (H, W), r, plane = ctx.size, ctx.kernel // 2, v.unflatten(2, ctx.size)
        padded = _frame(plane, r)
        padded[:, :, r : r + H, r : r + W] = grad.unflatten(2, ctx.size)
        grad_v, grad_s = torch.zeros_like(plane), torch.empty_like(s)
        for d, (y, x) in enumerate(_windows(ctx.size, ctx.kernel)):
            grad_v.addcmul_(s[:, d, None].unflatten(2, ctx.size), padded[:, :, y, x])
            grad_s[:, d] = (plane * padded[:, :, y, x]).sum(1).flatten(1)
        return grad_v.flatten(2), grad_s, None, None


class _RectifiedAttention(torch.autograd.Function):
    """A'V by chunks of queries, A' = softmax(Q^T K) * sigmoid(P^T P). Saves its inputs; the backward makes each chunk again."""

    @staticmethod
    def forward(ctx, q, k, v, p, chunk):
        """A'V (B, C, N) of Q, K (B, C', N), V (B, C, N) and P (B, n, N) or None; chunk: queries at a time, 0 for all."""
        ctx.save_for_backward(q, k, v, p)
        ctx.chunk = chunk
        B, C, N = v.shape
        out = v.new_empty(B, N, C)
        q, k, p, values = _operands(q, k, v, p)
        with no_autocast(q):
            maps = _buffers(q, p, chunk)
            for rows in _chunks(N, chunk):
                a, gate = _chunk_maps(q, k, p, rows, maps)
                if gate is not None:
                    a *= gate
                out[:, rows] = torch.bmm(a.to(values.dtype), values.transpose(1, 2))
        return out.transpose(1, 2)  # (B, C, N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradients of Q, K, V and P, in their shapes and types, from that of A'V (B, C, N)."""
        inputs = ctx.saved_tensors
        q, k, p, v = _operands(*inputs)
        gq, gk, gp, gv = (None if x is None else q.new_zeros(x.shape) for x in (q, k, p, v))
        grad = grad.to(v.dtype)
        with no_autocast(q):
            maps = _buffers(q, p, ctx.chunk)
            for rows in _chunks(v.shape[2], ctx.chunk):
                a, gate = _chunk_maps(q, k, p, rows, maps)
                rectified = a if gate is None else a * gate
                gv += torch.bmm(grad[:, :, rows], rectified.to(v.dtype))
                g = torch.bmm(grad[:, :, rows].transpose(1, 2), v).to(a.dtype)  # dL/dA', (B, c, N)
                g *= rectified  # both gradients of logits are made of it
                if gate is not None:
                    gl = torch.addcmul(g, g, gate, value=-1)  # through the sigmoid: g (1 - gate)
                    gp.baddbmm_(p[:, :, rows], gl)
                    gp[:, :, rows] += torch.bmm(p, gl.transpose(1, 2))
                g.addcmul_(a, g.sum(-1, keepdim=True), value=-1)  # through the softmax
                gq[:, :, rows] = torch.bmm(k, g.transpose(1, 2))
                gk.baddbmm_(q[:, :, rows], g)
        grads = (gq, gk, gv, gp)
        return *(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs)), None


def _chunks(n: int, chunk: int) -> list[slice]:
    """The columns of Q, `chunk` at a time; all at once for 0."""
    return [slice(j, j + chunk) for j in range(0, n, chunk)] if chunk else [slice(None)]


def _operands(q, k, v, p):
    """q, k, p and v as the products take them. Attention weights of 1/N underflow in fp16, so there v is widened."""
    values = at_least_fp32(v) if v.dtype is torch.float16 else v
    return at_least_fp32(q), at_least_fp32(k), None if p is None else at_least_fp32(p), values


def _buffers(q, p, chunk):
    """Room for a chunk of A and of P_class, used by all chunks in turn: fresh pages for each cost a tenth of the time.
    None for all queries at once: an exported program may be run with gradients, which written tensors do not have."""
    B, _, N = q.shape
    return [q.new_empty(B, min(chunk, N), N) if chunk and x is not None else None for x in (q, p)]


def _chunk_maps(q, k, p, rows, maps):
    """The chunk's rows of A and of P_class (None without GR), (B, c, N), written into `maps`."""

    def product(x, y, out):
        x = x[:, :, rows].transpose(1, 2)
        return torch.bmm(x, y, out=None if out is None else out[:, : x.shape[1]])

    a = product(q, k, maps[0])
    a = torch.softmax(a, -1, out=None if maps[0] is None else a)
    return a, None if p is None else product(p, p, maps[1]).sigmoid_()


# -------------------------------------------------------------------------------------------------- the block


class DenoisedNonLocal(nn.Module):
    """F' = gamma A''V + F (eq. 3), to drop into any network: (B, channels, H, W) -> the same shape.

    Q, K and V are 1x1 convolutions of F without bias; gamma starts at 0, so a fresh block is the identity. GR's P is a
    1x1 convolution of F, or whatever (B, n, H, W) the caller hands to `forward`; with num_classes 0 it must be handed.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        key_channels: int | None = None,
        kernel: int = 3,
        gr: bool = True,
        lr: bool = True,
    ) -> None:
        super().__init__()
        key_channels = key_channels or max(1, channels // 8)
        self.gr, self.kernel = gr, kernel if lr else 0
        if self.kernel and self.kernel % 2 == 0:
            raise ValueError(f"kernel {kernel}: LR's window needs an odd size")
        self.query = nn.Conv2d(channels, key_channels, 1, bias=False)
        self.key = nn.Conv2d(channels, key_channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.coarse = nn.Conv2d(channels, num_classes, 1) if gr and num_classes else None
        self.gamma = nn.Parameter(torch.zeros(1))

    def inputs(
        self, f: Tensor, p: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Q, K, V and P (None without GR) of F, each (B, ., N): the arguments of `denoised_attention`."""
        if self.gr and p is None:
            if self.coarse is None:
                raise ValueError(
                    "GR without num_classes: hand forward the class predictions p (B, n, H, W)"
                )
            p = self.coarse(f)
        return (
            self.query(f).flatten(2),
            self.key(f).flatten(2),
            self.value(f).flatten(2),
            p.flatten(2) if self.gr else None,
        )

    def forward(self, f: Tensor, p: Tensor | None = None) -> Tensor:
        """f (B, C, H, W), p (B, n, H, W) to use in the place of the module's own prediction -> F' (B, C, H, W)."""
        q, k, v, p = self.inputs(f, p)
        size = tuple(f.shape[2:])
        return self.gamma * denoised_attention(q, k, v, p, size, self.kernel).unflatten(2, size) + f


# ------------------------------------------------------------------------------------------------- the backbone


def conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size (at stride 1), without bias, for a BatchNorm to follow."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Block(nn.Module):
    """A residual block: `convs` in turn, each with a BatchNorm, a ReLU between them, and a shortcut around them all."""

    def __init__(self, convs: list[nn.Conv2d], shortcut: nn.Module | None) -> None:
        super().__init__()
        for i, conv in enumerate(convs, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.out_channels))
        self.depth, self.downsample = len(convs), shortcut

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            y = x if i == 1 else F.relu(y, inplace=True)
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


def basic_block(
    inputs: int, width: int, stride: int = 1, dilation: int = 1, shortcut: nn.Module | None = None
) -> Block:
    """Two 3x3 convolutions (ResNet-18 and 34; the paper's Reduction)."""
    return Block(
        [conv3x3(inputs, width, stride, dilation), conv3x3(width, width, 1, dilation)], shortcut
    )


def bottleneck(
    inputs: int, width: int, stride: int = 1, dilation: int = 1, shortcut: nn.Module | None = None
) -> Block:
    """1x1, 3x3 with the stride and the dilation, 1x1 to 4 * width (ResNet-50 and 101)."""
    return Block(
        [
            nn.Conv2d(inputs, width, 1, bias=False),
            conv3x3(width, width, stride, dilation),
            nn.Conv2d(width, 4 * width, 1, bias=False),
        ],
        shortcut,
    )


LAYOUTS = {  # block, its expansion, blocks a layer, torchvision's ImageNet file
    "resnet18": (basic_block, 1, (2, 2, 2, 2), "resnet18-f37072fd"),
    "resnet34": (basic_block, 1, (3, 4, 6, 3), "resnet34-b627a593"),
    "resnet50": (bottleneck, 4, (3, 4, 6, 3), "resnet50-0676ba61"),
    "resnet101": (bottleneck, 4, (3, 4, 23, 3), "resnet101-63fe2227"),
}


class ResNet(nn.Module):
    """A ResNet dilated to stride 8: image (B, 3, H, W) -> (res2, res3, X), all about H/8 x W/8.

    Parameter names are torchvision's (deep stem: those of PyTorch-Encoding's `resnet101s`), without `fc`. Layer3 has
    dilation 2; layer4 has 4, or 4, 8, 16 with `multi_grid`. `recompute` drops each block's activations and makes them again
    in the backward.
    """

    def __init__(self, name: str, *, deep_stem: bool = False, multi_grid: bool = False) -> None:
        super().__init__()
        if name not in LAYOUTS:
            raise ValueError(f"backbone {name!r}: expected one of {', '.join(LAYOUTS)}")
        block, expansion, depths, _ = LAYOUTS[name]
        inputs = 128 if deep_stem else 64
        self.conv1 = (
            nn.Sequential(*conv_bn_relu(3, 64, 2), *conv_bn_relu(64, 64), conv3x3(64, 128))
            if deep_stem
            else (nn.Conv2d(3, 64, 7, 2, 3, bias=False))
        )
        self.bn1 = nn.BatchNorm2d(inputs)
        plan = (
            (64, 1, [1]),
            (128, 2, [1]),
            (256, 1, [2]),
            (512, 1, [4, 8, 16] if multi_grid else [4]),
        )
        for i, ((width, stride, grid), depth) in enumerate(zip(plan, depths), 1):
            outputs = width * expansion
            shortcut = (
                None
                if stride == 1 and inputs == outputs
                else nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )
            )
            blocks = [block(inputs, width, stride, grid[0], shortcut)]
            blocks += [block(outputs, width, 1, grid[b % len(grid)]) for b in range(1, depth)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            inputs = outputs
        self.channels = tuple(width * expansion for width in (128, 256, 512))
        self.recompute = False
        for m in self.modules():
            if (
                isinstance(m, nn.Conv2d) and not m.weight.is_meta
            ):  # for which torch would import its compiler, for seconds
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image)), inplace=True), 3, 2, 1)
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = _recomputed(block, x) if self.recompute and self.training else block(x)
            features.append(x)
        return features[1], features[2], features[3]


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _still_statistics(block))
    )


@contextmanager
def _still_statistics(module: nn.Module):
    """Running statistics go to copies meanwhile: the second forward of a step must not count twice."""
    kept = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    for m, name, b in kept:
        setattr(m, name, b.clone())
    try:
        yield
    finally:
        for m, name, b in kept:
            setattr(m, name, b)


# -------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Config:
    """The whole network as plain values. PAPER is what the text says, RELEASED what the authors' model is.

    context: dnl, nl (no GR, no LR), none (Table II's baseline), or the name of a factory that `build` is handed. gr, lr and
    kernel switch the parts of dnl. p_from: GR's P is a 1x1 convolution of F ("feature", raw) or the softmax of the res3 head
    ("res3"). p_supervised: P joins the outputs of training. aux_conv: the auxiliary heads are 3x3 + 1x1, not 1x1. refine:
    a 3x3 convolution follows the block.
    """

    num_classes: int = 19
    backbone: str = "resnet101"
    context: str = "dnl"
    gr: bool = True
    lr: bool = True
    kernel: int = 3
    channels: int = 512
    p_from: str = "feature"
    p_supervised: bool = False
    aux_conv: bool = False
    refine: bool = False
    global_context: bool = True
    deep_stem: bool = False
    multi_grid: bool = False
    dropout: float = 0.0


PAPER = Config()
RELEASED = replace(
    PAPER,
    p_from="res3",
    aux_conv=True,
    refine=True,
    global_context=False,
    deep_stem=True,
    multi_grid=True,
    dropout=0.05,
)
PRESETS = {"paper": PAPER, "released": RELEASED}


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear with align_corners, as everywhere in the network."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def _head(inputs: int, width: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn_relu(inputs, width), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1)
    )


class Network(nn.Module):
    """Fig. 3: backbone, Reduction, Denoised NL, segmentation head, auxiliary heads (Section III-B, III-F)."""

    def __init__(self, config: Config, context: nn.Module) -> None:
        super().__init__()
        c, n, C = config, config.num_classes, config.channels
        self.config = config
        self.backbone = ResNet(c.backbone, deep_stem=c.deep_stem, multi_grid=c.multi_grid)
        res2, res3, X = self.backbone.channels
        shortcut = conv_bn_relu(C, C, 2)
        self.reduce = conv_bn_relu(X, C)
        self.down = basic_block(C, C, 2, shortcut=shortcut)
        self.context = context
        self.refine = conv_bn_relu(C, C) if c.refine else nn.Identity()
        self.pool = nn.Conv2d(X, C, 1) if c.global_context else None
        self.head = _head(X + C + (C if c.global_context else 0), C, n, c.dropout)
        self.aux2 = _head(res2, res2 // 8, n, c.dropout) if c.aux_conv else nn.Conv2d(res2, n, 1)
        self.aux3 = _head(res3, res3 // 2, n, c.dropout) if c.aux_conv else nn.Conv2d(res3, n, 1)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """res2, res3, X at stride 8, F at stride 16, and P at F's size (None where the context takes none)."""
        res2, res3, x = self.backbone(image)
        f = self.down(self.reduce(x))
        p = None
        if isinstance(self.context, DenoisedNonLocal) and self.context.gr:
            own = self.config.p_from == "feature"
            p = self.context.coarse(f) if own else resize(self.aux3(res3), f.shape[2:]).softmax(1)
        return res2, res3, x, f, p

    def forward(self, image: Tensor, full_size: bool = True) -> Tensor | tuple[Tensor, ...]:
        """image (B, 3, H, W), normalised -> logits (B, n, H, W); in training a tuple of them and the auxiliary ones.

        Auxiliary: res2, res3, and P where the configuration supervises it (eq. 5). full_size False leaves each at its
        own size (stride 8; P 16), for a loss that resizes image by image. Any H, W.
        """
        res2, res3, x, f, p = self.features(image)
        f = self.context(f) if p is None else self.context(f, p)
        parts = [
            x,
            self.refine(resize(f, x.shape[2:])).to(x.dtype),
        ]  # under autocast gamma has widened it
        if self.pool is not None:
            parts.append(self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:]))
        outputs = [self.head(torch.cat(parts, 1))]
        if self.training:
            outputs += [self.aux2(res2), self.aux3(res3)] + (
                [p] if self.config.p_supervised else []
            )
        if full_size:
            outputs = [resize(o, image.shape[2:]) for o in outputs]
        return tuple(outputs) if self.training else outputs[0]


def build(config: Config, context: Callable[[int, int], nn.Module] | None = None) -> Network:
    """The network of a configuration, on torch's default device, its weights drawn from torch's generator.

    context: the factory (channels, num_classes) -> module that `config.context` names, where it is not dnl, nl or none.
    Raises ValueError for an unknown backbone, p_from or context, or for a supervised P that does not exist.
    """
    c = config
    dnl = c.context in ("dnl", "nl")
    gr, lr = (c.gr, c.lr) if c.context == "dnl" else (False, False)
    if min(c.num_classes, c.channels) < 1 or not 0 <= c.kernel <= 31 or not 0 <= c.dropout < 1:
        raise ValueError(
            f"{c.num_classes} classes, {c.channels} channels, kernel {c.kernel}, dropout {c.dropout}: expected 1 or "
            "more, 1 or more, 0 to 31, 0 or more and below 1"
        )
    if c.p_from not in ("feature", "res3"):
        raise ValueError(f"p_from {c.p_from!r}: expected 'feature' or 'res3'")
    if c.p_supervised and not (gr and c.p_from == "feature"):
        raise ValueError("a supervised P needs GR with P from the feature (preset paper)")
    if not dnl and c.context != "none" and context is None:
        raise ValueError(
            f"context {c.context!r}: expected dnl, nl, none, or its factory beside the configuration"
        )
    if dnl:
        module = DenoisedNonLocal(
            c.channels, c.num_classes if c.p_from == "feature" else 0, kernel=c.kernel, gr=gr, lr=lr
        )
    else:
        module = nn.Identity() if c.context == "none" else context(c.channels, c.num_classes)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"context {c.context}: its factory returned {type(module).__name__}, expected a module"
        )
    return Network(c, module)


# ---------------------------------------------------------------------------------------------------- weights


def check_fit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """ValueError, with the missing, unexpected and misshapen keys, where `state` is not one of `module`, be it on the meta device.

    `num_batches_tracked` may be missing, as in files older than it. source: what the error calls the state.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        raise ValueError(
            f"{source} does not fit: "
            + "; ".join(
                f"{name}: {', '.join(keys[:8])}" + f" and {len(keys) - 8} more" * (len(keys) > 8)
                for name, keys in lists
                if keys
            )
        )


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, or raise `check_fit`'s ValueError and load nothing."""
    check_fit(module, state, source)
    module.load_state_dict(state, strict=False)


def load_backbone(backbone: ResNet, name: str, weights: str) -> None:
    """Fill the backbone with ImageNet weights, downloaded ("imagenet": torchvision's, by torch.hub, hash checked), or from a file.

    name: resnet18 ... resnet101. The file's `fc` is left out, and of a checkpoint of train.py all but the backbone; any other
    mismatch is a ValueError that lists the keys.
    """
    if weights == "imagenet":
        if not isinstance(backbone.conv1, nn.Conv2d):
            raise ValueError(
                "weights imagenet: those files have the plain stem; give a file in the layout of resnet101s"
            )
        url = f"https://download.pytorch.org/models/{LAYOUTS[name][-1]}.pth"
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
    else:
        if not os.path.isfile(weights):  # a pipe would be waited for
            raise ValueError("no such file")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        if "model" in state:
            state = {
                k.removeprefix("backbone."): v
                for k, v in state["model"].items()
                if k.startswith("backbone.")
            }
    load_strict(
        backbone, {k: v for k, v in state.items() if not k.startswith("fc.")}, f"weights {weights}"
    )


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' parameter names to those of `build(RELEASED)`. Their `interp` repeats the shortcut of `down_sample`."""
    names = {
        "conv.": "reduce.",
        "down_sample.": "down.",
        "dnl.gamma": "context.gamma",
        "dnl.conv1.": "context.query.",
        "dnl.conv2.": "context.key.",
        "dnl.conv3.": "context.value.",
        "dnl.conv.": "refine.",
        "dnl.conv_out3.conv.": "aux3.",
        "conv_out2.conv.": "aux2.",
        "conv_out1.conv.": "head.",
    }
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if not key.startswith("interp."):
            old = next((o for o in names if key.startswith(o)), "")
            renamed[names.get(old, "") + key[len(old) :]] = value
    return renamed
