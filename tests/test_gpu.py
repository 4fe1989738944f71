"""What only a GPU can show: precisions, nccl, repeatable kernels, memory (docs/gpu.md)."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    TINY,
    blocks,
    gap,
    make_checkpoint,
    run_whole_and_in_parts,
    same_run,
    script,
    trained,
)

import checkpoint
import dnl
import evaluate
import train
from paper import bench
from ranks import backend_of
from runtime import AMP

# --deterministic needs it, and torch reads it once in a process, before its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda")
ELEMENTS = 2**26  # of a chunk's map on a GPU
SIZES = ((64, 128), (128, 128), (128, 256))  # N = 8192, 16384, 32768


@pytest.fixture
def repeatable():
    """The flag that gives the same bits twice; other tests run without it."""
    yield "--deterministic"
    torch.use_deterministic_algorithms(False)


def scored(capsys, *args):
    """The mIoU that evaluate.py prints."""
    capsys.readouterr()
    assert evaluate.main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["miou"]


# ---- training


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_gpu_trains_resumes_and_scores(street, tmp_path, capsys, amp):
    """A step with all its parts, in each precision. In fp16 the loss is scaled."""
    flags = ["--amp", amp, "--clip", 1, "--accumulate", 2, "--workers", 2, "--ema", 0.9, "--ohem"]
    last = tmp_path / "r" / "last.pt"
    assert trained(tmp_path / "r", street, *flags) == 0
    state = torch.load(last, map_location="cpu", weights_only=True)
    for line in state["history"]:
        assert all(math.isfinite(line[name]) for name in ("loss", "loss_res2", "loss_res3"))
    torch.manual_seed(0)
    for name, drawn in dnl.build(dnl.Config(**state["config"])).named_parameters():
        assert not torch.equal(state["model"][name], drawn), f"{name} was not trained"
    assert (state["scaler"].get("scale", 0) > 0) == (amp == "fp16")
    os.replace(tmp_path / "r" / "last.prev.pt", last)  # from before the last validation
    assert trained(tmp_path / "r", street, *flags) == 0
    line = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
    assert scored(capsys, last) == line["miou"]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_on_a_gpu_stopped_and_resumed_is_the_uninterrupted_run(
    street, tmp_path, monkeypatch, amp, repeatable
):
    """Bit for bit with --deterministic. Without it kernels add in any order, and only the samples,
    the schedule and the number of steps are the same.
    """
    run_whole_and_in_parts(tmp_path, street, monkeypatch, repeatable, "--amp", amp)


def test_a_gpu_repeats_a_run_in_other_processes(street, tmp_path, repeatable):
    """The released preset has dropout and more kernels; hard pixels are chosen by sorting."""
    for name in "ab":
        flags = [*TINY, "--root", street, "--preset", "released", "--ohem", repeatable]
        status, _, told = script("train.py", *flags, "--out", tmp_path / name)
        assert status == 0, told
    assert same_run(tmp_path / "a", tmp_path / "b")


# ---- ranks


def torchrun(count, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", count, ROOT / "train.py", *TINY, *flags]
    subprocess.run([*map(str, command)], check=True, timeout=200)


def test_torchrun_with_one_rank_is_the_plain_run(street, tmp_path, repeatable):
    """One rank joins no process group, so nothing may differ."""
    torchrun(1, "--root", street, repeatable, "--out", tmp_path / "torchrun")
    assert trained(tmp_path / "plain", street, repeatable) == 0
    assert same_run(tmp_path / "plain", tmp_path / "torchrun")


def test_nccl_with_one_rank_changes_nothing(street, tmp_path, monkeypatch, repeatable):
    """DDP, nccl and gloo in a group of one: each sum has one part, so no bit may differ."""
    assert trained(tmp_path / "plain", street, repeatable) == 0
    distributed, wrap_network = train.distributed, train.wrap_network

    @contextmanager
    def in_a_group(asked):
        with distributed(asked) as (rank, world, device):  # ends the group too
            store = dist.HashStore()
            dist.init_process_group(backend_of(device), store=store, rank=0, world_size=1)
            yield rank, world, device

    def wrap_as_of_two(run):
        run.world = 2
        wrap_network(run)
        run.world = 1
        assert isinstance(run.model, torch.nn.parallel.DistributedDataParallel)

    monkeypatch.setattr(train, "distributed", in_a_group)
    monkeypatch.setattr(train, "wrap_network", wrap_as_of_two)
    assert trained(tmp_path / "group", street, repeatable) == 0
    assert same_run(tmp_path / "plain", tmp_path / "group")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(street, tmp_path, capsys, monkeypatch):
    """SyncBN and nccl: statistics and momenta are those of one rank, but for rounding.

    With statistics of its own on each rank they differ by 0.19 and 0.71, as two ranks on a CPU do.
    The weights hardly move, so that rounding cannot grow from step to step.
    """
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    runs = []
    for count in (1, 2):
        out = tmp_path / str(count)
        torchrun(count, "--root", street, "--lr", 1e-6, "--out", out)
        runs.append(torch.load(out / "last.pt", map_location="cpu", weights_only=True))
    one, two = runs
    for name, expected in one["model"].items():
        if "running" in name:
            assert relative_gap(two["model"][name], expected) < 0.01, name
    momenta = [
        torch.cat([s["momentum_buffer"].flatten() for s in run["optimizer"]["state"].values()])
        for run in runs
    ]
    assert relative_gap(momenta[1], momenta[0]) < 0.02  # 0.002 between two kinds of CPU kernels
    assert scored(capsys, tmp_path / "2" / "last.pt") == two["history"][-1]["miou"]


def relative_gap(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- the block


def test_memory_of_the_value_route_is_linear_in_n():
    """A chunk of query pixels has ELEMENTS elements at each of these N; the rest grows with N."""
    peaks = defaultdict(list)
    for size in SIZES:
        for row in bench.block_rows(size, ("value",), 0, DEVICE, torch.float32):
            peaks[row["pass"]].append(row["peak"])
    n = math.prod(SIZES[-1])
    # At once, of a chunk: A and P_class; backward also A', the gradients of A' and of P_class's
    # logits, and one of these from the chunk before. Of C x N: V~, its padded plane, the sum and,
    # at N = 8192, a chunk's rows of it; backward also the gradients of V~, V, and of Q, K, P.
    for what, chunks, planes in (("forward", 2, 4), ("forward+backward", 6, 6)):
        for size, peak in zip(SIZES, peaks[what], strict=True):
            n = math.prod(size)
            assert peak < 4 * (chunks * ELEMENTS + planes * bench.CHANNELS * n)
        assert peak < 4 * n * n / 2  # half of one map of the largest N; the map route makes 20


# Rounding, as a part of the largest value. fp32: logits of up to 25 are off by 25 x 2^-24 x a few,
# and so is the exponential. bf16 and fp16: half a unit, 2^-8 and 2^-11, for each of V~'s additions,
# A', a partial sum of a split product, and the result; 8 of them, since they seldom add up.
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-5), (torch.bfloat16, 8 * 2**-8), (torch.float16, 8 * 2**-11)],
    ids=str,
)
def test_a_gpu_computes_the_block_of_double_precision(dtype, tolerance):
    """Sum and gradients of the value route, against the maps on the CPU from the same numbers."""
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32 in products
    size, draw, drawn = (24, 40), torch.Generator().manual_seed(0), []
    for width in (16, 16, 24, 5, 24):
        drawn.append(torch.randn(2, width, math.prod(size), generator=draw).to(dtype))
    *inputs, grad = drawn
    exact = [x.double().requires_grad_() for x in inputs]
    q, k, v, p = exact
    a = dnl.denoised_maps(q, k, p, size)[2]
    out = torch.bmm(v, a.mT)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    low = [x.to(DEVICE).requires_grad_() for x in inputs]
    for chunk in (0, 400):  # the third chunk of 400 is a part of its buffer
        out = dnl.denoised_attention(*low, size, chunk=chunk)
        got = [out, *torch.autograd.grad(out, low, grad.to(DEVICE))]
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == dtype and gap([x.cpu()], [y]) <= tolerance * y.abs().max()


# ---- prediction


@pytest.mark.parametrize("amp, differ", [("bf16", 0.02), ("fp16", 0.005)])
def test_a_gpu_predicts_the_same_classes_in_low_precision(tmp_path, amp, differ):
    """Random weights with large logits: only pixels between two classes may change sides.

    On a CPU, 0.0043 of them do in bf16 and 0.0006 in fp16.
    """
    path = make_checkpoint(tmp_path / "best.pt", ["a", "b", "c", "d", "e"])
    net, _ = checkpoint.load_network(path, DEVICE)
    image = torch.from_numpy(blocks(192, 256)).permute(2, 0, 1)
    masks = []
    for dtype in (None, AMP[amp]):
        ids, _ = evaluate.predict_ids(net, image, "blocks", device=DEVICE, amp=dtype)
        masks.append(ids)
    assert len(np.unique(masks[0])) == 5 and (masks[0] != masks[1]).mean() <= differ


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_gpu_scores_the_same_in_low_precision(run_folder, capsys, amp):
    exact, low = (scored(capsys, run_folder / "best.pt", "--amp", a) for a in ("off", amp))
    assert low == pytest.approx(exact, abs=0.01)
