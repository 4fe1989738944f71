"""The paper's Tables II to V, on any machine and any data set.

    python -m paper.tables complexity                                        # Table V: FLOPs, parameters, memory, time
    python -m paper.tables ablation --out runs/ablation --seeds 0 1 2 --jobs 4 -- --data cityscapes --root DIR ...
    python -m paper.tables compare --out runs/compare --seeds 0 1 2 -- --data cityscapes --root DIR ...

Table II (ablation) and Tables III and IV (compare) train every method with every seed by train.py, which is handed
all flags not known here. OUT/METHOD-seedS is a run of train.py, with what it printed in output.txt; OUT/results.jsonl
has a line for each finished run, OUT/table.md the mean and standard deviation beside the paper's figures. The same
command again goes on where it was, and repeats nothing that is finished.
"""

from __future__ import annotations

import fcntl
import json
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import recipe
from data import open_dataset
from dnl import DenoisedNonLocal, denoised_maps
from paper import peers
from paper.bench import in_turn, markdown, peak_memory
from runtime import InputError, Parser, run_script, write

# ------------------------------------------------------------------------------------------------ Table V: complexity

CHANNELS, CLASSES, SIDE = 512, 19, 48  # of the block's input for a 768x768 image, at stride 16


class MapRoute(DenoisedNonLocal):
    """Denoised NL as Section III tells it: A, A' and A'' as whole N x N maps. The same F' as DenoisedNonLocal."""

    def forward(self, f: Tensor, p: Tensor | None = None) -> Tensor:
        q, k, v, p = self.inputs(f, p)
        a = denoised_maps(q, k, p, tuple(f.shape[2:]), self.kernel)[2]  # A'', (B, N, N)
        return self.gamma * torch.bmm(v, a.transpose(1, 2)).view_as(f) + f


# name, module, whether P is handed to it (the network's classifier is not counted), the paper's GFLOPs and memory (M)
BLOCKS: tuple[tuple[str, Callable[[], nn.Module], bool, float | None, int | None], ...] = (
    ("NL", partial(peers.nl, CHANNELS, CLASSES), False, 7.63, 407),
    ("CCNet, R = 1", partial(peers.ccnet, CHANNELS, CLASSES, recurrence=1), False, 1.77, 52),
    ("CCNet, R = 2", partial(peers.ccnet, CHANNELS, CLASSES), False, None, None),
    ("DANet", partial(peers.danet, CHANNELS, CLASSES), False, 10.04, 570),
    ("DRANet*", partial(peers.dranet, CHANNELS, CLASSES), False, 0.76, 30),
    ("Denoised NL, map route, P given", partial(MapRoute, CHANNELS, 0), True, 7.83, 428),
    ("Denoised NL, value route, P given", partial(DenoisedNonLocal, CHANNELS, 0), True, 7.83, 428),
    (
        "Denoised NL, value route, own P",
        partial(DenoisedNonLocal, CHANNELS, CLASSES),
        False,
        7.83,
        428,
    ),
    ("OCNet", partial(peers.ocnet, CHANNELS, CLASSES), False, None, None),
    ("PPM", partial(peers.ppm, CHANNELS, CLASSES), False, None, None),
    ("ASPP", partial(peers.aspp, CHANNELS, CLASSES), False, None, None),
)


def ready(
    make: Callable[[], nn.Module], given: bool, device: torch.device
) -> tuple[nn.Module, list[Tensor]]:
    """The block in eval mode, and its inputs: F (1, 512, 48, 48) and, where it is given, P (1, 19, 48, 48)."""
    with device:
        return make().eval(), [
            torch.randn(1, c, SIDE, SIDE) for c in ([CHANNELS, CLASSES] if given else [CHANNELS])
        ]


@torch.no_grad()
def count(make: Callable[[], nn.Module], given: bool) -> tuple[float, int]:
    """GFLOPs of a forward (2 a multiply-add, convolutions and matrix products) and parameters, from shapes alone."""
    block, inputs = ready(make, given, torch.device("meta"))
    with FlopCounterMode(display=False) as flops:
        block(*inputs)
    return flops.get_total_flops() / 1e9, sum(p.numel() for p in block.parameters())


