"""Tests of dnl.py alone. They need torch, numpy and pytest, and released.npz beside them."""

import ast
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import zlib
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dnl
from dnl import PAPER, RELEASED, DenoisedNonLocal, ResNet, build, denoised_attention, denoised_maps

HERE = Path(__file__).parent
SMALL = {"backbone": "resnet18", "channels": 16, "num_classes": 5}


def qkvp(size, batch=2, channels=6, keys=4, classes=3, seed=0, dtype=torch.double):
    """Q, K, V, P as leaves that require a gradient."""
    g = torch.Generator().manual_seed(seed)
    rows = (keys, keys, channels, classes)
    return [
        torch.randn(batch, c, size[0] * size[1], generator=g, dtype=dtype).requires_grad_()
        for c in rows
    ]


def map_route(q, k, v, p, size, kernel=3):
    """A''V by the maps: (B, C, N)."""
    return torch.bmm(v, denoised_maps(q, k, p, size, kernel)[2].transpose(1, 2))


def grads(out, inputs, seed=1):
    """Gradients of <out, a random tensor>."""
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return torch.autograd.grad(out, inputs, g.to(out.dtype))


def gap(a, b):
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------- the paper's formulas, pixel by pixel


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loop_maps(q, k, p, size, kernel):
    """A, A', A'' of one image by loops (eq. 4, Section III-D, E). q, k (C', N), p (n, N), None."""
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
        expected = loop_maps(
            q[b].numpy(), k[b].numpy(), None if p is None else p[b].numpy(), size, kernel
        )
        assert gap([m[b] for m in maps], [torch.from_numpy(m) for m in expected]) < 1e-12
        assert np.abs(values[b].numpy() - v[b].numpy() @ expected[2].T).max() < 1e-12


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 9)], ids=str)
@pytest.mark.parametrize("kernel", [0, 1, 3, 5])
@pytest.mark.parametrize("gr", [True, False])
def test_value_route_equals_map_route_forward_and_gradients(size, kernel, gr):
    q, k, v, p = qkvp(size)
    inputs, p = ([q, k, v, p], p) if gr else ([q, k, v], None)
    value, maps = (
        denoised_attention(q, k, v, p, size, kernel, chunk=10),
        map_route(q, k, v, p, size, kernel),
    )
    assert gap([value], [maps]) < 1e-12
    assert gap(grads(value, inputs), grads(maps, inputs)) < 1e-12


def test_without_gr_and_lr_it_is_the_plain_non_local_block():
    q, k, v, _ = qkvp((5, 6))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=1.0
    ).transpose(1, 2)
    assert gap([denoised_attention(q, k, v, None, (5, 6), 0)], [expected]) < 1e-12


def test_affinity_rows_sum_to_one_and_are_even_where_nothing_is_known():
    q, k, _, _ = qkvp((4, 5))
    a = dnl.affinity(q, k)
    assert (a > 0).all() and gap([a.sum(-1)], [torch.ones(2, 20)]) < 1e-12
    assert (
        gap(
            [dnl.affinity(torch.zeros_like(q), k)],
            [torch.full((2, 20, 20), 1 / 20, dtype=torch.double)],
        )
        < 1e-12
    )


def test_class_affinity_closed_forms():
    classes = torch.tensor([0, 2, 2, 1, 0])
    hot = (
        3 * F.one_hot(classes, 3).T[None].double()
    )  # logits 3 for the class, 0 for the others: P^T P is 9 or 0
    same = classes[:, None] == classes
    assert (
        gap([dnl.class_affinity(hot)[0]], [torch.where(same, torch.tensor(sigmoid(9.0)), 0.5)])
        < 1e-12
    )
    soft = dnl.class_affinity(torch.randn(2, 7, 50).mul(5).softmax(1))
    assert (
        soft.min() >= 0.5 and soft.max() <= sigmoid(1.0) + 1e-6
    )  # P^T P of probabilities lies in [0, 1]


