"""What a pixel attends to: its rows of A, A', A'' and P_class, and the sheet that shows them (Figs. 1, 4 and 11)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import dnl
from data import normalize
from pictures import HEAT, heat, marked, sheet
from runtime import InputError, quote


def attention_inputs(
    net: dnl.Network, image: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
    """Q, K (1, C', N), P (1, n, N) or None without GR, in fp32, and F's size, of an image (3, H, W), 0..255, on the
    network's device."""
    *_, f, p = net.features(normalize(image[None]).contiguous(memory_format=torch.channels_last))
    q, k, _, p = net.context.inputs(f, p)
    return q, k, p, tuple(f.shape[2:])


@torch.inference_mode()
def attention_maps(net: dnl.Network, image: Tensor, pixel: tuple[int, int]) -> dict[str, Tensor]:
    """What a pixel (x, y) of an image (3, H, W) receives: its rows of A, A', A'' (Fig. 4) and P_class, title -> (h, w) at
    F's size, float32 on the CPU. Maps of parts that the network lacks are left out. The image is taken whole."""
    q, k, p, size = attention_inputs(net, image)
    # nearest, corners on corners
    x, y = (
        round(at * (n - 1) / max(1, m - 1))
        for at, n, m in zip(pixel, size[::-1], (image.shape[2], image.shape[1]))
    )
    query = torch.tensor([y * size[1] + x], device=image.device)
    a, rectified, retained = dnl.denoised_maps(q, k, p, size, net.context.kernel, query)
    maps = {"A": a}
    if p is not None:
        maps["A' (after GR)"] = rectified
    if net.context.kernel:
        maps["A'' (after LR)"] = retained
    if p is not None:
        maps["P_class"] = dnl.class_affinity(p, query)
    return {title: m[0, 0].unflatten(0, size).cpu() for title, m in maps.items()}


def overlay_map(image: Image.Image, values: Tensor) -> Image.Image:
    """A map (h, w), scaled by its own maximum, in colours over the grey picture, at the picture's size."""
    full = dnl.resize(values[None, None], (image.height, image.width))[0, 0].numpy()
    colors = heat(full / max(float(values.max()), 1e-30)).astype(np.float32)
    grey = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    return Image.fromarray((0.7 * colors + 0.3 * 255 * grey).round().astype(np.uint8))


def attention_row(
    net: dnl.Network, image: Tensor, pixel: tuple[int, int], caption: str, width: int
) -> dict[str, Image.Image]:
    """Title -> picture of the image, with its caption, and of each of `attention_maps` over it, the pixel marked, for a
    sheet `width` wide. image (3, H, W) uint8 on the network's device; more than 4 times as high as wide it is squeezed."""
    (H, W), maps = image.shape[1:], attention_maps(net, image, pixel)
    across = max(1, (width - 6) // (len(maps) + 1) - 6)
    small = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).resize(
        (across, max(1, min(4 * across, round(H * across / W)))), Image.Resampling.BILINEAR
    )
    at = ((pixel[0] + 0.5) * small.width / W, (pixel[1] + 0.5) * small.height / H)
    return {"pixel, predicted class": marked(small, at, caption)} | {
        title: marked(overlay_map(small, m), at, f"max {m.max():.3g}") for title, m in maps.items()
    }


def attention_sheet(rows: Sequence[dict[str, Image.Image]]) -> Image.Image:
    """Rows of `attention_row` under their titles, and the colour scale: each map goes to its own maximum (Figs. 1, 11)."""
    return sheet(
        [[*row.values()] for row in rows],
        [*rows[0]],
        ("0", "1/4", "1/2", "3/4", "max"),
        HEAT,
        next(iter(rows[0].values())).width,
    )


def pixel_of(text: str) -> tuple[int, int]:
    """X,Y as given on the command line."""
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected X,Y in whole pixels, as 120,200"
        ) from None
    return x, y


def require_pixel(pixel: tuple[int, int], W: int, H: int, source: Path | str) -> None:
    """InputError unless the pixel (x, y) lies in the image of W x H that `source` names."""
    x, y = pixel
    if not (0 <= x < W and 0 <= y < H):
        raise InputError(
            f"{quote(source)}: pixel {x},{y} is outside of the image of {W}x{H} (width x height); expected X "
            f"0..{W - 1}, Y 0..{H - 1}"
        )


def require_attention(net: dnl.Network, source: str) -> None:
    """InputError unless the network has the maps A, A', A''. source: the checkpoint, for the message."""
    if not isinstance(net.context, dnl.DenoisedNonLocal):
        raise InputError(
            f"{source}: context {net.config.context!r} has no attention maps A, A', A''; "
            "give a checkpoint trained with --context dnl or nl"
        )
