"""Tests of predict.py: what a user gets for a folder of anything, against evaluate.py and closed forms."""
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import dnl
import evaluate
import predict
from data import ADE20K, CITYSCAPES, DataError, palette

CPU = torch.device("cpu")


def make_checkpoint(path, classes, data="folder", root=None, colors=None):
    torch.manual_seed(0)
    config = replace(dnl.PAPER, num_classes=len(classes), backbone="resnet18", channels=32)
    net = dnl.build(config)
    nn.init.constant_(net.context.gamma, 0.5)
    nn.init.normal_(net.head[-1].weight, std=3.0)  # several classes in an image
    torch.save({"version": evaluate.VERSION, "model": net.state_dict(), "config": asdict(config), "data": data,
                "root": root, "classes": list(classes), "amp": "off",
                "colors": [list(c) for c in colors or palette(len(classes))]}, path)
    return str(path)


def noise(h, w, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (h // 8 + 2, w // 8 + 2, 3), np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:h, :w].copy()


def run(*args):
    return predict.main([*map(str, args), "--workers", "0"])


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("net") / "best.pt", ["a", "b", "c", "d", "e"])


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(40, 56)).save(tmp_path / "in" / "photo.png")
    return tmp_path / "in" / "photo.png"


# ---- tiles

def test_spans_keep_each_pixel_once_with_margin():
    for side in (8, 13, 64):
        for length in [*range(1, 90), 200, 331]:
            kept = []
            for seen, keep in predict.spans(length, side):
                assert 0 <= seen.start <= keep.start < keep.stop <= seen.stop <= length
                assert seen.stop - seen.start == min(side, length)
                assert seen.start == 0 or keep.start - seen.start >= side // 8
                assert seen.stop == length or seen.stop - keep.stop >= side // 8
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
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    net = Blur()
    ids, confidence = predict.predict_ids(net, image, device=CPU, side=24)  # margin 3, the blur reaches 2
    assert net.largest <= 24 * 24
    x = (image.double().numpy() - np.array([123.675, 116.28, 103.53])[:, None, None])
    x = np.pad(x / np.array([58.395, 57.12, 57.375])[:, None, None], ((0, 0), (2, 2), (2, 2)))
    mean = sum(x[:, i:i + size[0], j:j + size[1]] for i in range(5) for j in range(5)) / 25
    p = np.exp(mean) / np.exp(mean).sum(0)
    assert ids.dtype == confidence.dtype == np.uint8 and np.array_equal(ids, mean.argmax(0))
    assert np.abs(confidence - 255 * p.max(0)).max() < 0.51


@pytest.mark.parametrize("options", [{}, {"flip": True, "scales": [0.5, 1.0]}, {"crop": 32}])
def test_up_to_the_bound_it_is_evaluates_argmax(checkpoint, options):
    net, _ = evaluate.load_network(checkpoint, CPU)
    image = torch.from_numpy(noise(48, 70)).permute(2, 0, 1)
    ids, _ = predict.predict_ids(net, image, device=CPU, **options)
    assert np.array_equal(ids, evaluate.predict(net, image, **options).argmax(0).numpy())
    assert len(np.unique(ids)) > 1


def test_tile_side_bounds_memory_but_grants_crop():
    assert predict.tile_side(19, None) == 2048 and predict.tile_side(19, 768) == 2048
    assert predict.tile_side(150, None) ** 2 * 150 * 4 <= 2**30 < (predict.tile_side(150, None) + 2) ** 2 * 150 * 4
    assert predict.tile_side(150, 3000) == 3000


# ---- files

def test_mask_overlay_confidence(checkpoint, photo, tmp_path):
    assert run(checkpoint, photo, "--out", tmp_path / "o", "--confidence") == 0
    assert files(tmp_path / "o") == ["photo.png", "photo_confidence.png", "photo_overlay.png"]
    net, saved = evaluate.load_network(checkpoint, CPU)
    p = evaluate.predict(net, torch.from_numpy(noise(40, 56)).permute(2, 0, 1))
    mask, grey = (Image.open(tmp_path / "o" / f"photo{e}.png") for e in ("", "_confidence"))
    assert mask.mode == "P" and np.array_equal(mask, p.argmax(0)) and len(np.unique(mask)) > 1
    assert np.array(mask.getpalette()[:15]).reshape(5, 3).tolist() == saved["colors"]
    assert grey.mode == "L" and np.abs(np.array(grey) - 255 * p.amax(0).numpy()).max() < 0.51
    over = np.asarray(Image.open(tmp_path / "o" / "photo_overlay.png")).astype(int)
    half = (noise(40, 56).astype(int) + np.array(saved["colors"])[np.array(mask)]) / 2
    found = any(np.abs(over[y:y + 40, x:x + 56] - half).max() <= 1 for y in range(30) for x in range(12))
    assert found and over.shape[0] > 60  # the picture as it is, and a legend


