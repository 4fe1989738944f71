"""Every equation and every promise, tested. `python -m pytest` runs all; `-m "not slow"` leaves out what takes minutes."""
import argparse
import ast
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
import weakref
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace
from datetime import timedelta
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import dnl
import evaluate
import hubconf
import predict
import train
from data import ADE20K, CITYSCAPES, IGNORE, InputError, palette
from dnl import PAPER, RELEASED, DenoisedNonLocal, ResNet, build, denoised_attention, denoised_maps

HERE = Path(__file__).parent
SMALL = dict(backbone="resnet18", channels=16, num_classes=5)


def qkvp(size, batch=2, channels=6, keys=4, classes=3, seed=0, dtype=torch.double):
    """Q, K, V, P as leaves that require a gradient."""
    g = torch.Generator().manual_seed(seed)
    rows = (keys, keys, channels, classes)
    return [torch.randn(batch, c, size[0] * size[1], generator=g, dtype=dtype).requires_grad_() for c in rows]


def map_route(q, k, v, p, size, kernel=3):
    """A''V by the maps: (B, C, N)."""
    return torch.bmm(v, denoised_maps(q, k, p, size, kernel)[2].transpose(1, 2))


def grads(out, inputs, seed=1):
    """Gradients of <out, a random tensor>."""
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return torch.autograd.grad(out, inputs, g.to(out.dtype))


def gap(a, b):
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------- the paper's formulas, pixel by pixel


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loop_maps(q, k, p, size, kernel):
    """A, A', A'' of one image, from eq. 4 and Section III-D, E in plain loops. q, k (C', N), p (n, N) or None."""
    (H, W), N, r = size, q.shape[1], kernel // 2
    a, rectified, retained = np.zeros((3, N, N))
    for j in range(N):
        e = [np.exp(q[:, j] @ k[:, i]) for i in range(N)]
        for i in range(N):
            a[j, i] = e[i] / sum(e)
            rectified[j, i] = a[j, i] * (1 if p is None else sigmoid(p[:, j] @ p[:, i]))
    if not kernel:
        return a, rectified, rectified
    for j in range(N):
        for y in range(H):
            for x in range(W):
                for near_y in range(max(0, y - r), min(H, y + r + 1)):
                    for near_x in range(max(0, x - r), min(W, x + r + 1)):
                        here, near = y * W + x, near_y * W + near_x
                        retained[j, here] += sigmoid(q[:, here] @ k[:, near]) * rectified[j, near]
    return a, rectified, retained


@pytest.mark.parametrize("size", [(3, 5), (4, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("kernel", [0, 1, 3, 5])
@pytest.mark.parametrize("gr", [True, False])
def test_both_routes_equal_loops_over_pixels(size, kernel, gr):
    q, k, v, p = (x.detach() for x in qkvp(size))
    p = p if gr else None
    maps = denoised_maps(q, k, p, size, kernel)
    values = denoised_attention(q, k, v, p, size, kernel, chunk=4)
    for b in range(2):
        expected = loop_maps(q[b].numpy(), k[b].numpy(), None if p is None else p[b].numpy(), size, kernel)
        assert gap([m[b] for m in maps], [torch.from_numpy(m) for m in expected]) < 1e-12
        assert np.abs(values[b].numpy() - v[b].numpy() @ expected[2].T).max() < 1e-12


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 9)], ids=str)
@pytest.mark.parametrize("kernel", [0, 1, 3, 5])
@pytest.mark.parametrize("gr", [True, False])
def test_value_route_equals_map_route_forward_and_gradients(size, kernel, gr):
    q, k, v, p = qkvp(size)
    inputs, p = ([q, k, v, p], p) if gr else ([q, k, v], None)
    value, maps = denoised_attention(q, k, v, p, size, kernel, chunk=10), map_route(q, k, v, p, size, kernel)
    assert gap([value], [maps]) < 1e-12
    assert gap(grads(value, inputs), grads(maps, inputs)) < 1e-12


def test_without_gr_and_lr_it_is_the_plain_non_local_block():
    q, k, v, _ = qkvp((5, 6))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=1.0).transpose(1, 2)
    assert gap([denoised_attention(q, k, v, None, (5, 6), 0)], [expected]) < 1e-12


def test_affinity_rows_sum_to_one_and_are_even_where_nothing_is_known():
    q, k, _, _ = qkvp((4, 5))
    a = dnl.affinity(q, k)
    assert (a > 0).all() and gap([a.sum(-1)], [torch.ones(2, 20)]) < 1e-12
    assert gap([dnl.affinity(torch.zeros_like(q), k)], [torch.full((2, 20, 20), 1 / 20, dtype=torch.double)]) < 1e-12


def test_class_affinity_closed_forms():
    classes = torch.tensor([0, 2, 2, 1, 0])
    hot = 3 * F.one_hot(classes, 3).T[None].double()  # logits 3 for the class, 0 for the others: P^T P is 9 or 0
    same = classes[:, None] == classes
    assert gap([dnl.class_affinity(hot)[0]], [torch.where(same, torch.tensor(sigmoid(9.0)), 0.5)]) < 1e-12
    soft = dnl.class_affinity(torch.randn(2, 7, 50).mul(5).softmax(1))
    assert soft.min() >= 0.5 and soft.max() <= sigmoid(1.0) + 1e-6  # P^T P of probabilities lies in [0, 1]


def test_local_similarity_and_retention_know_the_border():
    ones = torch.ones(1, 2, 12, dtype=torch.double)  # 3 x 4, Q.K = 2 inside and 0 in the padding
    s = dnl.local_similarity(ones, ones, (3, 4)).unflatten(2, (3, 4))
    assert s[0, 0, 0, 0] == s[0, 8, 2, 3] == 0.5 and abs(s[0, 0, 1, 1] - sigmoid(2.0)) < 1e-12
    counts = dnl.local_retention(torch.ones(1, 1, 12), torch.ones(1, 9, 12), (3, 4)).view(3, 4)
    assert counts.tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_spreading_values_is_the_adjoint_of_local_retention(kernel):
    g = torch.Generator().manual_seed(0)
    a, v, s = (torch.randn(2, c, 20, generator=g, dtype=torch.double) for c in (3, 3, kernel**2))  # s asymmetric
    left = (dnl.local_retention(a, s, (4, 5), kernel) * v).sum((1, 2))
    assert gap([left], [(a * dnl.spread_values(v, s, (4, 5), kernel)).sum((1, 2))]) < 1e-12


@pytest.mark.parametrize("batch", [1, 2])
def test_the_memory_format_does_not_change_the_result(batch):
    """Channels innermost, as in a network that runs in channels_last: the same bits, and V~ is laid out as V is."""
    q, k, v, p = (x.detach() for x in qkvp((5, 6), batch))
    last = [x.mT.contiguous().mT.requires_grad_() for x in (q, k, v, p)]
    plain = [x.clone().requires_grad_() for x in (q, k, v, p)]
    s = torch.rand(batch, 9, 30, dtype=torch.double)
    assert dnl.spread_values(last[2], s, (5, 6)).stride(1) == 1 and dnl.spread_values(plain[2], s, (5, 6)).stride(2) == 1
    assert torch.equal(dnl.spread_values(last[2], s, (5, 6)), dnl.spread_values(plain[2], s, (5, 6)))
    a, b = (denoised_attention(*inputs, (5, 6), chunk=7) for inputs in (last, plain))
    assert gap([a], [b]) < 1e-13 and gap(grads(a, last), grads(b, plain)) < 1e-13


@pytest.mark.parametrize("kernel", [0, 3])
def test_chosen_queries_are_rows_of_the_whole_map(kernel):
    q, k, _, p = qkvp((5, 4))
    rows = torch.tensor([19, 0, 7])
    chosen, all_rows = denoised_maps(q, k, p, (5, 4), kernel, rows), denoised_maps(q, k, p, (5, 4), kernel)
    for some, whole in zip(chosen, all_rows, strict=True):
        assert some.shape == (2, 3, 20) and gap([some], [whole[:, rows]]) < 1e-12


# ------------------------------------------------------------------------------------------ the value route's promises


@pytest.mark.parametrize("chunk", [1, 4, 7, 35, 100])
def test_the_chunk_does_not_change_the_result(chunk):
    q, k, v, p = qkvp((5, 7))  # 4 does not divide 35
    one, other = denoised_attention(q, k, v, p, (5, 7)), denoised_attention(q, k, v, p, (5, 7), chunk=chunk)
    assert gap([one], [other]) < 1e-12 and gap(grads(one, [q, k, v, p]), grads(other, [q, k, v, p])) < 1e-12


@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize("gr", [True, False])
def test_gradcheck(kernel, gr):
    inputs = qkvp((2, 3), batch=1, channels=2, keys=2, classes=2)[:4 if gr else 3]

    def route(q, k, v, p=None):
        return denoised_attention(q, k, v, p, (2, 3), kernel, chunk=4)

    assert torch.autograd.gradcheck(route, inputs)


