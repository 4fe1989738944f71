"""evaluate.py: confusion, scores, the table, windows, scales, flips; the command on some ranks."""

import json
import shutil
import weakref
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ranks
from PIL import Image

import data
import evaluate
import pictures
import runtime


def test_confusion_and_scores():
    rng = np.random.default_rng(1)
    guess, label = rng.integers(0, 4, (30, 20)), rng.integers(0, 3, (30, 20))
    label[:5] = 255
    counts = np.zeros((4, 4), int)
    for g, t in zip(guess.ravel(), label.ravel()):
        if t != 255:
            counts[t, g] += 1
    m = evaluate.confusion(torch.from_numpy(guess), torch.from_numpy(label).byte(), 4)
    assert (m.numpy() == counts).all() and m.dtype == torch.int64
    r = evaluate.scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert (
        r["iou"] == [3 / 6, 4 / 7, None]
        and r["miou"] == (3 / 6 + 4 / 7) / 2
        and r["accuracy"] == 0.7
    )
    assert evaluate.scores(torch.zeros(2, 2)) == {
        "miou": None,
        "accuracy": None,
        "iou": [None, None],
    }
    assert evaluate.scores(torch.tensor([[1, 1], [0, 0]]))["iou"] == [
        0.5,
        0.0,
    ]  # predicted but never true counts