def test_exif_is_honoured(checkpoint, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(photo.with_name("turned.png"), exif=exif)
    assert run(checkpoint, photo.parent, "--out", tmp_path / "o") == 0
    upright, turned = (np.asarray(Image.open(tmp_path / "o" / f"{n}.png")) for n in ("photo", "turned"))
    assert upright.shape == (40, 56) and np.array_equal(upright, turned)


def test_mixed_folder_names_the_bad_files_and_goes_on(checkpoint, photo, tmp_path, capsys):
    folder = photo.parent
    Image.fromarray(noise(80, 96)).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left alone")
    (folder / ".hidden.png").write_text("left alone")
    names = ["sp ace", "ünïcode", "new\nline", "a.b", "deep/er/x"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 8)).save(folder / f"{name}.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("L", (1, 3000)).save(folder / "thin.png")
    assert run(checkpoint, folder, "--out", tmp_path / "o") == 1
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
        assert run(checkpoint, photo.parent, "--out", photo.parent / "results") == 0
    assert files(photo.parent / "results") == ["photo.png", "photo_overlay.png"]


@pytest.mark.parametrize("other, flags, told", [
    ("photo.jpg", [], "both write"), ("photo_overlay.jpg", [], "both write"), ("x.png", ["--out", "in"], "overwrite"),
    ("x.png", ["--out", "link"], "leave")])
def test_refused_before_any_work(photo, tmp_path, monkeypatch, other, flags, told):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(photo.with_name(other))
    if "link" in flags:
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "x.png").symlink_to(tmp_path / "elsewhere.png")
    before = files(tmp_path)
    with pytest.raises(DataError, match=told) as e:
        run("absent.pt", "in", *flags)
    assert "\n" not in str(e.value) and files(tmp_path) == before


def test_nothing_to_do_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for given, told in ((tmp_path, "no image"), (tmp_path / "absent", "no such file")):
        with pytest.raises(DataError, match=told):
            run("absent.pt", given)


@pytest.mark.parametrize("flags", [["--attention", "1;2"], ["--format", "ade20k", "--confidence"], ["--scales", "0"]])
def test_wrong_flags(photo, flags):
    with pytest.raises(DataError):
        run("absent.pt", photo, *flags)


def test_result_that_cannot_be_written_is_named(checkpoint, photo, tmp_path, capsys):
    (tmp_path / "o" / "photo.png").mkdir(parents=True)
    assert run(checkpoint, photo, "--out", tmp_path / "o") == 1
    assert "photo.png: cannot be written" in capsys.readouterr().err


def test_two_ranks_give_the_files_of_one(checkpoint, photo, tmp_path):
    for i in range(3):
        Image.fromarray(noise(40, 40 + i, i)).save(photo.with_name(f"{i}.png"))
    photo.with_name("bad.png").write_text("")
    assert run(checkpoint, photo.parent, "--out", tmp_path / "one") == 1
    ranks = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                            predict.__file__, checkpoint, str(photo.parent), "--out", str(tmp_path / "two"), "--workers", "0"],
                           capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ranks.returncode != 0 and "4 images" in ranks.stderr and "1 failed" in ranks.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two") != []
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---- test servers

TO_TRAIN_ID = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
               28: 15, 31: 16, 32: 17, 33: 18}  # cityscapesScripts, helpers/labels.py