def test_a_second_derivative_is_an_error():
    q, k, v, p = qkvp((2, 3))
    loss = denoised_attention(q, k, v, p, (2, 3)).square().sum()
    first, = torch.autograd.grad(loss, [q], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def test_batch_of_none():
    q, k, v, p = qkvp((3, 4), batch=0)
    out = denoised_attention(q, k, v, p, (3, 4))
    assert out.shape == (0, 6, 12) and [g.shape for g in grads(out, [q, k, v, p])] == [x.shape for x in (q, k, v, p)]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("route, keeps", [(denoised_attention, False), (map_route, True)])
def test_no_map_is_ever_made_by_the_value_route(route, keeps):
    size, N = (48, 48), 2304
    q, k, v, p = qkvp(size, batch=1, channels=16, dtype=torch.float)
    with Largest() as forward:
        out = route(q, k, v, p, size)
    with Largest() as backward:
        grads(out, [q, k, v, p])
    if keeps:  # the watch sees maps where there are some
        assert forward.numel >= 9 * N * N and backward.numel >= 9 * N * N
    else:
        assert max(forward.numel, backward.numel) <= N * N // 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
                         ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_up_to_1e4_agree_with_double_precision(dtype, tolerance, autocast):
    """Q, K, P are small integers: exact in every type, so a logit rounded or overflowed on the way is seen."""
    g, size, N = torch.Generator().manual_seed(0), (8, 9), 72
    q, k = (torch.randint(-60, 61, (2, 8, N), generator=g).double() for _ in "qk")
    p, v = torch.randint(-3, 4, (2, 5, N), generator=g).double(), torch.randn(2, 6, N, generator=g).to(dtype).double()
    q[:, :, 0] = k[:, :, 0] = 36  # a logit of 8 * 36**2 = 10368
    assert 1e4 < torch.bmm(q.transpose(1, 2), k).abs().max() < 2e4
    exact = [x.clone().requires_grad_() for x in (q, k, v, p)]
    low = [x.to(dtype).requires_grad_() for x in (q, k, v, p)]
    expected = map_route(*exact, size)
    with torch.autocast("cpu", dtype if dtype != torch.float else torch.bfloat16, enabled=autocast):
        out = denoised_attention(*low, size)
        assert out.dtype == dtype
    for a, b in zip((out, *grads(out, low)), (expected, *grads(expected, exact)), strict=True):
        assert a.isfinite().all() and gap([a], [b]) <= tolerance * b.abs().max()


def test_maps_are_exact_under_autocast():
    q, k, _, p = (60 * x.detach().float() for x in qkvp((4, 5)))
    expected = denoised_maps(q, k, p, (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert gap(denoised_maps(q, k, p, (4, 5)), expected) == 0


def test_flops_are_those_of_table_v():
    """Table V at N = 48 x 48, C = 512, C' = 64, with the projections; one multiply-add is 2."""
    def gflops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e9

    f, p = torch.empty(1, 512, 48, 48, device="meta"), torch.empty(1, 19, 48, 48, device="meta")
    with torch.device("meta"):
        nl, block = DenoisedNonLocal(512, 19, gr=False, lr=False), DenoisedNonLocal(512, 19)
    assert gflops(lambda: map_route(*nl.inputs(f), (48, 48), 0)) == pytest.approx(7.625, abs=1e-3)
    assert gflops(lambda: map_route(*block.inputs(f, p), (48, 48))) == pytest.approx(7.83, abs=5e-3)
    assert gflops(lambda: block.coarse(f)) == pytest.approx(0.045, abs=5e-4)
    assert gflops(lambda: nl(f)) == pytest.approx(7.625, abs=1e-3)
    assert 7.8 < gflops(lambda: block(f)) <= 7.90


# ------------------------------------------------------------------------------------------------------- the block


def opened(module):
    """gamma away from 0, where the block does nothing."""
    for m in module.modules():
        if isinstance(m, DenoisedNonLocal):
            nn.init.constant_(m.gamma, 0.7)
    return module


def test_a_fresh_block_is_the_identity_and_an_opened_one_is_eq_3():
    block, f = DenoisedNonLocal(16, 5), torch.randn(2, 16, 6, 7)
    assert torch.equal(block(f), f)
    expected = 0.7 * map_route(*block.inputs(f), (6, 7)).view_as(f) + f
    assert gap([opened(block)(f)], [expected]) < 1e-5 and gap([expected], [f]) > 1e-2
    assert {n: tuple(x.shape) for n, x in block.named_parameters()} == {
        "gamma": (1,), "query.weight": (2, 16, 1, 1), "key.weight": (2, 16, 1, 1), "value.weight": (16, 16, 1, 1),
        "coarse.weight": (5, 16, 1, 1), "coarse.bias": (5,)}


def test_the_block_takes_the_callers_class_predictions():
    f, p = torch.randn(2, 16, 6, 7), torch.randn(2, 3, 6, 7)
    block = opened(DenoisedNonLocal(16, 0))
    q, k, v = (conv(f).flatten(2) for conv in (block.query, block.key, block.value))
    assert gap([block(f, p)], [0.7 * map_route(q, k, v, p.flatten(2), (6, 7)).view_as(f) + f]) < 1e-5
    with pytest.raises(ValueError, match=r"hand forward the class predictions p \(B, n, H, W\)"):
        block(f)


def test_the_block_compiles_without_a_break():
    block, f = opened(DenoisedNonLocal(16, 5)), torch.randn(2, 16, 6, 7)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    weights = list(block.parameters())
    assert gap([compiled(f)], [block(f)]) < 1e-6
    assert gap(grads(compiled(f), weights), grads(block(f), weights)) < 1e-4


def test_the_block_exports_with_free_height_and_width():
    block, free = opened(DenoisedNonLocal(16, 5)).eval(), {2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    exported = torch.export.export(block, (torch.randn(2, 16, 6, 7),), dynamic_shapes=(free,)).module()
    other = torch.randn(2, 16, 11, 4)
    assert gap([exported(other)], [block(other)]) < 1e-5


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_a_network_exports_and_the_program_is_the_network(config, tmp_path):
    """With free batch, height and width, saved and loaded again: any number of images from 17 pixels a side up."""
    net, Dim = opened(build(replace(config, **SMALL | {"channels": 32}))).eval(), torch.export.Dim
    free = {0: Dim("batch"), 2: Dim("height", min=17), 3: Dim("width", min=17)}
    net.to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format)  # as README says of a trained one
    program = torch.export.export(net, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(free,))
    torch.export.save(program, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    for size in ((1, 3, 17, 17), (3, 3, 65, 97), (2, 3, 80, 128)):
        image = torch.randn(size)
        assert gap([program(image)], [net(image)]) < 1e-4


# ------------------------------------------------------------------------------------------------- the backbone


def resnet_shapes(name):
    """torchvision's names and shapes of a ResNet's parameters and buffers without fc, from the rule they follow."""
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[int(name[6:])]
    wide, shapes, inputs = int(name[6:]) >= 50, {}, 64

    def conv_bn(conv, bn, *shape):
        shapes[conv + ".weight"] = shape
        shapes.update({f"{bn}.{leaf}": shape[:1] for leaf in ("weight", "bias", "running_mean", "running_var")})
        shapes[bn + ".num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", 64, 3, 7, 7)
    for stage, depth in enumerate(depths, 1):
        w = 32 * 2**stage
        for b in range(depth):
            at, out = f"layer{stage}.{b}.", w * (4 if wide else 1)
            convs = [(w, inputs, 1, 1), (w, w, 3, 3), (out, w, 1, 1)] if wide else [(w, inputs, 3, 3), (w, w, 3, 3)]
            for i, shape in enumerate(convs, 1):
                conv_bn(f"{at}conv{i}", f"{at}bn{i}", *shape)
            if b == 0 and (wide or stage > 1):
                conv_bn(at + "downsample.0", at + "downsample.1", out, inputs, 1, 1)
            inputs = out
    return shapes


def imagenet_like(name, **extra):
    """A state as torchvision saves it, with fc."""
    shapes = resnet_shapes(name) | {"fc.weight": (1000, 512), "fc.bias": (1000,)} | extra
    g = torch.Generator().manual_seed(0)
    return {k: torch.tensor(7) if k.endswith("tracked") else torch.rand(s, generator=g) for k, s in shapes.items()}


@pytest.mark.parametrize("name, keys, parameters", [("resnet18", 120, 11_176_512), ("resnet34", 216, 21_284_672),
                                                    ("resnet50", 318, 23_508_032), ("resnet101", 624, 42_500_160)])
def test_backbone_names_are_torchvisions(name, keys, parameters):
    with torch.device("meta"):
        net = ResNet(name)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == resnet_shapes(name)
    assert len(net.state_dict()) == keys and sum(p.numel() for p in net.parameters()) == parameters


def test_deep_stem_names_are_those_of_resnet101s():
    with torch.device("meta"):
        state = ResNet("resnet101", deep_stem=True).state_dict()
    stem = {k: tuple(v.shape) for k, v in state.items() if k.startswith(("conv1", "bn1")) and k.endswith(".weight")}
    assert stem == {"conv1.0.weight": (64, 3, 3, 3), "conv1.1.weight": (64,), "conv1.3.weight": (64, 64, 3, 3),
                    "conv1.4.weight": (64,), "conv1.6.weight": (128, 64, 3, 3), "bn1.weight": (128,)}
    assert state["layer1.0.conv1.weight"].shape == (64, 128, 1, 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
@pytest.mark.parametrize("multi_grid", [False, True])
def test_backbone_strides_and_dilations(name, multi_grid):
    with torch.device("meta"):
        net = ResNet(name, multi_grid=multi_grid)
        sizes = [tuple(x.shape[1:]) for x in net(torch.empty(1, 3, 65, 130))]
    channels = (512, 1024, 2048) if name == "resnet101" else (128, 256, 512)
    assert sizes == [(c, 9, 17) for c in channels]  # ceil(65 / 8), ceil(130 / 8)
    for layer, dilations in ((net.layer3, [2]), (net.layer4, [4, 8, 16] if multi_grid else [4])):
        for i, block in enumerate(layer):
            convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
            assert {m.dilation[0] for m in convs} == {dilations[i % len(dilations)]}
            assert {m.stride[0] for m in convs} == {1}
    first = net.layer2[0]  # stage 2 strides in the 3x3 of its first block, as torchvision's
    assert (first.conv2 if name == "resnet101" else first.conv1).stride == (2, 2)


def test_an_imagenet_file_loads_but_for_fc(tmp_path):
    state, net = imagenet_like("resnet18"), ResNet("resnet18")
    torch.save(state, tmp_path / "w.pth")
    dnl.load_backbone(net, "resnet18", str(tmp_path / "w.pth"))
    own = net.state_dict()
    assert own.keys() == state.keys() - {"fc.weight", "fc.bias"} and all(torch.equal(own[k], state[k]) for k in own)
    old = {k: v for k, v in state.items() if not k.endswith("tracked")}  # as the files at download.pytorch.org are
    torch.save(old, tmp_path / "old.pth")
    dnl.load_backbone(ResNet("resnet18"), "resnet18", str(tmp_path / "old.pth"))


def test_the_backbone_of_a_checkpoint_loads(run_folder, street, tmp_path):
    """Fine-tuning: the network of another training, whatever its classes, lends its backbone."""
    args = train.parse([*TINY, "--root", str(street), "--weights", str(run_folder / "last.pt")], 1)
    net, state = build(replace(PAPER, **SMALL)), torch.load(run_folder / "last.pt", weights_only=True)["model"]
    train.read_backbone(net, args)
    assert all(torch.equal(t, state[f"backbone.{k}"]) for k, t in net.backbone.state_dict().items())
    args.backbone = "resnet34"
    with pytest.raises(InputError, match=r"last\.pt does not fit: missing: layer1\.2\.conv1\.weight, .* and [0-9]+ more"):
        train.read_backbone(build(replace(PAPER, **SMALL | {"backbone": "resnet34"})), args)


def test_a_mismatch_lists_the_keys_and_loads_nothing():
    state, net = imagenet_like("resnet18", **{"conv1.weight": (64, 4, 7, 7), "layer9.weight": (1,)}), ResNet("resnet18")
    del state["layer1.0.bn1.bias"]
    before = net.layer1[0].conv1.weight.clone()
    with pytest.raises(ValueError) as error:
        dnl.load_strict(net, state, "file x.pth")
    assert str(error.value) == ("file x.pth does not fit: missing: layer1.0.bn1.bias; unexpected: fc.weight, fc.bias, "
                                "layer9.weight; of another shape: conv1.weight (64, 4, 7, 7) for (64, 3, 7, 7)")
    assert torch.equal(before, net.layer1[0].conv1.weight)


@pytest.mark.parametrize("name, file", [("resnet18", "resnet18-f37072fd"), ("resnet34", "resnet34-b627a593"),
                                        ("resnet50", "resnet50-0676ba61"), ("resnet101", "resnet101-63fe2227")])
def test_imagenet_weights_come_hash_checked_and_only_for_the_plain_stem(name, file, monkeypatch):
    asked = []

    def download(url, **options):
        asked.append((url, options["check_hash"]))
        return {}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with torch.device("meta"):
        plain, deep = ResNet(name), ResNet(name, deep_stem=True)
    with pytest.raises(ValueError, match="weights imagenet does not fit: missing: conv1.weight"):  # for the empty file
        dnl.load_backbone(plain, name, "imagenet")
    with pytest.raises(ValueError, match="plain stem"):
        dnl.load_backbone(deep, name, "imagenet")
    assert asked == [(f"https://download.pytorch.org/models/{file}.pth", True)]


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_recompute_changes_neither_gradients_nor_statistics(config):
    torch.manual_seed(0)
    net = opened(build(replace(config, **SMALL | {"dropout": 0.0}))).double().train()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    image, results = torch.randn(2, 3, 48, 40, dtype=torch.double), []
    for net.backbone.recompute in (False, True):
        net.load_state_dict(start)
        net.zero_grad()
        sum(o.square().mean() for o in net(image)).backward()
        results.append([p.grad.clone() for p in net.parameters()] + [b.clone() for b in net.buffers()])
    assert gap(*results) < 1e-12


# -------------------------------------------------------------------------------------------------- the network

SWITCHES = [("paper", s) for s in (
    {}, {"gr": False}, {"lr": False}, {"gr": False, "lr": False}, {"kernel": 5}, {"p_supervised": True},
    {"p_supervised": True, "lr": False}, {"p_from": "res3"}, {"context": "nl"}, {"context": "none"},
    {"context": "mine:conv"})]
SWITCHES += [("released", s) for s in (
    {}, {"gr": False}, {"lr": False}, {"gr": False, "lr": False}, {"p_from": "feature", "p_supervised": True},
    {"context": "nl"}, {"context": "none"}, {"context": "mine:conv"})]


@pytest.mark.parametrize("preset, switches", SWITCHES, ids=str)
def test_every_switch_trains_a_step_of_every_parameter(preset, switches):
    """Promise: every parameter is in the loss in every configuration, or DDP stops with unused parameters."""
    torch.manual_seed(0)
    config = replace(PAPER if preset == "paper" else RELEASED, **SMALL | switches)
    mine = config.context == "mine:conv"
    net = opened(build(config, (lambda channels, classes: nn.Conv2d(channels, channels, 1)) if mine else None)).train()
    image, label = torch.randn(2, 3, 48, 40), torch.randint(0, 5, (2, 48, 40))
    outputs = net(image)
    assert [tuple(o.shape) for o in outputs] == [(2, 5, 48, 40)] * (4 if config.p_supervised else 3)
    sum(F.cross_entropy(o, label) for o in outputs).backward()
    gradients = {n: p.grad for n, p in net.named_parameters()}
    assert [n for n, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()] == []
    with torch.no_grad():
        assert net.eval()(image).shape == (2, 5, 48, 40)


def test_the_rows_of_table_ii_differ_in_what_they_should():
    """The same weights through every row of the ablation: the switches change F', by the map route's account."""
    torch.manual_seed(0)
    whole, f = opened(build(replace(PAPER, **SMALL))).context, torch.randn(1, 16, 5, 6)
    q, k, v, p = whole.inputs(f)
    for gr, lr, switches in ((True, True, {}), (True, False, {"lr": False}), (False, True, {"gr": False}),
                             (False, False, {"gr": False, "lr": False}), (False, False, {"context": "nl"})):
        row = build(replace(PAPER, **SMALL | switches)).context
        row.load_state_dict({n: w for n, w in whole.state_dict().items() if gr or not n.startswith("coarse")})
        expected = 0.7 * map_route(q, k, v, p if gr else None, (5, 6), 3 if lr else 0).view_as(f) + f
        assert gap([row(f)], [expected]) < 1e-5


def test_the_paper_preset_is_fig_3_put_together():
    torch.manual_seed(0)
    net = opened(build(replace(PAPER, **SMALL))).double().eval()
    image, up = torch.randn(2, 3, 65, 50, dtype=torch.double), dict(mode="bilinear", align_corners=True)
    res2, res3, x = net.backbone(image)
    f = net.down(net.reduce(x))  # stride 16
    block = net.context
    q, k, v, p = (conv(f).flatten(2) for conv in (block.query, block.key, block.value, block.coarse))
    denoised = 0.7 * map_route(q, k, v, p, f.shape[2:]).view_as(f) + f
    context = net.pool(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:])
    logits = net.head(torch.cat([x, F.interpolate(denoised, x.shape[2:], **up), context], 1))
    assert gap([net(image)], [F.interpolate(logits, (65, 50), **up)]) < 1e-8  # Q.K is large in an untrained network
    assert gap([net(image, full_size=False)], [logits]) < 1e-8
    assert x.shape[2:] == (9, 7) and f.shape[2:] == (5, 4)
    assert isinstance(net.aux2, nn.Conv2d) and isinstance(net.aux3, nn.Conv2d) and net.aux2.bias is not None


def test_in_training_the_outputs_are_logits_res2_res3_and_p_at_their_own_sizes():
    net = build(replace(PAPER, **SMALL, p_supervised=True)).train()
    outputs = net(torch.randn(2, 3, 64, 48), full_size=False)
    assert [tuple(o.shape) for o in outputs] == [(2, 5, 8, 6)] * 3 + [(2, 5, 4, 3)]


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 8), (65, 33), (1025, 511)], ids=str)
def test_any_image_size(config, size):
    net = opened(build(replace(config, **SMALL))).eval()
    with torch.inference_mode():
        out = net(torch.randn(1, 3, *size))
    assert out.shape == (1, 5, *size) and out.isfinite().all()


@pytest.mark.parametrize("change, line", [
    (dict(backbone="resnet19"), "backbone 'resnet19': expected one of resnet18, resnet34, resnet50, resnet101"),
    (dict(p_from="res4"), "p_from 'res4': expected 'feature' or 'res3'"),
    (dict(context="mine:conv"), "context 'mine:conv': expected dnl, nl, none, or its factory"),
    (dict(kernel=4), "kernel 4: LR's window needs an odd size"),
    (dict(p_supervised=True, gr=False), "a supervised P needs GR"),
    (dict(p_supervised=True, context="nl"), "a supervised P needs GR"),
    (dict(p_supervised=True, p_from="res3"), "a supervised P needs GR with P from the feature")], ids=str)
def test_build_says_what_is_wrong(change, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        build(replace(PAPER, **SMALL | change))


# ------------------------------------------------------------------------------------------- the authors' model


def released_tensor(name, shape):
    """The recipe by which the stored numbers were made: weights are a function of their name."""
    r, leaf = np.random.default_rng(zlib.crc32(name.encode())), name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf == "gamma":
        x = np.full(shape, 0.7)
    elif leaf == "running_var":
        x = 0.5 + r.random(shape)
    elif leaf in ("running_mean", "bias"):
        x = 0.1 * r.standard_normal(shape)
    elif len(shape) == 1:
        x = 0.3 + 0.4 * r.random(shape)
    else:
        x = r.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) * (8 if re.match(r"dnl\.conv[12]\.", name) else 1)
    return torch.from_numpy(x.astype(np.float32))


@pytest.fixture(scope="module")
def released():
    """The stored numbers, and the authors' state: `interp` holds the tensors of `down_sample.downsample`."""
    with np.load(HERE / "released.npz") as file:
        stored = {k: torch.from_numpy(file[k]) for k in ("out", "aux1", "aux2", "f")}
        lines = file["tensors"].tobytes().decode().splitlines()
    state = {}
    for name, _, dims in (line.partition(" ") for line in lines):
        shape = tuple(map(int, dims.split(","))) if dims else ()
        state[name] = released_tensor(name.replace("interp", "down_sample.downsample"), shape)
    return stored, state


def released_gaps(net, images, stored):
    """The greatest difference of each of the outputs and F from the stored numbers."""
    image = np.random.default_rng(2026).standard_normal((2, 3, 128, 160)).astype(np.float32)[:images]
    with torch.inference_mode():
        res2, res3, _, f, _ = net.features(torch.from_numpy(image))
        own = {k: F.interpolate(o, (128, 160), mode="bilinear", align_corners=True)[:, :, ::16, ::16] for k, o in
               (("out", net(torch.from_numpy(image))), ("aux1", net.aux2(res2)), ("aux2", net.aux3(res3)))}
    own["f"] = f[:, ::32, ::2, ::2]
    return {k: gap([own[k]], [stored[k][:images]]) for k in stored}


def test_released_preset_equals_the_authors_model_and_the_check_can_fail(released):
    stored, state = released
    assert len(state) == 700
    net = build(RELEASED).eval()
    dnl.load_strict(net, dnl.from_released({"module." + k: v for k, v in state.items()}), "the authors' state")
    assert max(released_gaps(net, 2, stored).values()) < 1e-4
    with torch.no_grad():
        net.context.gamma.fill_(0.6)
    gaps = released_gaps(net, 1, stored)
    assert gaps["out"] > 1e-3 and max(gaps["aux1"], gaps["aux2"], gaps["f"]) < 1e-4
    with torch.no_grad():
        net.context.gamma.fill_(0.7)
    for block in net.backbone.layer4:  # as without the multi-grid
        block.conv2.dilation = block.conv2.padding = (4, 4)
    gaps = released_gaps(net, 1, stored)
    assert gaps["out"] > 1e-3 and gaps["f"] > 1e-3 and max(gaps["aux1"], gaps["aux2"]) < 1e-4


# ------------------------------------------------------------------------------------------ dnl.py as a file


def run_python(code, folder):
    """A fresh interpreter in `folder`, with nothing of this project on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_dnl_imports_torch_and_the_standard_library_and_only_defines():
    tree = ast.parse((HERE / "dnl.py").read_text())
    names = [n for node in ast.walk(tree) if isinstance(node, ast.Import) for n in [a.name for a in node.names]]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) == {"torch"}
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert [node.value.value for node in tree.body if isinstance(node, ast.Expr)] == [dnl.__doc__]


def test_three_packages_are_all_that_is_needed():
    """Promise: nothing compiled, no package but those of requirements.txt. Imports within functions count too."""
    files = [p for p in (*HERE.glob("*.py"), *HERE.glob("paper/*.py")) if not p.name.startswith("test_")]
    nodes = [node for p in files for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))]
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {p.stem for p in files} | {"paper"}
    assert {n.split(".")[0] for n in names} - sys.stdlib_module_names - own == {"torch", "numpy", "PIL"}
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert [re.match("[a-z]+", line)[0] for line in lines] == ["torch", "numpy", "pillow", "pytest"]
    assert not [p for top in (HERE, HERE / "paper") for p in top.iterdir() if p.suffix in (".c", ".cpp", ".cu", ".pyx", ".so")]


def test_importing_dnl_draws_no_random_number_and_changes_no_setting(tmp_path):
    shutil.copy(HERE / "dnl.py", tmp_path)
    done = run_python(textwrap.dedent("""
        import torch
        def state():
            return (torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
                    torch.is_grad_enabled(), torch.backends.cudnn.benchmark)
        before = state()
        import dnl
        if state() != before:
            raise SystemExit("changed")
    """), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {p.name for p in tmp_path.iterdir()} <= {"dnl.py", "__pycache__"}


@pytest.mark.parametrize("name", ["block", "fcn", "unet", pytest.param("export", marks=pytest.mark.slow)])
def test_readme_snippets_run_beside_dnl_alone(name, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    snippet = dict(zip(("block", "fcn", "unet", "export"), snippets, strict=True))[name]
    shutil.copy(HERE / "dnl.py", tmp_path)
    if "torchvision" in snippet and run_python("import torchvision", tmp_path).returncode:
        pytest.skip("torchvision is not there, or does not fit this torch")
    done = run_python(snippet, tmp_path)
    assert done.returncode == 0, done.stderr


def test_torch_hub_lists_explains_and_loads(run_folder, tmp_path):
    """From a folder, and from hub's copy of a repository, which is put there first so that nothing is downloaded."""
    (tmp_path / "someone_dnl_main").symlink_to(HERE)
    done = run_python(textwrap.dedent(f"""
        import torch
        torch.hub.set_dir({str(tmp_path)!r})
        folder, copy, trust = {str(HERE)!r}, "someone/dnl:main", dict(trust_repo=True, skip_validation=True)
        print(torch.hub.list(copy, verbose=False, **trust))
        print("A whole network" in torch.hub.help(copy, "network", **trust))
        print(torch.hub.load(folder, "network", source="local", num_classes=5, preset="released", backbone="resnet18").config)
        print(torch.hub.load(folder, "DenoisedNonLocal", 16, 5, source="local")(torch.ones(1, 16, 3, 4)).shape)
        net = torch.hub.load(copy, "trained", {str(run_folder / "best.pt")!r}, verbose=False, **trust)
        torch.save([net.training, net.state_dict()], "trained.pt")
    """), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['DenoisedNonLocal', 'network', 'trained']", "True",
        str(replace(RELEASED, num_classes=5, backbone="resnet18")), "torch.Size([1, 16, 3, 4])"]
    training, state = torch.load(tmp_path / "trained.pt")
    saved = torch.load(run_folder / "best.pt")["model"]
    assert not training and state.keys() == saved.keys() and all(torch.equal(t, saved[k]) for k, t in state.items())
    with pytest.raises(ValueError, match="preset 'mine': expected paper or released"):
        hubconf.network(preset="mine")


# ------------------------------------------------------------------------------------------------- whole sizes


@pytest.mark.slow
def test_resnet101_at_the_papers_sizes_within_20_gib():
    """A forward of 1024 x 2048 and 1025 x 511, and a training step of 2 x 768 x 768, in a process of their own."""
    done = run_python(f"import sys; sys.path.insert(0, {str(HERE)!r})" + textwrap.dedent("""
        import resource, torch, torch.nn.functional as F
        from dnl import PAPER, build
        last = dict(memory_format=torch.channels_last)  # as in training: half the time
        net = build(PAPER).to(**last)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
        with torch.autocast("cpu", torch.bfloat16):
            label = torch.randint(0, 19, (2, 768, 768))
            loss = sum(F.cross_entropy(o.float(), label) for o in net(torch.randn(2, 3, 768, 768).to(**last)))
            loss.backward()
            optimizer.step()
            net.eval()
            with torch.inference_mode():
                images = [torch.randn(1, 3, *size).to(**last) for size in ((1024, 2048), (1025, 511))]
                shapes = [tuple(net(image).shape) for image in images]
        ok = loss.isfinite().item() and shapes == [(1, 19, 1024, 2048), (1, 19, 1025, 511)]
        print(ok, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    """), HERE)
    assert done.returncode == 0, done.stderr
    ok, peak = done.stdout.split()
    assert ok == "True" and float(peak) < 20  # GiB


# ======================================================================================================= data.py


def status_of(main, *args):
    """The exit status of a script whose main this is."""
    with pytest.raises(SystemExit) as e:
        data.run_script(lambda: main([*map(str, args)]))
    return e.value.code


RNG = np.random.default_rng


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)


def noise(h, w, seed=0, channels=3):
    return RNG(seed).integers(0, 256, (h, w, channels), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three pairs for training and two to validate; three classes, two of them with colours."""
    (tmp_path / "classes.txt").write_text("dry land 200 100 0\nwater 0 0 255\n\nice\n", encoding="utf-8")
    for split, n in (("train", 3), ("val", 2)):
        for i in range(n):
            save(tmp_path / "images" / split / f"a {i}.png", noise(30, 40, i))
            save(tmp_path / "labels" / split / f"a {i}.png", RNG(i).choice(np.uint8([0, 1, 2, 255]), (30, 40)))
    return tmp_path


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """One image of the real size in each split; the label of train has every label id in columns."""
    root = tmp_path_factory.mktemp("cityscapes")
    for split in ("train", "val", "test"):
        stem = f"{split}/ulm/ulm_000000_000019"
        save(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", noise(16, 32).repeat(64, 0).repeat(64, 1))
        ids = np.r_[np.arange(34), [IGNORE] * 6].repeat(52)[:2048].astype(np.uint8)
        save(root / "gtFine" / f"{stem}_gtFine_labelIds.png", np.tile(ids, (1024, 1)))
    return root


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    """JPEGs of mixed sizes, one grey and one CMYK, labels 0..150."""
    root = tmp_path_factory.mktemp("ade") / "ADEChallengeData2016"
    for folder, short in (("training", "train"), ("validation", "val")):
        for i, (mode, h, w) in enumerate((("RGB", 256, 341), ("L", 683, 512), ("CMYK", 300, 300), ("RGB", 400, 257))):
            save(root / "images" / folder / f"ADE_{short}_{i:08}.jpg", Image.fromarray(noise(h, w, i)).convert(mode))
            label = (np.arange(h * w) % 151).astype(np.uint8).reshape(h, w)
            save(root / "annotations" / folder / f"ADE_{short}_{i:08}.png", label)
    return root


def report_of(capsys, *args):
    status = data.main(["check", *map(str, args), "--workers", "0", "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- data sets


def test_classes_and_settings():
    ids = "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33"
    assert " ".join(str(v[0]) for v in data.CITYSCAPES.values()) == ids
    assert data.CITYSCAPES["car"][1:] == (0, 0, 142) and list(data.CITYSCAPES)[13] == "car"
    assert len(set(data.ADE20K)) == 150 and [data.ADE20K[i] for i in (0, 12, 20, 149)] == ["wall", "person", "car", "flag"]
    assert len(set(data.palette(255))) == 255 and min(map(min, data.palette(255))) >= 0
    city, ade = data.SETTINGS["cityscapes"], data.SETTINGS["ade20k"]
    assert (city.lr, city.weight_decay, city.crop, city.batch, city.epochs, city.channels) == (1e-2, 5e-4, 768, 8, 240, 512)
    assert (ade.lr, ade.weight_decay, ade.crop, ade.batch, ade.epochs, ade.relative) == (2e-2, 1e-4, 608, 16, 240, True)


def test_cityscapes_all_splits(cityscapes, capsys):
    status, report = report_of(capsys, "--data", "cityscapes", "--root", cityscapes)
    assert status == 0 and not report["problems"]
    assert {s: r["pairs"] for s, r in report["splits"].items()} == {"train": 1, "val": 1, "test": 1}
    train = report["splits"]["train"]
    assert train["sizes"] == {"1024x2048": 1} and train["modes"] == {"RGB L": 1}
    assert train["pixels"] == [52 * 1024] * 19 and train["ignored"] == (2048 - 19 * 52) * 1024
    assert report["splits"]["test"]["modes"] == {"RGB": 1}
    for split, n in (("train", 1), ("val", 1), ("trainval", 2), ("test", 1)):
        dataset = data.open_dataset("cityscapes", cityscapes, split)
        assert len(dataset) == n and dataset.labelled == (split != "test")
        image, label = data.read(dataset, 0)
        assert image.shape == (1024, 2048, 3) and image.dtype == np.uint8
    assert label is None  # of test, whose files of ground truth are blank
    image, label, jitter = data.sample(data.open_dataset("cityscapes", str(cityscapes), "val"), 0, 0, 0, 768)
    assert image.shape == (3, 768, 768) and label.shape == (768, 768) and jitter.shape == (4,)
    with pytest.raises(InputError, match="no ground truth"):
        data.train_batches(dataset, seed=0, batch=1, start=0, stop=1, rank=0, world=1, crop=64, workers=0)


def test_ade20k_all_splits(ade20k, capsys):
    status, report = report_of(capsys, "--data", "ade20k", "--root", ade20k)
    assert status == 0 and list(report["splits"]) == ["train", "val"]
    assert report["splits"]["val"]["modes"] == {"RGB L": 2, "L L": 1, "CMYK L": 1}
    assert set(report["splits"]["train"]["sizes"]) == {"256x341", "683x512", "300x300", "400x257"}
    sizes = (256 * 341, 683 * 512, 300 * 300, 400 * 257)
    assert report["splits"]["val"]["ignored"] == sum(-(-n // 151) for n in sizes)
    assert report["splits"]["val"]["pixels"][0] == sum(-(-(n - 1) // 151) for n in sizes)
    for split, n in (("train", 4), ("val", 4), ("trainval", 8)):
        dataset = data.open_dataset("ade20k", ade20k, split)
        assert len(dataset) == n
        for index in range(n):
            image, label, _ = data.sample(dataset, 0, 0, index, 96)
            assert image.shape == (3, 96, 96) and label.shape == (96, 96)
    _, label = data.read(dataset, 0)
    assert label.ravel()[:4].tolist() == [255, 0, 1, 2] and label.ravel()[150] == 149


def test_folder(folder, capsys):
    dataset = data.open_dataset("folder", folder, "train")
    assert dataset.classes == ("dry land", "water", "ice") and dataset.colors[:2] == ((200, 100, 0), (0, 0, 255))
    assert dataset.colors[2] == data.palette(255)[2]
    image, label = data.read(dataset, 1)
    assert (image == noise(30, 40, 1)).all() and (label == np.asarray(Image.open(folder / "labels/train/a 1.png"))).all()
    save(folder / "images/test/deep er/b.JPG", noise(8, 8))  # no labels/test: a test split without ground truth
    assert not data.open_dataset("folder", folder, "test").labelled
    assert len(data.open_dataset("folder", folder, "trainval")) == 5
    status, report = report_of(capsys, "--data", "folder", "--root", folder)
    truth = np.bincount(np.concatenate([RNG(i).choice(np.uint8([0, 1, 2, 255]), 1200) for i in range(3)]), minlength=256)
    assert status == 0 and report["splits"]["train"]["pixels"] == truth[:3].tolist()
    assert report["splits"]["train"]["ignored"] == truth[255] and report["splits"]["test"]["pairs"] == 1
    assert data.check("folder", folder, workers=2) == report  # processes change nothing
    assert status_of(data.main, "check", "--data", "folder", "--root", folder, "--workers", 0) == 0
    out = capsys.readouterr()
    assert "dry land" in out.out and "0 wrong files" in out.out and "check train: 3/3, 0 wrong" in out.err


def test_class_weights():
    weights = data.class_weights(np.array([900, 100, 0]))  # shares 0.9 and 0.1
    assert np.allclose(weights[:2] @ [0.9, 0.1], 1) and np.isclose(weights[1] / weights[0], 3) and weights[2] == 1
    assert data.class_weights(np.zeros(2)).tolist() == [1, 1]


def test_warns_of_0_255_masks(folder, capsys):
    for path in folder.glob("labels/*/*.png"):
        save(path, RNG(0).choice(np.uint8([0, 255]), (30, 40)))
    status, report = report_of(capsys, "--data", "folder", "--root", folder)
    assert status == 0 and "hold only 0 and 255" in report["warnings"][0] and "'water'" in report["warnings"][1]


# ---- files to arrays


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("1", "png"), ("LA", "png"), ("RGBA", "png"),
                                          ("CMYK", "tif"), ("RGB", "bmp"), ("RGB", "webp"), ("L", "JPEG")])
def test_image_modes(tmp_path, mode, suffix):
    flat = np.full((6, 5, 3), (200, 60, 20), np.uint8)
    stored = Image.fromarray(flat).quantize(4) if mode == "P" else Image.fromarray(flat).convert(mode)
    if "A" in mode:
        stored.putalpha(7)  # nearly transparent: dropped, not blended
    save(tmp_path / f"x.{suffix}", stored, **({"lossless": True} if suffix == "webp" else {}))
    image = data.decode_image(tmp_path / f"x.{suffix}")
    grey = round(0.299 * 200 + 0.587 * 60 + 0.114 * 20)
    expected = {"L": (grey,) * 3, "LA": (grey,) * 3}.get(mode, (200, 60, 20))
    assert image.shape == (6, 5, 3) and image.dtype == np.uint8
    if mode == "1":
        assert set(np.unique(image)) <= {0, 255}
    else:
        assert np.abs(image.astype(int) - expected).max() <= 2


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    save(tmp_path / "x.png", noise(6, 9), exif=exif)
    assert (data.decode_image(tmp_path / "x.png") == np.rot90(noise(6, 9), -1)).all()


def test_label_modes(folder):
    dataset = data.open_dataset("folder", folder, "val")
    ids = RNG(1).choice(np.uint8([0, 1, 2, 255]), (7, 9))
    palette = Image.fromarray(ids, "L").convert("L").copy()
    palette.putpalette([9, 9, 9] * 256)  # of one colour: the index counts
    for stored in (Image.fromarray(ids), palette, Image.fromarray(ids.astype(np.uint16))):
        save(folder / "x.png", stored)
        assert (data.decode_label(folder / "x.png", dataset) == ids).all()
    save(folder / "x.png", Image.fromarray(ids == 1))
    assert (data.decode_label(folder / "x.png", dataset) == (ids == 1)).all()


def bomb(path):
    """A PNG of a few bytes that says it has 40000 x 40000 pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks))


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def colours(path):
    table = np.uint8([(200, 100, 0), (0, 0, 255)])
    save(path, table[RNG(0).integers(0, 2, (30, 40))])


