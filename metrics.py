"""Metrics: the confusion matrix, the scores that follow from it, and tables of the scores.

Ranks and images add up their matrices or counts, which are integers, so the sums are exact.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classes import IGNORE

Scores = list[float | None]  # of each class, 0..1; None: there is nothing to count
TITLES = {
    "iou": "IoU %",
    "precision": "precision %",
    "recall": "recall %",
    "dice": "Dice %",
}
HEAD = ("image", "mIoU", "accuracy", "worst class")  # of image_table


def confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(n, n) int64 counts of pixels: row the true class, column the predicted one.

    prediction and label: (H, W). Pixels of label 255 are left out.
    """
    known = label != IGNORE
    pairs = label[known].long() * num_classes + prediction[known].long()
    counts = torch.bincount(pairs, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def class_counts(matrix: Tensor) -> Tensor:
    """(3, n) of a confusion matrix: each class's correct, true and predicted pixels."""
    correct = matrix.diagonal()
    true = matrix.sum(1)
    predicted = matrix.sum(0)
    return torch.stack([correct, true, predicted])


def class_scores(counts: Tensor) -> dict[str, Scores]:
    """{'iou', 'precision', 'recall', 'dice'} of `class_counts`.

    Precision is None for a class that is not predicted, recall for one that is not true, IoU and
    Dice for one that is neither.
    """
    correct, true, predicted = counts.cpu().numpy().astype(np.int64)
    both = true + predicted
    return {
        "iou": _ratios(correct, both - correct),
        "precision": _ratios(correct, predicted),
        "recall": _ratios(correct, true),
        "dice": _ratios(2 * correct, both),
    }


def mean_scores(counts: Tensor) -> dict[str, Any]:
    """{'miou', 'accuracy', 'iou'} in 0..1 of `class_counts`.

    A class that is neither true nor predicted anywhere has IoU None and is left out of the mean.
    Without any labelled pixel miou and accuracy are None.
    """
    iou = class_scores(counts)["iou"]
    correct, true, _ = counts.sum(1).tolist()
    return {"miou": _mean(iou), "accuracy": _ratio(correct, true), "iou": iou}


def scores(matrix: Tensor) -> dict[str, Any]:
    """`mean_scores` of a confusion matrix."""
    return mean_scores(class_counts(matrix))


def _ratio(part: float, whole: float) -> float | None:
    if not whole:
        return None
    return float(part) / float(whole)


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> Scores:
    return [_ratio(part, whole) for part, whole in zip(parts, wholes)]


def _mean(values: Scores) -> float | None:
    known = [x for x in values if x is not None]
    return _ratio(sum(known), len(known))


# ---- tables


def iou_table(
    result: dict[str, Any], classes: Sequence[str], columns: Sequence[str] = ("iou",)
) -> str:
    """The scores for people, in percent: a line a class, then means and pixel accuracy.

    columns: names of `class_scores`, which the result holds.
    """
    width = max(len(name) for name in (*classes, "pixel accuracy"))
    across, mean = 8, "mIoU"
    if len(columns) > 1:
        across, mean = 13, "mean"

    def line(name: str, values: Scores) -> str:
        text = name.ljust(width)
        for value in values:
            cell = "-" if value is None else f"{100 * value:.2f}"
            text += cell.rjust(across)
        return text

    head = "class".ljust(width)
    for column in columns:
        head += TITLES[column].rjust(across)
    lines = [head]
    for i, name in enumerate(classes):
        values = [result[column][i] for column in columns]
        lines.append(line(name, values))
    means = [_mean(result[column]) for column in columns]
    lines.append(line(mean, means))
    accuracy = result["accuracy"]
    lines.append(line("pixel accuracy", [accuracy]))
    if None in result["iou"]:
        lines.append("- neither in the labels nor predicted: not in the mean")
    elif any(None in result[column] for column in columns):
        lines.append("- not predicted (precision) or not in the labels (recall): not in the mean")
    return "\n".join(lines)


def image_table(files: Sequence[Path], classes: Sequence[str], counts: Tensor) -> str:
    """CSV of HEAD: a row for each image, scores in 0..1, the lowest mIoU first.

    counts: `class_counts` of each image (images, 3, n). The mean is over the classes that are true
    or predicted in the image. An image without a labelled pixel comes last, with empty cells.
    """
    rows = []
    for file, one in zip(files, counts):
        result = mean_scores(one)
        worst = worst_class(one, result["iou"], classes)
        rows.append([file, result["miou"], result["accuracy"], worst])
    rows.sort(key=lambda row: (row[1] is None, row[1]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    writer.writerows(rows)
    return text.getvalue()


def worst_class(counts: Tensor, iou: Scores, classes: Sequence[str]) -> str:
    """The class of the lowest IoU; among equal ones the class with the most wrong pixels."""
    correct, true, predicted = counts.tolist()
    found = []
    for i, value in enumerate(iou):
        if value is not None:
            wrong = true[i] + predicted[i] - 2 * correct[i]
            found.append((value, -wrong, classes[i]))
    return min(found, default=(0, 0, ""))[2]
