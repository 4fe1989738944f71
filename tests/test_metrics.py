"""metrics.py: each figure equals one counted pixel by pixel; the tables."""

import csv
import io
from pathlib import Path

import numpy as np
import torch

import metrics


def count(guesses, labels, n):
    """(true positives, false positives, false negatives) of each class, by a loop over pixels."""
    tp, fp, fn = ([0] * n for _ in range(3))
    for guess, label in zip(guesses, labels):
        for g, t in zip(guess.ravel().tolist(), label.ravel().tolist()):
            if t == 255:
                continue
            tp[t] += g == t
            fp[g] += g != t
            fn[t] += g != t
    return list(zip(tp, fp, fn))


def divide(a, b):
    return a / b if b else None


def drawn(n=6, seed=0):
    """Predictions and labels of images; class 4 is never true, class 5 never predicted."""
    rng = np.random.default_rng(seed)
    guesses, labels = [], []
    for size in ((30, 20), (9, 40), (7, 7), (5, 6), (4, 4)):
        label = rng.choice([0, 1, 2, 3, 5, 255], size)
        guess = np.where(rng.random(size) < 0.5, label, rng.integers(0, 4, size))
        guesses.append(np.where(guess > 4, 4, guess))
        labels.append(label)
    labels[2][:] = guesses[2][:] = 0
    labels[2][0, :4] = 1, 2, 3, 5  # the highest accuracy but the lowest mIoU
    labels[3][:] = 255  # nothing to score
    labels[4][:] = guesses[4][:] = 2  # all correct
    return guesses, labels


def matrices(guesses, labels, n=7):
    pairs = zip(map(torch.from_numpy, guesses), map(torch.from_numpy, labels))
    return [metrics.confusion(g.byte(), t.byte(), n) for g, t in pairs]


def test_confusion_and_scores():
    rng = np.random.default_rng(1)
    guess, label = rng.integers(0, 4, (30, 20)), rng.integers(0, 3, (30, 20))
    label[:5] = 255
    counts = np.zeros((4, 4), int)
    for g, t in zip(guess.ravel(), label.ravel()):
        if t != 255:
            counts[t, g] += 1
    m = metrics.confusion(torch.from_numpy(guess), torch.from_numpy(label).byte(), 4)
    assert (m.numpy() == counts).all() and m.dtype == torch.int64
    r = metrics.scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert r == {"iou": [3 / 6, 4 / 7, None], "miou": (3 / 6 + 4 / 7) / 2, "accuracy": 0.7}
    nothing = {"miou": None, "accuracy": None, "iou": [None, None]}
    assert metrics.scores(torch.zeros(2, 2)) == nothing
    assert metrics.scores(torch.tensor([[1, 1], [0, 0]]))["iou"] == [0.5, 0.0]  # predicted counts


def test_precision_recall_and_dice_are_those_of_counted_pixels():
    guesses, labels = drawn()
    matrix = sum(matrices(guesses, labels))
    got = metrics.class_scores(metrics.class_counts(matrix))
    counted = count(guesses, labels, 7)
    assert got == {
        "iou": [divide(tp, tp + fp + fn) for tp, fp, fn in counted],
        "precision": [divide(tp, tp + fp) for tp, fp, fn in counted],
        "recall": [divide(tp, tp + fn) for tp, fp, fn in counted],
        "dice": [divide(2 * tp, 2 * tp + fp + fn) for tp, fp, fn in counted],
    }
    assert got["recall"][4] is None and got["precision"][4] == 0  # predicted, never true
    assert got["precision"][5] is None and got["recall"][5] == 0
    assert {got[name][6] for name in got} == {None}


def test_the_table_of_images_is_that_of_counted_pixels_worst_first():
    guesses, labels = drawn()
    counts = torch.stack([metrics.class_counts(m) for m in matrices(guesses, labels)])
    names = ["a.png", 'b, "c".png', "new\nline.png", "nothing.png", "right.png"]
    classes = list("klmnopq")
    text = metrics.image_table(list(map(Path, names)), classes, counts)
    head, *rows = csv.reader(io.StringIO(text))
    assert head == ["image", "mIoU", "accuracy", "worst class"]
    expected = []
    for name, guess, label in zip(names, guesses, labels):
        scored = []
        for c, (tp, fp, fn) in enumerate(count([guess], [label], 7)):
            if tp + fp + fn:
                scored.append((tp / (tp + fp + fn), -fp - fn, classes[c]))
        if not scored:
            last = [name, "", "", ""]
            continue
        known = label != 255
        miou = sum(iou for iou, *_ in scored) / len(scored)
        accuracy = (guess == label)[known].sum() / known.sum()
        expected.append([name, repr(miou), repr(float(accuracy)), min(scored)[2]])
    expected.sort(key=lambda row: float(row[1]))
    assert rows == [*expected, last]
    assert rows[-2] == ["right.png", "1.0", "1.0", "m"] and len({row[3] for row in rows}) > 2


def test_of_classes_of_equal_iou_the_worst_has_most_wrong_pixels():
    counts = metrics.class_counts(torch.tensor([[9, 0, 0], [40, 0, 0], [1, 0, 0]]))
    assert metrics.worst_class(counts, [9 / 50, 0.0, 0.0], ("a", "b", "c")) == "b"


def test_the_table_of_classes():
    r = {"iou": [0.5, None], "miou": 0.5, "accuracy": 0.75}
    lines = metrics.iou_table(r, ("road", "car")).splitlines()
    assert lines == [
        "class            IoU %",
        "road             50.00",
        "car                  -",
        "mIoU             50.00",
        "pixel accuracy   75.00",
        "- neither in the labels nor predicted: not in the mean",
    ]
    assert "-" not in metrics.iou_table(r | {"iou": [0.5]}, ("road",))
    matrix = torch.tensor([[6, 2], [0, 0]])
    r = metrics.scores(matrix) | metrics.class_scores(metrics.class_counts(matrix))
    lines = metrics.iou_table(r, ("road", "car"), list(metrics.TITLES)).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["class", *["IoU", "%", "precision", "%", "recall", "%", "Dice", "%"]]
    assert cells[1:4] == [
        ["road", "75.00", "100.00", "75.00", "85.71"],
        ["car", "0.00", "0.00", "-", "0.00"],
        ["mean", "37.50", "50.00", "75.00", "42.86"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1 and "not in the mean" in lines[-1]