def pipe(path):
    path.unlink()
    os.mkfifo(path)


IMAGE, LABEL = "images/train/a 1.png", "labels/train/a 1.png"
WRONG_FILES = {  # name: the file, what is done to it, words of the line
    "truncated": (IMAGE, halve, "cannot be read"),
    "wrong checksum": (LABEL, lambda p: p.write_bytes(p.read_bytes()[:-16] + b"oops" + p.read_bytes()[-12:]), "cannot be read"),
    "truncated label": (LABEL, halve, "cannot be read"),
    "not an image": (IMAGE, lambda p: p.write_text("hello"), "cannot be read (UnidentifiedImageError)"),
    "empty": (LABEL, lambda p: p.write_bytes(b""), "empty"),
    "pipe": (IMAGE, pipe, "not a file"),
    "dangling": (IMAGE, lambda p: (p.unlink(), p.symlink_to(p.parent / "gone.png")), "No such file"),
    "bomb": (IMAGE, bomb, "decompression bomb"),
    "16 bit": (IMAGE, lambda p: save(p, np.zeros((30, 40), np.uint16)), "I;16, more than 8 bit"),
    "float": (IMAGE, lambda p: save(p, np.zeros((30, 40), np.float32), format="TIFF"), "mode F"),
    "sizes": (LABEL, lambda p: save(p, np.zeros((40, 30), np.uint8)), "label of 40x30 (height x width), image of 30x40"),
    "range": (LABEL, lambda p: save(p, np.full((30, 40), 3, np.uint8)), "1 values out of range: 3; expected 0..2"),
    "16 bit range": (LABEL, lambda p: save(p, np.full((30, 40), 300, np.uint16)), "out of range: 300;"),
    "anti-aliased": (LABEL, lambda p: save(p, noise(30, 40)[..., 0]), "looks anti-aliased"),
    "jpeg label": (LABEL, lambda p: save(p, np.zeros((30, 40), np.uint8), format="JPEG"), "got a JPEG"),
    "class colours": (LABEL, colours, "its colours are those of the classes"),
    "grey as RGB": (LABEL, lambda p: save(p, np.zeros((30, 40, 3), np.uint8)), "its channels are equal"),
    "RGBA": (LABEL, lambda p: save(p, noise(30, 40, channels=4)), "saved as colours"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file(folder, case, capsys):
    name, spoil, words = WRONG_FILES[case]
    spoil(folder / name)
    dataset = data.open_dataset("folder", folder, "train")  # reads no file
    with pytest.raises(InputError) as error:
        data.sample(dataset, 0, 0, 1, 16)
    line = str(error.value)
    assert line.startswith(str(folder / name) + ": ") and words in line and "\n" not in line
    status, report = report_of(capsys, "--data", "folder", "--root", folder)
    assert status == 1 and report["problems"] == [line] and report["splits"]["train"]["pairs"] == 2


def test_wrong_values_by_data_set(cityscapes, ade20k, folder):
    for name, root, value, words in (("cityscapes", cityscapes, 34, "_gtFine_labelIds.png"),
                                     ("ade20k", ade20k, 151, "ADEChallengeData2016")):
        save(folder / "x.png", np.full((2, 2), value, np.uint8))
        with pytest.raises(InputError, match=f"out of range: {value}; .*{words}"):
            data.decode_label(folder / "x.png", data.open_dataset(name, root, "train"))


def remove(path):
    for file in path.iterdir():
        file.unlink()


WRONG_TREES = {  # name: what is done to the root, status of check, words of the line
    "no labels folder": (lambda r: (r / "labels").rename(r / "label"), 2, "labels/train: no such folder"),
    "empty split": (lambda r: (remove(r / "images/val"), remove(r / "labels/val")), 2, "the split val is empty"),
    "image alone": (lambda r: (r / "labels/val/a 1.png").unlink(), 1, "images/val/a 1.png: image without label"),
    "label alone": (lambda r: (r / "images/val/a 1.png").unlink(), 1, "labels/val/a 1.png: label without image"),
    "a name twice": (lambda r: save(r / "images/val/a 1.JPG", noise(3, 3)), 2, "one file for each name"),
    "link out": (lambda r: (r / "images/val/b.png").symlink_to("/etc/passwd"), 2, "a link to a folder or out"),
    "classes linked": (lambda r: ((r / "classes.txt").unlink(), (r / "classes.txt").symlink_to("/etc/passwd")), 2,
                       "classes.txt: a link out of the data set"),
    "link of a folder": (lambda r: (r / "images/val/b").symlink_to("/etc"), 2, "a link to a folder or out"),
    "no classes.txt": (lambda r: (r / "classes.txt").unlink(), 2, "classes.txt: cannot be read (FileNotFoundError)"),
    "no class": (lambda r: (r / "classes.txt").write_text("\n"), 2, "no class in it"),
    "not text": (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfe"), 2, "expected UTF-8"),
    "colour": (lambda r: (r / "classes.txt").write_text("a\nb 0 0 256"), 2, "line 2: got the colour 0 0 256"),
    "negative": (lambda r: (r / "classes.txt").write_text("b -1 0 0"), 2, "line 1: got the colour -1 0 0"),
    "no name": (lambda r: (r / "classes.txt").write_text("a\n\n1 2 3"), 2, "line 3: got the name ''"),
    "same name": (lambda r: (r / "classes.txt").write_text("a\na 1 2 3"), 2, "line 2: got the name 'a'"),
    "256 classes": (lambda r: (r / "classes.txt").write_text("\n".join(map(str, range(256)))), 2, "line 256: more than 255"),
}


@pytest.mark.parametrize("case", WRONG_TREES)
def test_wrong_tree(folder, case, capsys):
    spoil, expected, words = WRONG_TREES[case]
    spoil(folder)
    with pytest.raises(InputError) as error:
        for split in ("train", "val"):
            data.open_dataset("folder", folder, split)
    assert words in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)
    assert status_of(data.main, "check", "--data", "folder", "--root", folder, "--workers", 0) == expected
    out, err = capsys.readouterr()
    lines = err.splitlines() if expected == 2 else [n for n in out.splitlines() if n.startswith("wrong: ")]
    assert len(lines) == 1 and str(error.value) in lines[0]


@pytest.mark.parametrize("sign", ["images/ADE/training/x.jpg", "index_ade20k.mat", "images/training/a/abbey/x.jpg",
                                  "images/training/ADE_train_1_seg.png", "ADE20K_2016_07_26/images/training/x.jpg"])
def test_full_ade20k_is_recognised(tmp_path, sign, capsys):
    save(tmp_path / sign, noise(4, 4), format="PNG")
    assert status_of(data.main, "check", "--data", "ade20k", "--root", tmp_path) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "full ADE20K" in line and "ADEChallengeData2016.zip" in line and str(tmp_path) in line


def test_linked_folders(cityscapes, tmp_path):
    """One that links to a folder it lies in adds nothing; two links to one folder are two names of it, in whatever order the system
    lists them; and --root may be spelt by a way through the folders themselves."""
    root = shutil.copytree(cityscapes, tmp_path / "c")
    before = [item.files for item in data.open_dataset("cityscapes", root, "train").items]
    for top in ("leftImg8bit/train", "gtFine/train"):
        for name in ("again", "and_again"):
            (root / top / name).symlink_to(root / top)
    assert [item.files for item in data.open_dataset("cityscapes", root, "train").items] == before
    for top, order in (("leftImg8bit/train", 1), ("gtFine/train", -1)):
        for name in ("one", "two")[::order]:
            (root / top / name).symlink_to("ulm")
    for way in (root, root / "leftImg8bit" / "train" / ".." / ".."):
        assert len(data.open_dataset("cityscapes", way, "train").items) == 3 * len(before)


def test_root_one_level_off(ade20k):
    for root in (ade20k.parent, ade20k / "images", ade20k / "images/training"):
        with pytest.raises(InputError) as error:
            data.open_dataset("ade20k", root, "train")
        assert str(error.value).endswith(f"give --root {ade20k}")
    for name, root in (("nothing", None), ("folder", None), ("folder", ade20k / "gone"), ("folder", "x" * 300)):
        with pytest.raises(InputError, match="got data set 'nothing'|--root"):
            data.open_dataset(name, root, "train")


def test_a_folder_without_the_name_of_its_data_set(folder):
    for script in (data.main, train.main):
        argv = ["check", "--root", str(folder)] if script is data.main else ["--root", str(folder)]
        with pytest.raises(InputError, match="synthetic scenes are made in memory: name what lies there by --data"):
            script(argv)


def test_a_split_that_is_not_there(folder):
    with pytest.raises(InputError, match="images/test: no such folder; .* name another split, or add this one"):
        data.open_dataset("folder", folder, "test")


def test_odd_names(folder):
    odd = ["новый снимок", "with\nnewline", "写真", "tab\t", "q'uote\"", os.fsdecode(b"\xff\xfe")]
    for stem in odd:
        save(folder / "images/val" / f"{stem}.png", noise(5, 5))
        save(folder / "labels/val" / f"{stem}.png", np.zeros((5, 5), np.uint8))
    dataset = data.open_dataset("folder", folder, "val")
    assert {i.image.stem for i in dataset.items} == {"a 0", "a 1", *odd}
    for index, item in enumerate(dataset.items):
        data.read(dataset, index)
        item.image.unlink()  # vanished while training
        with pytest.raises(InputError, match="No such file") as error:
            data.read(dataset, index)
        assert str(error.value).isprintable() and str(error.value).encode()
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


# ---- mutated files
#
# CASES of each kind, drawn from (kind, number of the case) alone: `FAULT_CASES=20000 python -m pytest -s -k mutated` runs more
# and tells the counts. A case is refused by one line that names the file, or its result is one that the test computes itself.


CASES = int(os.environ.get("FAULT_CASES", 2000))


class Hang(BaseException):
    """Not an Exception, so that what takes decoders' errors for broken files does not take this for one."""


def hang(number, frame):
    raise Hang("10 seconds")


def refused(load, path, case):
    """load()'s result, or None where one line that names the file refuses it. All else, and 10 seconds, is a failure."""
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(10)
    try:
        return load()
    except InputError as e:
        assert str(path) in str(e) and str(e).isprintable() and len(str(e)) < 20_000, (case, str(e))
    except BaseException as e:
        raise AssertionError(f"{case}: {type(e).__name__}: {e}") from e
    finally:
        signal.alarm(0)


def mutated(rng, good, other):
    """One to three changes of the bytes of a file: flips, cuts, insertions, blocks twice, zeroed or left out, the end of another."""
    b = bytearray(good)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(b) + 1))
        end = min(len(b), at + int(2 ** rng.uniform(0, 9)))
        kind = rng.integers(7)
        if kind == 0 and at < len(b):
            b[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del b[at:]
        elif kind == 2:
            b[at:at] = rng.bytes(end - at)
        elif kind == 3:
            b[at:at] = b[at:end]
        elif kind == 4:
            b[at:end] = bytes(end - at)
        elif kind == 5:
            del b[at:end]
        else:
            b[at:] = other[int(rng.integers(len(other) + 1)) if rng.integers(2) else at:]
    return bytes(b)


def settled(kind, counts):
    """Tells the counts, of which a mutator that does nothing, or refuses all, has too few."""
    print(f"\n{kind}: {sum(counts.values())} cases, {counts['correct']} correct, {counts['refused']} refused, 0 other")
    assert sum(counts.values()) >= CASES and min(counts["correct"], counts["refused"]) >= CASES // 20, counts


def written(picture, **options):
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def png_of_bits(values, depth, kind):
    """A PNG of samples (H, W, channels) of `depth` bit; kind 0 is grey, 2 is RGB. Pillow writes none of 2, 4 or 3 x 16."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=3)[..., 16 - depth:]
    rows = np.packbits(bits.reshape(len(values), -1), axis=1)
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, 0)
    chunks = (b"IHDR" + size, b"IDAT" + zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes()), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


MODES = {  # of each format, that Pillow keeps without loss
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "BMP": ("1", "L", "P", "RGB"), "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("L",), "PPM": ("RGB",)}
UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),  # EXIF 2.3
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


def drawn_image(rng, h, w, mode, form, turn):
    """(bytes, what they should be decoded to: (H, W, 3) uint8, or None to be refused, or Ellipsis where Pillow is to say)."""
    colors, v = noise(256, 3, rng)[..., 0], noise(h, w, rng, 4)
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 1)
    stored = {"1": v[..., 0] > 127, "I;16": v[..., 0].astype(np.uint16) * 257, "I": v[..., 0].astype(np.int32),
              "F": v[..., 0].astype(np.float32)}.get(mode, v[..., :channels] if channels > 1 else v[..., 0])
    picture = Image.fromarray(stored, "CMYK" if mode == "CMYK" else None)
    shown = {"1": np.where(v[..., :1] > 127, 255, 0).repeat(3, 2), "RGB": v[..., :3], "RGBA": v[..., :3], "P": colors[v[..., 0]],
             "CMYK": np.rint((255 - v[..., :3].astype(float)) * (255 - v[..., 3:]) / 255)}.get(mode, v[..., :1].repeat(3, 2))
    if mode == "P":
        picture.putpalette(colors.tobytes())
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"TIFF": {"compression": ("raw", "tiff_lzw", "tiff_deflate")[rng.integers(3)]},
               "WEBP": {"lossless": True, "exact": True}}.get(form, {})
    raw = written(picture, format=form, **options, **({} if form in ("BMP", "GIF", "PPM") else {"exif": exif}))
    if form in ("GIF", "PPM") or mode[0] in "IF":
        return raw, None
    return raw, ... if form == "JPEG" else (shown if form == "BMP" else UPRIGHT[turn](shown))


def drawn_bits(rng, h, w):
    """As drawn_image, of the depths that Pillow does not write: grey is scaled to 255, of 16 bit the high byte counts."""
    depth, kind = ((2, 0), (4, 0), (16, 2))[rng.integers(3)]
    values = rng.integers(0, 2 ** depth, (h, w, 3 if kind else 1))
    shown = values // 256 if kind else (values * 255 // (2 ** depth - 1)).repeat(3, 2)
    return png_of_bits(values, depth, kind), shown


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_mutated_images(tmp_path):
    """PNG has checksums: the image that was written, or refused. The others: what Pillow decodes, or refused."""
    path, counts = tmp_path / "an image", Counter()
    for number in range(CASES):
        rng = RNG((1, number))
        h, w = rng.integers(1, 40, 2)
        form = list(MODES)[rng.integers(len(MODES))] if rng.integers(2) else "PNG"
        mode, turn = MODES[form][rng.integers(len(MODES[form]))], int(rng.integers(1, 9))
        bits = form == "PNG" and rng.random() < 0.2
        (raw, right), (other, second) = (drawn_bits(r, h, w) if bits else drawn_image(r, h, w, mode, form, turn)
                                         for r in (RNG((2, number)), RNG((2, number)) if bits else RNG((3, number))))
        changed = number % 3 > 0
        path.write_bytes(rng.bytes(int(rng.integers(200))) if number % 50 == 0 else mutated(rng, raw, other) if changed else raw)
        got, case = refused(lambda: data.decode_image(path), path, f"image {number}"), f"image {number}: {form} {mode}"
        counts["refused" if got is None else "correct"] += 1
        if got is None:
            assert changed or number % 50 == 0 or right is None, case
            continue
        assert got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3 and right is not None, case
        if changed and form != "PNG" or right is ...:
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                image.info.pop("transparency", None)
                right = second = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        near = 1 if mode == "CMYK" else 0
        assert any(got.shape == r.shape and np.abs(got - r.astype(int)).max() <= near for r in (right, second)), case
    settled("images", counts)


LABEL_VALUES = {  # of each data set: stored value to train id, those that may be
    "folder": {0: 0, 1: 1, 2: 2, 255: 255},
    "ade20k": {0: 255, **{v: v - 1 for v in range(1, 151)}},
    "cityscapes": {**dict.fromkeys([*range(34), 255], 255),
                   **{int(v): i for i, v in enumerate("7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33".split())}}}


def drawn_label(rng, h, w, name, store):
    """(bytes, their train ids, or None to be refused)."""
    values = rng.choice(list(LABEL_VALUES[name]), (h, w))
    for _ in range(rng.integers(3) if store in ("L", "P", "I;16") else 0):
        values[rng.integers(h), rng.integers(w)] = rng.integers(-1, 2 ** 16) % (2 ** 16 if store == "I;16" else 256)
    if store in ("grey of 2", "grey of 4"):
        return png_of_bits(values[..., None] % 4, int(store[-1]), 0), None
    values = values % 2 if store == "1" else values
    picture = Image.fromarray(values.astype({"1": bool, "I;16": np.uint16}.get(store, np.uint8)))
    if store == "P":
        picture.putpalette(rng.bytes(768))
    elif store == "blurred":
        picture = Image.fromarray(noise(h + 4, w + 4, rng)[..., 0]).resize((w, h), Image.Resampling.BILINEAR)
        values = np.asarray(picture)
    elif store in ("RGB", "RGBA", "LA", "RGB of classes"):
        picture = Image.fromarray(np.uint8([(255, 0, 0), (0, 255, 0)])[values % 2]) if "of" in store else picture.convert(store)
    form = store if store in ("JPEG", "TIFF", "BMP") else "PNG"
    size = values.shape if store != "other size" else (h + 1, w)
    allowed = store in ("L", "P", "1", "I;16", "blurred") and set(values.ravel().tolist()) <= set(LABEL_VALUES[name])
    picture = picture.resize(size[::-1], Image.Resampling.NEAREST) if store == "other size" else picture
    table = np.zeros(2 ** 16, np.uint8)
    table[list(LABEL_VALUES[name])] = list(LABEL_VALUES[name].values())
    return written(picture, format=form), table[values] if allowed else None


def test_mutated_labels(tmp_path):
    """The value table's result of the array that was written, or refused: where it holds what may not be, always."""
    path, counts = tmp_path / "a label", Counter()
    sets = {name: data.DataSet(name, "train", *((("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255))) if name == "folder" else
                                                data._classes(name, None)), ()) for name in LABEL_VALUES}
    stores = ("L", "L", "P", "1", "I;16", "RGB", "RGBA", "LA", "RGB of classes", "blurred", "JPEG", "TIFF", "BMP", "grey of 2",
              "grey of 4", "other size")
    for number in range(CASES):
        rng = RNG((4, number))
        (h, w), name = rng.integers(2, 40, 2), list(sets)[rng.integers(3)]
        store = stores[rng.integers(len(stores)) if number % 2 else rng.integers(5)]
        (raw, right), (other, second) = (drawn_label(RNG((s, number)), h, w, name, store) for s in (5, 6))
        changed = number % 3 > 0
        path.write_bytes(mutated(rng, raw, other) if changed else raw)
        save(tmp_path / "image.png", noise(h, w))
        got = refused(lambda: data.decode(sets[name], data.Item(tmp_path / "image.png", path))[1], path, f"label {number}")
        case = f"label {number}: {name} {store}"
        counts["refused" if got is None else "correct"] += 1
        if got is None:
            assert changed or right is None, case
        else:
            assert got.dtype == np.uint8 and any(r is not None and np.array_equal(got, r) for r in (right, second)), case
    settled("labels", counts)


def parsed_classes(raw):
    """classes.txt by one regular expression: [(name, colour or None)], or None to be refused."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None
    lines = [line.strip() for line in text.split("\n")]
    rows = [re.fullmatch(r"(?:(.*\S)\s+)?(-?[0-9]+)\s+(-?[0-9]+)\s+(-?[0-9]+)|(.*)", line, re.S).groups()
            for line in lines if line and line[0] != "#"]
    names, colors = [r[4] or r[0] or "" for r in rows], [r[1:4] if r[1] else None for r in rows]
    legal = 0 < len(names) == len(set(names)) < 256 and all(n and n.isprintable() for n in names)
    legal = legal and all(len(v) < 4 and 0 <= int(v) <= 255 for c in colors if c for v in c)
    return list(zip(names, [c and tuple(map(int, c)) for c in colors])) if legal else None


CLASS_LINES = ["road 128 64 128", "tree", "дом 1 2 3", "a  b\t0 0 0", "# note", "", "   ", "x 256 0 0", "y -1 2 3", "1 2 3", "z 007 1 1",
               "w 1 2", "q 1 2 3 4", "nul\0name", "esc\x1b[2J 1 1 1", "long " + "9" * 5000 + " 1 1", "\u202eabc 1 1 1", "tab\there",
               "zero\u200bwidth", "\u00a0nbsp 1 1 1", "x\u2028y", "٣ ٣ ٣ ٣", "1e2 1 1 1", "+1 1 1", "tree 1 1 1", "é", "e\u0301"]
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1251", "utf-7")


def test_mutated_class_lists(tmp_path):
    path, counts, defaults = tmp_path / "classes.txt", Counter(), data.palette(255)
    for number in range(CASES):
        rng = RNG((7, number))
        many = int(rng.integers(240, 260)) if number % 10 == 0 else 0
        lines = [f"class {i} {i} {i} {i}" if number % 20 else f"class {i}" for i in range(many)]
        lines += [CLASS_LINES[i] for i in rng.integers(0, len(CLASS_LINES) if number % 2 else 8, rng.integers(0, 6))]
        lines += [f"c{i} {i} 2 3" for i in range(rng.integers(0, 4))]
        raw = ("\n", "\r\n", "\r")[rng.integers(3)].join(lines).encode(ENCODINGS[rng.integers(len(ENCODINGS))], "replace")
        path.write_bytes(mutated(rng, raw, b"a 1 2 3\nb 4 5 6\n") if number % 3 == 0 else raw)
        got, right = refused(lambda: data.read_classes(path), path, f"class list {number}"), parsed_classes(path.read_bytes())
        counts["refused" if got is None else "correct"] += 1
        assert (got is None) == (right is None), f"class list {number}: {got} for {right}"
        if got is not None:
            names, colors = zip(*right)
            assert got[0] == names and len(got[1]) == len(names), f"class list {number}"
            assert all(c == (d or defaults[i]) for i, (c, d) in enumerate(zip(got[1], colors))), f"class list {number}"
    settled("class lists", counts)


def test_check_names_each_of_a_hundred_broken_files(tmp_path):
    """A byte between a PNG's signature and its end is changed in every second file: just those are listed, by name."""
    (tmp_path / "classes.txt").write_text("a\nb\n")
    broken = set()
    for number in range(200):
        path = tmp_path / ("images", "labels")[number % 2] / ("train", "val")[number // 2 % 2] / f"{number // 4}.png"
        save(path, noise(20, 30, number) if number % 2 == 0 else RNG(number).integers(0, 2, (20, 30), np.uint8))
        if number % 4 in (0, 3):  # of each pair one
            raw = bytearray(path.read_bytes())
            raw[RNG(number).integers(8, len(raw) - 12)] ^= 1 << number % 8
            path.write_bytes(raw)
            broken.add(str(path))
    status, out, err = script("data.py", "check", "--data", "folder", "--root", tmp_path, "--workers", 2)
    wrong = [line.removeprefix("wrong: ") for line in out.splitlines() if line.startswith("wrong: ")]
    assert status == 1 and "Traceback" not in err and "100 wrong files" in out and len(wrong) == len(broken) == 100
    assert {line.split(": ")[0] for line in wrong} == broken


# ---- augmentation


def ramps(h, w):
    """Image whose red is the column and green the row, and both as labels."""
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    return np.stack([x, y, 0 * x], 2), x, y


@pytest.mark.parametrize("relative, crop", [(False, 96), (False, 300), (True, 64)])
def test_label_and_image_stay_aligned(relative, crop):
    image, columns, rows = ramps(120, 200)
    steps, flips = [], []
    for seed in range(60):
        out, x = data.augment(image, columns, crop, (0.5, 2), relative, RNG(seed))
        same, y = data.augment(image, rows, crop, (0.5, 2), relative, RNG(seed))
        assert (out == same).all() and out.shape == (crop, crop, 3) and x.shape == (crop, crop)
        known = x != IGNORE
        assert (known == (y != IGNORE)).all() and (out[~known] == data.PAD).all()
        assert known.any(1).sum() * known.any(0).sum() == known.sum()  # a box
        # At a shrunken border the bilinear filter is cut off, hence 1.5 and not 1.
        assert np.abs(out[..., 0] - x.astype(float))[known].max() <= 1.5
        assert np.abs(out[..., 1] - y.astype(float))[known].max() <= 1.5
        line = x[0][known[0]].astype(float)
        steps.append(abs(line[-1] - line[0]) / (len(line) - 1) if len(line) > 1 else 1)
        flips.append(line[-1] < line[0])
    scales = 1 / np.array(steps) / (crop / 120 if relative else 1)
    assert 0.45 < scales.min() < 0.65 and 1.7 < scales.max() < 2.1 and 0.3 < np.mean(flips) < 0.7


@pytest.mark.parametrize("seed", range(6))
def test_box_equals_resizing_the_whole(seed):
    image, rng = noise(90, 130, seed), RNG(seed)
    h, w = round(90 * (scale := (0.5, 0.77, 1, 1.3, 1.9, 2)[seed])), round(130 * scale)
    y, x = data._window(90, h, 48, rng), data._window(130, w, 48, rng)
    whole = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)).astype(int)
    top, left = round(y.start / y.pixel), round(x.start / x.pixel)
    expected = whole[top:top + y.count, left:left + x.count]
    assert y.count == min(48, h) and np.abs(data._resize(image, y, x) - expected).max() <= 1


def test_color_jitter_equals_loops():
    images = torch.from_numpy(RNG(0).uniform(60, 190, (3, 3, 4, 5)))
    factors = torch.tensor([[1, 1, 1, 0], [1.2, 0.8, 1.1, 0.04], [0.75, 1.25, 0.7, -0.05]])
    out = data.color_jitter(images, factors)
    assert out.dtype == torch.float32 and torch.allclose(out[0], images[0].float(), atol=1e-3)
    luma = np.array([0.299, 0.587, 0.114])
    for b, (brightness, contrast, saturation, hue) in enumerate(factors.double().tolist()):
        pixels = images[b].flatten(1).T.numpy() * brightness
        mean = np.mean([luma @ p for p in pixels])
        for i, p in enumerate(pixels):
            p = mean + contrast * (p - mean)
            grey = luma @ p
            r, g, b_ = grey + saturation * (p - grey)
            u, v = 0.5959 * r - 0.2746 * g - 0.3213 * b_, 0.2115 * r - 0.5227 * g + 0.3112 * b_
            c, s = np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)
            yiq = np.array([grey, c * u - s * v, s * u + c * v])
            p = np.linalg.solve([luma, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], yiq)
            assert np.allclose(out[b].flatten(1)[:, i], p.clip(0, 255), atol=1e-2)
    extreme = data.color_jitter(noise_tensor(), torch.tensor([[1.3, 1.3, 1.3, 0.05]]))
    assert extreme.min() == 0 and extreme.max() == 255
    draws = torch.stack([data.draw_jitter(RNG(i)) for i in range(300)])
    assert (draws[:, :3] - 1).abs().max() <= 0.3 and draws[:, 3].abs().max() <= 0.05 and draws.std(0).min() > 0.02


def noise_tensor():
    return torch.from_numpy(noise(20, 20)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("seed", range(4))
def test_a_crop_of_one_pixel(seed):
    """Flipped or not, it has no stride that torch would refuse."""
    x, y, _ = data.sample(data.open_dataset("synthetic", None, "train"), seed, 0, 0, 1)
    assert x.shape == (3, 1, 1) and y.shape == (1, 1)


def test_normalize():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (noise_tensor() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(data.normalize(noise_tensor()), expected, atol=1e-5)


# ---- loading


def batches(dataset, **options):
    return list(data.train_batches(dataset, **{"seed": 3, "batch": 6, "start": 0, "stop": 4, "rank": 0, "world": 1,
                                               "crop": 32, "workers": 0, **options}))


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


def scenes(n, split="train"):
    dataset = data.open_dataset("synthetic", None, split)
    return replace(dataset, items=dataset.items[:n])


def test_samples_depend_on_seed_epoch_and_index_alone():
    dataset = scenes(14)  # two steps an epoch, two images left over
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = batches(dataset)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [tuple(t.shape) for t in whole[0]] == [(6, 3, 32, 32), (6, 32, 32), (6, 4)]
    assert [t.dtype for t in whole[0]] == [torch.uint8, torch.uint8, torch.float32]
    assert equal(whole, batches(dataset, workers=2)) and equal(whole[3:], batches(dataset, start=3, workers=2))
    assert not equal(whole, batches(dataset, seed=4)) and not equal(whole[:2], whole[2:])
    draws = [data.sample(dataset, *key, 32)[2] for key in ((3, 0, 1), (3, 1, 1), (4, 0, 1), (3, 0, 2))]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    for world in (2, 3):
        shares = [batches(dataset, world=world, rank=rank) for rank in range(world)]
        assert equal(whole, [[torch.cat(t) for t in zip(*step)] for step in zip(*shares)])
    for epoch, index in data.step_items(3, seed=3, n=14, batch=6)[:1]:
        assert all(torch.equal(a[0], b) for a, b in zip(whole[3], data.sample(dataset, 3, epoch, index, 32)))


def test_order_of_steps():
    steps = [data.step_items(s, seed=1, n=10, batch=3) for s in range(6)]
    assert [e for step in steps for e, _ in step] == [0] * 9 + [1] * 9
    first, second = ([i for step in part for _, i in step] for part in (steps[:3], steps[3:]))
    assert len(set(first)) == len(set(second)) == 9 and first != second and set(first) <= set(range(10))
    assert sorted(data.order(5, 2, 100)) == list(range(100)) and data.order(5, 2, 100).tolist() != list(range(100))
    with pytest.raises(InputError, match="4 images are fewer than one batch of 8"):
        data.train_batches(scenes(4), seed=0, batch=8, start=0, stop=1, rank=0, world=1, crop=8, workers=0)


def test_start_is_instant(monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "sample", lambda *a: drawn.append(a) or (torch.zeros(1),) * 3)
    next(data.train_batches(scenes(14), seed=0, batch=6, start=10**6, stop=10**6 + 9, rank=0, world=1, crop=8, workers=0))
    assert len(drawn) == 6 and drawn[0][2] == 500_000


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_hand_on_errors(folder, workers):
    halve(folder / IMAGE)
    dataset = data.open_dataset("folder", folder, "train")
    with pytest.raises(InputError) as error:
        batches(dataset, batch=3, stop=1, workers=workers)
    with pytest.raises(InputError) as other:
        list(data.eval_images(dataset, 0, 1, workers))
    assert str(error.value) == str(other.value) and str(error.value).startswith(str(folder / IMAGE))
    assert not multiprocessing.active_children()  # though both errors, and what their tracebacks hold, are still here


@pytest.mark.parametrize("change, words", [
    (lambda p: save(p, np.zeros((30, 40), np.uint8)), "changed since the data set was opened"),  # whole, but another
    (lambda p: os.utime(p, ns=(0, 10**9)), "changed since the data set was opened"),
    (lambda p: p.unlink(), "cannot be read (No such file"), (halve, "cannot be read")])
def test_files_that_change_while_training_are_named(folder, change, words):
    """Two workers, and the file is read in the second epoch only after it was changed."""
    dataset = data.open_dataset("folder", folder, "train")
    steps = data.train_batches(dataset, seed=0, batch=3, start=0, stop=50, rank=0, world=1, crop=16, workers=2)
    next(steps)
    change(folder / LABEL)
    with pytest.raises(InputError) as error:
        for _ in steps:
            pass
    assert str(error.value).startswith(f"{folder / LABEL}: {words}") and "\n" not in str(error.value)
    if "changed" in words:  # opened again, it is what it is
        assert data.read(data.open_dataset("folder", folder, "train"), 1)[1].shape == (30, 40)


def test_workers_outlive_signals_to_the_group_from_their_first_moment(monkeypatch):
    numbers, ready = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM), data._leave_signals

    def signalled(worker):  # before the handlers are set
        for number in numbers:
            os.kill(os.getpid(), number)
        ready(worker)

    monkeypatch.setattr(data, "_leave_signals", signalled)
    steps = data.train_batches(scenes(6), seed=0, batch=6, start=0, stop=40, rank=0, world=1, crop=8, workers=2)
    next(steps)
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in numbers:
            os.kill(worker.pid, number)
    assert len(workers) == 2 and len(list(steps)) == 39
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()).intersection(numbers)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_each_image_once(world, folder):
    assert sorted(i for rank in range(world) for i in data.eval_items(7, rank, world)) == list(range(7))
    dataset = scenes(4, "val")
    for rank in range(world):
        for index, image, label in data.eval_images(dataset, rank, world, workers=rank):
            truth = data.scene("val", index)
            assert (image.permute(1, 2, 0).numpy() == truth[0]).all() and (label.numpy() == truth[1]).all()
    save(folder / "images/test/b.png", noise(5, 6))
    (index, image, label), = data.eval_images(data.open_dataset("folder", folder, "test"), 0, 1, 0)
    assert index == 0 and image.shape == (3, 5, 6) and label is None


# ---- synthetic scenes


def test_scenes(capsys):
    status, report = report_of(capsys, "--data", "synthetic", "--split", "val")
    assert status == 0 and min(report["splits"]["val"]["pixels"]) > 0.02 * 64 * 128 * 160
    for split, n in (("train", 512), ("val", 64), ("test", 16), ("trainval", 576)):
        assert len(data.open_dataset("synthetic", None, split)) == n
    images = [data.read(data.open_dataset("synthetic", None, s), i)[0].tobytes()
              for s in ("train", "val", "test") for i in (0, 1)]
    assert len(set(images)) == 6 and data.scene("val", 1)[0].tobytes() == images[3]
    present = np.mean([np.bincount(data.scene("train", i)[1].ravel(), minlength=8) > 0 for i in range(60)], 0)
    assert len(present) == 8 and present.min() > 0.6


@pytest.mark.parametrize("radius", [0, 4])
def test_colour_alone_does_not_tell_the_class(radius):
    """The nearest class-mean colour, of the pixel or of its surroundings, fitted on train."""
    def colours(index, split):
        image, label = data.scene(split, index)
        pixels = torch.from_numpy(image).permute(2, 0, 1).double()
        mean = torch.nn.functional.avg_pool2d(pixels, 2 * radius + 1, 1, radius, count_include_pad=False)
        return mean.flatten(1).T[::7], torch.from_numpy(label).long().flatten()[::7]
    train = [torch.cat(x) for x in zip(*(colours(i, "train") for i in range(60)))]
    centres = torch.stack([train[0][train[1] == c].mean(0) for c in range(8)])
    confusion = torch.zeros(64)
    for index in range(64):
        pixels, label = colours(index, "val")
        confusion += torch.bincount(8 * label + torch.cdist(pixels, centres).argmin(1), minlength=64)
    confusion = confusion.view(8, 8)
    iou = confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())
    assert iou.mean() < 0.30


