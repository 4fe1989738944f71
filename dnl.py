"""Denoised Non-Local network for semantic segmentation (Song, Li, Guo, Huang), in one file.

The paper's equations are functions; the modules hold the parameters and call them. The file needs
torch alone and only defines names: copy it into any project.

    net = build(replace(PAPER, num_classes=19))             # a whole network
    block = DenoisedNonLocal(channels=256, num_classes=19)  # the block: (B, C, H, W) -> same shape

Symbols, channel-first, with N = H*W: Q, K (B, C', N), V (B, C, N), P (B, n, N), S_l (B, k*k, N).
A map A is (B, N, N); row j holds the weights of receiving pixel j.

The map route (`denoised_maps`) makes A, A' and A'' as Section III tells it, and defines what is
right. Networks run the value route (`denoised_attention`): LR is linear in A' and its window slides
over the keys, so it acts on the values instead, A''V = A'V~, and queries go in chunks, exactly.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Size = tuple[int, int]  # (H, W)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # Q, K, V, P


# --------------------------------------------------------------------------- the paper's equations
def affinity(q: Tensor, k: Tensor) -> Tensor:
    """A = softmax over the keys i of Q_j . K_i, unscaled (eq. 4): rows sum to 1, fp32 or better.
    q (B, C', R), k (B, C', N) -> (B, R, N). R is N, or fewer if q holds chosen query pixels."""
    q, k = at_least_fp32(q), at_least_fp32(k)
    with no_autocast(q):
        return (q.mT @ k).softmax(-1)


def class_affinity(p: Tensor, queries: Tensor | None = None) -> Tensor:
    """P_class = sigmoid(P^T P): near 1 where two pixels are of one class (Section III-D).
    p (B, n, N) -> (B, R, N), fp32 or better. queries: (R,) indices of pixels, all N by default."""
    p = at_least_fp32(p)
    rows = p if queries is None else p[:, :, queries]
    with no_autocast(p):
        return (rows.mT @ p).sigmoid()


def global_rectify(a: Tensor, p_class: Tensor) -> Tensor:
    """GR: A' = A * P_class, element-wise and not renormalised (Section III-E). Both (B, R, N)."""
    return a * p_class


def local_similarity(q: Tensor, k: Tensor, size: Size, kernel: int = 3) -> Tensor:
    """S_l[d, p] = sigmoid(Q_p . K_{p+d}), K zero-padded, for the offsets d of the window by rows.
    q, k (B, C', N) -> (B, kernel*kernel, N), fp32 or better (Section III-E)."""
    return _dots(at_least_fp32(q), at_least_fp32(k), size, kernel).sigmoid()


