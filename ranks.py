"""Ranks, device and precision: torchrun's environment, sums and failures over all ranks."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from runtime import InputError

# On a CPU, bf16 convolutions of stride 2 read memory that nobody wrote where a side is 1 or 2.
NARROW = 17  # pixels; below it the backbone has such a side


def sum_over_ranks(numbers: Sequence[float], failure: InputError | None = None) -> list[float]:
    """The sums of plain numbers over all ranks, on the CPU: a GPU is not waited for.

    If one rank brings a failure, every rank raises: that rank its own error, the others one that
    says so. An InputError reaches the other ranks only here; else they wait until the timeout.
    """
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return list(numbers)
    totals = torch.tensor([*numbers, failure is not None], dtype=torch.float64)
    dist.all_reduce(totals)
    *sums, failures = totals.tolist()
    if failure is not None:
        raise failure
    if failures:
        raise InputError(f"rank {dist.get_rank()}: stopped, because another rank cannot go on")
    return sums


@contextmanager
def fail_on_all_ranks() -> Iterator[None]:
    """If the block raises InputError on one rank, raise it on all: the others would wait for it."""
    failure = None
    try:
        yield
    except InputError as e:
        failure = e
    sum_over_ranks([], failure)


def read_ranks() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun sets them, or (0, 1, 0)."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    found = {name: os.environ.get(name, default) for name, default in defaults.items()}
    try:
        rank, world, local, port = map(int, found.values())
    except ValueError:
        rank = world = local = port = -1
    reachable = world == 1 or ("MASTER_ADDR" in os.environ and 0 < port < 65536)
    if not (0 <= rank < world and local >= 0 and reachable):
        listed = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise InputError(
            f"{listed} or MASTER_ADDR in the environment are not torchrun's: unset them, or start "
            "with torchrun"
        )
    return rank, world, local


def find_device(asked: str, local: int = 0) -> torch.device:
    """The device that --device names, for a local rank; auto: the accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(kind if asked == "auto" else asked)
    except RuntimeError:
        raise InputError(f"--device {asked}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", kind):
        raise InputError(f"--device {asked}: not on this machine: leave it out, or give cpu")
    if device.type != "cuda":
        return torch.device(device.type)
    index = local if device.index is None else device.index
    count = torch.accelerator.device_count()
    if index >= count:
        raise InputError(
            f"there is no GPU {index}, the machine has {count}: lower --nproc-per-node, or give "
            "another --device"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def backend_of(device: torch.device) -> str:
    """What sums over ranks: nccl on GPUs, gloo on CPUs; a GPU's process has plain numbers too."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def distributed(
    asked: str = "auto", timeout: timedelta = timedelta(minutes=10)
) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world, device); with several ranks also the process group, while the block runs.

    asked: --device. A rank that waits for another longer than the timeout gives up.
    """
    rank, world, local = read_ranks()
    device = find_device(asked, local)
    if world > 1:
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart torchrun's store still has the addresses of dead processes. On one
            # node all ranks know the number of restarts.
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"restart{restarts}", store)
        dist.init_process_group(
            backend_of(device), store=store, rank=rank, world_size=world, timeout=timeout
        )
    try:
        yield rank, world, device
    finally:
        if dist.is_initialized():
            # gloo's destructor holds Python's lock while it waits for threads that need the lock to
            # drop their tensors.
            time.sleep(0.1)
            dist.destroy_process_group()


def choose_amp(amp: str, device: torch.device) -> str:
    """The precision that "auto" stands for: bf16 if the machine is fast at it, else fp16 on a GPU
    and off on a CPU.

    Fast at bf16 are GPUs since Ampere, and CPUs with AVX512-BF16 or AMX.
    """
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "off"


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """Mixed precision of a type of AMP; None switches it off."""
    return torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)


def choose_kernels(deterministic: bool) -> None:
    """For this process: the fastest convolutions of the GPU, or repeatable kernels."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def to_device(net: nn.Module, device: torch.device | str) -> None:
    """Move a network to a device, channels innermost, which convolutions are fastest with."""
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def peak_memory(device: torch.device) -> float:
    """The most memory so far, GiB: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
