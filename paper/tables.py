"""The paper's Tables II to V, on any machine and any data set.

    python -m paper.tables complexity            # Table V: FLOPs, parameters, memory, time
    python -m paper.tables ablation --seeds 0 1 2 -- --data cityscapes --root DIR ...  # Table II
    python -m paper.tables compare --seeds 0 1 2 --jobs 4 -- --data cityscapes --root DIR ...

Table II (ablation) and Tables III and IV (compare) train every method with every seed by train.py,
which gets all flags not known here. OUT/METHOD-seedS is a run of train.py; its output.txt holds
what train.py printed. OUT/results.jsonl has a line for each finished run, OUT/table.md the mean and
standard deviation beside the paper's figures. The same command again goes on from there and repeats
no finished run.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import recipe
from data import open_dataset
from paper.complexity import complexity, complexity_table
from paper.measure import markdown
from ranks import find_device
from runtime import (
    InputError,
    Parser,
    add_flags,
    open_lock,
    print_line,
    print_progress,
    quote,
    run_script,
    write,
)

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True)
class Method:
    """A row: its label and the flags of train.py that make it."""

    label: str
    flags: tuple[str, ...]
    paper: tuple[float, ...] = ()  # mIoU in percent on Cityscapes val, of each of BACKBONES


BACKBONES = {"resnet50": "R-50", "resnet101": "R-101"}
METHODS = {  # by the name of the run's folder; Tables II, III and IV
    "none": Method("Baseline", ("--context", "none"), (76.7, 77.9)),
    "nl": Method("NL", ("--context", "nl"), (79.5, 80.6)),
    "gr": Method("Denoised NL, GR only", ("--no-lr",), (81.2, 82.3)),
    "lr": Method("Denoised NL, LR only", ("--no-gr",), (81.4, 82.5)),
    "ppm": Method("PPM", ("--context", "paper.peers:ppm"), (77.6, 79.0)),
    "aspp": Method("ASPP", ("--context", "paper.peers:aspp"), (77.9, 79.2)),
    "ocnet": Method("OCNet", ("--context", "paper.peers:ocnet"), (80.3, 81.3)),
    "ccnet": Method("CCNet", ("--context", "paper.peers:ccnet"), (79.9, 81.1)),
    "danet": Method("DANet", ("--context", "paper.peers:danet"), (80.3, 81.2)),
    "dranet": Method("DRANet*", ("--context", "paper.peers:dranet"), (80.2, 81.1)),
    "dnl": Method("Denoised NL", (), (82.0, 83.5)),
    "dnl-supervised": Method("Denoised NL, P supervised", ("--coarse-weight", "1")),
    "dnl-res3-logits": Method("Denoised NL, P = res3 logits", ("--p-from", "res3_logits")),
    "dnl-res3": Method("Denoised NL, P = res3 softmax", ("--p-from", "res3")),
}
TABLES = {
    "ablation": (
        *("none", "nl", "gr", "lr", "dnl"),
        *("dnl-supervised", "dnl-res3-logits", "dnl-res3"),  # other readings of P
    ),
    "compare": ("none", "ppm", "aspp", "nl", "ocnet", "ccnet", "danet", "dranet", "dnl"),
}

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


def cells_of(table: str, out: Path, seeds: Sequence[int], flags: Sequence[str]) -> list[Cell]:
    """The runs of a table, all methods of a seed before the next seed.

    flags: of train.py, the same for all runs. InputError for flags that train.py does not take, and
    for those by which the runs differ.
    """
    refuse_own_flags(flags)
    common = recipe.parse_training(flags, world=1)
    data = open_dataset(common.data, common.root, common.split)
    weights = recipe.read_class_weights(common.class_weights, data.classes)
    cells = []
    for seed in dict.fromkeys(seeds):
        for name in TABLES[table]:
            folder = out / f"{name}-seed{seed}"
            own = ("--seed", str(seed), "--out", str(folder))
            argv = (*flags, *METHODS[name].flags, *own)
            args = recipe.parse_training(argv, world=1)
            settings = recipe.settings_of(args, data, weights)
            if settings["amp"] == "auto":  # the machine chooses
                del settings["amp"]
            cells.append(Cell(name, seed, folder, argv, settings))
    return cells


def refuse_own_flags(flags: Sequence[str]) -> None:
    """InputError for a flag of train.py that the table sets."""
    own = ("out", "resume", "seed", "context", "no_gr", "no_lr", "p_from", "coarse_weight")
    parser = recipe.training_parser()
    parser.set_defaults(**dict.fromkeys(own))
    args = parser.parse_args(flags)
    for name in own:
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} among train.py's flags: the table sets it, leave it out")


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
    cells: Sequence[Cell], jobs: int, lock: int, ended: Callable[[], None], script: Path
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


# ---- the table


def score_table(cells: Sequence[Cell], command: str) -> str:
    """Mean and sample standard deviation of each method beside the paper's figures, as Markdown."""
    s = cells[0].settings
    which = list(BACKBONES)
    if s["backbone"] in which:
        which = [s["backbone"]]
    rows = []
    for name in dict.fromkeys(c.name for c in cells):
        results = results_of([c for c in cells if c.name == name])
        last = [100 * r["miou"] for r in results]
        best = [100 * r["best"] for r in results]
        paper = METHODS[name].paper and dict(zip(BACKBONES, METHODS[name].paper))
        row = [
            METHODS[name].label,
            len(last),
            f"{statistics.mean(last):.2f}" if last else "",
            f"{statistics.stdev(last):.2f}" if len(last) > 1 else "",
            f"{statistics.mean(best):.2f}" if best else "",
            " / ".join(str(paper[backbone]) for backbone in which) if paper else "",
        ]
        rows.append(row)
    head = "paper " + " / ".join(BACKBONES[backbone] for backbone in which)
    header = ("Method", "runs", "mIoU, %", "deviation", "best epoch", head)
    return (
        f"{markdown(header, rows)}\n\n"
        f"mIoU of the last epoch on the validation split of {s['data']}, mean and sample standard "
        "deviation over the seeds. Best epoch: mean of each run's best, which is chosen on the "
        f"split that it is measured on. {s['backbone']}, preset {s['preset']}, epochs "
        f"{s['epochs']}, crop {s['crop']}, batch {s['batch']}. The paper's: Cityscapes val, epochs "
        f"240, crop 768, batch 8.\n\n    {command}\n"
    )


