"""evaluate.py: windows, scales, flips; the command on some ranks, and the files it writes."""

import csv
import json
import re
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
import runtime
import train
from dnl import PAPER, build
from ranks import to_device


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
    table = tmp_path / "new" / "1.csv"
    flags = ["--json", "--workers", "0", "--images", str(table)]
    assert evaluate.main([str(run_folder / "last.pt"), *flags]) == 0
    results = [json.loads(capsys.readouterr().out.splitlines()[-1])]
    for n in (2, 3):
        status, texts = ranks(
            n,
            evaluate.main,
            run_folder / "last.pt",
            "--json",
            "--workers",
            1,
            "--images",
            tmp_path / f"{n}.csv",
            said=tmp_path / "said",
        )
        assert status == [0] * n, texts
        assert (tmp_path / f"{n}.csv").read_bytes() == table.read_bytes()
        results.append(json.loads(texts[0].splitlines()[-1]))
    assert results[0] == results[1] == results[2]
    assert (results[0]["miou"], results[0]["accuracy"]) == (last["miou"], last["accuracy"])
    labels = [np.asarray(Image.open(p)) for p in (street / "labels" / "val").iterdir()]
    assert np.sum(results[0]["confusion"]) == sum(int((x != 255).sum()) for x in labels)
    assert results[0]["images"] == 5 and len(table.read_text().splitlines()) == 6


def test_scores_and_files_are_those_of_counted_pixels(run_folder, street, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("a.csv", "b.PNG")}
    flags = ["--all", "--json", "--images", files["a.csv"], "--confusion", files["b.PNG"]]
    assert evaluate.main([str(run_folder / "last.pt"), "--workers", "0", *map(str, flags)]) == 0
    *lines, told = capsys.readouterr().out.splitlines()
    told = json.loads(told)
    net, _ = checkpoint.load_network(run_folder / "last.pt", CPU)
    names, total, rows = ("red", "green", "blue"), np.zeros((3, 3), int), []
    for path in (street / "images" / "val").iterdir():
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        guess = evaluate.predict(net, image).argmax(0).numpy()
        label = np.asarray(Image.open(street / "labels" / "val" / path.name))
        matrix = np.zeros((3, 3), int)
        for t, g in zip(label.ravel(), guess.ravel()):
            if t != 255:
                matrix[t, g] += 1
        total += matrix
        iou = {}
        for c in range(3):
            union = matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]
            iou[names[c]] = matrix[c, c] / union
        accuracy = matrix.trace() / matrix.sum()
        rows.append((sum(iou.values()) / 3, accuracy, min(iou.values()), iou, path))
    with open(files["a.csv"], newline="", encoding="utf-8") as f:
        head, *written = csv.reader(f)
    assert head == ["image", "mIoU", "accuracy", "worst class"]
    rows.sort(key=lambda row: row[0])
    for (miou, accuracy, least, iou, path), row in zip(rows, written, strict=True):
        assert row[0] == str(path) and iou[row[3]] == least
        assert [float(x) for x in row[1:3]] == pytest.approx([miou, accuracy], rel=1e-12)
    assert told["confusion"] == total.tolist()
    for c, name in enumerate(names):
        hit, true, guessed = total[c, c], total[c].sum(), total[:, c].sum()
        assert told["precision"][name] == (hit / guessed if guessed else None)
        assert told["recall"][name] == hit / true
        assert told["dice"][name] == 2 * hit / (true + guessed)
        assert f"{200 * hit / (true + guessed):.2f}" in lines[1 + c]
    with Image.open(files["b.PNG"]) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--images", "a.png"], r"a\.png: expected the name of a \.csv file"),
        (["--confusion", "a.csv"], r"a\.csv: expected the name of a \.png file"),
    ],
)
def test_names_of_files_are_checked_first(flags, told):
    with pytest.raises(runtime.InputError, match=told):
        evaluate.main(["absent.pt", *flags])


def test_files_that_cannot_be_written_leave_the_scores(run_folder, tmp_path, capsys):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(runtime.InputError, match=r"a\.csv: cannot be written .*write elsewhere"):
        evaluate.main([str(run_folder / "last.pt"), "--images", str(tmp_path / "a.csv")])
    assert "mIoU" in capsys.readouterr().out and [*tmp_path.iterdir()] == [tmp_path / "a.csv"]


def test_a_folder_offers_its_best_checkpoint(run_folder, tmp_path):
    best = run_folder / "best.pt"
    told = f"{run_folder} is a folder: did you mean {best}?"
    with pytest.raises(runtime.InputError, match=f"^{re.escape(told)}$"):
        evaluate.main([str(run_folder)])
    with pytest.raises(runtime.InputError, match="not a readable checkpoint"):
        evaluate.main([str(tmp_path)])


def test_split_without_ground_truth(run_folder, street, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(street, root)
    (root / "images" / "val").rename(root / "images" / "test")
    with pytest.raises(runtime.InputError, match="no ground truth"):
        evaluate.main([str(run_folder / "last.pt"), "--root", str(root), "--split", "test"])


def test_labels_of_one_class_are_a_warning(run_folder, street, tmp_path, capsys):
    """As 0/255 masks are, beside training labels that are right: their mIoU may be 100 %."""
    shutil.copytree(street, tmp_path / "s")
    flags = [str(run_folder / "best.pt"), "--root", str(tmp_path / "s")]
    assert evaluate.main(flags) == 0 and "warning" not in capsys.readouterr().err
    for path in (tmp_path / "s" / "labels" / "val").iterdir():
        with Image.open(path) as label:
            mask = np.where(np.asarray(label) == 1, 255, 0).astype(np.uint8)
        save(path, mask)
    assert evaluate.main(flags) == 0
    told = "the labels of 'val' hold fewer than two classes"
    assert told in capsys.readouterr().err


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