def test_local_similarity_and_retention_know_the_border():
    ones = torch.ones(1, 2, 12, dtype=torch.double)  # 3 x 4, Q.K = 2 inside and 0 in the padding
    s = dnl.local_similarity(ones, ones, (3, 4)).unflatten(2, (3, 4))
    assert s[0, 0, 0, 0] == s[0, 8, 2, 3] == 0.5 and abs(s[0, 0, 1, 1] - sigmoid(2.0)) < 1e-12
    counts = dnl.local_retention(torch.ones(1, 1, 12), torch.ones(1, 9, 12), (3, 4)).view(3, 4)
    assert counts.tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_spreading_values_is_the_adjoint_of_local_retention(kernel):
    g = torch.Generator().manual_seed(0)
    a, v, s = (
        torch.randn(2, c, 20, generator=g, dtype=torch.double) for c in (3, 3, kernel**2)
    )  # s asymmetric
    left = (dnl.local_retention(a, s, (4, 5), kernel) * v).sum((1, 2))
    assert gap([left], [(a * dnl.spread_values(v, s, (4, 5), kernel)).sum((1, 2))]) < 1e-12


@pytest.mark.parametrize("batch", [1, 2])
def test_the_memory_format_does_not_change_the_result(batch):
    """Channels innermost, as in a channels_last network: the same bits, and V~ is laid out as V."""
    q, k, v, p = (x.detach() for x in qkvp((5, 6), batch))
    last = [x.mT.contiguous().mT.requires_grad_() for x in (q, k, v, p)]
    plain = [x.clone().requires_grad_() for x in (q, k, v, p)]
    s = torch.rand(batch, 9, 30, dtype=torch.double)
    assert (
        dnl.spread_values(last[2], s, (5, 6)).stride(1) == 1
        and dnl.spread_values(plain[2], s, (5, 6)).stride(2) == 1
    )
    assert torch.equal(
        dnl.spread_values(last[2], s, (5, 6)), dnl.spread_values(plain[2], s, (5, 6))
    )
    a, b = (denoised_attention(*inputs, (5, 6), chunk=7) for inputs in (last, plain))
    assert gap([a], [b]) < 1e-13 and gap(grads(a, last), grads(b, plain)) < 1e-13


@pytest.mark.parametrize("kernel", [0, 3])
def test_chosen_queries_are_rows_of_the_whole_map(kernel):
    q, k, _, p = qkvp((5, 4))
    rows = torch.tensor([19, 0, 7])
    chosen, all_rows = (
        denoised_maps(q, k, p, (5, 4), kernel, rows),
        denoised_maps(q, k, p, (5, 4), kernel),
    )
    for some, whole in zip(chosen, all_rows, strict=True):
        assert some.shape == (2, 3, 20) and gap([some], [whole[:, rows]]) < 1e-12


# ----------------------------------------------------------------------- the value route's promises


@pytest.mark.parametrize("chunk", [1, 4, 7, 35, 100])
def test_the_chunk_does_not_change_the_result(chunk):
    q, k, v, p = qkvp((5, 7))  # 4 does not divide 35
    one, other = (
        denoised_attention(q, k, v, p, (5, 7)),
        denoised_attention(q, k, v, p, (5, 7), chunk=chunk),
    )
    assert (
        gap([one], [other]) < 1e-12
        and gap(grads(one, [q, k, v, p]), grads(other, [q, k, v, p])) < 1e-12
    )


@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize("gr", [True, False])
def test_gradcheck(kernel, gr):
    inputs = qkvp((2, 3), batch=1, channels=2, keys=2, classes=2)[: 4 if gr else 3]

    def route(q, k, v, p=None):
        return denoised_attention(q, k, v, p, (2, 3), kernel, chunk=4)

    assert torch.autograd.gradcheck(route, inputs)


def test_the_equations_can_be_differentiated_twice():
    q, k, v, _ = qkvp((2, 3), batch=1, channels=2, keys=2, classes=2)

    def spread(q, k, v):
        return dnl.spread_values(v, dnl.local_similarity(q, k, (2, 3)), (2, 3))

    assert torch.autograd.gradgradcheck(spread, (q, k, v))


