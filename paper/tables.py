"""The paper's Tables II to V, on any machine and any data set.

    python -m paper.tables complexity            # Table V: FLOPs, parameters, memory, time
    python -m paper.tables ablation --seeds 0 1 2 -- --data cityscapes --root DIR ...  # Table II
    python -m paper.tables compare --seeds 0 1 2 --jobs 4 -- --data cityscapes --root DIR ...

Table II (ablation) and Tables III and IV (compare) train every method with every seed by train.py,
which gets all flags not known here. OUT/METHOD-seedS is a run of train.py; its output.txt holds
what train.py printed. OUT/results.jsonl has a line for each finished run. OUT/table.md has the mean
and standard deviation beside the paper's figures, the differences seed by seed, and what P_class
knows and the attention's noise. The same command again goes on from there and repeats no finished
run. With --preset released, Denoised NL has P from the res3 head's softmax already.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import recipe
from checkpoint import base_of, load_network, open_like
from data import open_dataset
from paper.complexity import complexity, complexity_table
from paper.measure import markdown
from paper.noise import MEASURES, as_plain, measure
from paper.runs import Cell, locked, run_cells
from ranks import find_device
from runtime import InputError, Parser, add_flags, print_line, quote, run_script, write

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
    "dnl-supervised": Method(
        "Denoised NL, P supervised", ("--p-from", "feature", "--coarse-weight", "1")
    ),
    "dnl-res3-logits": Method("Denoised NL, P = res3 logits", ("--p-from", "res3_logits")),
    "dnl-res3": Method("Denoised NL, P = res3 softmax", ("--p-from", "res3")),
}
READINGS = ("dnl-supervised", "dnl-res3-logits", "dnl-res3")  # of P, other than Table II's
TABLES = {
    "ablation": ("none", "nl", "gr", "lr", "dnl", *READINGS),
    "compare": ("none", "ppm", "aspp", "nl", "ocnet", "ccnet", "danet", "dranet", "dnl"),
}
PAIRS = {  # (method, baseline), compared seed by seed
    "ablation": [
        ("nl", "none"),
        ("gr", "nl"),
        ("lr", "nl"),
        ("dnl", "nl"),
        *((name, "dnl") for name in READINGS),
    ],
    "compare": [("dnl", other) for other in TABLES["compare"][:-1]],
}
MOST_SEEDS = 20  # the paired test goes through all 2^n choices of signs
QUERIES = 16  # of an image, for the gate and the noise

# ---- the runs


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


# ---- the tables


def score_table(cells: Sequence[Cell]) -> str:
    """Mean and sample standard deviation of each method beside the paper's figures, as Markdown."""
    s = cells[0].settings
    which = list(BACKBONES)
    if s["backbone"] in which:
        which = [s["backbone"]]
    rows = []
    for name, results in results_by_method(cells).items():
        last = [100 * r["miou"] for r in results]
        best = [100 * r["best"] for r in results]
        method = METHODS[name]
        paper = dict(zip(BACKBONES, method.paper))
        row = [
            method.label,
            len(last),
            f"{statistics.mean(last):.2f}" if last else "",
            f"{statistics.stdev(last):.2f}" if len(last) > 1 else "",
            f"{statistics.mean(best):.2f}" if best else "",
            " / ".join(str(paper[backbone]) for backbone in which if paper),
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
        "240, crop 768, batch 8."
    )


def results_by_method(cells: Sequence[Cell]) -> dict[str, list[dict[str, Any]]]:
    """The results of the finished cells of each method."""
    results: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in cells}
    for result in results_of(cells):
        results[result["method"]].append(result)
    return results


def results_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The results of the finished cells."""
    results = [cell.result() for cell in cells]
    return [r for r in results if r is not None]


def paired_table(cells: Sequence[Cell], pairs: Sequence[tuple[str, str]]) -> str:
    """The difference of two methods, seed by seed, in points of mIoU, as Markdown."""
    scores = {}
    for name, results in results_by_method(cells).items():
        scores[name] = {r["seed"]: 100 * r["miou"] for r in results}
    rows = []
    for name, other in pairs:
        seeds = [seed for seed in scores[name] if seed in scores[other]]
        gains = [scores[name][seed] - scores[other][seed] for seed in seeds]
        figures = ["", "", ""]
        if gains:
            mean, p = statistics.mean(gains), sign_flip_p(gains)
            figures = [f"{mean:+.2f}", f"{min(gains):+.2f} to {max(gains):+.2f}", f"{p:.3f}"]
        rows.append([f"{METHODS[name].label} - {METHODS[other].label}", len(gains), *figures])
    return (
        f"{markdown(('Difference', 'seeds', 'mean, points', 'range', 'p'), rows)}\n\n"
        "p: the share of all choices of signs of the differences whose mean is at least this far "
        "from 0. With n seeds it is 2 / 2^n or more (3 seeds: 0.25). It is not corrected for the "
        "number of rows."
    )


def sign_flip_p(gains: Sequence[float]) -> float:
    """The two-sided p of the paired permutation test.

    The share of all 2^n choices of signs whose sum is as far from 0 as the sum of `gains`, or more.
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for gain in gains:
        sums = torch.cat([sums + gain, sums - gain])
    own = abs(math.fsum(gains))
    return (sums.abs() >= own - 1e-9).double().mean().item()