@torch.no_grad()
def complexity(device: torch.device) -> dict[str, Any]:
    """Table V: {"mode": how it is measured, "rows": [{"method", "gflops", "parameters", "memory" (MiB), "time" (ms),
    "paper_gflops", "paper_memory"}]}."""
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    mode = (
        f"The block alone on one input {CHANNELS}x{SIDE}x{SIDE} (a 768x768 image at stride 16), {CLASSES} classes, "
        f"forward in eval mode without gradient, fp32, {where}. GFLOPs: 2 a multiply-add, convolutions and matrix "
        "products. MiB: peak of allocations over the input and the parameters. ms: median of 10, in turn. P given: "
        "without the 1x1 convolution that predicts P. The paper states neither mode nor unit of its memory (M)."
    )
    runs, rows = {}, []
    for name, make, given, *_ in BLOCKS:
        block, inputs = ready(make, given, device)
        runs[name] = partial(block, *inputs)
    times = in_turn(
        runs, 10, device
    )  # before the memory: it also lets libraries take their workspaces
    for name, make, given, paper_gflops, paper_memory in BLOCKS:
        gflops, parameters = count(make, given)
        peak, _ = peak_memory(lambda: [runs[name]()], device)
        rows.append(
            {
                "method": name,
                "gflops": gflops,
                "parameters": parameters,
                "memory": peak / 2**20,
                "time": 1000 * times[name],
                "paper_gflops": paper_gflops,
                "paper_memory": paper_memory,
            }
        )
    return {"mode": mode, "rows": rows}


def complexity_table(result: dict[str, Any]) -> str:
    """What `complexity` gives, as Markdown."""
    rows = [
        [
            r["method"],
            f"{r['gflops']:.2f}",
            r["paper_gflops"] or "",
            f"{r['parameters']:,}",
            f"{r['memory']:.1f}",
            r["paper_memory"] or "",
            f"{r['time']:.1f}",
        ]
        for r in result["rows"]
    ]
    return f"{markdown(['Method', 'GFLOPs', 'paper', 'Parameters', 'MiB', 'paper, M', 'ms'], rows)}\n\n{result['mode']}"


# ------------------------------------------------------------------------------------ Tables II to IV: training runs