def test_a_second_derivative_is_an_error():
    q, k, v, p = qkvp((2, 3))
    loss = denoised_attention(q, k, v, p, (2, 3)).square().sum()
    (first,) = torch.autograd.grad(loss, [q], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def test_batch_of_none():
    q, k, v, p = qkvp((3, 4), batch=0)
    out = denoised_attention(q, k, v, p, (3, 4))
    assert out.shape == (0, 6, 12) and [g.shape for g in grads(out, [q, k, v, p])] == [
        x.shape for x in (q, k, v, p)
    ]


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


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_up_to_1e4_agree_with_double_precision(dtype, tolerance, autocast):
    """Q, K, P are small integers, exact in every type: the test sees a rounded or lost logit."""
    g, size, N = torch.Generator().manual_seed(0), (8, 9), 72
    q, k = (torch.randint(-60, 61, (2, 8, N), generator=g).double() for _ in "qk")
    p, v = (
        torch.randint(-3, 4, (2, 5, N), generator=g).double(),
        torch.randn(2, 6, N, generator=g).to(dtype).double(),
    )
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


# ---------------------------------------------------------------------------------------- the block


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
        "gamma": (1,),
        "query.weight": (2, 16, 1, 1),
        "key.weight": (2, 16, 1, 1),
        "value.weight": (16, 16, 1, 1),
        "coarse.weight": (5, 16, 1, 1),
        "coarse.bias": (5,),
    }


def test_the_block_takes_the_callers_class_predictions():
    f, p = torch.randn(2, 16, 6, 7), torch.randn(2, 3, 6, 7)
    block = opened(DenoisedNonLocal(16, 0))
    q, k, v = (conv(f).flatten(2) for conv in (block.query, block.key, block.value))
    assert (
        gap([block(f, p)], [0.7 * map_route(q, k, v, p.flatten(2), (6, 7)).view_as(f) + f]) < 1e-5
    )
    with pytest.raises(ValueError, match=r"hand forward the class predictions p \(B, n, H, W\)"):
        block(f)


@pytest.mark.parametrize(
    "p",
    [
        torch.randn(2, 5, 11, 9),  # another size, the same number of pixels
        torch.randn(1, 5, 9, 11),
        torch.randn(2, 0, 9, 11),
        torch.randn(2, 5, 99),
        torch.randn(2, 5, 9, 11, dtype=torch.double),
        torch.ones(2, 5, 9, 11, dtype=torch.long),
    ],
    ids=["size", "batch", "no class", "flat", "double", "integer"],
)
def test_class_predictions_that_do_not_fit_are_named(p):
    block, f = opened(DenoisedNonLocal(16, 5)), torch.randn(2, 16, 9, 11)
    got = (
        f"p {tuple(p.shape)}, {p.dtype}, for F (2, 16, 9, 11), torch.float32: expected (B, n, H, W)"
    )
    with pytest.raises(ValueError, match=re.escape(got)):
        block(f, p)


def test_class_predictions_may_be_of_lower_precision():
    block, f, p = (
        opened(DenoisedNonLocal(16, 5)),
        torch.randn(2, 16, 9, 11),
        torch.randn(2, 5, 9, 11),
    )
    assert torch.equal(block(f, p.bfloat16()), block(f, p.bfloat16().float()))


@pytest.mark.parametrize("kernel", [-1, -2, 2])
def test_a_window_needs_an_odd_size(kernel):
    with pytest.raises(ValueError, match=f"kernel {kernel}: LR's window needs an odd size above 0"):
        DenoisedNonLocal(16, 5, kernel=kernel)
    assert DenoisedNonLocal(16, 5, kernel=kernel, lr=False).kernel == 0


def test_the_block_compiles_without_a_break():
    block, f = opened(DenoisedNonLocal(16, 5)), torch.randn(2, 16, 6, 7)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    weights = list(block.parameters())
    assert gap([compiled(f)], [block(f)]) < 1e-6
    assert gap(grads(compiled(f), weights), grads(block(f), weights)) < 1e-4


# ----------------------------------------------------------- recorded and transformed by torch

Dim = torch.export.Dim
PLANES = {24: (4, 6), 400: (20, 20), 1500: (30, 50)}  # N: (H, W)
FREE = {
    "nothing": {},
    "batch": {0: Dim("batch")},
    "height and width": {2: Dim("height"), 3: Dim("width")},
    "all": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},
}
QUICK = [(way, "all", 24, True) for way in ("export", "trace", "onnx")]
QUICK += [("export", "batch", 400, True), ("trace", "nothing", 1500, True)]
TABLE = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product(
        ("export", "strict export", "compile", "trace", "onnx"), FREE, PLANES, (True, False)
    )
]