def attention_table(cells: Sequence[Cell]) -> str:
    """The gate and the noise of each method, means over its measured runs, as Markdown."""
    rows = []
    for name in dict.fromkeys(cell.name for cell in cells):
        found = [attention_means(cell) for cell in cells if cell.name == name]
        runs = [measures for measures in found if measures]
        if not runs:
            continue
        row = [METHODS[name].label, len(runs)]
        for key in MEASURES:
            values = [x for x in (measures[key] for measures in runs) if x is not None]
            row.append(f"{statistics.mean(values):.3f}" if values else "")
        rows.append(row)
    return (
        f"{markdown(('Method', 'runs', *MEASURES), rows)}\n\n"
        "Noise between classes (inter) and within (intra) of A, A', A''; 0 is clean. Mean P_class "
        "of pixels of the same class and of another, and how often it is larger for the same "
        "(AUC; 0.5: it knows nothing, or is 1 for all). paper/noise.py and paper/gate.py define "
        f"them. Means over queries ({QUERIES} an image), classes and runs, of last.pt."
    )


def attention_means(cell: Cell) -> dict[str, float | None] | None:
    """The mean of each of MEASURES in attention.json; None unless it is of this cell's result."""
    of = measured_of(cell)
    try:
        found = json.loads((cell.out / "attention.json").read_text())
    except (OSError, ValueError):
        return None
    if of is None or not isinstance(found, dict) or found.get("of") != of:
        return None
    return found["means"]


def measured_of(cell: Cell) -> dict[str, Any] | None:
    """What attention.json is of: the result, and what is measured. None for an unfinished run."""
    result = cell.result()
    if result is None:
        return None
    return {
        "epochs": result["settings"]["epochs"],
        "miou": result["miou"],
        "queries": QUERIES,
        "measures": list(MEASURES),
    }


def measure_attention(cells: Sequence[Cell], flags: Sequence[str]) -> None:
    """Write attention.json of each finished run that has attention and a last.pt, once.

    flags: of train.py; they name the data set and the device.
    """
    args = recipe.parse_training(flags, world=1)
    device = find_device(args.device)
    for cell in cells:
        path = cell.out / "last.pt"
        of = measured_of(cell)
        if cell.settings["context"] not in ("dnl", "nl") or of is None or not path.exists():
            continue
        if attention_means(cell) is not None:
            continue
        try:
            net, checkpoint = load_network(path, device)
            dataset = open_like(checkpoint, args.data, args.root, "val", str(path))
            base = base_of(checkpoint)
            measured = measure(net, dataset, queries=QUERIES, seed=0, device=device, base=base)
        except InputError as e:
            print_line(f"warning: {quote(cell.out)}: not measured: {e}", error=True)
            continue
        plain = as_plain(measured, dataset.classes)
        means = {name: values["mean"] for name, values in plain.items()}
        write_text(cell.out / "attention.json", json.dumps({"of": of, "means": means}))


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or leave the one before."""
    write(path, lambda f: f.write(text.encode()))


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

    def write_results() -> str:
        lines = "".join(json.dumps(r) + "\n" for r in results_of(cells))
        write_text(out / "results.jsonl", lines)
        parts = [score_table(cells), paired_table(cells, PAIRS[table]), attention_table(cells)]
        text = "\n\n".join([*parts, f"    {command}\n"])
        write_text(out / "table.md", text)
        return text

    with locked(out) as lock:
        write_results()
        failed = run_cells(cells, jobs, lock, write_results, script)
        measure_attention(cells, flags)
        print(write_results())
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
    if len(args.seeds) > MOST_SEEDS:
        raise InputError(f"--seeds: got {len(args.seeds)}, expected at most {MOST_SEEDS}")
    try:
        return run_table(args.table, args.out, args.seeds, args.jobs, flags)
    except KeyboardInterrupt:
        print_line(f"stopped; the same command goes on in {args.out}", error=True)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    run_script(main)