@dataclass(frozen=True)
class Method:
    """A row: its label, the flags of train.py that make it, the paper's mIoU (Cityscapes val, R-50 and R-101)."""

    label: str
    flags: tuple[str, ...]
    paper: tuple[float, float]


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
}
TABLES = {
    "ablation": ("none", "nl", "gr", "lr", "dnl"),
    "compare": ("none", "ppm", "aspp", "nl", "ocnet", "ccnet", "danet", "dranet", "dnl"),
}
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True)
class Cell:
    """One training run. argv: all flags of train.py; settings: what they come to."""

    name: str
    seed: int
    out: Path
    argv: tuple[str, ...]
    settings: dict[str, Any]

    def log(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The settings and the epochs of log.jsonl, none before the first epoch's end. InputError: another file of that name."""
        path = self.out / "log.jsonl"
        if not path.exists():
            return {}, []
        try:
            first, *epochs = map(json.loads, path.read_text().splitlines())
            if type(first["settings"]["epochs"]) is not int or not all(
                type(e["epoch"]) is int and (e["miou"] is None or 0 <= e["miou"] <= 1)
                for e in epochs
            ):
                raise ValueError("other values than train.py writes")
            return first["settings"], epochs
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(
                f"{path}: not the log of a run ({e}): remove its folder, or choose another --out"
            ) from None

    def epoch(self) -> int:
        """Epochs that are done."""
        epochs = self.log()[1]
        return epochs[-1]["epoch"] if epochs else 0

    def result(self) -> dict[str, Any] | None:
        """The line of results.jsonl, None while unfinished. miou: of the last epoch; best: the highest of all epochs.

        InputError where the finished run is of other settings than this cell's.
        """
        was, epochs = self.log()
        if not epochs or epochs[-1]["epoch"] < was["epochs"] or epochs[-1]["miou"] is None:
            return None
        differ = [
            f"{k} {was[k]} -> {v}" for k, v in self.settings.items() if k in was and was[k] != v
        ]
        if differ:
            raise InputError(
                f"{self.out}: finished with other settings ({'; '.join(differ)}): repeat its flags "
                "to keep it, or choose another --out"
            )
        best = max(e["miou"] for e in epochs if e["miou"] is not None)
        return {
            "method": self.name,
            "seed": self.seed,
            "miou": epochs[-1]["miou"],
            "best": best,
            "out": str(self.out),
            "settings": was,
        }


def cells_of(table: str, out: Path, seeds: Sequence[int], flags: Sequence[str]) -> list[Cell]:
    """The runs of a table, all methods of a seed before the next seed. flags: of train.py, common to all.

    InputError for flags that train.py does not take, and for those that tell the cells apart.
    """
    parser = recipe.training_parser()
    own = ("out", "resume", "seed", "context", "no_gr", "no_lr")
    parser.set_defaults(**dict.fromkeys(own))
    given = [k for k in own if getattr(parser.parse_args(flags), k) is not None]
    if given:
        raise InputError(
            f"--{given[0].replace('_', '-')} among train.py's flags: the table sets it, leave it out"
        )
    cells, common = [], recipe.parse_training(flags, world=1)
    data = open_dataset(common.data, common.root, common.split)
    weights = (
        recipe.read_weights(common.class_weights, data.classes) if common.class_weights else None
    )
    for seed in dict.fromkeys(seeds):
        for name in TABLES[table]:
            folder = out / f"{name}-seed{seed}"
            argv = (*flags, *METHODS[name].flags, "--seed", str(seed), "--out", str(folder))
            settings = recipe.settings_of(recipe.parse_training(argv, world=1), data, weights)
            if settings["amp"] == "auto":  # chosen by the machine
                del settings["amp"]
            cells.append(Cell(name, seed, folder, argv, settings))
    return cells


def start(cell: Cell, slot: int, jobs: int, script: Path, lock: int) -> subprocess.Popen:
    """train.py for a cell, on a GPU in turn where there are several. It holds the table's lock while it lives."""
    env = os.environ.copy()
    visible = env.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    )  # no context
    if len(gpus) > 1:
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    if jobs > 1:  # or each takes all the cores
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
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
    """OUT for this command alone, or InputError; runs that outlive a killed command hold it too. The lock's file."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another command, or a run it left, is at work there: wait or stop it"
            ) from None
        yield file.fileno()


@contextmanager
def children() -> Iterator[dict[subprocess.Popen, Any]]:
    """Processes, and what goes with each. Those left at Ctrl-C or SIGTERM are told to save and stop, and waited for."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    running: dict[subprocess.Popen, Any] = {}
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield running
    finally:
        try:
            for wait in (False, True):
                for child in running:
                    child.wait() if wait else child.terminate()
        except KeyboardInterrupt:  # a second time: they may be in the middle of a long validation
            for child in running:
                child.kill()
        signal.signal(signal.SIGTERM, old)


def report(cell: Cell, status: int) -> bool:
    """Say how a run ended, with the tail of its output where it failed. True where it is finished."""
    result = None if status else cell.result()
    if result:
        print(f"{cell.out}: mIoU {result['miou']:.4f}", flush=True)
    else:
        tail = (cell.out / "output.txt").read_text(errors="replace").splitlines()[-20:]
        print(
            f"{cell.out}: failed, exit status {status}; the others go on. The end of its output:",
            *tail,
            sep="\n    ",
            file=sys.stderr,
            flush=True,
        )
    return result is not None