def recorded(way, net, example, free, folder):
    """What torch makes of the network from an example. free: the dimensions that may change."""
    if way == "compile":
        torch.compiler.reset()
        for d in free:
            torch._dynamo.mark_dynamic(example, d)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        compiled(example)
        return compiled
    file = str(folder / "net")
    if way == "trace":
        torch.jit.save(torch.jit.trace(net, example), file)
        return torch.jit.load(file)
    if way == "onnx":
        for name in ("onnx", "onnxscript"):
            pytest.importorskip(name)
        runtime = pytest.importorskip("onnxruntime")
        torch.onnx.export(net, (example,), file, dynamo=True, dynamic_shapes=(free,), verbose=False)
        session = runtime.InferenceSession(file)
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.detach().numpy()})[0])
    strict = way == "strict export"
    program = torch.export.export(net, (example,), dynamic_shapes=(free,), strict=strict)
    torch.export.save(program, file + ".pt2")
    return torch.export.load(file + ".pt2").module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("way, free, N, gradients", TABLE)
def test_a_recorded_block_is_the_block(way, free, N, gradients, tmp_path):
    """Recorded with gradients on or off, and called with both."""
    torch.manual_seed(0)
    block, free = opened(DenoisedNonLocal(16, 5)).eval(), FREE[free]
    example = torch.randn(2, 16, *PLANES[N], requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        program = recorded(way, block, example, free, tmp_path)
    batches = (2, 8) if 0 in free else (2,)
    planes = PLANES.values() if 2 in free else (PLANES[N],)
    for batch, plane in product(batches, planes):
        f = (2 * torch.randn(batch, 16, *plane)).requires_grad_(gradients)
        for on in (True, False):
            with torch.set_grad_enabled(on):
                assert gap([program(f)], [block(f)]) < 1e-4
        if gradients and way != "onnx":
            assert gap(grads(program(f), [f]), grads(block(f), [f])) < 1e-4


def test_20_sizes_are_one_compiled_graph():
    """At most two, as of a plain non-local block; their N lie around the chunk's limits."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    block = opened(DenoisedNonLocal(16, 5))
    compiled = torch.compile(block, dynamic=True, backend=count)
    for i in range(20):
        f = torch.randn(2 + i % 3, 16, 5 + 2 * i, 50 - 2 * i)
        assert gap([compiled(f)], [block(f)]) < 1e-4
    assert len(graphs) <= 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("gradients", [True, False])
def test_the_default_compiler_takes_the_block(gradients):
    """One graph for all sizes; with gradients one size, as torch 2.13 compiles any two convolutions
    again for each size."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    block = opened(DenoisedNonLocal(16, 5))
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for plane in PLANES.values() if not gradients else [PLANES[400]]:
        f = (2 * torch.randn(2, 16, *plane)).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            assert gap([compiled(f)], [block(f)]) < 1e-4
            if gradients:
                assert gap(grads(compiled(f), [f]), grads(block(f), [f])) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_torch_func_takes_the_block():
    """grad, vmap, gradients of each sample, and through torch.func a second derivative too."""
    block, f = opened(DenoisedNonLocal(16, 5)).double(), torch.randn(3, 16, 4, 5).double()
    weights = dict(block.named_parameters())

    def loss(weights, f):
        return torch.func.functional_call(block, weights, f).square().sum()

    def of_one(weights, f):
        return loss(weights, f[None])

    expected = torch.autograd.grad(loss(weights, f), list(weights.values()))
    assert gap(torch.func.grad(loss)(weights, f).values(), expected) < 1e-9
    each = torch.func.vmap(torch.func.grad(of_one), (None, 0))(weights, f)
    assert gap([g.sum(0) for g in each.values()], expected) < 1e-9
    assert gap([torch.func.vmap(block)(f[:, None])[:, 0]], [block(f)]) < 1e-12
    x, step = f[:1], 1e-6 * torch.randn_like(f[:1])
    first = torch.func.grad(lambda x: loss(weights, x))
    second = torch.func.jvp(first, (x,), (step,))[1]
    assert gap([second], [(first(x + step) - first(x - step)) / 2]) < 1e-8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("way", ["export", "trace"])
def test_a_recorded_network_is_the_network(way, config, tmp_path):
    """Saved and loaded again, with free batch, height and width, from 17 pixels a side up."""
    net = opened(build(replace(config, **SMALL | {"channels": 32}))).eval()
    net.to(memory_format=torch.channels_last)
    net.to(memory_format=torch.contiguous_format)  # as README says of a trained one
    free = {0: Dim("batch"), 2: Dim("height", min=17), 3: Dim("width", min=17)}
    program = recorded(way, net, torch.randn(2, 3, 64, 96), free, tmp_path)
    for size in ((1, 3, 17, 17), (3, 3, 65, 97), (2, 3, 80, 128)):
        image = torch.randn(size)
        assert gap([program(image)], [net(image)]) < 1e-4


# ------------------------------------------------------------------------------------- the backbone


def resnet_shapes(name):
    """torchvision's names and shapes of a ResNet without fc, from the rule that they follow."""
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[
        int(name[6:])
    ]
    wide, shapes, inputs = int(name[6:]) >= 50, {}, 64

    def conv_bn(conv, bn, *shape):
        shapes[conv + ".weight"] = shape
        shapes.update(
            {
                f"{bn}.{leaf}": shape[:1]
                for leaf in ("weight", "bias", "running_mean", "running_var")
            }
        )
        shapes[bn + ".num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", 64, 3, 7, 7)
    for stage, depth in enumerate(depths, 1):
        w = 32 * 2**stage
        for b in range(depth):
            at, out = f"layer{stage}.{b}.", w * (4 if wide else 1)
            convs = (
                [(w, inputs, 1, 1), (w, w, 3, 3), (out, w, 1, 1)]
                if wide
                else [(w, inputs, 3, 3), (w, w, 3, 3)]
            )
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
    return {
        k: torch.tensor(7) if k.endswith("tracked") else torch.rand(s, generator=g)
        for k, s in shapes.items()
    }


@pytest.mark.parametrize(
    "name, keys, parameters",
    [
        ("resnet18", 120, 11_176_512),
        ("resnet34", 216, 21_284_672),
        ("resnet50", 318, 23_508_032),
        ("resnet101", 624, 42_500_160),
    ],
)
def test_backbone_names_are_torchvisions(name, keys, parameters):
    with torch.device("meta"):
        net = ResNet(name)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == resnet_shapes(name)
    assert len(net.state_dict()) == keys and sum(p.numel() for p in net.parameters()) == parameters


def test_deep_stem_names_are_those_of_resnet101s():
    with torch.device("meta"):
        state = ResNet("resnet101", deep_stem=True).state_dict()
    stem = {
        k: tuple(v.shape)
        for k, v in state.items()
        if k.startswith(("conv1", "bn1")) and k.endswith(".weight")
    }
    assert stem == {
        "conv1.0.weight": (64, 3, 3, 3),
        "conv1.1.weight": (64,),
        "conv1.3.weight": (64, 64, 3, 3),
        "conv1.4.weight": (64,),
        "conv1.6.weight": (128, 64, 3, 3),
        "bn1.weight": (128,),
    }
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
            convs = [
                m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
            ]
            assert {m.dilation[0] for m in convs} == {dilations[i % len(dilations)]}
            assert {m.stride[0] for m in convs} == {1}
    first = net.layer2[0]  # stage 2 strides in the 3x3 of its first block, as torchvision's
    assert (first.conv2 if name == "resnet101" else first.conv1).stride == (2, 2)


def test_an_imagenet_file_loads_but_for_fc(tmp_path):
    state, net = imagenet_like("resnet18"), ResNet("resnet18")
    torch.save(state, tmp_path / "w.pth")
    dnl.load_backbone(net, "resnet18", str(tmp_path / "w.pth"))
    own = net.state_dict()
    assert own.keys() == state.keys() - {"fc.weight", "fc.bias"} and all(
        torch.equal(own[k], state[k]) for k in own
    )
    old = {
        k: v for k, v in state.items() if not k.endswith("tracked")
    }  # as the files at download.pytorch.org are
    torch.save(old, tmp_path / "old.pth")
    dnl.load_backbone(ResNet("resnet18"), "resnet18", str(tmp_path / "old.pth"))


@pytest.mark.parametrize("wrap", ["", "module.", "backbone.", "module.backbone."])
def test_weights_of_other_tools_load(tmp_path, wrap):
    """mmsegmentation and Lightning wrap them as state_dict, DDP adds module.; a head is left."""
    state, net = imagenet_like("resnet18"), ResNet("resnet18")
    wrapped = {wrap + k: v for k, v in state.items()}
    if "backbone" in wrap:
        wrapped[wrap.replace("backbone", "decode_head") + "weight"] = torch.ones(1)
    torch.save({"state_dict": wrapped, "meta": {"epoch": 3}}, tmp_path / "w.pth")
    dnl.load_backbone(net, "resnet18", str(tmp_path / "w.pth"))
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())