def local_retention(a: Tensor, s: Tensor, size: Size, kernel: int = 3) -> Tensor:
    """LR: A''[j, p] = sum_d S_l[d, p] A'[j, p+d], the window over the keys, A' zero-padded.
    a (B, R, N), s (B, kernel*kernel, N) -> (B, R, N) (Section III-E)."""
    near = F.unfold(a.unflatten(2, size), kernel, padding=kernel // 2)  # (B, R*k*k, N)
    near = near.unflatten(1, (a.shape[1], kernel * kernel))  # (B, R, k*k, N)
    return (near * s[:, None]).sum(2)


def spread_values(v: Tensor, s: Tensor, size: Size, kernel: int = 3) -> Tensor:
    """V~[r] = sum_d S_l[d, r-d] V[r-d], the adjoint of LR: local_retention(A', s) V = A' V~.
    v (B, C, N), s (B, kernel*kernel, N) -> (B, C, N)."""
    spread = torch.zeros_like(v).unflatten(2, size)
    v, s = _padded(v, size, kernel), _padded(s.to(v.dtype), size, kernel)
    add = torch.addcmul if is_traced() else Tensor.addcmul_  # vmap cannot batch addcmul_
    for d, near in enumerate(reversed(_windows(size, kernel))):  # the window of -d
        spread = add(spread, v[near], s[:, d, None][near])
    return spread.flatten(2)


def denoised_maps(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    size: Size,
    kernel: int = 3,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The map route: A, A' and A'' (Fig. 4), each (B, R, N), for the query pixels `queries` (R,),
    all N by default, in the memory of 20 maps. p None: no GR, A' = A. kernel 0: no LR, A'' = A'."""
    a = rectified = affinity(q if queries is None else q[:, :, queries], k)
    if p is not None:
        rectified = global_rectify(a, class_affinity(p, queries))
    if not kernel:
        return a, rectified, rectified
    s = local_similarity(q, k, size, kernel)
    return a, rectified, local_retention(rectified, s, size, kernel)


def denoised_attention(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, size: Size, kernel: int = 3, chunk: int = 0
) -> Tensor:
    """The value route: A''V (the sum in eq. 3), (B, C, N), memory linear in N, differentiable once.
    q, k (B, C', N), v (B, C, N), p (B, n, N) or None for no GR; kernel 0 for no LR. chunk: query
    pixels at a time; 0: as memory allows, all if `is_traced()`. It changes rounding only.
    All is in fp32 or better, also under autocast, but the product with a bf16 v."""
    q, k = at_least_fp32(q), at_least_fp32(k)
    if p is not None:
        p = at_least_fp32(p)
    if kernel and is_traced():
        v = spread_values(v, local_similarity(q, k, size, kernel), size, kernel)
    elif kernel:
        v = _SpreadValues.apply(q, k, v, size, kernel)
    values = at_least_fp32(v) if v.dtype == torch.float16 else v  # weights of 1/N underflow in fp16
    if is_traced():
        a = denoised_maps(q, k, p, size, kernel=0)[1]  # A'
        with no_autocast(q):
            return (a.to(values.dtype) @ values.mT).mT.to(v.dtype)
    if not chunk:
        # About 4 MiB of a map stay in a CPU's cache; 128 pixels or more keep products efficient.
        elements = 2**20 if q.device.type == "cpu" else 2**26
        B, _, N = q.shape
        chunk = max(128, -(-N // max(1, round(B * N * N / elements))))  # chunks of equal size
    return _RectifiedAttention.apply(q, k, values, p, chunk).to(v.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """x, in fp32 if it is bf16 or fp16: trained logits reach 1e4, where bf16 steps by 64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_traced() -> bool:
    """Whether torch records or transforms operations: compile, export, ONNX, jit.trace, torch.func.
    Each refuses, or fixes to one size, some autograd.Function, `out=` or loop over chunks."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recorded or torch._C._are_functorch_transforms_active()  # torch has no public name


def no_autocast(x: Tensor) -> torch.autocast | nullcontext:
    """A context in which autocast leaves types as they are. x: any tensor of the device."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # autocast knows no meta device
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()  # an exported program that holds an autocast block cannot be loaded


def _windows(size, kernel):
    """For each offset d: the index of the pixels p + d in a plane padded by kernel // 2."""
    H, W = size
    return [(..., slice(y, y + H), slice(x, x + W)) for y, x in product(range(kernel), repeat=2)]


def _padded(x, size, kernel):
    """x (B, C, N) as planes, kernel // 2 zeros on each side: (B, C, H + kernel - 1, ...)."""
    x, (H, W), r = x.unflatten(2, size), size, kernel // 2
    if is_traced() or x.stride(1) != 1:
        return F.pad(x, (r, r, r, r))
    # In a batch of one F.pad puts pixels innermost, even if channels were: 10x slower to read.
    plane = x.new_zeros(x.shape[0], H + 2 * r, W + 2 * r, x.shape[1]).permute(0, 3, 1, 2)
    plane[:, :, r : r + H, r : r + W] = x
    return plane


def _dots(x, y, size, kernel):
    """The products x_p . y_{p+d} of x, y (B, C, N) for each offset d, (B, k*k, N)."""
    x, y = x.unflatten(2, size), _padded(y, size, kernel)
    return torch.stack([(x * y[near]).sum(1) for near in _windows(size, kernel)], 1).flatten(2)


def _gather(s, y, size, kernel):
    """The sum over d of s_d[p] y[p+d], (B, C, N), of s (B, k*k, N) and y (B, C, N)."""
    total, y = torch.zeros_like(y).unflatten(2, size), _padded(y, size, kernel)
    for near, weight in zip(_windows(size, kernel), s.unflatten(2, size).unbind(1)):
        total.addcmul_(weight[:, None], y[near])
    return total.flatten(2)


class _SpreadValues(torch.autograd.Function):
    """V~ of Q, K and V by k*k shifted adds: no unfolded copy of V, no saved product."""

    @staticmethod
    def forward(ctx, q, k, v, size, kernel):
        """Q, K (B, C', N), V (B, C, N) -> V~ (B, C, N)."""
        s = local_similarity(q, k, size, kernel)
        ctx.save_for_backward(q, k, v, s)
        ctx.window = size, kernel
        return spread_values(v, s, size, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradient of V~ (B, C, N) -> the gradients of Q, K and V, in their shapes."""
        q, k, v, s = ctx.saved_tensors
        gs = _dots(v, grad, *ctx.window).to(s.dtype) * s * (1 - s)  # of the sigmoid's input
        gv = _gather(s.to(v.dtype), grad, *ctx.window)
        return _gather(gs, k, *ctx.window), spread_values(q, gs, *ctx.window), gv, None, None


class _RectifiedAttention(torch.autograd.Function):
    """A'V, where A' = softmax(Q^T K) * sigmoid(P^T P), by chunks of query pixels.
    Only the inputs are saved: the backward makes each chunk of A and P_class again."""

    @staticmethod
    def forward(ctx, q, k, v, p, chunk):
        """Q, K (B, C', N), V (B, C, N), P (B, n, N) or None -> A'V (B, C, N)."""
        ctx.save_for_backward(q, k, v, p)
        ctx.chunk = chunk
        out = v.new_empty(v.mT.shape)
        with no_autocast(q):
            for rows, a, p_class in _chunks(q, k, p, chunk):
                if p_class is not None:
                    a *= p_class
                torch.bmm(a.to(v.dtype), v.mT, out=out[:, rows])
        return out.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradient of A'V (B, C, N) -> the gradients of Q, K, V and P, in their shapes."""
        q, k, v, p = ctx.saved_tensors
        gq, gk, gv = (q.new_zeros(x.shape) for x in (q, k, v))
        gp = None if p is None else q.new_zeros(p.shape)
        with no_autocast(q):
            for rows, a, p_class in _chunks(q, k, p, ctx.chunk):
                rectified = a if p_class is None else a * p_class
                out = grad[:, :, rows]
                gv += out @ rectified.to(v.dtype)
                g = (out.mT @ v).to(a.dtype)  # the gradient of A', (B, c, N)
                g *= rectified  # a factor of both gradients of logits
                if p_class is not None:
                    gl = torch.addcmul(g, g, p_class, value=-1)  # sigmoid: g (1 - P_class)
                    gp.baddbmm_(p[:, :, rows], gl)
                    gp[:, :, rows] += p @ gl.mT
                g.addcmul_(a, g.sum(-1, keepdim=True), value=-1)  # softmax
                gq[:, :, rows] = k @ g.mT
                gk.baddbmm_(q[:, :, rows], g)
        return gq, gk, gv.to(v.dtype), gp, None


def _chunks(q, k, p, chunk):
    """For each chunk of c query pixels: their slice, and their rows of A and of P_class (None
    without GR), (B, c, N). All chunks share memory: fresh pages take 10 % of the time."""
    B, _, N = q.shape
    buffers = [q.new_empty(B, min(chunk, N), N) for x in (q, p) if x is not None]
    for start in range(0, N, chunk):
        rows = slice(start, start + chunk)
        a = torch.bmm(q[:, :, rows].mT, k, out=buffers[0][:, : N - start])
        torch.softmax(a, -1, out=a)
        p_class = None
        if p is not None:
            p_class = torch.bmm(p[:, :, rows].mT, p, out=buffers[1][:, : N - start]).sigmoid_()
        yield rows, a, p_class


class DenoisedNonLocal(nn.Module):
    """F' = gamma A''V + F (eq. 3), a block for any network: (B, channels, H, W) -> the same shape.
    Q, K and V are 1x1 convolutions of F without bias. gamma starts at 0, so a fresh block is the
    identity. gr, lr: whether GR and LR are used. GR's P is a 1x1 convolution of F, or any
    (B, n, H, W) that the caller hands to `forward`; with num_classes 0 the caller has to."""

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
        if not lr:
            kernel = 0
        if kernel and (kernel < 0 or kernel % 2 == 0):
            raise ValueError(f"kernel {kernel}: LR's window needs an odd size above 0; 0 is no LR")
        key_channels = key_channels or max(1, channels // 8)
        self.gr, self.kernel = gr, kernel
        self.query = nn.Conv2d(channels, key_channels, 1, bias=False)
        self.key = nn.Conv2d(channels, key_channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.coarse = nn.Conv2d(channels, num_classes, 1) if gr and num_classes else None
        self.gamma = nn.Parameter(torch.zeros(1))

    def class_predictions(self, f: Tensor, p: Tensor | None = None) -> Tensor:
        """P (B, n, H, W): the given p, if it fits F, else the block's own 1x1 convolution of F."""
        if p is not None:
            like = p.is_floating_point() and at_least_fp32(p).dtype == at_least_fp32(f).dtype
            if not like or p[:, :1].shape != f[:, :1].shape:
                got = f"p {tuple(p.shape)}, {p.dtype}, for F {tuple(f.shape)}, {f.dtype}"
                raise ValueError(f"{got}: expected (B, n, H, W) with F's B, H, W and type")
            return p
        if self.coarse is None:
            raise ValueError("no num_classes: hand forward the class predictions p (B, n, H, W)")
        return self.coarse(f)

    def inputs(self, f: Tensor, p: Tensor | None = None) -> Inputs:
        """Q, K, V and P (None without GR), each (B, ., N), for `denoised_attention`."""
        classes = self.class_predictions(f, p).flatten(2) if self.gr else None
        q, k, v = (conv(f).flatten(2) for conv in (self.query, self.key, self.value))
        return q, k, v, classes

    def forward(self, f: Tensor, p: Tensor | None = None) -> Tensor:
        """F -> F', both (B, C, H, W). p (B, n, H, W) replaces the block's own predictions."""
        q, k, v, p = self.inputs(f, p)
        size = (f.shape[2], f.shape[3])
        return self.gamma * denoised_attention(q, k, v, p, size, self.kernel).unflatten(2, size) + f


# ----------------------------------------------------------------------------------- the backbone
def conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution for a BatchNorm to follow: no bias; at stride 1 it keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    layers = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    return nn.Sequential(*layers)


class Block(nn.Module):
    """Residual convolutions, each with a BatchNorm, ReLUs between; `downsample` on the shortcut."""

    def __init__(self, *convs: nn.Conv2d) -> None:
        super().__init__()
        for i, conv in enumerate(convs, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.out_channels))
        self.depth = len(convs)
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            if i > 1:
                y = F.relu(y, inplace=True)
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return F.relu(y + x, inplace=True)


def basic_block(inputs: int, width: int, stride: int = 1, dilation: int = 1) -> Block:
    """Two 3x3 convolutions (ResNet-18 and 34; the paper's Reduction)."""
    return Block(conv3x3(inputs, width, stride, dilation), conv3x3(width, width, 1, dilation))


def bottleneck(inputs: int, width: int, stride: int = 1, dilation: int = 1) -> Block:
    """1x1, 3x3 with the stride and the dilation, 1x1 to 4 * width (ResNet-50 and 101)."""
    narrow = nn.Conv2d(inputs, width, 1, bias=False)
    middle = conv3x3(width, width, stride, dilation)
    return Block(narrow, middle, nn.Conv2d(width, 4 * width, 1, bias=False))


LAYOUTS = {  # block, its expansion, blocks in each layer, torchvision's ImageNet file
    "resnet18": (basic_block, 1, (2, 2, 2, 2), "resnet18-f37072fd"),
    "resnet34": (basic_block, 1, (3, 4, 6, 3), "resnet34-b627a593"),
    "resnet50": (bottleneck, 4, (3, 4, 6, 3), "resnet50-0676ba61"),
    "resnet101": (bottleneck, 4, (3, 4, 23, 3), "resnet101-63fe2227"),
}


class ResNet(nn.Module):
    """A ResNet dilated to stride 8: image (B, 3, H, W) -> (res2, res3, X), all about H/8 x W/8.
    Names are torchvision's, with a deep stem PyTorch-Encoding's. Layer3 has dilation 2; layer4 has
    4, or 4, 8, 16 with `multi_grid`. `recompute` computes activations again in the backward."""

    def __init__(self, name: str, *, deep_stem: bool = False, multi_grid: bool = False) -> None:
        super().__init__()
        if name not in LAYOUTS:
            raise ValueError(f"backbone {name!r}: expected one of {', '.join(LAYOUTS)}")
        block, expansion, depths, _ = LAYOUTS[name]
        inputs = 128 if deep_stem else 64
        if deep_stem:
            stem = conv_bn_relu(3, 64, 2) + conv_bn_relu(64, 64)
            self.conv1: nn.Module = stem.append(conv3x3(64, inputs))
        else:
            self.conv1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        last = [4, 8, 16] if multi_grid else [4]
        plan = [(64, 1, [1]), (128, 2, [1]), (256, 1, [2]), (512, 1, last)]
        layers = []
        for (width, stride, dilations), depth in zip(plan, depths):
            outputs = width * expansion
            layer = nn.Sequential(block(inputs, width, stride, dilations[0]))
            if stride > 1 or inputs != outputs:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                layer[0].downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
            for i in range(1, depth):
                layer.append(block(outputs, width, 1, dilations[i % len(dilations)]))
            layers.append(layer)
            inputs = outputs
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.channels = (128 * expansion, 256 * expansion, 512 * expansion)
        self.recompute = False
        for m in self.modules():
            # On the meta device torch would import its compiler for this, which takes seconds.
            if isinstance(m, nn.Conv2d) and not m.weight.is_meta:
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
    """block(x), computed again in the backward; running statistics change in the first run only."""
    copies: dict[str, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        y = torch.func.functional_call(block, copies, x)
        copies.update({name: b.clone() for name, b in block.named_buffers()})
        return y

    return checkpoint(run, x, use_reentrant=False)


# ------------------------------------------------------------------------------------ the network
@dataclass(frozen=True)
class Config:
    """The whole network as plain values. PAPER follows the text, RELEASED the authors' model."""

    num_classes: int = 19
    backbone: str = "resnet101"
    context: str = "dnl"  # or nl (no GR, no LR), none (Table II's baseline), a factory's name
    gr: bool = True  # the parts of dnl
    lr: bool = True
    kernel: int = 3
    channels: int = 512  # of F
    p_from: str = "feature"  # one of P_FROM
    p_supervised: bool = False  # in training P is an output too
    aux_conv: bool = False  # the auxiliary heads are 3x3 + 1x1 convolutions, not 1x1
    refine: bool = False  # a 3x3 convolution follows the block
    global_context: bool = True
    deep_stem: bool = False
    multi_grid: bool = False
    dropout: float = 0.0  # of the heads of 3x3 + 1x1 convolutions


PAPER = Config()
RELEASED = Config(
    p_from="res3",
    aux_conv=True,
    refine=True,
    global_context=False,
    deep_stem=True,
    multi_grid=True,
    dropout=0.05,
)
PRESETS = {"paper": PAPER, "released": RELEASED}
P_FROM = ("feature", "res3", "res3_logits")  # P: 1x1 convolution of F; res3 head's softmax; logits


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear with align_corners, as everywhere in the network."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def _head(inputs: int, width: int, num_classes: int, dropout: float) -> nn.Sequential:
    head = conv_bn_relu(inputs, width)
    return head.append(nn.Dropout2d(dropout)).append(nn.Conv2d(width, num_classes, 1))


class Network(nn.Module):
    """Fig. 3: backbone, Reduction, Denoised NL, head and auxiliary heads (Section III-B, III-F)."""

    def __init__(self, config: Config, context: nn.Module) -> None:
        super().__init__()
        c, n, C = config, config.num_classes, config.channels
        self.config = config
        self.backbone = ResNet(c.backbone, deep_stem=c.deep_stem, multi_grid=c.multi_grid)
        res2, res3, X = self.backbone.channels
        shortcut = conv_bn_relu(C, C, 2)
        self.reduce = conv_bn_relu(X, C)
        self.down = basic_block(C, C, 2)
        self.down.downsample = shortcut
        self.context = context
        self.refine = conv_bn_relu(C, C) if c.refine else nn.Identity()
        self.pool: nn.Conv2d | None = None
        joined = X + C
        if c.global_context:
            self.pool = nn.Conv2d(X, C, 1)
            joined += C
        self.head = _head(joined, C, n, c.dropout)
        if c.aux_conv:
            self.aux2: nn.Module = _head(res2, res2 // 8, n, c.dropout)
            self.aux3: nn.Module = _head(res3, res3 // 2, n, c.dropout)
        else:
            self.aux2 = nn.Conv2d(res2, n, 1)
            self.aux3 = nn.Conv2d(res3, n, 1)

    def features(
        self, image: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """res2, the res3 head's logits (None if unused) and X at stride 8, F at stride 16, and P at
        F's size (None if nothing takes it)."""
        res2, res3, x = self.backbone(image)
        f = self.down(self.reduce(x))
        aux3 = p = None
        if self.training:
            aux3 = self.aux3(res3)
        if isinstance(self.context, DenoisedNonLocal) and self.context.gr:
            if self.config.p_from == "feature":
                p = self.context.class_predictions(f)
            else:
                if aux3 is None:  # in training P and the loss share one run of the head
                    aux3 = self.aux3(res3)
                p = resize(aux3, f.shape[2:])
                if self.config.p_from == "res3":
                    p = p.softmax(1)
        return res2, aux3, x, f, p

    def forward(self, image: Tensor, full_size: bool = True) -> Tensor | tuple[Tensor, ...]:
        """image (B, 3, H, W), normalised, any size -> logits (B, n, H, W). In training a tuple: the
        logits, the auxiliary ones of res2 and res3, and P if it is supervised (eq. 5). full_size
        False leaves each at its own size (stride 8; P 16): a loss may resize image by image."""
        res2, aux3, x, f, p = self.features(image)
        f = self.context(f) if p is None else self.context(f, p)
        parts = [x, self.refine(resize(f, x.shape[2:])).to(x.dtype)]  # gamma widens in autocast
        if self.pool is not None:
            parts.append(self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:]))
        outputs = [self.head(torch.cat(parts, 1))]
        if self.training:
            outputs += [self.aux2(res2), aux3]
            if self.config.p_supervised:
                outputs.append(p)
        if full_size:
            outputs = [resize(o, image.shape[2:]) for o in outputs]
        return tuple(outputs) if self.training else outputs[0]


def build(config: Config, context: Callable[[int, int], nn.Module] | None = None) -> Network:
    """The network of a configuration, on torch's default device, weights from torch's generator.
    context: a factory (channels, num_classes) -> module, if `config.context` is the name of one.
    ValueError for a value out of range, an unknown name, or a supervised P that does not exist."""
    c = config
    gr, lr = (c.gr, c.lr) if c.context == "dnl" else (False, False)
    if min(c.num_classes, c.channels) < 1 or not 0 <= c.kernel <= 31 or not 0 <= c.dropout < 1:
        raise ValueError(
            f"num_classes {c.num_classes}, channels {c.channels}: expected 1 or more; "
            f"kernel {c.kernel}: expected 0 to 31; dropout {c.dropout}: expected 0 <= dropout < 1"
        )
    if c.p_from not in P_FROM:
        raise ValueError(f"p_from {c.p_from!r}: expected one of {', '.join(P_FROM)}")
    if c.p_supervised and not (gr and c.p_from == "feature"):
        raise ValueError("a supervised P needs GR with P from the feature (p_from)")
    if c.context in ("dnl", "nl"):
        classes = c.num_classes if c.p_from == "feature" else 0
        module: nn.Module = DenoisedNonLocal(c.channels, classes, kernel=c.kernel, gr=gr, lr=lr)
    elif c.context == "none":
        module = nn.Identity()
    elif context is None:
        raise ValueError(f"context {c.context!r}: expected dnl, nl, none, or its factory as well")
    else:
        module = context(c.channels, c.num_classes)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{c.context}: its factory returned {type(module).__name__}, not a module")
    return Network(c, module)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """ValueError with the keys that are missing, unexpected or misshapen, if `state` (in the error:
    `source`) does not fit `module`. `num_batches_tracked` may be missing, as in old files."""
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    changed = [k for k in own if k in state and state[k].shape != own[k].shape]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in changed]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = []
    for name, keys in lists.items():
        if keys:
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            faults.append(f"{name}: {', '.join(keys[:8])}{more}")
    if faults:
        raise ValueError(f"{source} does not fit: {'; '.join(faults)}")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, or raise `check_fit`'s ValueError and load nothing."""
    check_fit(module, state, source)
    module.load_state_dict(state, strict=False)


def load_backbone(backbone: ResNet, name: str, weights: str) -> None:
    """Fill the backbone `name`. weights: "imagenet" (torchvision's, downloaded, hash checked) or a
    file for `read_weights`. ValueError if they do not fit, with the keys, or are not finite."""
    if weights == "imagenet":
        if not isinstance(backbone.conv1, nn.Conv2d):
            raise ValueError("imagenet weights have the plain stem: give a file like resnet101s's")
        url = f"https://download.pytorch.org/models/{LAYOUTS[name][-1]}.pth"
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
    else:
        state = read_weights(weights)
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    found = _which_resnet(state)
    if found not in (name, None):
        raise ValueError(f"this is a {found}, expected a {name}")
    load_strict(backbone, state, "the file")
    if not all(v.isfinite().all() for v in backbone.state_dict().values()):
        raise ValueError("its weights are not all finite: give another file")


def _which_resnet(state: Mapping[str, Tensor]) -> str | None:
    """The name of the ResNet that a state fits."""
    for name in LAYOUTS:
        with torch.device("meta"), suppress(ValueError):
            check_fit(ResNet(name, deep_stem="conv1.0.weight" in state), state, name)
            return name
    return None


def read_weights(path: str) -> dict[str, Tensor]:
    """The weights in a file of torchvision, train.py, mmsegmentation or Lightning; of the backbone
    alone if the file names one. ValueError if there are none."""
    if not os.path.isfile(path):  # a pipe, for which torch.load would wait, is none
        raise ValueError("no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state.get("state_dict", state))
        state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    except Exception as e:  # what is no checkpoint can fail anywhere
        raise ValueError(f"not a file of weights ({type(e).__name__})") from None
    inner = {k: v for k, v in state.items() if k.startswith("backbone.")}
    return {k.removeprefix("backbone."): v for k, v in (inner or state).items()}


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state with the parameter names of `build(RELEASED)`."""
    pairs = (
        "conv.:reduce. down_sample.:down. dnl.gamma:context.gamma dnl.conv1.:context.query. "
        "dnl.conv2.:context.key. dnl.conv3.:context.value. dnl.conv.:refine. "
        "dnl.conv_out3.conv.:aux3. conv_out2.conv.:aux2. conv_out1.conv.:head."
    )
    names = dict(pair.split(":") for pair in pairs.split())
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if key.startswith("interp."):
            continue  # the shortcut of `down_sample` again
        for old, new in names.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        renamed[key] = value
    return renamed