def test_cityscapes_files_score_as_evaluate_does(tmp_path, capsys):
    root, rng = tmp_path / "cityscapes", np.random.default_rng(3)
    frames = ["ulm_000000_000019", "ulm_000001_000019", "jena_000000_000019"]
    for i, frame in enumerate(frames):
        for top, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            path = root / top / "val" / frame.split("_")[0] / f"{frame}_{end}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(64, 128, i) if end == "leftImg8bit" else
                            rng.integers(0, 34, (64, 128), np.uint8)).save(path)
    checkpoint = make_checkpoint(tmp_path / "best.pt", CITYSCAPES, "cityscapes", str(root))
    out = tmp_path / "o"
    assert run(checkpoint, root / "leftImg8bit" / "val", "--out", out, "--format", "cityscapes") == 0
    said = capsys.readouterr().err
    assert "3 not 2048x1024" in said and "3 files; the server expects the 1525" in said and "missing" not in said
    assert files(out) == sorted(f"{frame}_pred_labelIds.png" for frame in frames)
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
    assert len(lines) == 4 and "missing: c_" in lines[0] and "old.png" in lines[1] and ": b_" in lines[2]
    assert not any("a_0" in line for line in lines)


def test_cityscapes_needs_its_names_and_classes(checkpoint, photo, tmp_path):
    with pytest.raises(DataError, match="CITY_SEQUENCE_FRAME"):
        run(checkpoint, photo, "--format", "cityscapes")
    frame = photo.rename(photo.with_name("ulm_000000_000019_leftImg8bit.png"))
    with pytest.raises(DataError, match="trained on folder"):
        run(checkpoint, frame, "--format", "cityscapes", "--out", tmp_path / "o")


def test_ade20k_counts_from_one(photo, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "best.pt", ADE20K, "ade20k")
    for form in ("masks", "ade20k"):
        assert run(checkpoint, photo, "--out", tmp_path / form, "--format", form) == 0
    assert files(tmp_path / "ade20k") == ["photo.png"]
    mask, result = (Image.open(tmp_path / form / "photo.png") for form in ("masks", "ade20k"))
    assert result.mode == "L" and np.array_equal(np.asarray(result), np.asarray(mask).astype(int) + 1)
    assert len(np.unique(mask)) > 1


# ---- attention

def test_attention_maps_are_the_papers_rows(checkpoint):
    net, _ = evaluate.load_network(checkpoint, CPU)
    image = torch.from_numpy(noise(65, 97)).permute(2, 0, 1)
    maps = predict.attention_maps(net, image, (96, 0))  # upper right corner
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    with torch.inference_mode():
        f = net.features(((image - mean) / std)[None])[3]
        q, k, p = (conv(f)[0].double() for conv in (net.context.query, net.context.key, net.context.coarse))
    H, W = f.shape[2:]
    a = torch.einsum("c,chw->hw", q[:, 0, W - 1], k).flatten().softmax(0).view(H, W)
    gate = torch.einsum("c,chw->hw", p[:, 0, W - 1], p).sigmoid()
    retained = torch.zeros(H, W, dtype=torch.float64)
    for y in range(H):
        for x in range(W):
            for v in range(max(0, y - 1), min(H, y + 2)):
                for u in range(max(0, x - 1), min(W, x + 2)):
                    retained[y, x] += (q[:, y, x] * k[:, v, u]).sum().sigmoid() * a[v, u] * gate[v, u]
    for name, expected in (("A", a), ("P_class", gate), ("A'", a * gate), ("A''", retained)):
        torch.testing.assert_close(maps[name].double(), expected, rtol=1e-3, atol=1e-5)


def test_attention_page_by_tiles_and_outside(checkpoint, photo, tmp_path, capsys):
    assert run(checkpoint, photo, "--out", tmp_path / "o", "--attention", "55,39") == 0
    assert "photo_attention.png" in files(tmp_path / "o")
    assert run(checkpoint, photo, "--out", tmp_path / "p", "--attention", "56,39") == 1
    assert "56,39: outside" in capsys.readouterr().err and "photo.png" not in files(tmp_path)
    net, saved = evaluate.load_network(checkpoint, CPU)
    image = torch.from_numpy(noise(40, 56)).permute(2, 0, 1)
    whole, tiled = (predict.attention_page(net, image, np.zeros((40, 56), np.uint8), (50, 30), saved, device=CPU, side=s)
                    for s in (64, 32))
    assert whole.width == tiled.width and whole.height == tiled.height + 8  # 40 high, and a tile of 32
