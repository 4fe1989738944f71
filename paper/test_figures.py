"""What the figures show, pixel by pixel if possible; every figure runs end to end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import classes
import data
import pictures
import synthetic
from paper import curves, figures, noise
from paper.test_noise import checkpoint
from runtime import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two checkpoints and a photograph of 90x61."""
    folder = tmp_path_factory.mktemp("figures")
    checkpoint(folder / "dnl.pt")
    checkpoint(folder / "nl.pt", context="nl")
    pixels = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def test_pixels_are_drawn_from_different_classes():
    ids = np.zeros((20, 30), np.uint8)
    ids[3:12, 4:20], ids[15, 15] = 5, 6  # class 6 covers less than 1 %
    for seed in range(10):
        drawn = figures.draw_pixels(ids, 2, np.random.default_rng(seed))
        assert sorted(int(ids[y, x]) for x, y in drawn) == [0, 5]


def test_boxes_lie_where_the_weight_is():
    """Against a search over all squares, by sums of slices."""
    rng = np.random.default_rng(4)
    weight = (rng.random((40, 52)) < 0.1) * 1.0
    weight[5:14, 30:42], weight[28:36, 3:9] = 1, 1
    boxes = figures.largest_boxes(weight)
    for left, top, side in boxes:
        best = max(weight[y : y + 10, x : x + 10].sum() for y in range(31) for x in range(43))
        assert side == 10 and weight[top : top + 10, left : left + 10].sum() == best
        weight[top : top + 10, left : left + 10] = -1e4
    assert len(boxes) == 2
    weight = np.zeros((40, 40))
    weight[5:17, 5:17] = 1  # the best second square would overlap the first
    (x, y, side), (x2, y2, _) = figures.largest_boxes(weight)
    assert max(abs(x - x2), abs(y - y2)) >= side
    assert figures.largest_boxes(np.zeros((40, 52))) == []
    assert figures.largest_boxes(np.ones((1, 1))) == [(0, 0, 1)]


def test_disagreement():
    a, b, truth = np.array([[1, 2, 3, 4]]), np.array([[1, 2, 0, 0]]), np.array([[1, 0, 3, 255]])
    assert figures.disagreement([a, b], truth).tolist() == [[False, False, True, False]]
    assert figures.disagreement([a], truth).tolist() == [[False, True, False, False]]
    assert figures.disagreement([a, b], None).tolist() == [[False, False, True, True]]


def test_region_colours_the_mask_only():
    mask = np.array([[True, False]])
    out = np.asarray(figures.region(np.full((1, 2, 3), 100, np.uint8), mask, (200, 0, 40)))
    assert out.tolist() == [[[165, 35, 61], [50, 50, 50]]]


@pytest.mark.parametrize(
    "low, high, about, expected",
    [
        (0, 36, 8, [0, 5, 10, 15, 20, 25, 30, 35]),
        (0.21, 0.52, 5, [0.3, 0.4, 0.5]),
        (0, 1, 1, [0, 1]),
        (0, 3, 3, [0, 1, 2, 3]),
        (0.99, 1.01, 5, [0.99, 0.995, 1, 1.005, 1.01]),
    ],
)
def test_ticks(low, high, about, expected):
    assert curves.ticks(low, high, about) == expected


def test_panel_places_points():
    """The lowest value is 5 % of the range above the axis, epoch x_end at its right end."""
    out = np.asarray(curves.panel("t", [[(0, 2.0), (10, 4.0)]], [(255, 0, 0)], 10, (620, 610)))
    y, x = np.nonzero((out == (255, 0, 0)).all(2))
    assert abs(x.min() - 85) <= 1 and abs(x.max() - 595) <= 1  # 90 and 590, dots of radius 5
    assert (
        abs(y.max() - 5 - (550 - 500 * 0.1 / 2.2)) <= 2
        and abs(y.min() + 5 - (550 - 500 * 2.1 / 2.2)) <= 2
    )


