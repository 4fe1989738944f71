"""Read every file of a data set and report: pairs, sizes, pixels of each class, each wrong file.

python check.py --data synthetic|cityscapes|ade20k|folder [--root DIR] [--split S] [--json]
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from classes import IGNORE
from data import NAMES, SPLITS, DataSet, open_split, read
from decode import decode_label, header
from files import list_names, split_files
from runtime import InputError, Parser, counted, print_progress, run_script


def check(
    name: str,
    root: Path | str | None,
    split: str | None = None,
    *,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Read every file of the split; None: of train, val, and test if there is one.

    Returns plain values: data, classes, splits {split: {pairs, sizes {"HxW": n}, modes {"image
    label": n}, pixels (of each class), ignored, weights, left_out (files that are no image or
    label)}}, problems (a line for each wrong file), warnings. weights: see class_weights. Raises
    InputError if there is nothing to check.
    """
    splits = [split] if split else ["train", "val", "test"]
    if not split and name != "synthetic":
        images = split_files(name, Path(root or ""), "test")[0]
        if not images.is_dir():
            splits.remove("test")
    opened = [open_split(name, root, s) for s in splits]  # before the long part
    problems = []
    report: dict[str, Any] = {"data": name, "classes": list(opened[0][0].classes), "splits": {}}
    warnings = []
    for dataset, wrong in opened:
        part = _check_split(dataset, workers, progress, wrong)
        report["splits"][dataset.split] = part
        problems += wrong
        warnings += [f"{dataset.split}: {text}" for text in _warnings(dataset, part)]
    return report | {"problems": problems, "warnings": warnings}


def _check_split(
    dataset: DataSet, workers: int, progress: bool, problems: list[str]
) -> dict[str, Any]:
    """The report of one split. Adds its wrong files to the problems, which hold its lone ones."""
    parts = [replace(dataset, items=dataset.items[i : i + 16]) for i in range(0, len(dataset), 16)]
    pixels = np.zeros(256, np.int64)
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    done = 0
    with ExitStack() as stack:
        run: Callable[..., Iterable[Any]] = map
        if workers:
            run = stack.enter_context(ProcessPoolExecutor(workers)).map
        for part, tally in zip(parts, run(_check_part, parts)):
            pixels += tally[0]
            sizes += tally[1]
            modes += tally[2]
            problems += tally[3]
            done += len(part)
            if progress:
                line = f"check {dataset.split}: {done}/{len(dataset)}, {len(problems)} wrong"
                print_progress(line, last=done == len(dataset))
    known = pixels[: len(dataset.classes)]
    return {
        "pairs": sizes.total(),
        "sizes": dict(sizes.most_common()),
        "modes": dict(modes.most_common()),
        "pixels": known.tolist(),
        "ignored": int(pixels[IGNORE]),
        "weights": class_weights(known).tolist(),
        "left_out": list(map(str, dataset.left_out)),
    }


def _check_part(dataset: DataSet) -> tuple[np.ndarray, Counter[str], Counter[str], list[str]]:
    pixels = np.zeros(256, np.int64)
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    wrong = []
    for index, item in enumerate(dataset.items):
        try:
            image, label = read(dataset, index)
            modes[" ".join(_mode(dataset, path) for path in item.files)] += 1
        except (InputError, OSError) as e:  # OSError: the file vanished after it was read
            wrong.append(str(e))
            continue
        sizes[f"{image.shape[0]}x{image.shape[1]}"] += 1
        if label is not None:
            pixels += np.bincount(label.ravel(), minlength=256)
    return pixels, sizes, modes, wrong


def _mode(dataset: DataSet, path: Path) -> str:
    if dataset.name == "synthetic":
        return "memory"
    return header(path)[0]


def _warnings(dataset: DataSet, part: dict[str, Any]) -> list[str]:
    """What looks wrong in the labels of a split that can all be read."""
    pixels = part["pixels"]
    missing = [name for name, n in zip(dataset.classes, pixels) if not n]
    if len(missing) == len(pixels):
        return ["no pixel has a class, all are ignored"] if part["ignored"] else []
    lines = []
    if dataset.name == "folder" and part["ignored"] and pixels[0] == sum(pixels):
        lines.append(
            "the labels hold only 0 and 255 (ignored): if they are 0/255 masks, write class "
            "numbers 0 and 1"
        )
    if dataset.name == "cityscapes" and _are_train_ids(dataset):
        lines.append(
            "the labels hold only 0..18 and 255: these look like labelTrainIds; give the "
            "*_gtFine_labelIds.png of gtFine_trainvaltest.zip"
        )
    if missing:
        lines.append(f"classes without a pixel: {list_names(missing)}")
    return lines


def _are_train_ids(dataset: DataSet) -> bool:
    """Whether the first 100 labels of Cityscapes hold only 0..18 and 255, and both."""
    ignored = False
    for item in dataset.items[:100]:
        try:
            ids = decode_label(item.files[-1], "folder", len(dataset.classes), {})
        except InputError:
            return False
        ignored |= bool((ids == IGNORE).any())
    return ignored


def class_weights(pixels: np.ndarray) -> np.ndarray:
    """Pixels of each class (n,) to suggested weights of the loss (n,).

    Proportional to 1 / sqrt(share), and 1 in the mean over the pixels, so that the loss keeps its
    scale; 1 for classes without a pixel.
    """
    root = np.sqrt(pixels / max(1, pixels.sum()))
    inverse = 1 / (np.where(root > 0, root, 1) * max(root.sum(), 1e-12))
    return np.where(root > 0, inverse, 1.0)


def _print_report(report: dict[str, Any]) -> None:
    for split, part in report["splits"].items():
        print(f"{report['data']} {split}: {part['pairs']} readable")
        for what, title in ("sizes", "height x width"), ("modes", "image and label"):
            text = ", ".join(f"{k}: {n}" for k, n in list(part[what].items())[:6])
            if len(part[what]) > 6:
                text += f", {counted(len(part[what]) - 6, 'other')}"
            print(f"  {what} ({title})  {text}")
        if part["left_out"]:
            print(f"  left out (no image or label)  {list_names(part['left_out'])}")
        total = max(1, sum(part["pixels"]) + part["ignored"])
        names = [*report["classes"], "(ignored)"]
        pixels = [*part["pixels"], part["ignored"]]
        for name, n, weight in zip(names, pixels, [*part["weights"], 0.0]):
            print(f"  {name:<20} {n:>14} pixels {100 * n / total:7.3f} %   weight {weight:.3f}")
    for line in report["warnings"]:
        print(f"warning: {line}")
    for line in report["problems"]:
        print(f"wrong: {line}")
    print(counted(len(report["problems"]), "wrong file"))


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
    if args.json:
        print(json.dumps(report))
    else:
        _print_report(report)
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    run_script(main)
