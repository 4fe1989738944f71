"""Many runs of train.py, some at a time: start them, watch them, go on after a stop.

OUT/METHOD-seedS is a run of train.py; its output.txt holds what train.py printed. A finished run is
never repeated.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime import InputError, open_lock, print_line, print_progress, quote

# ---- one run


@dataclass(frozen=True)
class Cell:
    """One training run. argv: all flags of train.py; settings: what they come to."""

    name: str
    seed: int
    out: Path
    argv: tuple[str, ...]
    settings: dict[str, Any]

    def log(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The last settings and the epochs of log.jsonl; none before the end of the first epoch.

        InputError: another file of that name.
        """
        path = self.out / "log.jsonl"
        if not path.exists():
            return {}, []
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            settings = [line["settings"] for line in lines if "settings" in line][-1]
            epochs = [line for line in lines if "settings" not in line]
            if type(settings["epochs"]) is not int or not all(map(is_epoch, epochs)):
                raise ValueError("other values than train.py writes")
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            raise InputError(
                f"{quote(path)}: not the log of a run ({e}): remove its folder, or choose another "
                "--out"
            ) from None
        return settings, epochs

    def epoch(self) -> int:
        """Epochs that are done."""
        _, epochs = self.log()
        return max((e["epoch"] for e in epochs), default=0)

    def result(self) -> dict[str, Any] | None:
        """The line of results.jsonl; None while unfinished.

        miou: of the last epoch; best: the highest of all epochs. InputError if the finished run has
        other settings than this cell.
        """
        was, epochs = self.log()
        if not epochs or epochs[-1]["epoch"] < was["epochs"] or epochs[-1]["miou"] is None:
            return None
        differ = []
        for key, value in self.settings.items():
            if key in was and was[key] != value:
                differ.append(f"{key} {was[key]} -> {value}")
        if differ:
            raise InputError(
                f"{quote(self.out)}: finished with other settings ({'; '.join(differ)}): repeat "
                "its flags to keep it, or choose another --out"
            )
        return {
            "method": self.name,
            "seed": self.seed,
            "miou": epochs[-1]["miou"],
            "best": max(e["miou"] for e in epochs if e["miou"] is not None),
            "out": str(self.out),
            "settings": was,
        }


def is_epoch(line: dict[str, Any]) -> bool:
    """Whether a line of a log has a whole epoch, and mIoU None or 0..1."""
    miou = line["miou"]
    return type(line["epoch"]) is int and (miou is None or 0 <= miou <= 1)


# ---- all runs


def start(cell: Cell, slot: int, jobs: int, script: Path, lock: int) -> subprocess.Popen:
    """Start train.py for a cell. If there are several GPUs, each slot has one.

    The run holds the table's lock while it lives.
    """
    env = os.environ.copy()
    visible = env.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())]  # makes no CUDA context
    if visible:
        gpus = visible.split(",")
    if len(gpus) > 1:
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    if jobs > 1:  # otherwise each run takes all cores
        threads = max(1, (os.cpu_count() or 1) // jobs)
        env.setdefault("OMP_NUM_THREADS", str(threads))
    cell.out.mkdir(parents=True, exist_ok=True)
    with open(cell.out / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, str(script), *cell.argv],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
        )


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Lock OUT and yield the lock's file number. InputError if another command has it.

    Runs that outlive a killed command hold it too.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open_lock(out / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{quote(out)}: another command, or a run it left, works there: wait or stop it"
            ) from None
        yield file.fileno()


@contextmanager
def children() -> Iterator[dict[subprocess.Popen, tuple[Cell, int]]]:
    """Running processes, with the cell and the slot of each.

    At Ctrl-C or SIGTERM they are told to save and stop, and waited for.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    running: dict[subprocess.Popen, tuple[Cell, int]] = {}
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield running
    finally:
        try:
            for child in running:
                child.terminate()
            for child in running:
                child.wait()
        except KeyboardInterrupt:  # a second time; a run may be in a long validation
            for child in running:
                child.kill()
        signal.signal(signal.SIGTERM, old)


def print_outcome(cell: Cell, status: int) -> bool:
    """Print how a run ended, and the end of its output if it failed. Whether it is finished."""
    result = None if status else cell.result()
    if result:
        print_line(f"{cell.out}: mIoU {100 * result['miou']:.2f} %")
        return True
    output = (cell.out / "output.txt").read_text(errors="replace")
    text = f"{cell.out}: failed, exit status {status}; the others go on. The end of its output:"
    print_line("\n    ".join([text, *output.splitlines()[-20:]]), error=True)
    return False


def run_cells(
    cells: Sequence[Cell], jobs: int, lock: int, ended: Callable[[], object], script: Path
) -> list[Cell]:
    """Train the unfinished cells, `jobs` at a time. Call `ended` after each. Returns the failed."""
    waiting = [c for c in cells if c.result() is None]
    slots = list(range(jobs))
    failed: list[Cell] = []
    before = {c.out: c.epoch() for c in cells}
    began = time.monotonic()
    shown = -math.inf
    print_line(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished")
    with children() as running:
        while waiting or running:
            while waiting and slots:
                cell, slot = waiting.pop(0), slots.pop(0)
                running[start(cell, slot, jobs, script, lock)] = cell, slot
            time.sleep(0.1)
            for child in [c for c in running if c.poll() is not None]:
                cell, slot = running.pop(child)
                slots.append(slot)
                if not print_outcome(cell, child.returncode):
                    failed.append(cell)
                ended()
                shown = -math.inf
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                going = [c for c in cells if c not in failed]
                line = progress_line(going, before, shown - began)
                print_progress(line, last=not running, log=True)
    return failed


def progress_line(cells: Sequence[Cell], before: Mapping[Path, int], seconds: float) -> str:
    """Epochs of all cells, and the time left at the pace of these `seconds`.

    before: the epochs that were done at their start.
    """
    done = sum(c.epoch() for c in cells)
    total = sum(c.settings["epochs"] for c in cells)
    new = done - sum(before[c.out] for c in cells)
    line = f"epoch {done}/{total} of all runs"
    if new:
        left = int(seconds * (total - done) / new)
        line += f", left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return line