def test_what_holds_no_such_weights_is_a_line(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(imagenet_like("resnet18"), path)
    with pytest.raises(ValueError, match="this is a resnet18, expected a resnet34"):
        dnl.load_backbone(ResNet("resnet34"), "resnet34", str(path))
    for content in (b"x", b"", pickle.dumps(3), pickle.dumps([1]), b"\x80"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a file of weights"):
            dnl.load_backbone(ResNet("resnet18"), "resnet18", str(path))
    torch.save({"state_dict": 5}, path)
    with pytest.raises(ValueError, match="not a file of weights"):
        dnl.load_backbone(ResNet("resnet18"), "resnet18", str(path))
    state = imagenet_like("resnet18")
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, path)
    with pytest.raises(ValueError, match="not all finite"):
        dnl.load_backbone(ResNet("resnet18"), "resnet18", str(path))


def test_a_mismatch_lists_the_keys_and_loads_nothing():
    state, net = (
        imagenet_like("resnet18", **{"conv1.weight": (64, 4, 7, 7), "layer9.weight": (1,)}),
        ResNet("resnet18"),
    )
    del state["layer1.0.bn1.bias"]
    before = net.layer1[0].conv1.weight.clone()
    with pytest.raises(ValueError) as error:
        dnl.load_strict(net, state, "file x.pth")
    assert str(error.value) == (
        "file x.pth does not fit: missing: layer1.0.bn1.bias; unexpected: fc.weight, fc.bias, "
        "layer9.weight; of another shape: conv1.weight (64, 4, 7, 7) for (64, 3, 7, 7)"
    )
    assert torch.equal(before, net.layer1[0].conv1.weight)


@pytest.mark.parametrize(
    "name, file",
    [
        ("resnet18", "resnet18-f37072fd"),
        ("resnet34", "resnet34-b627a593"),
        ("resnet50", "resnet50-0676ba61"),
        ("resnet101", "resnet101-63fe2227"),
    ],
)
def test_imagenet_weights_come_hash_checked_and_only_for_the_plain_stem(name, file, monkeypatch):
    asked = []

    def download(url, **options):
        asked.append((url, options["check_hash"]))
        return {}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with torch.device("meta"):
        plain, deep = ResNet(name), ResNet(name, deep_stem=True)
    with pytest.raises(
        ValueError, match=r"the file does not fit: missing: conv1\.weight"
    ):  # for the empty file
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
        results.append(
            [p.grad.clone() for p in net.parameters()] + [b.clone() for b in net.buffers()]
        )
    assert gap(*results) < 1e-12


# -------------------------------------------------------------------------------------- the network

PAPER_SWITCHES: list[dict[str, Any]] = [
    {},
    {"gr": False},
    {"lr": False},
    {"gr": False, "lr": False},
    {"kernel": 5},
    {"p_supervised": True},
    {"p_supervised": True, "lr": False},
    {"p_from": "res3"},
    {"p_from": "res3_logits"},
    {"context": "nl"},
    {"context": "none"},
    {"context": "mine:conv"},
]
RELEASED_SWITCHES: list[dict[str, Any]] = [
    {},
    {"gr": False},
    {"lr": False},
    {"gr": False, "lr": False},
    {"p_from": "feature", "p_supervised": True},
    {"context": "nl"},
    {"context": "none"},
    {"context": "mine:conv"},
]
SWITCHES = [("paper", s) for s in PAPER_SWITCHES] + [("released", s) for s in RELEASED_SWITCHES]


@pytest.mark.parametrize("preset, switches", SWITCHES, ids=str)
def test_every_switch_trains_a_step_of_every_parameter(preset, switches):
    """Promise: each parameter is in the loss in any configuration; DDP stops at unused ones."""
    torch.manual_seed(0)
    config = replace(PAPER if preset == "paper" else RELEASED, **SMALL | switches)
    mine = config.context == "mine:conv"
    net = opened(
        build(
            config, (lambda channels, classes: nn.Conv2d(channels, channels, 1)) if mine else None
        )
    ).train()
    image, label = torch.randn(2, 3, 48, 40), torch.randint(0, 5, (2, 48, 40))
    outputs = net(image)
    assert [tuple(o.shape) for o in outputs] == [(2, 5, 48, 40)] * (4 if config.p_supervised else 3)
    sum(F.cross_entropy(o, label) for o in outputs).backward()
    gradients = {n: p.grad for n, p in net.named_parameters()}
    assert [
        n for n, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()
    ] == []
    with torch.no_grad():
        assert net.eval()(image).shape == (2, 5, 48, 40)


def test_the_rows_of_table_ii_differ_in_what_they_should():
    """The switches change F' of the same weights as the map route says."""
    torch.manual_seed(0)
    whole, f = opened(build(replace(PAPER, **SMALL))).context, torch.randn(1, 16, 5, 6)
    q, k, v, p = whole.inputs(f)
    for gr, lr, switches in (
        (True, True, {}),
        (True, False, {"lr": False}),
        (False, True, {"gr": False}),
        (False, False, {"gr": False, "lr": False}),
        (False, False, {"context": "nl"}),
    ):
        row = build(replace(PAPER, **SMALL | switches)).context
        row.load_state_dict(
            {n: w for n, w in whole.state_dict().items() if gr or not n.startswith("coarse")}
        )
        expected = (
            0.7 * map_route(q, k, v, p if gr else None, (5, 6), 3 if lr else 0).view_as(f) + f
        )
        assert gap([row(f)], [expected]) < 1e-5


def test_the_paper_preset_is_fig_3_put_together():
    torch.manual_seed(0)
    net = opened(build(replace(PAPER, **SMALL))).double().eval()
    image, up = (
        torch.randn(2, 3, 65, 50, dtype=torch.double),
        {"mode": "bilinear", "align_corners": True},
    )
    x = net.backbone(image)[2]
    f = net.down(net.reduce(x))  # stride 16
    block = net.context
    q, k, v, p = (
        conv(f).flatten(2) for conv in (block.query, block.key, block.value, block.coarse)
    )
    denoised = 0.7 * map_route(q, k, v, p, f.shape[2:]).view_as(f) + f
    context = net.pool(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:])
    logits = net.head(torch.cat([x, F.interpolate(denoised, x.shape[2:], **up), context], 1))
    assert (
        gap([net(image)], [F.interpolate(logits, (65, 50), **up)]) < 1e-8
    )  # Q.K is large in an untrained network
    assert gap([net(image, full_size=False)], [logits]) < 1e-8
    assert x.shape[2:] == (9, 7) and f.shape[2:] == (5, 4)
    assert (
        isinstance(net.aux2, nn.Conv2d)
        and isinstance(net.aux3, nn.Conv2d)
        and net.aux2.bias is not None
    )


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_a_training_forward_calls_each_module_once(config):
    net, calls = build(replace(config, **SMALL)).train(), []
    layers = {f"backbone.layer{i}" for i in range(1, 5)}  # whose blocks are called one by one
    modules = {name: m for name, m in net.named_modules() if name not in layers}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    net(torch.randn(2, 3, 48, 40))
    assert sorted(calls) == sorted(modules)


