"""Read every file of a data set and report: pairs, sizes, pixels of each class, and each wrong file with its remedy.

python check.py --data synthetic|cityscapes|ade20k|folder [--root DIR] [--split S] [--workers N] [--json]
"""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data import ADE_FOLDERS, FORMATS, IGNORE, LAYOUT, NAMES, SPLITS, DataSet, open_split, read
from runtime import InputError, Parser, print_progress, run_script


def check(
    name: str,
    root: Path | str | None,
    split: str | None = None,
    *,
    workers: int = 0,
    progress: bool = False,
) -> dict:
    """Reads every file of the split (None: train, val, and test if there is one). Returns plain values: data, classes,
    splits {split: {pairs, sizes {"HxW": n}, modes {"image label": n}, pixels (of each class), ignored, weights}},
    problems (a line for each wrong file), warnings. weights: see class_weights. InputError: nothing to check."""
    splits = [split] if split else ["train", "val"]
    if not split and (
        name == "synthetic"
        or Path(
            root or "", LAYOUT[name][0], ADE_FOLDERS["test"] if name == "ade20k" else "test"
        ).is_dir()
    ):
        splits.append("test")
    opened = [
        open_split(name, root, s) for s in splits
    ]  # all folders are looked at before the long part
    problems, warned = [line for _, wrong in opened for line in wrong], []
    parts = {d.split: _check_split(d, workers, progress, problems) for d, _ in opened}
    classes, seen = opened[0][0].classes, np.sum([p["pixels"] for p in parts.values()], 0)
    if (
        len(seen) > 1
        and seen[0]
        and not seen[1:].any()
        and any(p["ignored"] for p in parts.values())
    ):
        warned.append(
            "the labels hold only 0 and 255 (ignored): if they are 0/255 masks, write class numbers 0 and 1"
        )
    warned += [
        f"no pixel is of the class {c!r}" for c, n in zip(classes, seen) if not n and seen.any()
    ]
    return {
        "data": name,
        "classes": list(classes),
        "splits": parts,
        "problems": problems,
        "warnings": warned,
    }


def _check_split(dataset: DataSet, workers: int, progress: bool, problems: list[str]) -> dict:
    parts = [replace(dataset, items=dataset.items[i : i + 16]) for i in range(0, len(dataset), 16)]
    pixels, sizes, modes, done = np.zeros(256, np.int64), Counter(), Counter(), 0
    with ProcessPoolExecutor(workers) if workers else nullcontext() as pool:
        for part, report in zip(parts, (pool.map if pool else map)(_check_part, parts)):
            for total, value in zip((pixels, sizes, modes, problems), report):
                total += value
            done += len(part)
            if progress:
                line = f"check {dataset.split}: {done}/{len(dataset)}, {len(problems)} wrong"
                print_progress(line, last=done == len(dataset))
    known = pixels[: len(dataset.classes)]
    return {
        "pairs": sum(sizes.values()),
        "sizes": dict(sizes.most_common()),
        "modes": dict(modes.most_common()),
        "pixels": known.tolist(),
        "ignored": int(pixels[IGNORE]),
        "weights": class_weights(known).tolist(),
    }


def _check_part(dataset: DataSet) -> tuple[np.ndarray, Counter, Counter, list[str]]:
    pixels, sizes, modes, wrong = np.zeros(256, np.int64), Counter(), Counter(), []
    for index, item in enumerate(dataset.items):
        try:
            image, label = read(dataset, index)
            modes[" ".join(_mode(dataset, path) for path in item.files)] += 1
        except (InputError, OSError) as e:  # OSError: gone since it was read
            wrong.append(str(e))
            continue
        sizes["{}x{}".format(*image.shape)] += 1
        if label is not None:
            pixels += np.bincount(label.ravel(), minlength=256)
    return pixels, sizes, modes, wrong


def _mode(dataset: DataSet, path: Path) -> str:
    if dataset.name == "synthetic":
        return "memory"
    with Image.open(path, formats=FORMATS) as image:
        return image.mode


def class_weights(pixels: np.ndarray) -> np.ndarray:
    """Pixels of each class (n,) to suggested weights of the loss (n,), proportional to 1/sqrt(share) and 1 in the mean
    over the pixels, so that the loss keeps its scale; 1 for classes without a pixel."""
    root = np.sqrt(pixels / max(1, pixels.sum()))
    return np.where(root > 0, 1 / (np.where(root > 0, root, 1) * max(root.sum(), 1e-12)), 1.0)


def _print_report(report: dict) -> None:
    for split, part in report["splits"].items():
        print(f"{report['data']} {split}: {part['pairs']} readable")
        for what, title in ("sizes", "height x width"), ("modes", "image and label"):
            text = ", ".join(f"{k}: {v}" for k, v in list(part[what].items())[:6])
            print(
                f"  {what} ({title})  {text}"
                + f", {len(part[what]) - 6} others" * (len(part[what]) > 6)
            )
        total = max(1, sum(part["pixels"]) + part["ignored"])
        rows = zip(
            [*report["classes"], "(ignored)"],
            [*part["pixels"], part["ignored"]],
            [*part["weights"], 0.0],
        )
        for name, n, weight in rows:
            print(f"  {name:<20} {n:>14} pixels {100 * n / total:7.3f} %   weight {weight:.3f}")
    for line in [f"warning: {w}" for w in report["warnings"]] + [
        f"wrong: {p}" for p in report["problems"]
    ]:
        print(line)
    print(f"{len(report['problems'])} wrong files")


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit status 0: clean, 1: wrong files were found. InputError: unusable input."""
    parser = Parser(description="Read every file of a data set and report.")
    parser.add_argument("--data", choices=NAMES, default="synthetic")
    parser.add_argument("--root", help="the data set's folder")
    parser.add_argument("--split", choices=SPLITS, help="default: all that are there")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: expected 0 or more")
    report = check(args.data, args.root, args.split, workers=args.workers, progress=True)
    print(json.dumps(report)) if args.json else _print_report(report)
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    run_script(main)