def run(*argv):
    assert figures.main([str(a) for a in argv]) == 0
    return Image.open(argv[argv.index("--out") + 1])


def test_boxed_draws_white_at_the_scaled_place():
    out = np.asarray(figures.boxed(Image.new("RGB", (50, 40), "gray"), [(10, 5, 20)], 100))
    y, x = np.nonzero((out == 255).all(2))
    assert out.shape == (80, 100, 3) and (x.min(), x.max(), y.min(), y.max()) == (20, 60, 10, 50)
    # the lower right corner of the box is the picture's
    edge = np.asarray(figures.boxed(Image.new("RGB", (50, 40), "gray"), [(30, 20, 20)], 50))
    assert (edge[-1, 35] == 255).all() and (edge[35, -1] == 255).all()
    assert (out[30, 30] == 128).all() and not (
        np.asarray(figures.boxed(Image.new("RGB", (50, 40)), [], 100)) == 255
    ).any()


def test_every_figure_runs(made, monkeypatch):
    monkeypatch.setitem(synthetic.SIZES, "val", 3)
    pixels = ("--pixel", "3,4", "80,60")
    out = made / "new" / "a.png"
    out = run("attention", made / "dnl.pt", made / "photo.png", *pixels, "--out", out)
    assert abs(out.width - 900) <= 5
    twice = [
        np.asarray(run("attention", made / "nl.pt", made / "photo.png", "--out", made / f"{i}.png"))
        for i in (1, 2)
    ]
    assert np.array_equal(*twice)
    flags = ("--names", "A", "B", "--images", "0", "2")
    compared = run("compare", made / "dnl.pt", made / "nl.pt", *flags, "--out", made / "c.png")
    assert compared.height == 22 + 2 * 180 + 22 + 6 + 22  # titles, rows, legend, gap, note
    _, label = synthetic.scene("val", 2)
    colors = np.array(classes.palette(8), np.uint8)
    truth = Image.fromarray(colors[label]).resize((217, 174), 0)
    cell = np.asarray(compared)[22 + 180 :, 6 + 3 * 223 :][:174, :217]  # second row, fourth column
    assert (cell == np.asarray(truth)).all(2).mean() > 0.8  # all but the boxes' lines
    out = run(
        "region", made / "dnl.pt", "--class", "ball", "--out", made / "r.png", "--width", "700"
    )
    assert abs(out.width - 700) <= 5


def test_the_comparison_says_what_boxes_and_black_are(made, monkeypatch):
    told = []

    def spy(rows, titles, classes, colors, width, note):
        told.append((classes[-1], colors[-1], note))
        return pictures.sheet(rows, titles, classes, colors, width, note)

    scene = synthetic.scene

    def ignoring(split, index):
        image, label = scene(split, index)
        label[:9] = 255
        return image, label

    monkeypatch.setattr(figures, "sheet", spy)
    both = ("compare", made / "dnl.pt", made / "nl.pt", "--images", "0", "--out", made / "c.png")
    run(*both)
    monkeypatch.setattr(synthetic, "scene", ignoring)
    run(*both[:2], *both[3:])
    run("region", made / "dnl.pt", "--class", "ball", *both[3:])
    last = (synthetic.CLASSES[-1], classes.palette(8)[-1])
    assert told == [
        (*last, "white boxes: where the predictions differ most"),
        ("(ignored)", (0, 0, 0), "white boxes: where the prediction differs from the truth most"),
        ("ball", classes.palette(8)[synthetic.CLASSES.index("ball")], ""),
    ]


def test_curves(tmp_path):
    for name, n in (("a", 5), ("b", 1)):
        (tmp_path / name).mkdir()
        lines = [{"settings": {}}]
        for e in range(n):
            miou = None if e % 2 else 0.1 * e
            lines.append({"epoch": e + 1, "loss": 2 / (e + 1), "miou": miou})
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = np.asarray(
        run("curves", tmp_path / "a", tmp_path / "b" / "log.jsonl", "--out", tmp_path / "c.png")
    )
    for color in classes.palette(2):
        distance = np.abs(out.astype(int) - color).sum(2)
        assert (distance < 12).sum() > 100  # the run's legend and its points


