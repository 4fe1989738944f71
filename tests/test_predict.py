"""predict.py: tiles, the files it writes, what the test servers expect."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, Stub, blocks, files, make_checkpoint, predicted, ranks, save
from PIL import Image
from torch import nn

import evaluate
import predict
from checkpoint import load_network
from classes import ADE20K, CITYSCAPES
from runtime import InputError

# ---- tiles


def test_tiles_keep_each_pixel_once_with_margin():
    for side in (8, 13, 64):
        for length in [*range(1, 90), 200, 331]:
            kept = []
            for seen, keep, inner in evaluate.tile_axis(length, side):
                assert 0 <= seen.start <= keep.start < keep.stop <= seen.stop <= length
                assert seen.stop - seen.start <= side
                assert seen.start == 0 or keep.start - seen.start >= side // 8
                assert seen.stop == length or seen.stop - keep.stop >= side // 8
                assert range(length)[seen][inner] == range(length)[keep]
                kept += range(keep.start, keep.stop)
            assert kept == list(range(length))


class Blur(nn.Module):
    """Logits: the image averaged over 5x5 pixels, zero outside. Remembers the largest input."""

    largest = 0

    def forward(self, x):
        self.largest = max(self.largest, x.shape[2] * x.shape[3])
        return F.avg_pool2d(x, 5, 1, 2)


@pytest.mark.parametrize("size", [(150, 90), (33, 400), (1, 700)])
def test_tiles_give_what_the_whole_image_gives(size):
    image = torch.randint(
        0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    net = Blur()
    # The margin is 3, and the blur reaches 2.
    ids, confidence = evaluate.predict_ids(net, image, "", device=CPU, side=24)
    assert net.largest <= 24 * 24
    x = image.double().numpy() - np.array([123.675, 116.28, 103.53])[:, None, None]
    x = np.pad(x / np.array([58.395, 57.12, 57.375])[:, None, None], ((0, 0), (2, 2), (2, 2)))
    mean = sum(x[:, i : i + size[0], j : j + size[1]] for i in range(5) for j in range(5)) / 25
    p = np.exp(mean) / np.exp(mean).sum(0)
    assert ids.dtype == confidence.dtype == np.uint8 and np.array_equal(ids, mean.argmax(0))
    assert np.abs(confidence - 255 * p.max(0)).max() < 0.51


@pytest.mark.parametrize("options", [{}, {"flip": True, "scales": [0.5, 1.0]}, {"crop": 32}])
def test_up_to_the_bound_it_is_evaluates_argmax(checkpoint, options):
    net, _ = load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(48, 70)).permute(2, 0, 1)
    ids, _ = evaluate.predict_ids(net, image, "", device=CPU, **options)
    assert np.array_equal(ids, evaluate.predict(net, image, **options).argmax(0).numpy())
    assert len(np.unique(ids)) > 1


def test_tile_side_bounds_memory_but_grants_crop():
    assert evaluate.tile_side(19, None) == 2048 and evaluate.tile_side(19, 768) == 2048
    assert (
        evaluate.tile_side(150, None) ** 2 * 150 * 4
        <= 2**30
        < (evaluate.tile_side(150, None) + 2) ** 2 * 150 * 4
    )
    assert evaluate.tile_side(150, 3000) == 3000


# ---- files


def test_mask_overlay_confidence(checkpoint, photo, tmp_path):
    assert predicted(checkpoint, photo, "--out", tmp_path / "o", "--confidence") == 0
    assert files(tmp_path / "o") == ["photo.png", "photo_confidence.png", "photo_overlay.png"]
    net, saved = load_network(checkpoint, CPU)
    p = evaluate.predict(net, torch.from_numpy(blocks(40, 56)).permute(2, 0, 1))
    mask, grey = (Image.open(tmp_path / "o" / f"photo{e}.png") for e in ("", "_confidence"))
    assert mask.mode == "P" and np.array_equal(mask, p.argmax(0)) and len(np.unique(mask)) > 1
    assert np.array(mask.getpalette()[:15]).reshape(5, 3).tolist() == saved["colors"]
    assert grey.mode == "L" and np.abs(np.array(grey) - 255 * p.amax(0).numpy()).max() < 0.51
    over = np.asarray(Image.open(tmp_path / "o" / "photo_overlay.png")).astype(int)
    over = over[22 : 22 + 40, 6 : 6 + 56]
    colors = np.array(saved["colors"])[np.array(mask)]
    full, layer = (np.abs(over - x).max(2) for x in (colors, 0.65 * blocks(40, 56) + 0.35 * colors))
    ids, border = np.array(mask), np.zeros((40, 56), bool)
    for y, x in np.ndindex(40, 56):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            border[y, x] |= 0 <= v < 40 and 0 <= u < 56 and ids[v, u] != ids[y, x]
    assert full[border].max() == 0 and layer[~border].max() <= 1 and 0 < border.mean() < 0.5


def test_exif_is_honoured(checkpoint, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(
        photo.with_name("turned.png"), exif=exif
    )
    assert predicted(checkpoint, photo.parent, "--out", tmp_path / "o") == 0
    upright, turned = (
        np.asarray(Image.open(tmp_path / "o" / f"{n}.png")) for n in ("photo", "turned")
    )
    assert upright.shape == (40, 56) and np.array_equal(upright, turned)


def test_mixed_folder_names_the_bad_files_and_goes_on(checkpoint, photo, tmp_path, capsys):
    folder = photo.parent
    Image.fromarray(blocks(80, 96)).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left alone")
    (folder / ".hidden.png").write_text("left alone")
    names = ["sp ace", "ünïcode", "new\nline", "a.b", "deep/er/x"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks(8, 8)).save(folder / f"{name}.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("L", (1, 3000)).save(folder / "thin.png")
    assert predicted(checkpoint, folder, "--out", tmp_path / "o") == 1
    good = [*names, "one", "thin", "photo", "whole"]
    assert files(tmp_path / "o") == sorted(n + e for n in good for e in (".png", "_overlay.png"))
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert sum("cannot be read" in line for line in lines) == 2
    assert all(f"{name}.jpg: cannot be read" in error for name in ("text", "truncated"))
    assert "notes.txt" in lines[0] and "2 failed" in lines[-1] and "hidden" not in error
    for name, size in (("one", (1, 1)), ("thin", (1, 3000)), ("whole", (96, 80))):
        assert Image.open(tmp_path / "o" / f"{name}.png").size == size


def test_again_with_results_inside_the_folder(checkpoint, photo):
    for _ in range(2):
        assert predicted(checkpoint, photo.parent, "--out", photo.parent / "results") == 0
    assert files(photo.parent / "results") == ["photo.png", "photo_overlay.png"]


@pytest.mark.parametrize(
    "other, flags, told",
    [
        ("photo.jpg", [], "both write"),
        ("photo_overlay.jpg", [], "both write"),
        ("x.jpg", ["--out", "in"], "--out in: is the folder of the images"),
        ("x.png", ["--out", "link"], "leave"),
    ],
)
def test_refused_before_any_work(photo, tmp_path, monkeypatch, other, flags, told):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(photo.with_name(other))
    if "link" in flags:
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "x.png").symlink_to(tmp_path / "elsewhere.png")
    before = files(tmp_path)
    with pytest.raises(InputError, match=told) as e:
        predicted("absent.pt", "in", *flags)
    assert "\n" not in str(e.value) and files(tmp_path) == before


def test_no_image_is_overwritten(photo):
    with pytest.raises(InputError, match="would overwrite an image"):
        predicted("absent.pt", photo, "--out", photo.parent)


def test_confidence_stays_data_and_its_scale_is_in_the_overlay(checkpoint, photo, tmp_path):
    for flags in ([], ["--confidence"]):
        assert predicted(checkpoint, photo, "--out", tmp_path / str(len(flags)), *flags) == 0
    plain, scaled = (np.asarray(Image.open(tmp_path / n / "photo_overlay.png")) for n in "01")
    grey = np.asarray(Image.open(tmp_path / "1" / "photo_confidence.png"))
    assert grey.shape == (40, 56)
    assert np.array_equal(plain[:62], scaled[:62]) and len(scaled) == len(plain) + 40 + 22 + 6
    assert (scaled[68:108, 6:62] == grey[..., None]).all()
    bar = scaled[118, 6:326].min(1).astype(int)  # the line with the bar, and letters at its left
    steps = max(np.split(bar, np.flatnonzero(np.diff(bar) < 0) + 1), key=len)  # longest ascent
    assert len(steps) > 90 and steps[0] < 10 and steps[-1] > 245


def test_the_line_of_an_image_says_what_was_written(checkpoint, photo, tmp_path, capsys):
    Image.fromarray(blocks(80, 96)).save(photo.with_name("large.png"))
    flags = ("--attention", "60,70", "--confidence")
    assert predicted(checkpoint, photo.parent, "--out", tmp_path / "o", *flags) == 1
    line, total = capsys.readouterr().err.splitlines()
    assert "photo.png: pixel 60,70 is outside" in line
    assert line.endswith("(3 of its 4 files were written)")
    assert total.startswith("1 image to ") and total.endswith("1 failed, named above")
    assert len(files(tmp_path / "o")) == 3 + 4


def test_nothing_to_do_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for given, told in ((tmp_path, "no image"), (tmp_path / "absent", "no such file")):
        with pytest.raises(InputError, match=told):
            predicted("absent.pt", given)


@pytest.mark.parametrize(
    "flags",
    [
        ["--attention", "1;2"],
        ["--format", "ade20k", "--confidence"],
        ["--scales", "0"],
        ["--scales", "1e9"],
    ],
)
def test_wrong_flags(photo, flags):
    with pytest.raises(InputError):
        predicted("absent.pt", photo, *flags)


def test_an_output_that_is_not_finite_is_no_result(run_folder, street, photo, tmp_path, capsys):
    """Finite weights that overflow: neither a score nor a mask of class 0 comes of them."""
    state = torch.load(run_folder / "best.pt", weights_only=True)
    for name in ("head.0.weight", "head.4.weight"):
        state["model"][name] *= 1e30
    torch.save(state, tmp_path / "huge.pt")
    with pytest.raises(
        InputError, match=r"images/val/0\.png: the network's output is not finite: try --amp off"
    ):
        evaluate.main([str(tmp_path / "huge.pt")])
    assert predicted(tmp_path / "huge.pt", photo, "--out", tmp_path / "o") == 1
    assert (
        "photo.png: the network's output is not finite" in capsys.readouterr().err
        and not (tmp_path / "o").exists()
    )


def test_out_that_is_a_file(photo):
    with pytest.raises(InputError, match="is a file: name a folder"):
        predicted("absent.pt", photo, "--out", __file__)


def test_result_that_cannot_be_written_is_named(checkpoint, photo, tmp_path, capsys):
    (tmp_path / "o" / "photo.png").mkdir(parents=True)
    assert predicted(checkpoint, photo, "--out", tmp_path / "o") == 1
    assert "photo.png: cannot be written" in capsys.readouterr().err


def test_image_without_result_leaves_the_others(checkpoint, photo, tmp_path, capsys, monkeypatch):
    errors = {
        41: lambda: torch.empty(2**60, dtype=torch.uint8),
        42: lambda: np.empty(2**60, np.uint8),
        43: lambda: Image.new("L", (9, 9)).resize((0, 9)),
        44: lambda: torch.ones(2) @ torch.ones(3),
    }
    whole = evaluate.predict_ids

    def failing(net, image, source, **options):
        errors.get(image.shape[2], tuple)()
        return whole(net, image, source, **options)

    monkeypatch.setattr(predict, "predict_ids", failing)
    for width in (41, 42, 43):
        Image.fromarray(blocks(40, width)).save(photo.with_name(f"{width}.png"))
    assert predicted(checkpoint, photo.parent, "--out", tmp_path / "o") == 1
    assert files(tmp_path / "o") == ["photo.png", "photo_overlay.png"]
    told = capsys.readouterr().err.splitlines()
    assert all(f"{n}.png: out of memory: " in line for n, line in zip((41, 42), told))
    assert all("--crop 768" in line for line in told[:2])
    assert "43.png: no result (ValueError" in told[2] and "3 failed" in told[3]
    Image.fromarray(blocks(40, 44)).save(photo.with_name("44.png"))
    with pytest.raises(RuntimeError, match="size"):  # not of the image: all of them would fail
        predicted(checkpoint, photo.parent, "--out", tmp_path / "p")


def test_two_ranks_give_the_files_of_one(checkpoint, photo, tmp_path):
    for i in range(3):
        Image.fromarray(blocks(40, 40 + i, i)).save(photo.with_name(f"{i}.png"))
    photo.with_name("bad.png").write_text("")
    assert predicted(checkpoint, photo.parent, "--out", tmp_path / "one") == 1
    status, texts = ranks(
        2,
        predict.main,
        checkpoint,
        photo.parent,
        "--out",
        tmp_path / "two",
        "--workers",
        "0",
        said=tmp_path / "said",
    )
    assert status == [1, 1] and "4 images" in texts[0] and "1 failed" in texts[0]
    assert files(tmp_path / "one") == files(tmp_path / "two") != []
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---- test servers

TO_TRAIN_ID = {
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
    27: 14,
    28: 15,
    31: 16,
    32: 17,
    33: 18,
}  # cityscapesScripts, helpers/labels.py


def test_cityscapes_files_score_as_evaluate_does(tmp_path, capsys):
    root, rng = tmp_path / "cityscapes", np.random.default_rng(3)
    frames = ["ulm_000000_000019", "ulm_000001_000019", "jena_000000_000019"]
    for i, frame in enumerate(frames):
        for top, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            path = root / top / "val" / frame.split("_")[0] / f"{frame}_{end}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                blocks(64, 128, i)
                if end == "leftImg8bit"
                else rng.integers(0, 34, (64, 128), np.uint8)
            ).save(path)
    checkpoint = make_checkpoint(tmp_path / "best.pt", CITYSCAPES, "cityscapes", str(root))
    out = tmp_path / "o"
    assert (
        predicted(checkpoint, root / "leftImg8bit" / "val", "--out", out, "--format", "cityscapes")
        == 0
    )
    said = capsys.readouterr().err
    assert (
        "3 not 2048x1024" in said
        and "3 files; the server expects the 1525" in said
        and "missing" not in said
    )
    assert files(out) == sorted(f"{frame}_pred_labelIds.png" for frame in frames)
    status, texts = ranks(
        2,
        predict.main,
        checkpoint,
        root / "leftImg8bit" / "val",
        "--out",
        tmp_path / "two",
        "--format",
        "cityscapes",
        "--workers",
        "0",
        said=tmp_path / "said",
    )
    assert status == [0, 0] and "3 files; the server expects the 1525" in texts[0]
    assert all(
        (tmp_path / "two" / name).read_bytes() == (out / name).read_bytes() for name in files(out)
    )
    matrix = np.zeros((19, 19), int)
    for frame in frames:
        [guess] = out.glob(f"{frame}*.png")  # as cityscapesScripts looks for it
        with Image.open(guess) as image:
            assert image.mode == "L" and image.size == (128, 64)
            guess = np.asarray(image)
        [truth] = root.glob(f"gtFine/val/*/{frame}_gtFine_labelIds.png")
        assert set(np.unique(guess)) <= set(TO_TRAIN_ID)
        for t, g in zip(np.asarray(Image.open(truth)).ravel(), guess.ravel()):
            if int(t) in TO_TRAIN_ID:
                matrix[TO_TRAIN_ID[int(t)], TO_TRAIN_ID[int(g)]] += 1
    evaluate.main([checkpoint, "--json", "--workers", "0"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (matrix.sum(0) > 0).sum() > 2 and matrix.tolist() == told["confusion"]


def test_check_server_lists_what_the_server_refuses(tmp_path, capsys):
    Image.new("L", (2048, 1024)).save(tmp_path / "a_000000_000000_pred_labelIds.png")
    Image.new("L", (2048, 512)).save(tmp_path / "b_000000_000000_pred_labelIds.png")
    Image.new("L", (2048, 1024)).save(tmp_path / "old.png")
    predict.check_server(tmp_path, [f"{c}_000000_000000_pred_labelIds" for c in "abc"])
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 4
        and "missing: c_" in lines[0]
        and "old.png" in lines[1]
        and ": b_" in lines[2]
    )
    assert not any("a_0" in line for line in lines)


def test_check_server_has_nothing_to_say_of_the_whole_split(tmp_path, capsys):
    Image.new("L", (2048, 1024)).save(tmp_path / "0.png")
    for i in range(1, 1525):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    predict.check_server(tmp_path, [str(i) for i in range(1525)])
    assert capsys.readouterr().err == ""


def test_cityscapes_needs_its_names_and_classes(checkpoint, photo, tmp_path):
    with pytest.raises(InputError, match="CITY_SEQUENCE_FRAME"):
        predicted(checkpoint, photo, "--format", "cityscapes")
    frame = photo.rename(photo.with_name("ulm_000000_000019_leftImg8bit.png"))
    with pytest.raises(InputError, match="trained on folder"):
        predicted(checkpoint, frame, "--format", "cityscapes", "--out", tmp_path / "o")


def test_ade20k_counts_from_one(photo, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "best.pt", ADE20K, "ade20k")
    for form in ("masks", "ade20k"):
        assert predicted(checkpoint, photo, "--out", tmp_path / form, "--format", form) == 0
    assert files(tmp_path / "ade20k") == ["photo.png"]
    mask, result = (Image.open(tmp_path / form / "photo.png") for form in ("masks", "ade20k"))
    assert result.mode == "L" and np.array_equal(
        np.asarray(result), np.asarray(mask).astype(int) + 1
    )
    assert len(np.unique(mask)) > 1


def test_ade20k_is_predicted_at_the_crop_of_its_training(tmp_path, monkeypatch, stub):
    """What the network is fed has a short side of the crop; the files have the image's size."""
    path = make_checkpoint(tmp_path / "best.pt", ADE20K, "ade20k")
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"settings": {"data": "ade20k", "crop": 64}}, path)
    fed = []
    forward = Stub.forward

    def recorded(self, image):
        fed.append(tuple(image.shape[2:]))
        return forward(self, image)

    monkeypatch.setattr(Stub, "forward", recorded)
    sizes = {"0": (256, 341), "1": (480, 640), "2": (1500, 2000), "3": (40, 900)}
    for number, size in sizes.items():
        name = f"ADE_val_{number:>08}"
        save(tmp_path / "validation" / f"{name}.jpg", blocks(*size))
    images = tmp_path / "validation"
    for flags in (["--attention", "30,20", "--page"], ["--format", "ade20k"]):
        fed.clear()
        out = tmp_path / flags[-1]
        assert predicted(path, images, "--out", out, *flags) == 0
        repeats = 3 if "--attention" in flags else 1  # the maps are of what is fed
        assert fed == [*[(64, 85)] * 3 * repeats, *[(11, 256)] * repeats]
        for number, (h, w) in sizes.items():
            with Image.open(out / f"ADE_val_{number:>08}.png") as mask:
                assert mask.size == (w, h)
    fed.clear()
    small = [images / f"ADE_val_{number:>08}.jpg" for number in "03"]
    assert predicted(path, *small, "--out", tmp_path / "o", "--base", "0") == 0
    assert fed == [(256, 341), (40, 900)]
    with pytest.raises(InputError, match="--base -1: expected 0 to 8192"):
        predicted(path, images, "--base", "-1")
    for settings in ({"data": "ade20k"}, {"data": "ade20k", "crop": -5}):
        torch.save(saved | {"settings": settings}, path)
        with pytest.raises(InputError, match="fields missing or wrong: settings"):
            predicted(path, images)