def results_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The results of the finished cells."""
    results = [cell.result() for cell in cells]
    return [r for r in results if r is not None]


def run_table(
    table: str,
    out: Path,
    seeds: Sequence[int],
    jobs: int,
    flags: Sequence[str],
    script: Path = TRAIN,
) -> int:
    """Train a table's cells; after each, write OUT/results.jsonl and OUT/table.md.

    Returns 1 if a cell failed, else 0.
    """
    cells = cells_of(table, out, seeds, flags)
    own = (table, "--out", str(out), "--seeds", *map(str, seeds))
    command = shlex.join(["python", "-m", "paper.tables", *own, "--", *flags])

    def write_results() -> None:
        lines = "".join(json.dumps(r) + "\n" for r in results_of(cells))
        write(out / "results.jsonl", lambda f: f.write(lines.encode()))
        text = score_table(cells, command)
        write(out / "table.md", lambda f: f.write(text.encode()))

    with locked(out) as lock:
        write_results()
        failed = run_cells(cells, jobs, lock, write_results, script)
    print(score_table(cells, command))
    if failed:
        return 1
    return 0


# ---- the command


def tables_parser() -> Parser:
    """The flags of the three tables."""
    p = Parser(prog="python -m paper.tables", description="The paper's Tables II to V")
    tables = p.add_subparsers(dest="table", required=True)
    t = tables.add_parser("complexity", help="Table V", allow_abbrev=False)
    t.add_argument("--json", action="store_true", help="also one JSON object, as the last line")
    add_flags(t, "device")
    for name, what in (("ablation", "Table II"), ("compare", "Tables III and IV")):
        t = tables.add_parser(
            name,
            help=what,
            allow_abbrev=False,
            description=f"{what}. All other flags go to train.py, whose --help lists them.",
        )
        t.add_argument(
            "--out",
            type=Path,
            default=Path("runs") / name,
            help="folder of all its runs (%(default)s)",
        )
        t.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        t.add_argument("--jobs", type=int, default=1, help="runs at a time, on the GPUs in turn")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, after the runs that it needs. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--" not in argv:
        argv.append("--")
    split = argv.index("--")
    args, flags = tables_parser().parse_known_args(argv[:split])
    flags += argv[split + 1 :]
    if args.table == "complexity":
        if flags:
            raise InputError(f"{flags[0]}: not a flag of complexity, which takes only --json")
        result = complexity(find_device(args.device))
        print(complexity_table(result))
        if args.json:
            print(json.dumps(result))
        return 0
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: expected 1 or more")
    try:
        return run_table(args.table, args.out, args.seeds, args.jobs, flags)
    except KeyboardInterrupt:
        print_line(f"stopped; the same command goes on in {args.out}", error=True)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    run_script(main)