def test_p_and_the_loss_share_one_run_of_the_res3_head():
    """Outputs, weights and statistics after a step are those of a forward that runs it once."""
    torch.manual_seed(0)
    net = opened(build(replace(RELEASED, **SMALL | {"dropout": 0.0}))).double().train()
    reference, image = deepcopy(net), torch.randn(2, 3, 48, 40, dtype=torch.double)
    up = {"mode": "bilinear", "align_corners": True}
    res2, res3, x = reference.backbone(image)
    f, aux3 = reference.down(reference.reduce(x)), reference.aux3(res3)
    p = F.interpolate(aux3, f.shape[2:], **up).softmax(1)
    f = reference.refine(F.interpolate(reference.context(f, p), x.shape[2:], **up))
    expected = [reference.head(torch.cat([x, f], 1)), reference.aux2(res2), aux3]
    outputs = net(image, full_size=False)
    assert gap(outputs, expected) < 1e-12
    for model, results in ((net, outputs), (reference, expected)):
        sum(o.square().mean() for o in results).backward()
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert gap(net.state_dict().values(), reference.state_dict().values()) < 1e-12
    assert net.aux3[1].num_batches_tracked == 1


def test_p_and_the_res3_output_have_one_dropout_mask():
    net, handed = build(replace(RELEASED, **SMALL | {"dropout": 0.5})).train(), []
    net.context.register_forward_pre_hook(lambda _, inputs: handed.append(inputs[1]))
    aux3 = net(torch.randn(2, 3, 64, 64), full_size=False)[2]
    up = {"mode": "bilinear", "align_corners": True}
    assert torch.equal(handed[0], F.interpolate(aux3, handed[0].shape[2:], **up).softmax(1))


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