# ---- the decoded copy


def test_cache_holds_the_same_samples(folder, tmp_path):
    plain, cached = (data.open_dataset("folder", folder, "train", c) for c in (None, tmp_path / "cache"))
    assert cached.cached.stat().st_size == 3 * 30 * 40 * 4
    for i in range(len(plain)):
        assert all(np.array_equal(a, b) for a, b in zip(data.read(plain, i), data.read(cached, i)))
        assert all(torch.equal(a, b) for a, b in zip(data.sample(plain, 0, 1, i, 24), data.sample(cached, 0, 1, i, 24)))
    a, b = (list(data.eval_images(d, 0, 1, 0)) for d in (plain, cached))
    assert all(torch.equal(torch.as_tensor(x[1]), torch.as_tensor(y[1])) for x, y in zip(a, b))


def test_cache_is_made_once_and_again_after_a_change(folder, tmp_path, monkeypatch):
    made, build = [], data._write_cache
    monkeypatch.setattr(data, "_write_cache", lambda *a: made.append(a) or build(*a))
    first = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    assert len(made) == 1 and data.open_dataset("folder", folder, "val", tmp_path / "cache") == first and len(made) == 1
    save(folder / "images" / "val" / "a 0.png", noise(30, 40, 77))
    os.utime(folder / "images" / "val" / "a 0.png", (1, 1))
    again = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    assert len(made) == 2 and np.array_equal(data.read(again, 0)[0], noise(30, 40, 77))