@pytest.mark.parametrize(
    "length, crop", [(5, 8), (8, 8), (9, 8), (100, 8), (1024, 768), (2048, 768), (7, 1), (64, 3)]
)
def test_windows_cover_and_overlap(length, crop):
    windows = evaluate.windows(length, crop)
    covered = {x for window in windows for x in range(length)[window]}
    assert covered == set(range(length))
    assert windows[0].start == 0 and windows[-1].stop == length
    assert all(window.stop - window.start == min(crop, length) for window in windows)
    starts = [window.start for window in windows]
    assert all(b - a <= max(1, crop * 2 // 3) for a, b in pairwise(starts))


class Linear(torch.nn.Module):
    """A known answer: logits are a linear map of a pixel, plus a constant of the window's size."""

    def forward(self, x):
        w = torch.tensor([[1.0, -0.5, 0.2], [0.1, 0.4, -1.0]], dtype=x.dtype)
        return torch.einsum("nc,bchw->bnhw", w, x) + x.mean((1, 2, 3))[
            :, None, None, None
        ] * torch.tensor([1.0, 0]).view(1, 2, 1, 1)


def test_the_table_tells_of_classes_that_are_nowhere():
    lines = evaluate.iou_table(
        {"iou": [0.5, None], "miou": 0.5, "accuracy": 0.75}, ("road", "car")
    ).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["road", "50.00"],
        ["car", "-"],
    ] and "not in the mean" in lines[-1]
    assert "not in the mean" not in evaluate.iou_table(
        {"iou": [0.5], "miou": 0.5, "accuracy": 0.75}, ("road",)
    )


@pytest.mark.parametrize("size", [10, 14, 24])
def test_titles_are_cut_to_their_picture(size):
    font = pictures.load_font(size)
    for text in ("", "short", "a very long name of a checkpoint in a folder, best.pt"):
        cut = pictures.shorten(text, font, 120)
        assert font.getlength(cut) <= 120
        assert cut == text or (cut.endswith("...") and text.startswith(cut[:-3]))
    row = [[Image.new("RGB", (50, 50))] * 2]
    long = pictures.sheet(row, ("x" * 300, "b"), ("c" * 300, "d"), ((1, 2, 3), (4, 5, 6)), 150)
    assert (
        long.size
        == pictures.sheet(row, ("x" * 200, "b"), ("c" * 200, "d"), ((1, 2, 3), (4, 5, 6)), 150).size
    )
    second = np.asarray(long)[:22, 6 + 150 :]  # the gap, and the second title
    assert (second[:, :6] == 255).all() and (second < 128).any()


def test_evaluation_keeps_no_image(monkeypatch):
    """Validation does not fill the memory: of 30 images and their outputs, two are alive."""
    made, net, dataset = (
        [],
        Linear(),
        data.DataSet(
            "folder", "val", ("a", "b"), ((0, 0, 0), (1, 1, 1)), (data.Item(Path(), Path()),)
        ),
    )

    def forward(x):
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.deterministic
        made.append(weakref.ref(out := x[:, :2] + 0))
        return out

    monkeypatch.setattr(net, "forward", forward)

    def images(*args):
        for index in range(30):
            assert sum(one() is not None for one in made) <= 4
            image, label = (
                torch.full((3, 8, 9), index, dtype=torch.uint8),
                torch.zeros(8, 9, dtype=torch.uint8),
            )
            made.append(weakref.ref(image))
            yield index, image, label

    monkeypatch.setattr(evaluate, "eval_images", images)
    matrix = evaluate.evaluate(net, dataset, device=torch.device("cpu"))
    assert matrix.sum() == 30 * 72 and len(made) == 60


def test_prediction_averages_scales_flips_and_windows():
    image = torch.randint(0, 256, (3, 21, 34), generator=torch.Generator().manual_seed(0)).byte()
    x, net = data.normalize(image[None]), Linear()
    assert torch.allclose(evaluate.predict(net, image), net(x).softmax(1)[0], atol=1e-6)
    both = (net(x).softmax(1) + net(x.flip(3)).softmax(1).flip(3)) / 2
    assert torch.allclose(evaluate.predict(net, image, flip=True), both[0], atol=1e-6)
    small = torch.nn.functional.interpolate(x, (10, 17), mode="bilinear", align_corners=True)
    up = torch.nn.functional.interpolate(
        net(small).softmax(1), (21, 34), mode="bilinear", align_corners=True
    )
    expected = (net(x).softmax(1) + up) / 2
    assert torch.allclose(evaluate.predict(net, image, scales=(1, 0.5)), expected[0], atol=1e-6)
    total, count = torch.zeros(1, 2, 21, 34), torch.zeros(21, 34)
    for rows, columns in product(evaluate.windows(21, 9), evaluate.windows(34, 9)):
        total[:, :, rows, columns] += net(x[:, :, rows, columns]).softmax(1)
        count[rows, columns] += 1
    assert torch.allclose(evaluate.predict(net, image, crop=9), (total / count)[0], atol=1e-6)
    assert torch.allclose(
        evaluate.predict(net, image, crop=99), net(x).softmax(1)[0], atol=1e-6
    )  # crop above the image


def test_evaluate_prints_the_figure_of_training_on_any_number_of_ranks(
    run_folder, street, tmp_path, capsys
):
    last = json.loads((run_folder / "log.jsonl").read_text().splitlines()[-1])
    assert evaluate.main([str(run_folder / "last.pt"), "--json", "--workers", "0"]) == 0
    results = [json.loads(capsys.readouterr().out.splitlines()[-1])]
    for n in (2, 3):
        status, texts = ranks(
            n,
            evaluate.main,
            run_folder / "last.pt",
            "--json",
            "--workers",
            1,
            said=tmp_path / "said",
        )
        assert status == [0] * n, texts
        results.append(json.loads(texts[0].splitlines()[-1]))
    assert results[0] == results[1] == results[2]
    assert (results[0]["miou"], results[0]["accuracy"]) == (last["miou"], last["accuracy"])
    labels = [np.asarray(Image.open(p)) for p in (street / "labels" / "val").iterdir()]
    assert np.sum(results[0]["confusion"]) == sum(int((x != 255).sum()) for x in labels)
    assert results[0]["images"] == 5


def test_split_without_ground_truth(run_folder, street, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(street, root)
    (root / "images" / "val").rename(root / "images" / "test")
    with pytest.raises(runtime.InputError, match="no ground truth"):
        evaluate.main([str(run_folder / "last.pt"), "--root", str(root), "--split", "test"])


def test_an_image_that_breaks_while_scoring_is_one_line_on_every_rank(run_folder, street, tmp_path):
    root = tmp_path / "street"
    shutil.copytree(street, root)
    (root / "images" / "val" / "3.png").write_bytes(b"not an image")
    status, texts = ranks(
        2,
        evaluate.main,
        run_folder / "last.pt",
        "--root",
        root,
        "--workers",
        0,
        said=tmp_path / "said",
    )
    assert (
        status == [2, 2]
        and all(text.count("\n") == 1 for text in texts)
        and "val/3.png" in texts[1]
    ), texts