EDITED = (
    '{"epoch": 0, "loss": 1, "miou": null}',
    '{"epoch": "1", "loss": 1, "miou": null}',
    '{"epoch": 1, "loss": NaN, "miou": null}',
    '{"epoch": 1, "loss": 1, "miou": "0.5"}',
    '{"epoch": 1, "loss": 1}',
    '["epoch"]',
    "3",
)


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["attention", "dnl.pt", "photo.png", "--pixel", "90,0"],
            r"photo\.png: pixel 90,0 is outside of the image of 90x61 .* X 0\.\.89, Y 0\.\.60",
        ),
        (["attention", "dnl.pt", "photo.png", "--pixel", "7"], r"--pixel: got '7', expected X,Y"),
        (["attention", "dnl.pt", "no.jpg"], r"no\.jpg: cannot be read"),
        (["region", "dnl.pt", "--class", "cow"], r"--class cow: expected one of sky, ground"),
        (["compare", "dnl.pt", "--names", "a", "b"], r"got 2 names for 1 paths"),
        (["compare", "dnl.pt", "--images", "64"], r"--images 64: expected numbers in 0\.\.63"),
        (["curves", "."], r"log\.jsonl: not the log of a run \(no such file"),
        (["curves", "photo.png"], r"photo\.png: not the log of a run"),
        (["curves", "empty.jsonl"], r"empty\.jsonl: not the log of a run \(no epoch in it"),
        *(
            (["curves", f"edited{i}.jsonl"], rf"edited{i}\.jsonl: not the log of a run")
            for i in range(len(EDITED))
        ),
        (
            ["attention", "dnl.pt", "photo.png", "--pixel", "0,0", "--out", "a.nothing"],
            r"--out a\.nothing: expected the name of a \.png",
        ),
        (
            ["compare", "dnl.pt", "--images", "0", "--out", "photo.png/a.png"],
            r"photo\.png/a\.png: cannot be written",
        ),
        (["curves", "x", "--width", "20"], r"--width 20: expected 200 to 20000"),
    ],
)
def test_wrong_input_is_one_clear_line(made, monkeypatch, argv, message):
    monkeypatch.chdir(made)
    for name, line in (
        ("empty", '{"settings": {}}'),
        *((f"edited{i}", line) for i, line in enumerate(EDITED)),
    ):
        (made / f"{name}.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message) as error:
        figures.main(argv)
    assert "\n" not in str(error.value)


def test_the_gate_shows_the_mean_of_p_class_by_pair(made, tmp_path, monkeypatch):
    """The cells' colours against `measure`; a checkpoint without GR is refused."""
    monkeypatch.setitem(synthetic.SIZES, "val", 2)
    out = tmp_path / "gate.png"
    assert figures.main(["gate", str(made / "dnl.pt"), "--out", str(out)]) == 0
    net, _ = figures.load(str(made / "dnl.pt"), torch.device("cpu"), [])
    dataset = data.open_dataset("synthetic", None, "val")
    means = noise.measure(net, dataset, queries=64, seed=0, device=torch.device("cpu")).gate
    expected = pictures.heat(means.nan_to_num(0).numpy())
    expected[means.isnan()] = 255
    shown = np.asarray(Image.open(out))
    margin = (shown.shape[1] - 8 * 56) // 2
    top = next(
        y for y in range(shown.shape[0]) if (shown[y + 4, margin + 4] == expected[0, 0]).all()
    )
    cells = shown[top + 12 : top + 8 * 56 : 56, margin + 8 : margin + 8 * 56 : 56]
    assert np.array_equal(cells, expected)
    with pytest.raises(InputError, match=r"nl\.pt: trained without GR, so it has no P_class"):
        figures.main(["gate", str(made / "nl.pt"), "--out", str(out)])
