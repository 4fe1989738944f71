"""Time and memory of a call, the machine's name, and tables of the results."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

SOURCE = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "the profiler's allocations played back",
}
Name = TypeVar("Name", bound=Hashable)


def machine(device: torch.device) -> dict[str, str | int | None]:
    """The machine: cpu, cores that this process may use, threads, torch, device."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = re.search(r"model name\s*: (.*)", info.read_text())
        cpu = model[1] if model else cpu
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call in seconds; on a GPU until its work is done."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(
    cases: Mapping[Name, Callable[[], object]], runs: int, device: torch.device
) -> dict[Name, float]:
    """Median seconds of each case over `runs` rounds. A round calls every case once.

    One more round comes first and is not counted. With runs 0 it is the result: for calls so long
    that a cold start does not show.
    """
    rounds = []
    for _ in range(runs + 1):
        rounds.append({name: seconds(run, device) for name, run in cases.items()})
    counted = rounds[1:] or rounds
    return {name: statistics.median(r[name] for r in counted) for name in cases}


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what a library writes to the file of standard error away: the profiler's USDT lines."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_memory(run: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[int, int]:
    """The peak of a call in bytes over the tensors held before it, and the bytes of its results.

    On a CPU temporary copies inside operators count; what oneDNN or MKL allocate does not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = sum(x.nbytes for x in run())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, results
    with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = sum(x.nbytes for x in run())
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = np.cumsum([0, *(e.nbytes() for e in events)])
    return int(held.max()), results


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table that also lines up as plain text: first column left, the others right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    columns = []
    for i, column in enumerate(zip(*cells)):
        width = max(3, *map(len, column))
        if i == 0:
            lines = [c.ljust(width) for c in column]
            rule = "-" * (width + 2)
        else:
            lines = [c.rjust(width) for c in column]
            rule = "-" * (width + 1) + ":"
        columns.append([f" {lines[0]} ", rule, *(f" {c} " for c in lines[1:])])
    return "\n".join(f"|{'|'.join(line)}|" for line in zip(*columns))
