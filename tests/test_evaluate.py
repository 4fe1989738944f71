"""evaluate.py: confusion, scores, the table, windows, scales, flips; the command on some ranks."""

import json
import shutil
import weakref
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, TINY, Stub, noise, ranks, save
from PIL import Image

import checkpoint
import data
import evaluate
import pictures
import runtime
import train
from dnl import PAPER, build
from ranks import to_device


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


# ---- data sets of relative scale


class Recorder(torch.nn.Module):
    """Two classes by brightness; remembers the size and the type of what it is fed."""

    def __init__(self):
        super().__init__()
        self.fed = []

    def forward(self, x):
        one = torch.nn.functional.conv2d(x, torch.ones(1, 3, 1, 1))
        self.fed.append((*x.shape[2:], one.dtype))
        return torch.cat([one, -one], 1).float()


SIZES = {"0": (256, 341), "1": (480, 640), "2": (1500, 2000)}


@pytest.fixture
def scenes(tmp_path):
    """A tree of ADE20K's names; the validation images have its small, usual and large sizes."""
    root = tmp_path / "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        for number, (h, w) in SIZES.items():
            h, w = (90, 120) if short == "train" else (h, w)
            name = f"ADE_{short}_{number:>08}"
            label = np.add.outer(np.arange(h) * 9 // h, np.arange(w) * 9 // w) % 4
            picture = label.astype(np.uint8)[..., None] * np.uint8([60, 20, 40])
            save(root / "images" / split / f"{name}.jpg", picture, quality=95)
            save(root / "annotations" / split / f"{name}.png", label.astype(np.uint8))
    return root


def test_training_and_evaluate_feed_ade20k_at_the_crop(scenes, tmp_path, capsys, monkeypatch, stub):
    fed = []
    forward = Stub.forward

    def recorded(self, image):
        fed.append(tuple(image.shape[2:]))
        return forward(self, image)

    monkeypatch.setattr(Stub, "forward", recorded)
    run = tmp_path / "run"
    flags = ["--data", "ade20k", "--root", scenes, "--out", run, "--crop", "64", "--batch", "3"]
    assert train.main([*TINY, *map(str, flags)]) == 0
    assert {*fed} == {(64, 64), (64, 85)}  # crops; validation and val.png
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])

    def scored(*flags):
        fed.clear()
        assert evaluate.main([str(run / "last.pt"), "--json", "--workers", "0", *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    same = scored()
    assert fed == [(64, 85)] * 3 and same["base"] == 64
    assert (same["miou"], same["accuracy"]) == (last["miou"], last["accuracy"])
    assert scored("--base", "128")["base"] == 128 and fed == [(128, 170), (128, 171), (128, 171)]
    scored("--scales", "0.5", "1.5", "--crop", "32")
    assert {*fed} == {(32, 32)}


@pytest.mark.parametrize("size", SIZES.values())
def test_a_scale_of_one_is_the_base_and_ids_have_the_images_size(size):
    net, image = Recorder(), torch.full((3, *size), 200, dtype=torch.uint8)
    image[:, :, : size[1] // 2] = 20
    ids, confidence = evaluate.predict_ids(net, image, "", device=CPU, base=608)
    ((h, w, _),) = net.fed
    assert h == 608 and w == round(608 * size[1] / size[0])
    assert ids.shape == confidence.shape == size
    expected = np.broadcast_to(np.arange(size[1]) < size[1] // 2, size)
    assert (ids != expected).mean() < 0.005  # within a pixel or two of the edge
    evaluate.predict_ids(net, image, "", device=CPU, base=0)
    assert net.fed[1][:2] == size


@pytest.mark.parametrize("size", [(20, 2000), (2000, 20), (1, 30000), (3, 3), (1, 1)])
def test_the_long_side_is_bounded(size):
    net, image = Recorder(), torch.zeros(3, *size, dtype=torch.uint8)
    ids, _ = evaluate.predict_ids(net, image, "", device=CPU, base=64, scales=[1.0, 2.0])
    assert [max(f[:2]) for f in net.fed] == [256, 512] if max(size) > 3 else [64, 128]
    assert ids.shape == size


def test_views_of_a_base_are_resized_as_training_does():
    """From the image itself, anti-aliased: a scale of 2 is not enlarged from the base."""
    image = torch.from_numpy(noise(90, 130)).permute(2, 0, 1)
    for size in ((30, 43), (90, 130), (200, 300), (1, 1)):
        ours = data.resize_smooth(image[None].float(), size)[0]
        photo = Image.fromarray(noise(90, 130)).resize(size[::-1], Image.Resampling.BILINEAR)
        assert (
            ours - torch.tensor(np.asarray(photo)).permute(2, 0, 1)
        ).abs().max() < 1.1  # Pillow rounds twice
    assert torch.equal(data.resize_smooth(image[None].float(), (90, 130))[0], image.float())
    fed = []
    evaluate.predict(lambda x: fed.append(x) or x, image, factor=1 / 3, scales=[1.0, 2.0])
    full = data.normalize(data.resize_smooth(image[None].float(), (60, 86)))
    assert torch.equal(fed[1], full)


def test_the_top_class_is_that_of_whole_probabilities_and_holds_one_class(monkeypatch):
    p = torch.randn(150, 31, 43, generator=torch.Generator().manual_seed(0)).softmax(0)
    for size in ((31, 43), (200, 311), (12, 17)):
        whole = data.resize_smooth(p[None], size)[0]
        largest = []

        def spy(x, size, largest=largest):
            largest.append(len(x[0]))
            return data.resize_smooth(x, size)

        monkeypatch.setattr(evaluate, "resize_smooth", spy)
        ids, top = evaluate.top_class(p, size)
        assert torch.equal(ids, whole.argmax(0).byte()) and torch.equal(top, whole.amax(0))
        assert max(largest, default=1) == 1
    p[:, 3, 4] = torch.nan
    assert evaluate.top_class(p, (99, 99))[1].isnan().any()


def test_tiles_of_a_scaled_image_give_what_the_whole_gives():
    image = data.resize_smooth(
        torch.from_numpy(noise(10, 12))[None].permute(0, 3, 1, 2).float(), (150, 190)
    )[0].byte()
    whole, tiled = Recorder(), Recorder()
    for base in (60, 300):
        ids, confidence = evaluate.predict_ids(whole, image, "", device=CPU, base=base)
        again, near = evaluate.predict_ids(tiled, image, "", device=CPU, base=base, side=56)
        assert len(np.unique(ids)) == 2 and (ids != again).mean() < 0.005
        assert np.abs(confidence.astype(int) - near).mean() < 2
    assert len(tiled.fed) > 10 and max(h * w for h, w, _ in tiled.fed) <= 56 * 56


def test_base_of_checkpoints():
    settings = {"data": "ade20k", "crop": 608}
    assert checkpoint.base_of({"settings": settings}) == 608
    assert checkpoint.base_of({"settings": settings}, 0) == 0
    assert checkpoint.base_of({"settings": settings | {"data": "cityscapes"}}) == 0
    assert checkpoint.base_of({}) == 0  # a file without a training's fields
    old = torch.load(Path(__file__).parent / "version1.pt", weights_only=True)
    assert checkpoint.base_of(old) == 0


# ---- narrow images


def fill_freed_memory():
    """Leave nan in the memory that the next tensors get."""
    blocks = [torch.full((2**k + 7,), torch.nan) for k in range(4, 18) for _ in range(3)]
    del blocks


def test_narrow_views_on_a_cpu_are_fp32():
    """torch's bf16 convolutions of stride 2 read memory that nobody wrote, at sides of 1 and 2."""
    net = Recorder()
    for size in ((30, 16), (16, 30), (1, 1), (17, 30), (30, 17)):
        evaluate.predict(net, torch.zeros(3, *size, dtype=torch.uint8), amp=torch.bfloat16)
    assert [dtype for *_, dtype in net.fed] == [torch.float32] * 3 + [torch.bfloat16] * 2
    net = build(replace(PAPER, num_classes=5, backbone="resnet18", channels=32)).eval()
    torch.nn.init.normal_(net.head[-1].weight, std=3.0)
    to_device(net, CPU)
    for side in range(1, 13):
        for size in ((40, side), (side, 40)):
            image = torch.from_numpy(noise(*size, side)).permute(2, 0, 1)
            expected = evaluate.predict(net, image)
            fill_freed_memory()
            assert torch.equal(evaluate.predict(net, image, amp=torch.bfloat16), expected), size