def run_cells(
    cells: Sequence[Cell], jobs: int, lock: int, ended: Callable[[], None], script: Path
) -> list[Cell]:
    """Train the unfinished cells, `jobs` at a time; `ended` is called after each. Returns those that failed."""
    waiting, slots, failed = [c for c in cells if c.result() is None], list(range(jobs)), []
    before, began, shown = {c.out: c.epoch() for c in cells}, time.monotonic(), float("-inf")
    print(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished", flush=True)
    with children() as running:
        while waiting or running:
            while waiting and slots:
                cell, slot = waiting.pop(0), slots.pop(0)
                running[start(cell, slot, jobs, script, lock)] = cell, slot
            time.sleep(0.1)
            for child in [c for c in running if c.poll() is not None]:
                cell, slot = running.pop(child)
                slots.append(slot)
                failed += [] if report(cell, child.returncode) else [cell]
                ended()
                shown = float("-inf")
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(
                    progress([c for c in cells if c not in failed], before, shown - began),
                    flush=True,
                )
    return failed


def progress(cells: Sequence[Cell], before: Mapping[Path, int], seconds: float) -> str:
    """Epochs of all cells, and the time left at the pace of these `seconds`, at whose start `before` were done."""
    done, total = sum(map(Cell.epoch, cells)), sum(c.settings["epochs"] for c in cells)
    new = done - sum(before[c.out] for c in cells)
    if not new:
        return f"epoch {done}/{total} of all runs"
    left = int(seconds * (total - done) / new)
    return (
        f"epoch {done}/{total} of all runs, left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    )


def score_table(cells: Sequence[Cell], command: str) -> str:
    """Mean and sample standard deviation over the seeds of each method beside the paper's figures, as Markdown."""
    s = cells[0].settings
    which = {"resnet50": (0,), "resnet101": (1,)}.get(s["backbone"], (0, 1))
    rows = []
    for name in dict.fromkeys(c.name for c in cells):
        results = [r for c in cells if c.name == name and (r := c.result())]
        last, best = ([100 * r[k] for r in results] for k in ("miou", "best"))
        rows.append(
            [
                METHODS[name].label,
                len(last),
                f"{statistics.mean(last):.2f}" if last else "",
                f"{statistics.stdev(last):.2f}" if len(last) > 1 else "",
                f"{statistics.mean(best):.2f}" if best else "",
                " / ".join(str(METHODS[name].paper[i]) for i in which),
            ]
        )
    paper = "paper " + " / ".join(("R-50", "R-101")[i] for i in which)
    return (
        f"{markdown(['Method', 'runs', 'mIoU, %', 'deviation', 'best epoch', paper], rows)}\n\n"
        f"mIoU of the last epoch on the validation split of {s['data']}, mean and sample standard deviation over "
        "the seeds. Best epoch: mean of each run's best, which is chosen on the split that it is measured on. "
        f"{s['backbone']}, preset {s['preset']}, epochs {s['epochs']}, crop {s['crop']}, batch {s['batch']}. "
        f"The paper's: Cityscapes val, epochs 240, crop 768, batch 8.\n\n    {command}\n"
    )


def run_table(
    table: str,
    out: Path,
    seeds: Sequence[int],
    jobs: int,
    flags: Sequence[str],
    script: Path = TRAIN,
) -> int:
    """Train a table's cells; after each, write OUT/results.jsonl and OUT/table.md. 1 where a cell failed, else 0."""
    cells = cells_of(table, out, seeds, flags)
    own = (table, "--out", str(out), "--seeds", *map(str, seeds))
    command = shlex.join(["python", "-m", "paper.tables", *own, "--", *flags])

    def report_all() -> None:
        lines = "".join(json.dumps(r) + "\n" for c in cells if (r := c.result()))
        write(out / "results.jsonl", lambda f: f.write(lines.encode()))
        write(out / "table.md", lambda f: f.write(score_table(cells, command).encode()))

    with locked(out) as lock:
        report_all()
        failed = run_cells(cells, jobs, lock, report_all, script)
    print(score_table(cells, command))
    return 1 if failed else 0


def tables_parser() -> Parser:
    """The flags of the three tables."""
    p = Parser(prog="python -m paper.tables", description="The paper's Tables II to V")
    tables = p.add_subparsers(dest="table", required=True)
    t = tables.add_parser("complexity", help="Table V", allow_abbrev=False)
    t.add_argument("--json", action="store_true", help="also one JSON object, as the last line")
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
    split = argv.index("--") if "--" in argv else len(argv)
    args, flags = tables_parser().parse_known_args(argv[:split])
    flags += argv[split + 1 :]
    if args.table == "complexity":
        if flags:
            raise InputError(f"{flags[0]}: not a flag of complexity, which takes --json alone")
        result = complexity(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        print(complexity_table(result), *[json.dumps(result)] * args.json, sep="\n")
        return 0
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: expected 1 or more")
    try:
        return run_table(args.table, args.out, args.seeds, args.jobs, flags)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on in {args.out}", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    run_script(main)