def test_half_a_cache_is_none(folder, tmp_path, monkeypatch):
    """A build that fails (a wrong file, a full disk) leaves nothing that a later one would take for whole."""
    good = (folder / "labels" / "val" / "a 1.png").read_bytes()
    save(folder / "labels" / "val" / "a 1.png", np.full((30, 40), 77, np.uint8))
    with pytest.raises(InputError, match="a 1.png"):
        data.open_dataset("folder", folder, "val", tmp_path / "cache")
    (folder / "labels" / "val" / "a 1.png").write_bytes(good)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left.*make room"):
        data.open_dataset("folder", folder, "val", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json")) and not list((tmp_path / "cache").glob("*.part"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(data.open_dataset("folder", folder, "val", tmp_path / "cache").places) == 2


def test_cut_cache_is_made_again(folder, tmp_path):
    first = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    for spoil in (lambda: halve(first.cached), lambda: first.cached.with_suffix(".json").write_text("[[0, 30"),
                  lambda: first.cached.with_suffix(".json").write_text("[]"),
                  lambda: first.cached.with_suffix(".json").write_text(json.dumps([first.places[1], first.places[0]])),
                  lambda: first.cached.with_suffix(".json").write_text(json.dumps([[0, 60, 40]])),
                  lambda: first.cached.with_suffix(".json").write_text(json.dumps([[0, 30.0, 40], first.places[1]])),
                  lambda: first.cached.with_suffix(".json").write_text(json.dumps([["0", 30, 40], [4800, 30]]))):
        spoil()
        again = data.open_dataset("folder", folder, "val", tmp_path / "cache")
        assert again == first and np.array_equal(data.read(again, 1)[0], noise(30, 40, 1))


def test_whole_cache_may_lie_where_nothing_can_be_written(folder, tmp_path, monkeypatch):
    """The superuser writes everywhere: so the system's calls refuse in its place."""
    first = data.open_dataset("folder", folder, "val", tmp_path / "cache")
    monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert data.open_dataset("folder", folder, "val", tmp_path / "cache") == first
    with pytest.raises(InputError, match="--cache .*Read-only file system"):
        data.open_dataset("folder", folder, "train", tmp_path / "cache")


def test_cache_of_synthetic_scenes_is_refused(tmp_path):
    with pytest.raises(InputError, match="synthetic scenes are made in memory: leave --cache out"):
        data.open_dataset("synthetic", None, "train", tmp_path)


def test_cache_of_several_ranks_at_once(folder, tmp_path):
    with ProcessPoolExecutor(4) as pool:
        sets = list(pool.map(data.open_dataset, *zip(*[("folder", folder, "val", tmp_path / "cache")] * 4)))
    assert all(s == sets[0] for s in sets) and len(list((tmp_path / "cache").glob("*.bin"))) == 1


# ------------------------------------------------------------------------------------- training and evaluating

TINY = ["--data", "folder", "--backbone", "resnet18", "--channels", "16", "--crop", "48", "--batch", "4", "--epochs", "2",
        "--workers", "0", "--log-every", "1", "--amp", "off"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What these tests kill is a process, never the power: fsync would be most of their time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """A folder data set of 3 classes: 12 training images of 40x56, 5 validation images of odd sizes, with ignored pixels."""
    root, rng = tmp_path_factory.mktemp("street"), np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 5)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(n):
            size = (40, 56) if split == "train" else (33 + i, 47 - i)
            label = (np.add.outer(np.arange(size[0]) // 9, np.arange(size[1]) // 11) + i) % 3
            image = np.array([[200, 60, 40], [60, 180, 80], [50, 70, 220]])[label] + rng.integers(-30, 30, (*size, 3))
            label[rng.random(size) < 0.1 * i / n] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label.astype(np.uint8)).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("red 200 60 40\ngreen 60 180 80\nblue 50 70 220\n")
    return root


class Stub(nn.Module):
    """A backbone of 240 weights in the place of a ResNet's 11 million: a checkpoint of 100 kB."""

    def __init__(self, name, **options):
        super().__init__()
        self.conv, self.bn, self.channels, self.recompute = nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), (8, 8, 8), False
        if name not in dnl.LAYOUTS:
            raise ValueError(f"backbone {name!r}")

    def forward(self, image):
        return (F.relu(self.bn(self.conv(image))),) * 3


@pytest.fixture
def stub(monkeypatch):
    """Networks of this process and of its copies have the stub, for tests of what is not in the network."""
    monkeypatch.setattr(dnl, "ResNet", Stub)


def trained(out, street, *flags):
    """Train the tiny network in this process; the exit status."""
    return train.main([*TINY, "--root", str(street), "--out", str(out), *map(str, flags)])


def torchrun(n, script, *args, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(HERE / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200, **kwargs)


def forked(main, *argv, said=os.devnull, rank=0, world=1, port=0):
    """main(argv) in a process of its own, started at once: a copy of this one, on one thread, with torchrun's environment. What
    it prints goes to the file `said`."""
    def work():
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.stdout = sys.stderr = open(said, "w", buffering=1)
        data.run_script(lambda: main([*map(str, argv)]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(world, main, *argv, said):
    """main(argv) on that many ranks: the exit status and the printed text of each."""
    port = free_port()
    processes = [forked(main, *argv, said=f"{said}{r}", rank=r, world=world, port=port) for r in range(world)]
    for p in processes:
        p.join(100)
        p.kill()  # what hangs
    return [p.exitcode for p in processes], [Path(f"{said}{r}").read_text() for r in range(world)]


def script(name, *args):
    """Run a script as a user does: (exit status, standard output, standard error)."""
    done = subprocess.run([sys.executable, str(HERE / name), *map(str, args)], capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def same_state(a, b):
    """Whether two checkpoints hold the same weights, optimizer state and log, bit for bit."""
    a, b = (torch.load(p, weights_only=True) for p in (a, b))
    tensors = [(x[k], y[k]) for x, y in ((a["model"], b["model"]),) for k in x]
    tensors += [(x, b["ema"][k]) for k, x in (a["ema"] or {}).items()]
    tensors += [(x["momentum_buffer"], b["optimizer"]["state"][k]["momentum_buffer"]) for k, x in a["optimizer"]["state"].items()]
    return all(torch.equal(x, y) for x, y in tensors) and a["history"] == b["history"] and a["step"] == b["step"]


def test_poly_schedule():
    assert [train.rate(s, 4, 1.0) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert train.rate(30, 100) == pytest.approx(0.7 ** 0.9)
    assert [train.rate(s, 10**9, 0.9, 3) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_plain_cross_entropy(weighted):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, dtype=torch.double, requires_grad=True)
    label = torch.randint(0, 4, (3, 17, 23)).byte()
    label[0, :9] = label[2] = 255
    weight = torch.rand(4, dtype=torch.double) + 0.5 if weighted else None
    labelled = float(weight[label[label < 255].long()].sum()) if weighted else float((label < 255).sum())
    ours = train.losses([logits], label, labelled, weight)[0]
    whole = torch.nn.functional.interpolate(logits, (17, 23), mode="bilinear", align_corners=True)
    plain = torch.nn.functional.cross_entropy(whole, label.long(), weight, ignore_index=255)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    g, h = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, plain))
    assert (g - h).abs().max() < 1e-14
    assert train.losses([logits], torch.full_like(label, 255), 0.0)[0] == 0  # nothing labelled: no NaN


def test_loss_keeps_one_image_of_logits():
    """A batch of 8 must not hold 8 full-size copies: nothing saved for the backward has their size."""
    logits, label = torch.randn(8, 5, 4, 4, requires_grad=True), torch.randint(0, 5, (8, 64, 64)).byte()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        train.pixel_losses(logits, label).sum().backward()
    assert sum(saved) < 2 * 5 * 64 * 64


def test_hardest_pixels():
    rng = np.random.default_rng(0)
    p = rng.random((2, 20, 30))  # of the true class
    for at_least in (10, 300, 900, 10**6):
        hard = train.hardest(torch.from_numpy(-np.log(p)), 0.7, at_least).numpy()
        enough = (p < 0.7).sum() >= at_least
        expected = p < 0.7 if enough else p <= np.sort(p.ravel())[min(at_least, p.size) - 1]
        assert (hard == expected).all()
    ignored = torch.zeros(1, 4, 4)
    assert not train.hardest(ignored, 0.7, 3).any()


def test_confusion_and_scores():
    rng = np.random.default_rng(1)
    guess, label = rng.integers(0, 4, (30, 20)), rng.integers(0, 3, (30, 20))
    label[:5] = 255
    counts = np.zeros((4, 4), int)
    for g, t in zip(guess.ravel(), label.ravel()):
        if t != 255:
            counts[t, g] += 1
    m = evaluate.confusion(torch.from_numpy(guess), torch.from_numpy(label).byte(), 4)
    assert (m.numpy() == counts).all() and m.dtype == torch.int64
    r = evaluate.scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert r["iou"] == [3 / 6, 4 / 7, None] and r["miou"] == (3 / 6 + 4 / 7) / 2 and r["accuracy"] == 0.7
    assert evaluate.scores(torch.zeros(2, 2)) == {"miou": None, "accuracy": None, "iou": [None, None]}
    assert evaluate.scores(torch.tensor([[1, 1], [0, 0]]))["iou"] == [0.5, 0.0]  # predicted but never true counts


@pytest.mark.parametrize("length, crop", [(5, 8), (8, 8), (9, 8), (100, 8), (1024, 768), (2048, 768), (7, 1), (64, 3)])
def test_windows_cover_and_overlap(length, crop):
    starts = evaluate.windows(length, crop)
    covered = {x for s in starts for x in range(s, min(s + crop, length))}
    assert covered == set(range(length)) and starts[0] == 0 and starts[-1] == max(0, length - crop)
    assert all(b - a <= max(1, crop * 2 // 3) for a, b in zip(starts, starts[1:]))


class Linear(torch.nn.Module):
    """A network with a known answer: logits are a per-pixel linear map, and a constant of the window's size."""

    def forward(self, x):
        w = torch.tensor([[1.0, -0.5, 0.2], [0.1, 0.4, -1.0]], dtype=x.dtype)
        return torch.einsum("nc,bchw->bnhw", w, x) + x.mean((1, 2, 3))[:, None, None, None] * torch.tensor([1.0, 0]).view(1, 2, 1, 1)


def test_the_table_tells_of_classes_that_are_nowhere():
    lines = evaluate.table({"iou": [0.5, None], "miou": 0.5, "accuracy": 0.75}, ("road", "car")).splitlines()
    assert [line.split() for line in lines[1:3]] == [["road", "50.00"], ["car", "-"]] and "not in the mean" in lines[-1]
    assert "not in the mean" not in evaluate.table({"iou": [0.5], "miou": 0.5, "accuracy": 0.75}, ("road",))


@pytest.mark.parametrize("size", [10, 14, 24])
def test_titles_are_cut_to_their_picture(size):
    font = evaluate.load_font(size)
    for text in ("", "short", "a very long name of a checkpoint in a folder, best.pt"):
        cut = evaluate.fit(text, font, 120)
        assert font.getlength(cut) <= 120 and (cut == text or cut.endswith("...") and text.startswith(cut[:-3]))
    row = [[Image.new("RGB", (50, 50))] * 2]
    long = evaluate.sheet(row, ("x" * 300, "b"), ("c" * 300, "d"), ((1, 2, 3), (4, 5, 6)), 150)
    assert long.size == evaluate.sheet(row, ("x" * 200, "b"), ("c" * 200, "d"), ((1, 2, 3), (4, 5, 6)), 150).size
    second = np.asarray(long)[:22, 6 + 150:]  # the gap, and the second title
    assert (second[:, :6] == 255).all() and (second < 128).any()


def test_evaluation_keeps_no_image(monkeypatch):
    """Promise: validation does not fill the memory. Of 30 images and their outputs, two at most are alive at any time."""
    made, net, dataset = [], Linear(), data.DataSet("folder", "val", ("a", "b"), ((0, 0, 0), (1, 1, 1)), (data.Item(Path(), Path()),))
    def forward(x):
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.deterministic
        made.append(weakref.ref(out := x[:, :2] + 0))
        return out

    monkeypatch.setattr(net, "forward", forward)

    def images(*args):
        for index in range(30):
            assert sum(one() is not None for one in made) <= 4
            image, label = torch.full((3, 8, 9), index, dtype=torch.uint8), torch.zeros(8, 9, dtype=torch.uint8)
            made.append(weakref.ref(image))
            yield index, image, label

    monkeypatch.setattr(evaluate, "eval_images", images)
    matrix = evaluate.evaluate(net, dataset, device=torch.device("cpu"))
    assert matrix.sum() == 30 * 72 and len(made) == 60


def test_prediction_averages_scales_flips_and_windows():
    image = torch.randint(0, 256, (3, 21, 34), generator=torch.Generator().manual_seed(0)).byte()
    x, net = data.normalize(image[None]), Linear()
    assert torch.allclose(evaluate.predict(net, image), net(x).softmax(1)[0], atol=1e-6)
    both = (net(x).softmax(1) + net(x.flip(3)).softmax(1).flip(3)) / 2
    assert torch.allclose(evaluate.predict(net, image, flip=True), both[0], atol=1e-6)
    small = torch.nn.functional.interpolate(x, (10, 17), mode="bilinear", align_corners=True)
    up = torch.nn.functional.interpolate(net(small).softmax(1), (21, 34), mode="bilinear", align_corners=True)
    expected = (net(x).softmax(1) + up) / 2
    assert torch.allclose(evaluate.predict(net, image, scales=(1, 0.5)), expected[0], atol=1e-6)
    total, count = torch.zeros(1, 2, 21, 34), torch.zeros(21, 34)
    for t in evaluate.windows(21, 9):
        for l in evaluate.windows(34, 9):
            total[:, :, t:t + 9, l:l + 9] += net(x[:, :, t:t + 9, l:l + 9]).softmax(1)
            count[t:t + 9, l:l + 9] += 1
    assert torch.allclose(evaluate.predict(net, image, crop=9), (total / count)[0], atol=1e-6)
    assert torch.allclose(evaluate.predict(net, image, crop=99), net(x).softmax(1)[0], atol=1e-6)  # crop above the image


def gradients(rank, world, port, dtype, accumulate, out):
    """The gradient of one step over `world` gloo ranks, BatchNorm in eval mode, ignored pixels spread unevenly."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    net = dnl.build(replace(dnl.PAPER, num_classes=3, backbone="resnet18", channels=8)).to(dtype)
    torch.nn.init.constant_(net.context.gamma, 0.5)
    set_train = train.set_mode(net, False)
    for m in set_train.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    net.register_forward_pre_hook(lambda m, a: (a[0].to(dtype), *a[1:]))
    kept = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            kept.update({k: p.grad.clone() for k, p in net.named_parameters()})

    args = argparse.Namespace(**vars(train.parse(["--batch", "4", "--accumulate", str(accumulate), "--amp", "off"], 1)))
    weights = torch.ones(3)
    optimizer = Keep([{"params": list(net.parameters()), "factor": 1.0}], 0.1)
    dataset = data.open_dataset("synthetic", None, "train")
    run = train.Run(args, dataset, dataset, net, net, optimizer, torch.amp.GradScaler("cpu", enabled=False), rank, world,
                    torch.device("cpu"), weights, sums=torch.zeros(3, dtype=torch.float64))
    train.connect(run)
    g = torch.Generator().manual_seed(1)
    images, labels = torch.randint(0, 256, (4, 3, 40, 40), generator=g).byte(), torch.randint(0, 3, (4, 40, 40), generator=g).byte()
    labels[0], labels[1, 5:], labels[3, :, 3:] = 255, 255, 255
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    batch = [images[own], labels[own], torch.tensor([[1.1, 0.9, 1.2, 0.02]]).repeat(4, 1)[own]]
    labelled = train.over_ranks(run, [train.count_labelled(run, batch[1])])[0]
    share = train.train_step(run, batch, labelled)
    if rank == 0:
        torch.save([kept, share], out)
    if world > 1:
        time.sleep(0.1)  # as in evaluate.distributed
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.double, 1e-10)])
def test_ranks_and_parts_have_the_gradient_of_one(tmp_path, dtype, bound):
    one = tmp_path / "one"
    gradients(0, 1, 0, dtype, 1, one)
    reference, _ = torch.load(one)
    for world, accumulate in ((2, 1),) if dtype is torch.float32 else ((1, 2), (2, 2)):
        other = tmp_path / f"{world}-{accumulate}"
        if world == 1:
            gradients(0, 1, 0, dtype, accumulate, other)
        else:
            torch.multiprocessing.start_processes(gradients, (world, free_port(), dtype, accumulate, other), world, start_method="fork")
        got, _ = torch.load(other)
        norm = torch.cat([g.flatten() for g in reference.values()]).norm()
        assert torch.cat([(got[k] - g).flatten() for k, g in reference.items()]).norm() / norm < bound
        assert norm > 0.1


@pytest.fixture(scope="module")
def run_folder(street, tmp_path_factory):
    """A finished tiny training, shared by the tests that read it."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert trained(out, street) == 0
    return out


def test_a_run_leaves_its_four_files(run_folder):
    assert {p.name for p in run_folder.iterdir()} == {"last.pt", "last.prev.pt", "best.pt", "log.jsonl", "val.png", ".lock"}
    settings, *epochs = map(json.loads, (run_folder / "log.jsonl").read_text().splitlines())
    assert settings["settings"]["batch"] == 4 and [e["epoch"] for e in epochs] == [1, 2] and epochs[1]["step"] == 6
    assert set(epochs[0]) == {"epoch", "step", "lr", "skipped", "loss", "loss_res2", "loss_res3", "miou", "accuracy", "iou"}
    checkpoint = torch.load(run_folder / "last.pt", weights_only=True)
    assert checkpoint["classes"] == ["red", "green", "blue"] and checkpoint["best"] == max(e["miou"] for e in epochs)
    with Image.open(run_folder / "val.png") as sheet:
        assert sheet.width > 900 and sheet.height > 600


def test_the_line_fits_its_terminal(run_folder, street, tmp_path, monkeypatch, capsys, stub):
    """What is longer than a row could not be taken back by the next line."""
    monkeypatch.setattr(train, "on_terminal", lambda stream: True)
    monkeypatch.setattr(train.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    assert trained(tmp_path / "r", street) == 0
    lines = [line for line in re.split("\r\033\\[K|\n", capsys.readouterr().out) if line.startswith("[")]
    assert len(lines) == 6 and all(len(line) == 79 for line in lines) and lines[2].startswith("[" + 10 * "#" + 10 * "." + "] epoch 1/2")


def test_evaluate_prints_the_figure_of_training_on_any_number_of_ranks(run_folder, street, tmp_path, capsys):
    last = json.loads((run_folder / "log.jsonl").read_text().splitlines()[-1])
    assert evaluate.main([str(run_folder / "last.pt"), "--json", "--workers", "0"]) == 0
    results = [json.loads(capsys.readouterr().out.splitlines()[-1])]
    for n in (2, 3):
        status, texts = ranks(n, evaluate.main, run_folder / "last.pt", "--json", "--workers", 1, said=tmp_path / "said")
        assert status == [0] * n, texts
        results.append(json.loads(texts[0].splitlines()[-1]))
    assert results[0] == results[1] == results[2]
    assert (results[0]["miou"], results[0]["accuracy"]) == (last["miou"], last["accuracy"])
    labels = [np.asarray(Image.open(p)) for p in (street / "labels" / "val").iterdir()]
    assert np.sum(results[0]["confusion"]) == sum(int((x != 255).sum()) for x in labels)
    assert results[0]["images"] == 5


@pytest.mark.slow
def test_training_learns(street, tmp_path):
    """Colour alone separates these classes: a network that cannot learn them in 30 steps is broken."""
    assert trained(tmp_path / "r", street, "--epochs", 10, "--lr", 0.05, "--eval-every", 10) == 0
    lines = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()[1:]]
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"] and lines[-1]["miou"] > 0.4 and lines[0]["miou"] is None


@pytest.mark.parametrize("flags", [
    [], pytest.param(["--preset", "released", "--workers", "2", "--ema", "0.9"], marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_the_uninterrupted_run(street, tmp_path, monkeypatch, flags, capsys):
    """Stopped by a signal within an epoch (twice), resumed by the same command; the released preset has dropout."""
    assert trained(tmp_path / "whole", street, *flags) == 0
    step, stops = train.train_step, [1, 3]

    def stopping(run, *rest):
        if run.step in stops:
            stops.remove(run.step)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *rest)

    monkeypatch.setattr(train, "train_step", stopping)
    assert [trained(tmp_path / "parts", street, *flags) for _ in range(3)] == [143, 143, 0]
    told = capsys.readouterr().err
    assert "SIGTERM at step 2, saved" in told and "SIGTERM at step 4, saved" in told  # the step is finished, no other begun
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "parts" / "log.jsonl").read_text()


def test_two_ranks_go_on_where_one_was(street, tmp_path, capsys, monkeypatch, stub):
    """Dead after step 5 on one rank, ended on two; the mIoU that two ranks logged is what one rank evaluates."""
    step = train.train_step

    def dying(run, *rest):
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run, *rest)

    monkeypatch.setattr(train, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "r", street, "--save-every", 1)
    monkeypatch.setattr(train, "train_step", step)
    status, texts = ranks(2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", said=tmp_path / "said")
    assert status == [0, 0] and "at step 5 of 6" in texts[0], texts
    last = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert last["step"] == 6 and evaluate.main([str(tmp_path / "r" / "last.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["miou"] == last["miou"]


def test_three_ranks_stopped_and_resumed_are_the_uninterrupted_three(street, tmp_path, monkeypatch, stub):
    """Of three on the order of a sum of gradients matters, and DDP changes its own after a process's first step."""
    flags, step = [*TINY, "--root", street, "--batch", 6], train.train_step

    def stopped(run, *args):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *args)

    assert ranks(3, train.main, *flags, "--out", tmp_path / "whole", said=tmp_path / "said")[0] == [0] * 3
    monkeypatch.setattr(train, "train_step", stopped)
    assert ranks(3, train.main, *flags, "--out", tmp_path / "r", said=tmp_path / "said")[0] == [143] * 3
    monkeypatch.setattr(train, "train_step", step)
    status, text = ranks(3, train.main, *flags, "--out", tmp_path / "r", said=tmp_path / "said")
    assert status == [0] * 3 and "last.pt at step 2 of 4" in text[0] and same_run(tmp_path / "whole", tmp_path / "r")


BAD = {  # flags: what the one line must hold
    "--batch 3 --accumulate 2": "multiple of 2",
    "--batch 1 --context paper.peers:ppm": "BatchNorm",
    "--batch 4 --accumulate 4 --crop 16": "BatchNorm",
    "--batch 64": "fewer than one batch",
    "--backbone resnet19": "invalid choice",
    "--epochs 0": "expected 1 or more",
    "--scale 2 1": "MIN <= MAX",
    "--context nowhere:thing": "MODULE:FACTORY",
    "--context else": "expected dnl, nl, none, or MODULE:FACTORY",
    "--no-gr --coarse-weight 1": "needs GR",
    "--weights /nowhere.pth": "--weights /nowhere.pth: no such file",
    "--class-weights /nowhere.json": "/nowhere.json",
    "--resume /nowhere.pt": "/nowhere.pt",
    "--weights imagenet --preset released": "plain stem",
    "--weights README.md": "--weights README.md: not a file of weights: expected a file of torchvision's",
    "--seed -1": "0 or more",
    "--ema 1": "below 1",
    "--compile --recompute": "leave one out",
    "--context nl --no-gr": "leave them out",
    "--lr 1e39": "expected 0 or more, up to 1000000000",
    "--crop 100000": "up to 8192",
    "--scale 1 1e300": "MAX <= 100",
    "--context math:pi": "cannot be called",
    "--context math:gcd": "its factory returned int",
    "--context .a:b": "MODULE:FACTORY",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_cannot_be_trained_is_one_line(street, tmp_path, flags):
    with pytest.raises(data.InputError) as e:
        trained(tmp_path / "r", street, *flags.split())
    assert BAD[flags] in str(e.value) and "\n" not in str(e.value)


def test_notes_where_the_papers_recipe_is_left():
    told = train.notes(train.parse(["--data", "cityscapes", "--batch", "4"], 1))
    assert len(told) == 2 and "8" in told[0] and "imagenet" in told[1]
    assert not train.notes(train.parse(["--data", "ade20k", "--weights", "imagenet"], 1))


def test_exit_status_and_one_line(street, tmp_path):
    for args in (("train.py", "--data", "folder", "--root", tmp_path / "none"), ("train.py", "--crop", "x"),
                 ("evaluate.py", tmp_path / "none.pt")):
        status, out, err = script(*args)
        assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "a"}, "RANK='a'"), ({"WORLD_SIZE": "2"}, "start by torchrun"), ({"WORLD_SIZE": "-1"}, "WORLD_SIZE -1"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "start by torchrun"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "RANK 2")], ids=str)
def test_an_environment_that_is_not_torchruns(monkeypatch, environment, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        with evaluate.distributed():
            pass


@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_cannot_be_written_is_no_traceback(run_folder, monkeypatch, buffered):
    """A full disk behind standard output: status 1 and a line; a closed standard error: nobody hears, the result is the same."""
    command = [sys.executable, str(HERE / "evaluate.py"), str(run_folder / "best.pt")]
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)  # empty: as if unset, the usual case
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == "evaluate.py: [Errno 28] No space left on device\n", done.stderr
    done = subprocess.run(f"{shlex.join(command)} --json 2>&-", shell=True, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "miou" in json.loads(done.stdout.splitlines()[-1])


def test_names_that_the_output_cannot_print_end_nothing(street, tmp_path):
    shutil.copytree(street, tmp_path / "d")
    (tmp_path / "d" / "classes.txt").write_text("stra\u00dfe\ngreen\nblue\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(HERE / "data.py"), "check", "--data", "folder", "--root", str(tmp_path / "d")],
                          capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=100)
    assert done.returncode == 0 and "stra\\xdfe" in done.stdout and not done.stderr.count("Traceback"), done.stderr


def test_what_only_rank_0_meets_is_one_line_on_every_rank(street, tmp_path):
    (tmp_path / "file").write_text("")
    for flags in (["--weights", "/nowhere.pth"], ["--out", tmp_path / "file"]):
        status, text = ranks(2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", *flags, said=tmp_path / "said")
        assert status == [2, 2] and all(len(t.splitlines()) == 1 for t in text) and "rank 1: stopped" in text[1], text


def test_ctrl_c_is_no_traceback(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert status_of(interrupted) == 130 and not capsys.readouterr().err


def test_other_settings_are_refused_by_name(run_folder, street):
    with pytest.raises(data.InputError, match=r"lr 0.01 -> 0.5.*--out"):
        trained(run_folder, street, "--lr", 0.5)


def test_a_finished_run_stays_as_it_is(run_folder, street):
    before = (run_folder / "log.jsonl").read_text()
    assert trained(run_folder, street) == 0
    assert (run_folder / "log.jsonl").read_text() == before


def test_split_without_ground_truth(run_folder, street, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(street, root)
    (root / "images" / "val").rename(root / "images" / "test")
    with pytest.raises(data.InputError, match="no ground truth"):
        evaluate.main([str(run_folder / "last.pt"), "--root", str(root), "--split", "test"])


def test_own_context_is_named_again(street, tmp_path):
    flags = ("--context", "paper.peers:nl", "--epochs", 1)
    assert trained(tmp_path / "r", street, *flags) == 0
    checkpoint = str(tmp_path / "r" / "last.pt")
    with pytest.raises(data.InputError, match="name it again"):
        evaluate.main([checkpoint])
    assert evaluate.main([checkpoint, "--context", "paper.peers:nl"]) == 0


def test_malicious_pickle_does_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"version": 1, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(data.InputError, match="evil.pt"):
        evaluate.read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


def test_damaged_checkpoint_falls_back_to_the_previous(run_folder, street, tmp_path, capsys):
    out = tmp_path / "r"
    shutil.copytree(run_folder, out)
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[:len(whole) // 2])
    assert trained(out, street) == 0
    assert "going on from last.prev.pt" in capsys.readouterr().err
    assert same_state(out / "last.pt", run_folder / "last.pt")
    for at in np.random.default_rng(0).integers(0, len(whole), 10):  # a flipped bit is noticed, or changes nothing
        flipped = bytearray(whole)
        flipped[at] ^= 4
        (tmp_path / "x.pt").write_bytes(flipped)
        try:
            evaluate.read_checkpoint(tmp_path / "x.pt")
        except data.InputError:
            continue
        assert same_state(tmp_path / "x.pt", run_folder / "last.pt")


def test_gradient_that_is_not_finite_is_left_out(street, tmp_path, monkeypatch, stub):
    """A finite loss with an infinite gradient in step 2: with --skip-nonfinite, step 3 begins from the weights of step 1."""
    normal, seen = train.part_losses, []

    def broken(run, *rest):
        losses = normal(run, *rest)
        seen.append(run.net.head[-1].bias.detach().clone())
        losses.register_hook(lambda g: g * float("inf") if run.step == 1 else g)
        return losses

    monkeypatch.setattr(train, "part_losses", broken)
    assert trained(tmp_path / "r", street, "--skip-nonfinite", 1, "--epochs", 1) == 0
    line = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1]) and line["skipped"] == 1 and 0.5 < line["loss"] < 2


def small_checkpoint(seed):
    """A checkpoint as train.py writes it, of 3 classes."""
    torch.manual_seed(seed)
    net = build(replace(PAPER, backbone="resnet18", channels=4, num_classes=3))
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return {"version": evaluate.VERSION, "model": dict(net.state_dict()), "optimizer": {"state": {0: torch.rand(3)}, "lr": 0.1},
            "config": asdict(net.config), "settings": {"lr": 0.1}, "data": "folder", "root": f"/somewhere/{seed}",
            "classes": ["a", "b", f"c{seed}"], "colors": [[seed, 2, 3], [4, 5, 6], [7, 8, 9]], "amp": "off", "step": 7, "epoch": 1,
            "best": 0.5, "sums": torch.rand(3), "history": [{"miou": 0.5}]}


class Evil:
    """A pickle that would make a folder where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("touched by a checkpoint",)


def garbage(rng):
    """A value that a field should not have, or might."""
    nested = []
    for _ in range(200):
        nested = [nested]
    some = [None, True, False, -1, 0, 1, 2, 3, 5, 4, 7, 256, 10**6 + 1, 10**12, 10**30, -10**30, 0.5, 1.0, float("nan"), float("inf"), "",
            "x", "a", "dnl", "nl", "none", "res3", "feature", "resnet34", "os:system", "a\nb", "\0", "fp16", "bf16", "synthetic", b"x", (1,),
            [], [1], [[1, 2, 3]] * 3, ["a", "b"], ["a", "a", "b"], ["d", "e", "f"], ["x\ny", "b", "c"], {}, {"a": 1}, {1: 2}, nested,
            Evil(), torch.zeros(0), torch.zeros(3), torch.zeros(3).half(), torch.rand(3).double(), torch.full((3,), float("nan")),
            torch.zeros(1).expand(10**12), torch.zeros(2, 2).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64),
            nn.Parameter(torch.zeros(3))]
    return some[rng.integers(len(some))]


def warp(rng, tensor):
    """A tensor of another kind, shape or type, or of the same and other values."""
    kinds = [tensor.double, tensor.half, tensor.flatten, lambda: tensor[None], lambda: tensor.flatten()[:0], lambda: tensor.to("meta"),
             lambda: tensor * float("nan"), lambda: tensor.new_zeros(1).expand(10**9, *tensor.shape), lambda: tensor + 1,
             lambda: tensor.new_zeros(()).expand(tensor.shape), tensor.to_sparse, lambda: tensor.flip(0) if tensor.dim() else tensor + 2]
    return kinds[rng.integers(len(kinds))]()


def spoiled(rng, value, depth=0):
    """The nested value with one thing in it replaced, left out, added or warped; anywhere, the top fields as often as the deep."""
    if isinstance(value, dict) and value and depth < 3 and rng.random() < 0.95:
        value, keys = dict(value), list(value)
        key, kind = keys[rng.integers(len(keys))], rng.integers(8)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[("extra", "a\nb", 5)[rng.integers(3)]] = garbage(rng)
        else:
            value[key] = spoiled(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = int(rng.integers(len(value)))
        return [value[:at] + value[at + 1:], value + [garbage(rng)],
                value[:at] + [spoiled(rng, value[at], 2)] + value[at + 1:]][rng.integers(3)]
    return warp(rng, value) if isinstance(value, torch.Tensor) and rng.random() < 0.7 else garbage(rng)


def alike(a, b, within=()):
    """Whether two nested values are the same, tensors bit for bit and of one type. within: those that these lie in, be it in themselves."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        plain = all(t.layout is torch.strided and t.device.type == "cpu" and t.numel() < 10**6 for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and (not plain or a.detach().numpy().tobytes() == b.detach().numpy().tobytes())
    if type(a) is not type(b):
        return False
    if isinstance(a, (dict, list, tuple)):
        pairs = zip(a.items(), b.items()) if isinstance(a, dict) else zip(a, b)
        return len(a) == len(b) and (id(a) in within or all(alike(x, y, (*within, id(a))) for x, y in pairs))
    return a == b or a != a and b != b


def usable(net, checkpoint, case):
    """What a network that was loaded must be: all that the file says, and such that the scripts can use it."""
    assert asdict(net.config) == checkpoint["config"] and not net.training, case
    state = net.state_dict()
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in checkpoint["model"].items()), case
    assert all(k in checkpoint["model"] or k.endswith("num_batches_tracked") for k in state), case
    names, colors = checkpoint["classes"], checkpoint["colors"]
    assert len(set(names)) == len(names) == len(colors) == net.config.num_classes and all(n.isprintable() for n in names), case
    assert evaluate.colorize(np.zeros((2, 2), np.uint8), colors).mode == "P" and evaluate.AMP.get(checkpoint["amp"], 0) != 0, case
    with torch.inference_mode():
        out = net(torch.rand(1, 3, 33, 40))
    assert out.shape == (1, len(names), 33, 40) and out.isfinite().all(), case
    assert checkpoint["data"] in data.SETTINGS and (checkpoint["root"] is None or isinstance(checkpoint["root"], str)), case


def zipped_again(rng, raw, other):
    """The file with its pickle mutated and the checksums made right, now and then with all entries compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED * int(rng.random() < 0.1)) as new:
        for entry in old.namelist():
            data_of = old.read(entry)
            new.writestr(entry, mutated(rng, data_of, other) if entry.endswith("data.pkl") else data_of)
    return file.getvalue()


def test_broken_checkpoint_is_one_line(run_folder, tmp_path):
    whole = (run_folder / "best.pt").read_bytes()
    broken, other = tmp_path / "a\nname.pt", torch.load(run_folder / "best.pt", weights_only=True)
    for spoil in (lambda: broken.write_bytes(whole[:-100]), lambda: torch.save(other | {"classes": ["red"]}, broken),
                  lambda: (broken.unlink(), os.mkfifo(broken))):
        spoil()
        status, out, err = script("evaluate.py", broken)
        assert status == 2 and not out and err.count("\n") == 1 and repr(str(broken)) in err, err


def test_mutated_checkpoints(tmp_path, monkeypatch, stub):
    """The weights and fields that were written, or refused; where the mutation has right checksums, those that torch reads."""
    monkeypatch.chdir(tmp_path)
    path, counts = tmp_path / "a checkpoint.pt", Counter()
    whole = [small_checkpoint(seed) for seed in (1, 2)]
    raws = []
    for checkpoint in whole:
        file = io.BytesIO()
        torch.save(checkpoint, file)
        raws.append(file.getvalue())
    for number in range(CASES):
        rng, case, legal = RNG((8, number)), f"checkpoint {number}", whole
        if number % 3 == 0:  # of bytes: noticed by checksums
            path.write_bytes(mutated(rng, raws[0], raws[1]) if number % 30 else raws[0])
        elif number % 3 == 1:  # of bytes, with right checksums
            path.write_bytes(zipped_again(rng, raws[0], b"(lp0\n."))
            legal = None
        else:  # of structure
            key = (*whole[0], "config", "config", "config", "config", "model", "classes", "colors")[rng.integers(len(whole[0]) + 7)]
            legal = [whole[0] | {key: spoiled(rng, whole[0][key], 1)} if number % 2 else spoiled(rng, whole[0])]
            torch.save(legal[0], path)
        got = refused(lambda: evaluate.load_network(path, torch.device("cpu")), path, case)
        counts["refused" if got is None else "correct"] += 1
        assert got is not None or number % 30, case  # the file as it was written
        if got is not None:
            assert any(alike(got[1], x) for x in legal or [torch.load(path, map_location="cpu", weights_only=True)]), case
            usable(*got, case)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a checkpoint wrote something"
    settled("checkpoints", counts)


@pytest.mark.parametrize("skip", [0, 2, 99])
def test_loss_that_is_not_finite(street, tmp_path, monkeypatch, skip, capsys, stub):
    """Step 4's images are made infinite: the run stops and names them, or leaves the step out."""
    normal = train.part_losses

    def broken(run, x, y, labelled):
        return normal(run, x * float("inf") if run.step == 3 else x, y, labelled)

    monkeypatch.setattr(train, "part_losses", broken)
    if skip:
        assert trained(tmp_path / "r", street, "--skip-nonfinite", skip) == 0
    else:
        with pytest.raises(data.InputError, match=r"step 4, rank 0: the loss is not finite; images .*train/\d+\.png"):
            trained(tmp_path / "r", street)
    saved = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    assert saved["step"] == (6 if skip else 3) and all(t.isfinite().all() for t in saved["model"].values())
    assert saved["skipped"] == (1 if skip else 0)


class Full:
    """A file on a full disk."""

    def write(self, data):
        raise OSError(28, "No space left on device")


write = data.write


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(((tmp_path / "x.part").read_bytes(), (tmp_path / "x").read_bytes())))
    data.write(tmp_path / "x", lambda f: f.write(b"new"))
    assert seen == [(b"new", b"old")] and (tmp_path / "x").read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError):
        data.write(tmp_path / "x", lambda f: f.write(b"half") / 0)
    assert (tmp_path / "x").read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_full_disk_at_each_write(street, tmp_path, monkeypatch, capsys, stub):
    """Whichever write fails, a loadable checkpoint is there afterwards, and the run goes on and ends the same."""
    assert trained(tmp_path / "whole", street, "--epochs", 1) == 0
    for nth, name in enumerate(("new.pt", "log.jsonl", "best.pt", "new.pt", "log.jsonl", "val.png")):
        out, writes = tmp_path / f"r{nth}", []

        def full(path, save):
            writes.append(path.name)
            return write(path, lambda f: f.write(b"part") and save(Full()) if len(writes) == nth + 1 else save(f))

        monkeypatch.setattr(train, "write", full)
        status = trained(out, street, "--epochs", 1)
        assert writes[nth] == name and "No space left" in capsys.readouterr().err and not list(out.glob("*.part"))
        assert status == (name == "val.png") and same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("flags", [[], ["--clip", "0.05", "--backbone-lr", "0.5", "--warmup", "3", "--freeze-bn"],
                                   ["--class-weights", "w.json"]], ids=["paper", "beyond", "weighted"])
def test_two_steps_are_eq_5_by_plain_sgd(street, tmp_path, monkeypatch, stub, flags):
    """Against the formulas: cross-entropy + 0.3 * (res2, res3), momentum, weight decay, poly rate; jitter as its own test has it."""
    monkeypatch.chdir(tmp_path)
    Path("w.json").write_text(json.dumps({"classes": ["red", "green", "blue"], "splits": {"train": {"weights": [0.5, 1.0, 2.0]}}}))
    args = train.parse([*TINY, "--root", str(street), "--aux-weight", "0.3", "--weight-decay", "0.1", *flags], 1)
    run = train.setup(args, 0, 1, torch.device("cpu"))
    train.set_mode(run.net, args.freeze_bn)
    net, momenta = deepcopy(run.net), {}
    weight = torch.tensor([0.5, 1.0, 2.0]) if "--class-weights" in flags else None
    for step, batch in enumerate(batches(run.data, batch=4, stop=2, crop=48)):
        x, y, factors = batch
        parts = [F.cross_entropy(o, y.long(), weight, ignore_index=IGNORE) for o in net(data.normalize(data.color_jitter(x, factors)))]
        net.zero_grad()
        (parts[0] + 0.3 * (parts[1] + parts[2])).backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert norm > 0.05  # else nothing is clipped
        rate = 0.01 * (1 - step / 6) ** 0.9 * ((step + 1) / 4 if "--warmup" in flags else 1)
        with torch.no_grad():
            for name, p in net.named_parameters():
                g = p.grad * (0.05 / norm if "--clip" in flags else 1) + 0.1 * p
                momenta[name] = 0.9 * momenta.get(name, 0) + g
                p -= rate * (0.5 if "--backbone-lr" in flags and name.startswith("backbone.") else 1) * momenta[name]
        share = train.train_step(run, batch, train.count_labelled(run, y).item())
        run.step += 1
        assert torch.equal(run.net.backbone.bn.running_mean, torch.zeros(8)) == args.freeze_bn
        assert gap([share], [torch.stack(parts).detach()]) < 1e-6
        assert gap(run.net.state_dict().values(), net.state_dict().values()) < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_ohem_is_the_mean_over_the_hard_pixels_of_all_ranks(street, tmp_path, monkeypatch, stub, weighted):
    """Two ranks print the loss of one, which is the mean of the pixels of a loss above 1, weighted where weights are given."""
    monkeypatch.setattr(train, "hardest", lambda pixels: pixels > 1)
    (tmp_path / "w.json").write_text(json.dumps({"classes": ["red", "green", "blue"], "splits": {"train": {"weights": [0.5, 1.0, 2.0]}}}))
    flags = [*TINY, "--root", street, "--ohem", "--seed", 1, *(["--class-weights", tmp_path / "w.json"] if weighted else [])]
    run = train.setup(train.parse([*map(str, flags)], 1), 0, 1, torch.device("cpu"))
    x, y, factors = next(iter(batches(run.data, batch=4, stop=1, crop=48, seed=1)))
    with torch.no_grad():
        logits = deepcopy(run.net).eval()(data.normalize(data.color_jitter(x, factors)))
        monkeypatch.setattr(run, "model", lambda x, full_size: [logits] * 3)
        ours = train.part_losses(run, x, y, train.count_labelled(run, y).item())[0]
    plain = F.cross_entropy(logits, y.long(), ignore_index=IGNORE, reduction="none")
    weight = torch.tensor([0.5, 1.0, 2.0])[y.long().clamp(max=2)] if weighted else torch.ones(y.shape)
    assert 0.05 < (plain > 1).float().mean() < 0.95
    assert ours.item() == pytest.approx(((plain * weight)[plain > 1].sum() / weight[plain > 1].sum()).item(), rel=1e-5)
    texts = [ranks(world, train.main, *flags, "--out", tmp_path / f"r{world}", said=tmp_path / "said")[1][0] for world in (1, 2)]
    first = [float(re.search("step 1/6  loss ([0-9.]+)", text)[1]) for text in texts]
    assert first[0] == pytest.approx(first[1], rel=0.05)  # BatchNorm sees other halves


def test_every_rank_scores_with_the_statistics_of_rank_0(street, tmp_path, monkeypatch, stub):
    evaluation = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda net, *a, **k: print("bn", net.backbone.bn.running_mean.tolist()) or evaluation(net, *a, **k))
    status, texts = ranks(2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", said=tmp_path / "said")
    lines = [re.findall("bn .*", text) for text in texts]
    assert status == [0, 0] and len(lines[0]) == 2 and lines[0] == lines[1], texts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_gpu_trains_resumes_and_scores(street, tmp_path, capsys, amp):
    flags = ["--amp", amp, "--clip", "1", "--accumulate", "2", "--workers", "2", "--ema", "0.9", "--ohem"]
    assert trained(tmp_path / "r", street, *flags) == 0
    os.replace(tmp_path / "r" / "last.prev.pt", tmp_path / "r" / "last.pt")  # from before the last validation
    assert trained(tmp_path / "r", street, *flags) == 0
    line = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "r" / "last.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["miou"] == line["miou"]


def test_beyond_the_paper(street, tmp_path):
    """Every extra at once trains, and is recorded; a weights file is what check prints."""
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps(data.check("folder", street)))
    flags = ("--ohem", "--class-weights", weights, "--ema", 0.5, "--clip", 1, "--warmup", 2, "--backbone-lr", 0.1, "--freeze-bn",
             "--recompute", "--coarse-weight", 0.4, "--accumulate", 2, "--deterministic")
    try:
        assert trained(tmp_path / "r", street, *flags) == 0
        weights.write_text(re.sub('"weights": .[0-9.]+', '"weights": [1.5', weights.read_text()))
        with pytest.raises(data.InputError, match="class_weights"):  # of the same name
            trained(tmp_path / "r", street, *flags)
    finally:
        torch.use_deterministic_algorithms(False)
    settings, *epochs = map(json.loads, (tmp_path / "r" / "log.jsonl").read_text().splitlines())
    assert settings["settings"]["ohem"] and settings["settings"]["clip"] == 1 and "ema_miou" in epochs[-1] and "loss_p" in epochs[-1]
    ema = torch.load(tmp_path / "r" / "ema.pt", weights_only=True)
    assert not torch.equal(ema["model"]["head.4.weight"], torch.load(tmp_path / "r" / "last.pt", weights_only=True)["model"]["head.4.weight"])
    assert evaluate.main([str(tmp_path / "r" / "ema.pt")]) == 0
    with pytest.raises(InputError, match="averaged True -> None"):  # its momenta are of other weights
        trained(tmp_path / "s", street, "--resume", tmp_path / "r" / "ema.pt")


def test_ema_is_the_average():
    torch.manual_seed(0)
    net, mean = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    expected = mean.weight.detach().clone()
    for _ in range(3):
        torch.nn.init.normal_(net.weight)
        train.follow(mean, net, 0.75)
        expected = 0.75 * expected + 0.25 * net.weight.detach()
    assert torch.allclose(mean.weight, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name, split", [("cityscapes", "trainval"), ("ade20k", "train")])
def test_trees_named_as_the_real_ones_train_and_score(name, split, request, tmp_path, capsys):
    root = request.getfixturevalue(name)
    flags = ["--data", name, "--root", str(root), "--split", split, "--backbone", "resnet18", "--channels", "8", "--crop", "64",
             "--batch", "1", "--epochs", "1", "--workers", "0", "--out", str(tmp_path / "r")]
    assert train.main(flags) == 0
    checkpoint = str(tmp_path / "r" / "last.pt")
    assert evaluate.main([checkpoint, "--split", "train", "--workers", "0"]) == 0
    if name == "cityscapes":
        with pytest.raises(InputError, match="no ground truth"):
            evaluate.main([checkpoint, "--split", "test"])


def whole(process):
    process.join(200)
    process.kill()
    assert process.exitcode == 0


def same_run(a, b):
    """Whether two runs ended with the same bits and the same log."""
    return same_state(a / "last.pt", b / "last.pt") and (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()


@pytest.mark.slow
def test_killed_twenty_times_is_the_uninterrupted_run(street, tmp_path):
    """SIGKILL at random moments, the same command again each time: the weights, optimizer and log of the run left alone."""
    import torch._dynamo  # noqa: F401  else each start would, and most moments would fall into that
    flags = [*TINY, "--root", street, "--epochs", 6, "--save-every", 1, "--out"]
    start = time.monotonic()
    whole(forked(train.main, *flags, tmp_path / "whole"))
    latest = (time.monotonic() - start) / 10
    rng, kills, steps = random.Random(0), 0, set()
    while kills < 20:
        process = forked(train.main, *flags, tmp_path / "killed", said=tmp_path / "said")
        process.join(rng.uniform(0.1, latest))
        assert process.exitcode is None or kills >= 10, "too quick to be killed often"
        steps |= set(re.findall("  step ([0-9]+)", (tmp_path / "said").read_text()))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            shutil.move(tmp_path / "killed", tmp_path / f"ended{kills}")
    assert len(steps) > 2, "most moments were before the training"
    whole(forked(train.main, *flags, tmp_path / "killed"))
    (tmp_path / "said").unlink()
    assert all(same_run(tmp_path / "whole", ended) for ended in tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_stopped_and_killed_are_the_uninterrupted_two(street, tmp_path):
    """SIGTERM to torchrun: both ranks save the same step. Then --max-restarts 3 and each time one rank killed."""
    flags = [*TINY, "--root", street, "--epochs", 4, "--save-every", 1]
    assert ranks(2, train.main, *flags, "--out", tmp_path / "whole", said=tmp_path / "said")[0] == [0, 0]

    def start():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
                   HERE / "train.py", *flags, "--out", tmp_path / "r"]
        return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})

    process = start()
    for line in process.stdout:
        if "step 3/12" in line:
            process.terminate()
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and {f"rank {r}: stopped by SIGTERM at step" in rest for r in (0, 1)} == {True}, rest
    process, kills, steps, lines = start(), 0, 0, []
    for line in process.stdout:
        lines.append(line)
        steps = 0 if line.startswith("resumed") else steps + ("images/s" in line)
        if kills < 2 and steps == 3:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(workers[kills % 2]), signal.SIGKILL)
            kills, steps = kills + 1, 0
    assert process.wait(60) == 0 and kills == 2 and sum(line.startswith("resumed") for line in lines) == 3, "".join(lines)
    assert same_run(tmp_path / "whole", tmp_path / "r")


def test_killed_while_validating_repeats_only_that(street, tmp_path, monkeypatch, stub):
    assert trained(tmp_path / "whole", street) == 0
    evaluation, calls = train.evaluate, []

    def dying(*args, **kwargs):
        calls.append(args[0].training)
        if len(calls) in (1, 2, 4):
            raise KeyboardInterrupt
        return evaluation(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", dying)
    for step in (3, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "r", street)
        assert (tmp_path / "r" / "last.prev.pt").exists() == (step == 6)  # a repetition leaves the checkpoint before where it is
        saved = evaluate.read_checkpoint(tmp_path / "r" / "last.pt")
        assert saved["step"] == step and len(saved["history"]) == step // 3 - 1
    assert trained(tmp_path / "r", street) == 0 and len(calls) == 5
    assert same_run(tmp_path / "whole", tmp_path / "r")


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_while_validating_stops_every_rank_at_the_image(street, tmp_path, monkeypatch, stub, world):
    """Told as saved, which it was before validating; the same command repeats validation alone, to the same bits."""
    assert ranks(world, train.main, *TINY, "--root", street, "--out", tmp_path / "whole", said=tmp_path / "said")[0] == [0] * world
    first, prediction, seen = tmp_path / "first", evaluate.predict, []

    def signalled(*args, **kwargs):
        seen.append(0)
        if os.environ["RANK"] == "0" and not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        elif first.exists() and world == 1 and len(seen) == 2:
            raise RuntimeError("the next image was computed too")
        return prediction(*args, **kwargs)

    monkeypatch.setattr(evaluate, "predict", signalled)
    flags = [*TINY, "--root", street, "--out", tmp_path / "r"]
    status, text = ranks(world, train.main, *flags, said=tmp_path / "said")
    told = zip(status, text, (signal.SIGUSR1, signal.SIGTERM))
    assert all(code == 128 + s and f"rank {r}: stopped by {s.name} at step 3, saved" in line for r, (code, line, s) in enumerate(told)), text
    saved = evaluate.read_checkpoint(tmp_path / "r" / "last.pt")
    assert saved["step"] == 3 and not saved["history"]
    monkeypatch.setattr(evaluate, "predict", prediction)
    assert ranks(world, train.main, *flags, said=tmp_path / "said")[0] == [0] * world and same_run(tmp_path / "whole", tmp_path / "r")


@pytest.mark.parametrize("moved", [False, True])
def test_killed_between_the_two_renames(street, tmp_path, capsys, moved, stub):
    """new.pt is whole and last.pt the one before, still there or already last.prev.pt: the run goes on from new.pt."""
    assert trained(tmp_path / "whole", street) == 0
    out = tmp_path / "r"
    shutil.copytree(tmp_path / "whole", out)
    os.replace(out / "last.pt", out / "new.pt")
    if not moved:
        os.replace(out / "last.prev.pt", out / "last.pt")
    capsys.readouterr()
    assert trained(out, street) == 0 and "last.pt at step 6 of 6" in capsys.readouterr().out
    assert same_run(tmp_path / "whole", out) and not (out / "new.pt").exists()


def test_a_file_size_limit_of_the_system(street, tmp_path, capsys, stub):
    """Writes that fail half-way by RLIMIT_FSIZE: the run trains to its end, says so, and the same command then writes all."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert trained(tmp_path / "whole", street) == 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
        assert trained(tmp_path / "r", street) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step 6 not saved" in capsys.readouterr().err and not list((tmp_path / "r").glob("*.p*t"))
    assert trained(tmp_path / "r", street) == 0 and same_run(tmp_path / "whole", tmp_path / "r")


def test_stopped_with_a_full_disk_is_not_told_as_saved(street, tmp_path, monkeypatch, capsys, stub):
    monkeypatch.setattr(train, "write", lambda path, save: save(Full()))
    monkeypatch.setattr(train, "train_step", lambda run, *rest: os.kill(os.getpid(), signal.SIGTERM))
    assert trained(tmp_path / "r", street) == 143
    assert "SIGTERM at step 1, not saved" in capsys.readouterr().err


def no_room_at_first(monkeypatch, name):
    """The first write of a file of this name meets a full disk."""
    tried = []

    def full(path, save):
        if path.name == name and not tried:
            tried.append(path)
            raise OSError(28, "No space left on device")
        return write(path, save)

    monkeypatch.setattr(train, "write", full)


def test_the_best_that_a_full_disk_lost_is_not_told_as_best(street, tmp_path, monkeypatch, capsys, stub):
    rising = iter((0.5, 0.4, 0.3))
    monkeypatch.setattr(train, "validate", lambda run, net: {"miou": next(rising), "accuracy": 1.0, "iou": [0.5] * 3})
    no_room_at_first(monkeypatch, "best.pt")
    assert trained(tmp_path / "r", street, "--epochs", 3) == 0
    assert "best.pt (mIoU 0.4000)" in capsys.readouterr().out
    best, last = (evaluate.read_checkpoint(tmp_path / "r" / name) for name in ("best.pt", "last.pt"))
    assert best["step"] == 6 and best["best"] == last["best"] == 0.4


def test_the_best_of_the_last_epoch_is_tried_again(street, tmp_path, monkeypatch, stub):
    """The retry at the end has the very weights."""
    no_room_at_first(monkeypatch, "best.pt")
    assert trained(tmp_path / "r", street, "--epochs", 1) == 0
    assert same_state(tmp_path / "r" / "best.pt", tmp_path / "r" / "last.pt")


def test_nobody_listens(street, tmp_path, monkeypatch, stub):
    """Nothing that is printed is worth a training: output to a full disk."""
    assert trained(tmp_path / "whole", street) == 0
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        assert trained(tmp_path / "r", street) == 0
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert same_run(tmp_path / "whole", tmp_path / "r")


def test_a_context_may_have_a_vector_named_gamma(street, tmp_path, monkeypatch):
    (tmp_path / "layer_scale.py").write_text("""import torch
class Scale(torch.nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(channels, 1, 1))
    def forward(self, x):
        return x * self.gamma
""")
    monkeypatch.chdir(tmp_path)
    assert trained(tmp_path / "r", street, "--context", "layer_scale:Scale") == 0


def test_training_on_a_full_disk_behind_its_output_keeps_its_status(street, tmp_path, monkeypatch):
    """A process of its own, its output buffered: neither a loader's start, which flushes, nor the interpreter's end is the worse for it."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    command = [sys.executable, HERE / "train.py", *TINY, "--root", street, "--out", tmp_path / "r", "--workers", 1]
    with open("/dev/full", "w") as full:
        assert subprocess.run([*map(str, command)], stdout=full, stderr=full, timeout=100).returncode == 0
    assert trained(tmp_path / "heard", street) == 0 and same_run(tmp_path / "r", tmp_path / "heard")


def test_two_trainings_in_one_folder(street, tmp_path, stub):
    first = forked(train.main, *TINY, "--root", street, "--out", tmp_path / "r", "--epochs", 2000)
    try:
        while not (tmp_path / "r" / "last.pt").exists():
            assert first.is_alive()
            time.sleep(0.05)
        with pytest.raises(data.InputError, match="another training is writing"):
            trained(tmp_path / "r", street, "--epochs", 2000)
    finally:
        first.kill()
        first.join()


def test_resume_into_the_folder_of_another_run(run_folder, street, tmp_path, stub):
    assert trained(tmp_path / "r", street, "--seed", 5, "--epochs", 1) == 0
    with pytest.raises(data.InputError, match="holds a run of other settings"):
        trained(tmp_path / "r", street, "--resume", run_folder / "last.pt")
    (tmp_path / "r" / "last.pt").unlink()
    assert trained(tmp_path / "s", street, "--epochs", 2, "--eval-every", 2) == 0
    os.replace(tmp_path / "r" / "best.pt", tmp_path / "s" / "best.pt")
    assert trained(tmp_path / "s", street, "--epochs", 2, "--eval-every", 2) == 0
    args = train.parse([*TINY, "--root", str(street), "--out", str(tmp_path / "s"), "--eval-every", "2"], 1)
    run = train.setup(args, 0, 1, CPU)
    train.restore(run)
    assert run.step == 6 and run.best is None  # that best.pt is another run's


def test_an_image_that_breaks_while_scoring_is_one_line_on_every_rank(run_folder, street, tmp_path):
    root = tmp_path / "street"
    shutil.copytree(street, root)
    (root / "images" / "val" / "3.png").write_bytes(b"not an image")
    status, texts = ranks(2, evaluate.main, run_folder / "last.pt", "--root", root, "--workers", 0, said=tmp_path / "said")
    assert status == [2, 2] and all(text.count("\n") == 1 for text in texts) and "val/3.png" in texts[1], texts


def broken_fields(state):
    """A checkpoint with one field changed into what no run writes."""
    momentum = state["optimizer"]["state"]
    yield from ({"step": 7}, {"step": -1}, {"step": 2.5}, {"step": "6"}, {"step": 5}, {"history": []}, {"history": None},
                {"history": state["history"][::-1]}, {"skipped": None}, {"skipped": 99},
                {"sums": torch.zeros(2, dtype=torch.float64)}, {"sums": state["sums"] + float("nan")}, {"sums": 0},
                {"optimizer": {}}, {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}}},
                {"optimizer": {"state": {10 ** 9: momentum[0]}}}, {"optimizer": {"state": momentum | {"x": momentum[0]}}},
                {"model": {}}, {"model": None}, {"model": [1]}, {"settings": None}, {"scaler": 3}, {"settings": []})


def test_a_checkpoint_that_no_run_wrote_is_refused(run_folder, street, tmp_path):
    """By restore, in one line with the file's name; each case without its change goes on."""
    args = train.parse([*TINY, "--root", str(street), "--out", str(tmp_path / "r")], 1)
    run, whole = train.setup(args, 0, 1, CPU), torch.load(run_folder / "last.pt", weights_only=True)
    args.out.mkdir()
    for change in broken_fields(whole):
        torch.save(whole | change, args.out / "last.pt")
        with pytest.raises(data.InputError, match="last.pt") as e:
            train.restore(run)
        assert "\n" not in str(e.value), change
    torch.save(whole, args.out / "last.pt")
    train.restore(run)
    assert run.step == 6 and run.history == whole["history"]


def test_the_rank_whose_loss_is_not_finite_is_told(street, tmp_path, monkeypatch, stub):
    """Two ranks; rank 1's images of each step are infinite: the files named are its own."""
    normal = train.part_losses
    monkeypatch.setattr(train, "part_losses", lambda run, x, *rest: normal(run, x * (float("inf") if run.rank else 1), *rest))
    status, texts = ranks(2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", "--skip-nonfinite", 1, said=tmp_path / "said")
    assert status == [2, 2] and "step 2, rank 1: the loss is not finite; images" in texts[1], texts
    assert "rank 0: stopped, since the loss of another rank is not finite" in texts[0] and "images/train" not in texts[0], texts


def test_a_file_that_breaks_stops_every_rank_with_one_line(street, tmp_path, stub):
    """Two ranks; images of later steps are not images: exit status 2, the name, no traceback of ours, and what was saved stays."""
    root = tmp_path / "street"
    shutil.copytree(street, root)
    first = {i for step in range(2) for _, i in data.step_items(step, seed=0, n=12, batch=4)}
    for i, item in enumerate(data.open_dataset("folder", root, "train").items):
        if i not in first:
            item.image.write_bytes(b"not an image")
    status, texts = ranks(2, train.main, *TINY, "--root", root, "--out", tmp_path / "r", "--save-every", 1, said=tmp_path / "said")
    told = [text.splitlines()[-1] for text in texts]
    assert status == [2, 2] and any("images/train/" in line for line in told) and "Traceback" not in "".join(texts), texts
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["step"] == 2


def test_a_rank_gives_up_one_that_hangs(tmp_path):
    """Within the timeout, here 2 s in place of 10 minutes; torchrun then ends the others."""
    def main(argv):
        with evaluate.distributed(timedelta(seconds=2)) as (rank, world, device):
            time.sleep(20 * rank)
            torch.distributed.all_reduce(torch.ones(1))

    port = free_port()
    waiting, hanging = (forked(main, said=tmp_path / f"said{r}", rank=r, world=2, port=port) for r in (0, 1))
    waiting.join(15)
    ended = waiting.exitcode, hanging.exitcode
    for process in (waiting, hanging):
        process.kill()
        process.join()
    assert ended[0] not in (0, None) and ended[1] is None


@pytest.mark.parametrize("where", ["agree", "train_step", "mean_in_rank_order", "validate"])
def test_a_rank_that_is_killed_is_a_line_on_the_other(where, street, tmp_path, monkeypatch, stub):
    """By the kernel, for want of memory: no traceback, no waiting."""
    function = getattr(train, where)

    @wraps(function)  # DDP looks at its hook's signature
    def killed(*args, **kwargs):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    monkeypatch.setattr(train, where, killed)
    status, text = ranks(2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", said=tmp_path / "said")
    assert status == [1, -signal.SIGKILL] and text[0].splitlines()[-1].endswith("another rank is gone: its own line says why, or it was killed")
    assert "Traceback" not in text[0]


def test_other_images_of_the_same_number_are_other_settings(run_folder, street, tmp_path):
    root = tmp_path / "street"
    shutil.copytree(street, root)
    for kind in ("images", "labels"):
        os.replace(root / kind / "train" / "3.png", root / kind / "train" / "new.png")
    shutil.copytree(run_folder, tmp_path / "r")
    with pytest.raises(data.InputError, match="names [0-9a-f]{8} -> [0-9a-f]{8}"):
        trained(tmp_path / "r", root)


def test_deterministic_gives_the_same_bits_twice(street, tmp_path):
    try:
        for name in "ab":
            assert trained(tmp_path / name, street, "--deterministic") == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_run(tmp_path / "a", tmp_path / "b")


def test_tensorboard_is_imported_only_when_asked(street, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert trained(tmp_path / "r", street, "--epochs", 1) == 0
    with pytest.raises(data.InputError, match="pip install tensorboard"):
        trained(tmp_path / "s", street, "--tensorboard")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("full", [(), ("add_scalar",), ("__init__",), ("close",), ("add_scalar", "close")], ids=str)
def test_tensorboard_gets_the_log_and_its_full_disk_stops_nothing(street, tmp_path, monkeypatch, capsys, stub, full):
    values, pictures = {}, []

    class Writer:  # in the place of TensorBoard's
        def __init__(self, folder, purge_step):
            if "__init__" in full:
                raise OSError(28, "No space left on device")

        def add_scalar(self, name, value, step):
            if "add_scalar" in full:
                raise OSError(28, "No space left on device")
            values[name, step] = value

        def add_image(self, name, picture, step, dataformats):
            pictures.append((name, picture.shape[2], step))

        def close(self):
            if "close" in full:
                raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", argparse.Namespace(SummaryWriter=Writer))
    assert trained(tmp_path / "r", street, "--tensorboard", "--ema", 0.5) == 0
    assert capsys.readouterr().err.count("warning: TensorBoard's file not written") == bool(full)
    assert trained(tmp_path / "s", street, "--ema", 0.5) == 0 and same_run(tmp_path / "r", tmp_path / "s")
    if not full:
        line = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
        names = ("loss", "loss_res2", "loss_res3", "lr", "miou", "accuracy", "ema_miou")
        assert {n: values[n, 6] for n in names} == {n: line[n] for n in names}
        assert {n: values[f"iou/{n}", 6] for n in line["iou"]} == line["iou"] and ("gamma", 6) in values
        assert len([n for n, step in values if n == "step/loss"]) == 6 and pictures == [("val", 3, 3), ("val", 3, 6)]


# ==================================================================================================== predict.py


CPU = torch.device("cpu")


def make_checkpoint(path, classes, data="folder", root=None, context="dnl"):
    torch.manual_seed(0)
    config = replace(dnl.PAPER, num_classes=len(classes), backbone="resnet18", channels=32, context=context)
    net = dnl.build(config)
    if context == "dnl":
        nn.init.constant_(net.context.gamma, 0.5)
    nn.init.normal_(net.head[-1].weight, std=3.0)  # several classes in an image
    torch.save({"version": evaluate.VERSION, "model": net.state_dict(), "config": asdict(config), "data": data,
                "root": root, "classes": list(classes), "amp": "off",
                "colors": [list(c) for c in palette(len(classes))]}, path)
    return str(path)


def blocks(h, w, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (h // 8 + 2, w // 8 + 2, 3), np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:h, :w].copy()


def run(*args):
    return predict.main([*map(str, args), "--workers", "0"])


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("net") / "best.pt", ["a", "b", "c", "d", "e"])


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(blocks(40, 56)).save(tmp_path / "in" / "photo.png")
    return tmp_path / "in" / "photo.png"


# ---- tiles

def test_spans_keep_each_pixel_once_with_margin():
    for side in (8, 13, 64):
        for length in [*range(1, 90), 200, 331]:
            kept = []
            for seen, keep in predict.spans(length, side):
                assert 0 <= seen.start <= keep.start < keep.stop <= seen.stop <= length
                assert seen.stop - seen.start <= side
                assert seen.start == 0 or keep.start - seen.start >= side // 8
                assert seen.stop == length or seen.stop - keep.stop >= side // 8
                kept += range(keep.start, keep.stop)
            assert kept == list(range(length))


class Blur(nn.Module):
    """Logits: the image averaged over 5x5 pixels, zero outside. Remembers the largest input."""
    largest = 0

    def forward(self, x):
        self.largest = max(self.largest, x.shape[2] * x.shape[3])
        return F.avg_pool2d(x, 5, 1, 2)


@pytest.mark.parametrize("size", [(150, 90), (33, 400), (1, 700)])
def test_tiles_give_what_the_whole_image_gives(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    net = Blur()
    ids, confidence = predict.predict_ids(net, image, "", device=CPU, side=24)  # margin 3, the blur reaches 2
    assert net.largest <= 24 * 24
    x = (image.double().numpy() - np.array([123.675, 116.28, 103.53])[:, None, None])
    x = np.pad(x / np.array([58.395, 57.12, 57.375])[:, None, None], ((0, 0), (2, 2), (2, 2)))
    mean = sum(x[:, i:i + size[0], j:j + size[1]] for i in range(5) for j in range(5)) / 25
    p = np.exp(mean) / np.exp(mean).sum(0)
    assert ids.dtype == confidence.dtype == np.uint8 and np.array_equal(ids, mean.argmax(0))
    assert np.abs(confidence - 255 * p.max(0)).max() < 0.51


@pytest.mark.parametrize("options", [{}, {"flip": True, "scales": [0.5, 1.0]}, {"crop": 32}])
def test_up_to_the_bound_it_is_evaluates_argmax(checkpoint, options):
    net, _ = evaluate.load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(48, 70)).permute(2, 0, 1)
    ids, _ = predict.predict_ids(net, image, "", device=CPU, **options)
    assert np.array_equal(ids, evaluate.predict(net, image, **options).argmax(0).numpy())
    assert len(np.unique(ids)) > 1


def test_tile_side_bounds_memory_but_grants_crop():
    assert predict.tile_side(19, None) == 2048 and predict.tile_side(19, 768) == 2048
    assert predict.tile_side(150, None) ** 2 * 150 * 4 <= 2**30 < (predict.tile_side(150, None) + 2) ** 2 * 150 * 4
    assert predict.tile_side(150, 3000) == 3000


# ---- files

def test_mask_overlay_confidence(checkpoint, photo, tmp_path):
    assert run(checkpoint, photo, "--out", tmp_path / "o", "--confidence") == 0
    assert files(tmp_path / "o") == ["photo.png", "photo_confidence.png", "photo_overlay.png"]
    net, saved = evaluate.load_network(checkpoint, CPU)
    p = evaluate.predict(net, torch.from_numpy(blocks(40, 56)).permute(2, 0, 1))
    mask, grey = (Image.open(tmp_path / "o" / f"photo{e}.png") for e in ("", "_confidence"))
    assert mask.mode == "P" and np.array_equal(mask, p.argmax(0)) and len(np.unique(mask)) > 1
    assert np.array(mask.getpalette()[:15]).reshape(5, 3).tolist() == saved["colors"]
    assert grey.mode == "L" and np.abs(np.array(grey) - 255 * p.amax(0).numpy()).max() < 0.51
    over = np.asarray(Image.open(tmp_path / "o" / "photo_overlay.png")).astype(int)
    half = (blocks(40, 56).astype(int) + np.array(saved["colors"])[np.array(mask)]) / 2
    found = any(np.abs(over[y:y + 40, x:x + 56] - half).max() <= 1 for y in range(30) for x in range(12))
    assert found and over.shape[0] > 60  # the picture as it is, and a legend


def test_an_overlay_keeps_the_shape_of_a_tall_photograph():
    """What is as high as 2048 pixels is not squeezed: the lowest row of the picture is the lowest of the photograph."""
    image, ids = torch.zeros(1900, 300, 3, dtype=torch.uint8), np.zeros((1900, 300), np.uint8)
    image[-1] = 250
    picture = np.asarray(predict.overlay(image, "t", ids, {"classes": ["a"], "colors": [[0, 0, 0]]})).astype(int)
    bright, = (picture[:, 100] == 125).all(1).nonzero()
    assert len(bright) == 1 and (picture[bright[0] - 1899:bright[0], 100] == 0).all()


def test_exif_is_honoured(checkpoint, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(photo.with_name("turned.png"), exif=exif)
    assert run(checkpoint, photo.parent, "--out", tmp_path / "o") == 0
    upright, turned = (np.asarray(Image.open(tmp_path / "o" / f"{n}.png")) for n in ("photo", "turned"))
    assert upright.shape == (40, 56) and np.array_equal(upright, turned)


def test_mixed_folder_names_the_bad_files_and_goes_on(checkpoint, photo, tmp_path, capsys):
    folder = photo.parent
    Image.fromarray(blocks(80, 96)).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left alone")
    (folder / ".hidden.png").write_text("left alone")
    names = ["sp ace", "ünïcode", "new\nline", "a.b", "deep/er/x"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks(8, 8)).save(folder / f"{name}.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("L", (1, 3000)).save(folder / "thin.png")
    assert run(checkpoint, folder, "--out", tmp_path / "o") == 1
    good = [*names, "one", "thin", "photo", "whole"]
    assert files(tmp_path / "o") == sorted(n + e for n in good for e in (".png", "_overlay.png"))
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert sum("cannot be read" in line for line in lines) == 2
    assert all(f"{name}.jpg: cannot be read" in error for name in ("text", "truncated"))
    assert "notes.txt" in lines[0] and "2 failed" in lines[-1] and "hidden" not in error
    for name, size in (("one", (1, 1)), ("thin", (1, 3000)), ("whole", (96, 80))):
        assert Image.open(tmp_path / "o" / f"{name}.png").size == size


def test_again_with_results_inside_the_folder(checkpoint, photo):
    for _ in range(2):
        assert run(checkpoint, photo.parent, "--out", photo.parent / "results") == 0
    assert files(photo.parent / "results") == ["photo.png", "photo_overlay.png"]


@pytest.mark.parametrize("other, flags, told", [
    ("photo.jpg", [], "both write"), ("photo_overlay.jpg", [], "both write"), ("x.png", ["--out", "in"], "overwrite"),
    ("x.png", ["--out", "link"], "leave")])
def test_refused_before_any_work(photo, tmp_path, monkeypatch, other, flags, told):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(photo.with_name(other))
    if "link" in flags:
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "x.png").symlink_to(tmp_path / "elsewhere.png")
    before = files(tmp_path)
    with pytest.raises(InputError, match=told) as e:
        run("absent.pt", "in", *flags)
    assert "\n" not in str(e.value) and files(tmp_path) == before


def test_nothing_to_do_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for given, told in ((tmp_path, "no image"), (tmp_path / "absent", "no such file")):
        with pytest.raises(InputError, match=told):
            run("absent.pt", given)


@pytest.mark.parametrize("flags", [["--attention", "1;2"], ["--format", "ade20k", "--confidence"], ["--scales", "0"], ["--scales", "1e9"]])
def test_wrong_flags(photo, flags):
    with pytest.raises(InputError):
        run("absent.pt", photo, *flags)


def test_an_output_that_is_not_finite_is_no_result(run_folder, street, photo, tmp_path, capsys):
    """Finite weights that overflow: neither a score nor a mask of class 0 comes of them."""
    state = torch.load(run_folder / "best.pt", weights_only=True)
    for name in ("head.0.weight", "head.4.weight"):
        state["model"][name] *= 1e30
    torch.save(state, tmp_path / "huge.pt")
    with pytest.raises(InputError, match=r"images/val/0\.png: the network's output is not finite: try --amp off"):
        evaluate.main([str(tmp_path / "huge.pt")])
    assert run(tmp_path / "huge.pt", photo, "--out", tmp_path / "o") == 1
    assert "photo.png: the network's output is not finite" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_out_that_is_a_file(photo):
    with pytest.raises(InputError, match="is a file: name a folder"):
        run("absent.pt", photo, "--out", __file__)


def test_result_that_cannot_be_written_is_named(checkpoint, photo, tmp_path, capsys):
    (tmp_path / "o" / "photo.png").mkdir(parents=True)
    assert run(checkpoint, photo, "--out", tmp_path / "o") == 1
    assert "photo.png: cannot be written" in capsys.readouterr().err


def test_image_without_result_leaves_the_others(checkpoint, photo, tmp_path, capsys, monkeypatch):
    errors = {41: lambda: torch.empty(2**60, dtype=torch.uint8), 42: lambda: np.empty(2**60, np.uint8),
              43: lambda: Image.new("L", (9, 9)).resize((0, 9)), 44: lambda: torch.ones(2) @ torch.ones(3)}
    whole = predict.predict_ids

    def failing(net, image, source, **options):
        errors.get(image.shape[2], tuple)()
        return whole(net, image, source, **options)

    monkeypatch.setattr(predict, "predict_ids", failing)
    for width in (41, 42, 43):
        Image.fromarray(blocks(40, width)).save(photo.with_name(f"{width}.png"))
    assert run(checkpoint, photo.parent, "--out", tmp_path / "o") == 1
    assert files(tmp_path / "o") == ["photo.png", "photo_overlay.png"]
    told = capsys.readouterr().err.splitlines()
    assert all(f"{n}.png: out of memory: give --crop" in line for n, line in zip((41, 42), told))
    assert "43.png: no result (ValueError" in told[2] and "3 failed" in told[3]
    Image.fromarray(blocks(40, 44)).save(photo.with_name("44.png"))
    with pytest.raises(RuntimeError, match="size"):  # not of the image: all of them would fail
        run(checkpoint, photo.parent, "--out", tmp_path / "p")


def test_two_ranks_give_the_files_of_one(checkpoint, photo, tmp_path):
    for i in range(3):
        Image.fromarray(blocks(40, 40 + i, i)).save(photo.with_name(f"{i}.png"))
    photo.with_name("bad.png").write_text("")
    assert run(checkpoint, photo.parent, "--out", tmp_path / "one") == 1
    status, texts = ranks(2, predict.main, checkpoint, photo.parent, "--out", tmp_path / "two", "--workers", "0", said=tmp_path / "said")
    assert status == [1, 1] and "4 images" in texts[0] and "1 failed" in texts[0]
    assert files(tmp_path / "one") == files(tmp_path / "two") != []
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---- test servers

TO_TRAIN_ID = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
               28: 15, 31: 16, 32: 17, 33: 18}  # cityscapesScripts, helpers/labels.py


def test_cityscapes_files_score_as_evaluate_does(tmp_path, capsys):
    root, rng = tmp_path / "cityscapes", np.random.default_rng(3)
    frames = ["ulm_000000_000019", "ulm_000001_000019", "jena_000000_000019"]
    for i, frame in enumerate(frames):
        for top, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            path = root / top / "val" / frame.split("_")[0] / f"{frame}_{end}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(blocks(64, 128, i) if end == "leftImg8bit" else
                            rng.integers(0, 34, (64, 128), np.uint8)).save(path)
    checkpoint = make_checkpoint(tmp_path / "best.pt", CITYSCAPES, "cityscapes", str(root))
    out = tmp_path / "o"
    assert run(checkpoint, root / "leftImg8bit" / "val", "--out", out, "--format", "cityscapes") == 0
    said = capsys.readouterr().err
    assert "3 not 2048x1024" in said and "3 files; the server expects the 1525" in said and "missing" not in said
    assert files(out) == sorted(f"{frame}_pred_labelIds.png" for frame in frames)
    status, texts = ranks(2, predict.main, checkpoint, root / "leftImg8bit" / "val", "--out", tmp_path / "two", "--format",
                          "cityscapes", "--workers", "0", said=tmp_path / "said")
    assert status == [0, 0] and "3 files; the server expects the 1525" in texts[0]
    assert all((tmp_path / "two" / name).read_bytes() == (out / name).read_bytes() for name in files(out))
    matrix = np.zeros((19, 19), int)
    for frame in frames:
        [guess] = out.glob(f"{frame}*.png")  # as cityscapesScripts looks for it
        with Image.open(guess) as image:
            assert image.mode == "L" and image.size == (128, 64)
            guess = np.asarray(image)
        [truth] = root.glob(f"gtFine/val/*/{frame}_gtFine_labelIds.png")
        assert set(np.unique(guess)) <= set(TO_TRAIN_ID)
        for t, g in zip(np.asarray(Image.open(truth)).ravel(), guess.ravel()):
            if int(t) in TO_TRAIN_ID:
                matrix[TO_TRAIN_ID[int(t)], TO_TRAIN_ID[int(g)]] += 1
    evaluate.main([checkpoint, "--json", "--workers", "0"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (matrix.sum(0) > 0).sum() > 2 and matrix.tolist() == told["confusion"]


def test_check_server_lists_what_the_server_refuses(tmp_path, capsys):
    Image.new("L", (2048, 1024)).save(tmp_path / "a_000000_000000_pred_labelIds.png")
    Image.new("L", (2048, 512)).save(tmp_path / "b_000000_000000_pred_labelIds.png")
    Image.new("L", (2048, 1024)).save(tmp_path / "old.png")
    predict.check_server(tmp_path, [f"{c}_000000_000000_pred_labelIds" for c in "abc"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "missing: c_" in lines[0] and "old.png" in lines[1] and ": b_" in lines[2]
    assert not any("a_0" in line for line in lines)


def test_check_server_has_nothing_to_say_of_the_whole_split(tmp_path, capsys):
    Image.new("L", (2048, 1024)).save(tmp_path / "0.png")
    for i in range(1, 1525):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    predict.check_server(tmp_path, [str(i) for i in range(1525)])
    assert capsys.readouterr().err == ""


def test_cityscapes_needs_its_names_and_classes(checkpoint, photo, tmp_path):
    with pytest.raises(InputError, match="CITY_SEQUENCE_FRAME"):
        run(checkpoint, photo, "--format", "cityscapes")
    frame = photo.rename(photo.with_name("ulm_000000_000019_leftImg8bit.png"))
    with pytest.raises(InputError, match="trained on folder"):
        run(checkpoint, frame, "--format", "cityscapes", "--out", tmp_path / "o")


def test_ade20k_counts_from_one(photo, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "best.pt", ADE20K, "ade20k")
    for form in ("masks", "ade20k"):
        assert run(checkpoint, photo, "--out", tmp_path / form, "--format", form) == 0
    assert files(tmp_path / "ade20k") == ["photo.png"]
    mask, result = (Image.open(tmp_path / form / "photo.png") for form in ("masks", "ade20k"))
    assert result.mode == "L" and np.array_equal(np.asarray(result), np.asarray(mask).astype(int) + 1)
    assert len(np.unique(mask)) > 1


# ---- attention

def lightness(rgb):
    """CIE L* of sRGB colours (..., 3)."""
    c = np.asarray(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16


def test_equal_steps_of_attention_are_equal_steps_of_lightness():
    steps = np.linspace(0, 1, 33)
    assert np.abs(lightness(predict.heat(steps)) - (15 + 80 * steps)).max() < 1.5


def test_attention_maps_are_the_papers_rows(checkpoint):
    net, _ = evaluate.load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(65, 97)).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    with torch.inference_mode():
        f = net.features(((image - mean) / std)[None])[3]
        q, k, p = (conv(f)[0].double() for conv in (net.context.query, net.context.key, net.context.coarse))
    H, W = f.shape[2:]
    for pixel, (i, j) in {(0, 64): (H - 1, 0), (96, 0): (0, W - 1), (50, 31): (2, 3)}.items():  # corners on corners
        a = torch.einsum("c,chw->hw", q[:, i, j], k).flatten().softmax(0).view(H, W)
        gate = torch.einsum("c,chw->hw", p[:, i, j], p).sigmoid()
        retained = torch.zeros(H, W, dtype=torch.float64)
        for y in range(H):
            for x in range(W):
                for v in range(max(0, y - 1), min(H, y + 2)):
                    for u in range(max(0, x - 1), min(W, x + 2)):
                        retained[y, x] += (q[:, y, x] * k[:, v, u]).sum().sigmoid() * a[v, u] * gate[v, u]
        maps = predict.attention_maps(net, image, pixel)
        assert list(maps) == ["A", "A' (after GR)", "A'' (after LR)", "P_class"]
        for got, expected in zip(maps.values(), (a, a * gate, retained, gate)):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parts, maps", [(dict(context="nl"), ["A"]), (dict(gr=False), ["A", "A'' (after LR)"])])
def test_attention_maps_of_parts_that_a_network_lacks_are_left_out(parts, maps):
    net = dnl.build(replace(dnl.PAPER, num_classes=2, backbone="resnet18", channels=16, **parts)).eval()
    assert list(predict.attention_maps(net, torch.zeros(3, 33, 33, dtype=torch.uint8), (0, 0))) == maps


def test_attention_is_brightest_at_the_maximum():
    values = torch.zeros(4, 6)
    values[2, 5] = 1e-7  # maps of many pixels are small: each is scaled by its own maximum
    out = np.asarray(predict.overlay_map(Image.new("RGB", (91, 61), "black"), values))
    assert out.shape == (61, 91, 3)
    assert tuple(np.unravel_index(out.sum(2).argmax(), (61, 91))) == (40, 90)
    assert np.abs(out[40, 90] - 0.7 * np.array(predict.HEAT[-1])).max() <= 0.5
    assert np.abs(out[0, 0] - 0.7 * np.array(predict.HEAT[0])).max() <= 0.5


@pytest.mark.parametrize("pixel", [(10, 50), (0, 0), (89, 60)])
def test_attention_sheet_marks_the_pixel_in_every_picture(checkpoint, pixel):
    net, _ = evaluate.load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(61, 90)).permute(2, 0, 1)
    out = predict.attention_sheet([predict.attention_row(net, image, pixel, "", 900)])
    width = (900 - 6) // 5 - 6
    assert abs(out.width - 900) <= 5
    green = (np.asarray(out) == (0, 255, 0)).all(2)
    for i in range(5):
        left = 6 + i * (width + 6)
        x, y = left + (pixel[0] + 0.5) * width / 90, 22 + (pixel[1] + 0.5) * width / 90
        assert green[int(y) - 1:int(y) + 2, int(x) - 1:int(x) + 2].any()
        assert green[:, left:left + width].sum() > 10


def test_attention_page_by_tiles_and_outside(checkpoint, photo, tmp_path, capsys):
    assert run(checkpoint, photo, "--out", tmp_path / "o", "--attention", "55,39") == 0
    assert "photo_attention.png" in files(tmp_path / "o")
    assert run(checkpoint, photo, "--out", tmp_path / "p", "--attention", "56,39") == 1
    assert "photo.png: pixel 56,39 is outside of the image of 56x40" in capsys.readouterr().err
    assert files(tmp_path / "p") == ["photo.png", "photo_overlay.png"]
    net, _ = evaluate.load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(40, 56)).permute(2, 0, 1)
    rows, columns = slice(16, 40), slice(33, 56)  # the lower right of six tiles
    whole, tiled, part = (predict.attention_page(net, i, at, "", device=CPU, side=s) for i, at, s in (
        (image, (50, 30), 64), (image, (50, 30), 32), (image[:, rows, columns], (17, 14), 64)))
    assert tiled.size != whole.size and np.array_equal(tiled, part)


def test_attention_needs_a_non_local_block(photo, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "none.pt", ["a", "b"], context="none")
    with pytest.raises(InputError, match="context 'none' has no attention maps"):
        run(checkpoint, photo, "--out", tmp_path / "o", "--attention", "0,0")
