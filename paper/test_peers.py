"""The peers against their formulas in plain loops over pixels (numpy, double); costs at C = 512.

A reference takes the module's parameters by name and one image (C, H, W); it shares nothing else
with peers.py.
"""

import dataclasses
import math
import socket
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dnl
from paper import peers
from recipe import losses

FACTORIES = (peers.nl, peers.ccnet, peers.danet, peers.dranet, peers.ocnet, peers.ppm, peers.aspp)
ccnet_once = partial(peers.ccnet, recurrence=1)


def make(factory, channels=32):
    """The module in double precision and eval mode, with random parameters and statistics."""
    generator = torch.Generator().manual_seed(5)
    module = factory(channels, 19).double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.double)
            fan_in = math.prod(tensor.shape[1:])
            positive = name.endswith("running_var") or name.endswith("gamma")
            tensor.copy_(0.5 + drawn.abs() if positive else 1.5 * drawn / fan_in**0.5)
    return module


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.double)


# ---- references


def part(state, prefix):
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(powers) for value in powers]


def loop_conv(state, x, dilation=1):
    """Any odd kernel with zero padding, pixel by pixel and tap by tap; a 1-D kernel has width 1."""
    weight = state["weight"].reshape(
        *state["weight"].shape[:2], *(state["weight"].shape[2:] * 2)[:2]
    )
    k, (_, H, W) = weight.shape[2], x.shape
    out = np.zeros((len(weight), H, W))
    for h in range(H):
        for w in range(W):
            for i in range(k):
                for j in range(k):
                    y, z = h + (i - k // 2) * dilation, w + (j - k // 2) * dilation
                    if 0 <= y < H and 0 <= z < W:
                        out[:, h, w] += weight[:, :, i, j] @ x[:, y, z]
            out[:, h, w] += state.get("bias", 0)
    return out


def loop_unit(state, x, dilation=1):
    """Convolution "0.", batch norm "1." by its running statistics, ReLU."""
    out, bn = loop_conv(part(state, "0."), x, dilation), part(state, "1.")
    for c in range(len(out)):
        normal = (out[c] - bn["running_mean"][c]) / math.sqrt(bn["running_var"][c] + 1e-5)
        out[c] = normal * bn["weight"][c] + bn["bias"][c]
    return np.maximum(out, 0)


def loop_pool(x, size):
    C, H, W = x.shape
    out = np.zeros((C, size, size))
    for i in range(size):
        for j in range(size):
            rows = slice(i * H // size, math.ceil((i + 1) * H / size))
            columns = slice(j * W // size, math.ceil((j + 1) * W / size))
            out[:, i, j] = x[:, rows, columns].mean((1, 2))
    return out


def loop_resize(x, H, W):
    """Bilinear with aligned corners."""
    size = x.shape[1]
    out = np.zeros((len(x), H, W))
    for h in range(H):
        for w in range(W):
            y, z = h * (size - 1) / (H - 1), w * (size - 1) / (W - 1)
            for i in range(size):
                for j in range(size):
                    out[:, h, w] += max(0, 1 - abs(y - i)) * max(0, 1 - abs(z - j)) * x[:, i, j]
    return out


def loop_attention(q, k, v, scale=1.0):
    """q (c, H, W), k (c, M), v (C, M)."""
    out = np.zeros((len(v), *q.shape[1:]))
    for h, w in np.ndindex(*q.shape[1:]):
        weights = softmax([scale * (q[:, h, w] @ k[:, i]) for i in range(k.shape[1])])
        for i, weight in enumerate(weights):
            out[:, h, w] += weight * v[:, i]
    return out


def loop_nl(state, x):
    q, k, v = (loop_conv(part(state, name), x) for name in ("query.", "key.", "value."))
    return state["gamma"] * loop_attention(q, k.reshape(len(k), -1), v.reshape(len(v), -1)) + x


def loop_channels(state, x, y):
    out = np.zeros_like(x)
    for c in range(len(x)):
        energy = [float((x[c] * y[d]).sum()) for d in range(len(y))]
        for d, weight in enumerate(softmax([max(energy) - e for e in energy])):
            out[c] += weight * y[d]
    return state["gamma"] * out + x


def loop_ccnet(state, x, recurrence):
    """Full attention with a mask: a pixel sees those in its row or its column, itself once."""
    for _ in range(recurrence):
        q, k, v = (loop_conv(part(state, name), x) for name in ("query.", "key.", "value."))
        out = np.zeros_like(x)
        pixels = list(np.ndindex(*x.shape[1:]))
        for h, w in pixels:
            seen = [(i, j) for i, j in pixels if i == h or j == w]
            for (i, j), weight in zip(seen, softmax([q[:, h, w] @ k[:, i, j] for i, j in seen])):
                out[:, h, w] += weight * v[:, i, j]
        x = state["gamma"] * out + x
    return x


def loop_danet(state, x):
    return loop_nl(part(state, "position."), x) + loop_channels(part(state, "channel."), x, x)


def loop_dranet(state, x):
    position, channel = part(state, "position."), part(state, "channel.")
    pools = [
        loop_unit(part(position, f"encoders.{n}.layers."), loop_pool(x, size))
        for n, size in enumerate((1, 2, 3, 6))
    ]
    tokens = np.concatenate([pool.reshape(len(x), -1) for pool in pools], axis=1)[
        ..., None
    ]  # (C, 50, 1)
    q, k, v = (
        loop_conv(part(position, f"{name}."), of)
        for name, of in (("query", x), ("key", tokens), ("value", tokens))
    )
    compact = position["gamma"] * loop_attention(q, k[..., 0], v[..., 0]) + x
    return compact + loop_channels(channel, x, loop_unit(part(channel, "encoder."), x))


def loop_ocnet(state, x):
    q, v = loop_unit(part(state, "shared."), x), loop_conv(part(state, "value."), x)
    context = loop_attention(q, q.reshape(len(q), -1), v.reshape(len(v), -1), len(q) ** -0.5)
    return loop_unit(
        part(state, "fuse.0."), np.concatenate([loop_conv(part(state, "expand."), context), x])
    )


def loop_ppm(state, x):
    levels = [
        loop_resize(loop_unit(part(state, f"levels.{n}.layers."), loop_pool(x, size)), *x.shape[1:])
        for n, size in enumerate((1, 2, 3, 6))
    ]
    return loop_unit(part(state, "fuse.0."), np.concatenate([x, *levels]))


def loop_aspp(state, x):
    branches = [
        loop_unit(part(state, f"branches.{n}."), x, rate) for n, rate in enumerate((1, 6, 12, 18))
    ]
    pooled = loop_unit(part(state, "image.layers."), loop_pool(x, 1))
    return loop_unit(
        part(state, "fuse.0."), np.concatenate([*branches, pooled + np.zeros_like(branches[0])])
    )


@pytest.mark.parametrize(
    "factory, reference, size",
    [
        (peers.nl, loop_nl, (5, 7)),
        (ccnet_once, partial(loop_ccnet, recurrence=1), (5, 7)),
        (peers.ccnet, partial(loop_ccnet, recurrence=2), (5, 7)),
        (peers.danet, loop_danet, (5, 7)),
        (peers.dranet, loop_dranet, (5, 7)),
        (peers.ocnet, loop_ocnet, (5, 7)),
        (peers.ppm, loop_ppm, (5, 7)),
        # larger than the dilation of 18, so that every tap counts
        (peers.aspp, loop_aspp, (21, 23)),
    ],
)
def test_agrees_with_loops(factory, reference, size):
    module, x = make(factory), image(2, 32, *size)
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    with torch.no_grad():
        out = module(x).numpy()
    expected = np.stack([reference(state, one) for one in x.numpy()])
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() < 1e-10 * max(1, np.abs(expected).max())
    assert np.abs(expected - x.numpy()).max() > 0.1  # the module did something


# ---- costs


@pytest.mark.parametrize(
    "factory, parameters, gflops",
    [
        (peers.nl, 328_321, "7.6252"),
        (ccnet_once, 328_321, "1.7648"),
        (peers.ccnet, 328_321, "3.5295"),
        (peers.danet, 328_322, "10.0412"),
        (peers.dranet, 1_463_106, "0.7349"),
        (peers.ocnet, 920_576, "9.66"),  # the shared projection computed once
        (peers.ppm, 4_982_784, "21.75"),
        (peers.aspp, 4_460_032, "19.93"),
    ],
)
def test_parameters_and_flops_of_table_5(factory, parameters, gflops):
    module = factory(512, 19).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 512, 48, 48))
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert f"{counter.get_total_flops() / 1e9:.{len(gflops.split('.')[1])}f}" == gflops


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation puts out."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("factory, whole_map", [(peers.nl, True), (peers.ccnet, False)])
def test_criss_cross_makes_no_whole_map(factory, whole_map):
    H, W, N = 48, 40, 48 * 40
    with Largest() as largest:
        factory(16, 19)(torch.randn(1, 16, H, W)).sum().backward()
    assert (largest.numel >= N * N) == whole_map
    if not whole_map:
        assert largest.numel == N * (H + W)


# ---- behaviour in a network


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_parameter_gets_a_gradient(factory):
    fresh = factory(32, 19)
    # training mode as it starts: what DDP asks for
    fresh(image(2, 32, 5, 7).float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fresh.parameters())
    module = make(factory)
    module(image(2, 32, 5, 7)).square().sum().backward()
    largest = {name: p.grad.abs().max() for name, p in module.named_parameters()}
    # A key's bias shifts a whole row of logits, which softmax cancels.
    assert {name for name in largest if not largest[name] > 1e-8} == {
        n for n in largest if n.endswith("key.bias")
    }


@pytest.mark.parametrize("factory", FACTORIES)
def test_empty_batch_and_odd_sizes(factory):
    for shape in ((0, 16, 5, 7), (2, 16, 1, 3), (2, 16, 4, 1), (3, 16, 13, 8)):
        for training in (True, False):
            module = factory(16, 19).train(training)
            assert module(torch.randn(shape)).shape == shape


@pytest.mark.parametrize(
    "factory, multiple", [(peers.nl, 1), (peers.ccnet, 1), (peers.danet, 2), (peers.dranet, 2)]
)
def test_starts_as_a_multiple_of_its_input(factory, multiple):
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(factory(32, 19)(x), multiple * x, rtol=0, atol=0)


@pytest.mark.parametrize("logits_of", ["attention", "channel_attention", "criss_cross"])
def test_logits_are_single_precision_under_autocast(logits_of):
    """Logits of 256 + i/2: bf16 steps by 2 there and would make neighbours equal."""
    ones, ramp = torch.ones(8), torch.arange(8) / 2
    q, k = (
        torch.stack([ones, ones])[None],
        torch.stack([256 * ones, ramp])[None],
    )  # (1, 2, 8), exact in bf16

    def run(dtype):
        a, b = q.to(dtype), k.to(dtype)
        if logits_of == "attention":
            return peers.attention(a, b, torch.eye(8, dtype=dtype)[None])
        if logits_of == "criss_cross":
            return peers.criss_cross(
                a[:, :, None], b[:, :, None], torch.eye(8, dtype=dtype)[None, :, None]
            )
        return peers.channel_attention(a.mT[:, :1], b.mT)  # one row of x, eight of y

    with torch.autocast("cpu", torch.bfloat16):
        out = run(torch.bfloat16)
    expected = run(torch.double)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("factory", FACTORIES)
def test_runs_under_autocast_with_gradients(factory):
    module, x = factory(32, 19), torch.randn(2, 32, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("factory", [peers.dranet, peers.ppm, peers.aspp])
def test_one_image_in_training_is_one_clear_line(factory):
    module, x = factory(16, 19), torch.randn(1, 16, 5, 7)
    with pytest.raises(
        ValueError, match=r"got a training batch of 1 image, expected 2 or more.*--batch"
    ):
        module(x)
    assert module.eval()(x).shape == x.shape


@pytest.mark.parametrize(
    "factory, rate, whole_channels",
    [(peers.ocnet, 0.05, True), (peers.ppm, 0.1, True), (peers.aspp, 0.5, False)],
)
def test_dropout_at_the_end_in_training(factory, rate, whole_channels):
    torch.manual_seed(0)
    module = factory(64, 19).train()
    # far above what batch norm puts out, so that only dropped values are 0
    torch.nn.init.constant_(module.fuse[0][1].bias, 20.0)
    kept = module(torch.randn(8, 64, 9, 9)) != 0
    channels = kept.flatten(2).float().mean(2)  # (B, C), the share kept of each channel
    assert abs(1 - rate - channels.mean()) < 0.04
    assert bool(((channels == 0) | (channels == 1)).all()) == whole_channels


def test_wrong_arguments():
    with pytest.raises(ValueError, match="got recurrence 0, expected 1 or more"):
        peers.ccnet(16, 19, recurrence=0)
    with pytest.raises(ValueError, match="got 4 channels, expected 8 or more"):
        peers.nl(4, 19)


# ---- in the network, on one and on two ranks


def train_each_peer(rank, world, port):
    """A step of every peer in the network: all parameters have gradients, equal on both ranks."""
    if world > 1:
        torch.set_num_threads(1)  # a process of its own
        torch.distributed.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    for name in ("nl", "ccnet", "danet", "dranet", "ocnet", "ppm", "aspp"):
        torch.manual_seed(0)
        net = dnl.build(
            dataclasses.replace(
                dnl.PAPER, num_classes=3, backbone="resnet18", channels=16, context=name
            ),
            getattr(peers, name),
        ).train()
        model = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
        torch.manual_seed(rank)
        label = torch.randint(0, 3, (2, 48, 48)).byte()
        outputs = model(torch.randn(2, 3, 48, 48), full_size=False)
        losses(outputs, label, float(label.numel() * world)).sum().backward()
        total = torch.stack([p.grad.double().norm() for p in net.parameters()]).sum()
        assert total.isfinite() and total > 0, name
        if world > 1:
            both = [torch.zeros_like(total) for _ in range(world)]
            torch.distributed.all_gather(both, total)
            assert both[0] == both[1], name
        torch.optim.SGD(net.parameters(), 0.01).step()
        assert all(p.isfinite().all() for p in net.parameters()), name
    if world > 1:
        time.sleep(0.1)  # as in distributed
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_peer_trains_in_the_network(world):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(
        train_each_peer, (world, port), world, start_method="fork"
    )