@pytest.mark.parametrize(
    "change, line",
    [
        (
            {"backbone": "resnet19"},
            "backbone 'resnet19': expected one of resnet18, resnet34, resnet50, resnet101",
        ),
        ({"p_from": "res4"}, "p_from 'res4': expected one of feature, res3, res3_logits"),
        ({"context": "mine:conv"}, "context 'mine:conv': expected dnl, nl, none, or its factory"),
        ({"kernel": 4}, "kernel 4: LR's window needs an odd size"),
        ({"p_supervised": True, "gr": False}, "a supervised P needs GR"),
        ({"p_supervised": True, "context": "nl"}, "a supervised P needs GR"),
        (
            {"p_supervised": True, "p_from": "res3"},
            "a supervised P needs GR with P from the feature",
        ),
    ],
    ids=str,
)
def test_build_says_what_is_wrong(change, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        build(replace(PAPER, **SMALL | change))


# ------------------------------------------------------------------------------- the authors' model


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
        x = (
            r.standard_normal(shape)
            / np.sqrt(np.prod(shape[1:]))
            * (8 if re.match(r"dnl\.conv[12]\.", name) else 1)
        )
    return torch.from_numpy(x.astype(np.float32))


@pytest.fixture(scope="module")
def released():
    """The stored numbers, and the authors' state; `interp` is `down_sample.downsample` again."""
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
    image = (
        np.random.default_rng(2026).standard_normal((2, 3, 128, 160)).astype(np.float32)[:images]
    )
    with torch.inference_mode():
        res2, aux3, _, f, _ = net.features(torch.from_numpy(image))
        own = {
            k: F.interpolate(o, (128, 160), mode="bilinear", align_corners=True)[:, :, ::16, ::16]
            for k, o in (
                ("out", net(torch.from_numpy(image))),
                ("aux1", net.aux2(res2)),
                ("aux2", aux3),
            )
        }
    own["f"] = f[:, ::32, ::2, ::2]
    return {k: gap([own[k]], [stored[k][:images]]) for k in stored}


def test_released_preset_equals_the_authors_model_and_the_check_can_fail(released):
    stored, state = released
    assert len(state) == 700
    net = build(RELEASED).eval()
    dnl.load_strict(
        net, dnl.from_released({"module." + k: v for k, v in state.items()}), "the authors' state"
    )
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


# --------------------------------------------------------------------------------- dnl.py as a file


def run_python(code, folder):
    """A fresh interpreter in `folder`, with nothing of this project on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )


def test_dnl_imports_torch_and_the_standard_library_and_only_defines():
    tree = ast.parse((HERE / "dnl.py").read_text())
    names = [
        n
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for n in [a.name for a in node.names]
    ]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) == {"torch"}
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert [node.value.value for node in tree.body if isinstance(node, ast.Expr)] == [dnl.__doc__]


def test_importing_dnl_draws_no_random_number_and_changes_no_setting(tmp_path):
    shutil.copy(HERE / "dnl.py", tmp_path)
    done = run_python(
        textwrap.dedent("""
        import torch
        def state():
            return (torch.get_rng_state().tolist(), torch.get_default_dtype(),
                    torch.get_num_threads(), torch.is_grad_enabled(),
                    torch.backends.cudnn.benchmark)
        before = state()
        import dnl
        if state() != before:
            raise SystemExit("changed")
    """),
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {p.name for p in tmp_path.iterdir()} <= {"dnl.py", "__pycache__"}
