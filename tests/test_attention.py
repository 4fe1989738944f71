"""attention.py: the maps are the paper's rows; their colours, sheets and pages."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, blocks, files, make_checkpoint, predicted
from PIL import Image

import attention
import dnl
import pictures
import predict
from checkpoint import load_network
from runtime import InputError


def lightness(rgb):
    """CIE L* of sRGB colours (..., 3)."""
    c = np.asarray(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16


def test_equal_steps_of_attention_are_equal_steps_of_lightness():
    steps = np.linspace(0, 1, 33)
    assert np.abs(lightness(pictures.heat(steps)) - (15 + 80 * steps)).max() < 1.5


def test_attention_maps_are_the_papers_rows(checkpoint):
    net, _ = load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(65, 97)).permute(2, 0, 1)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    with torch.inference_mode():
        f = net.features(((image - mean) / std)[None])[3]
        q, k, p = (
            conv(f)[0].double() for conv in (net.context.query, net.context.key, net.context.coarse)
        )
    H, W = f.shape[2:]
    for pixel, (i, j) in {
        (0, 64): (H - 1, 0),
        (96, 0): (0, W - 1),
        (50, 31): (2, 3),
    }.items():  # corners on corners
        a = torch.einsum("c,chw->hw", q[:, i, j], k).flatten().softmax(0).view(H, W)
        gate = torch.einsum("c,chw->hw", p[:, i, j], p).sigmoid()
        retained = torch.zeros(H, W, dtype=torch.float64)
        for y in range(H):
            for x in range(W):
                for v in range(max(0, y - 1), min(H, y + 2)):
                    for u in range(max(0, x - 1), min(W, x + 2)):
                        retained[y, x] += (
                            (q[:, y, x] * k[:, v, u]).sum().sigmoid() * a[v, u] * gate[v, u]
                        )
        maps = attention.attention_maps(net, image, pixel)
        assert list(maps) == ["A", "A' (after GR)", "A'' (after LR)", "P_class"]
        for got, expected in zip(maps.values(), (a, a * gate, retained, gate)):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "parts, maps", [({"context": "nl"}, ["A"]), ({"gr": False}, ["A", "A'' (after LR)"])]
)
def test_attention_maps_of_parts_that_a_network_lacks_are_left_out(parts, maps):
    net = dnl.build(
        replace(dnl.PAPER, num_classes=2, backbone="resnet18", channels=16, **parts)
    ).eval()
    assert (
        list(attention.attention_maps(net, torch.zeros(3, 33, 33, dtype=torch.uint8), (0, 0)))
        == maps
    )


def test_attention_is_brightest_at_the_maximum():
    values = torch.zeros(4, 6)
    values[2, 5] = 1e-7  # maps of many pixels are small: each is scaled by its own maximum
    out = np.asarray(attention.overlay_map(Image.new("RGB", (91, 61), "black"), values))
    assert out.shape == (61, 91, 3)
    assert tuple(np.unravel_index(out.sum(2).argmax(), (61, 91))) == (40, 90)
    assert np.abs(out[40, 90] - 0.7 * np.array(pictures.HEAT[-1])).max() <= 0.5
    assert np.abs(out[0, 0] - 0.7 * np.array(pictures.HEAT[0])).max() <= 0.5


@pytest.mark.parametrize("pixel", [(10, 50), (0, 0), (89, 60)])
def test_attention_sheet_marks_the_pixel_in_every_picture(checkpoint, pixel):
    net, _ = load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(61, 90)).permute(2, 0, 1)
    out = attention.attention_sheet([attention.attention_row(net, image, pixel, "", 900)])
    width = (900 - 6) // 5 - 6
    assert abs(out.width - 900) <= 5
    green = (np.asarray(out) == (0, 255, 0)).all(2)
    for i in range(5):
        left = 6 + i * (width + 6)
        x, y = left + (pixel[0] + 0.5) * width / 90, 22 + (pixel[1] + 0.5) * width / 90
        assert green[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].any()
        assert green[:, left : left + width].sum() > 10


def test_attention_page_by_tiles_and_outside(checkpoint, photo, tmp_path, capsys):
    assert predicted(checkpoint, photo, "--out", tmp_path / "o", "--attention", "55,39") == 0
    assert "photo_attention.png" in files(tmp_path / "o")
    assert predicted(checkpoint, photo, "--out", tmp_path / "p", "--attention", "56,39") == 1
    assert "photo.png: pixel 56,39 is outside of the image of 56x40" in capsys.readouterr().err
    assert files(tmp_path / "p") == ["photo.png", "photo_overlay.png"]
    net, _ = load_network(checkpoint, CPU)
    image = torch.from_numpy(blocks(40, 56)).permute(2, 0, 1)
    rows, columns = slice(16, 40), slice(33, 56)  # the lower right of six tiles
    whole, tiled, part = (
        predict.pixel_sheet(net, i, at, "", device=CPU, side=s)
        for i, at, s in (
            (image, (50, 30), 64),
            (image, (50, 30), 32),
            (image[:, rows, columns], (17, 14), 64),
        )
    )
    assert tiled.size != whole.size and np.array_equal(tiled, part)


def test_attention_needs_a_non_local_block(photo, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "none.pt", ["a", "b"], context="none")
    with pytest.raises(InputError, match="context 'none' has no attention maps"):
        predicted(checkpoint, photo, "--out", tmp_path / "o", "--attention", "0,0")
