"""What a pixel attends to: its rows of A, A', A'' and P_class, as pictures (Figs. 1, 4 and 11)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

import dnl
from data import normalize, resize_smooth, scaled
from pictures import GAP, HEAT, Picture, heat, mark_pixel, sheet, text_size
from runtime import InputError, quote

Pixel = tuple[int, int]  # (x, y) in an image, from 0
SCALE = ("0", "1/4", "1/2", "3/4", "max")  # what the colours HEAT stand for


def require_attention(net: dnl.Network, source: str) -> None:
    """InputError unless the network has the maps A, A', A''. source: its checkpoint."""
    if not isinstance(net.context, dnl.DenoisedNonLocal):
        raise InputError(
            f"{quote(source)}: context {net.config.context!r} has no attention maps A, A', A''; "
            "give a checkpoint trained with --context dnl or nl"
        )


def attention_inputs(
    net: dnl.Network, image: Tensor, factor: float | None = None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
    """Q, K (1, C', N), P (1, n, N) or None without GR, float32, and the size (h, w) of F.

    image: (3, H, W), 0..255, on the network's device; its sides are fed times the factor of
    `base_factor`. The network passes `require_attention`.
    """
    x = image[None].float()
    if factor is not None:
        x = resize_smooth(x, scaled(image.shape[1:], factor))
    x = normalize(x)
    x = x.contiguous(memory_format=torch.channels_last)
    *_, f, p = net.features(x)
    block = cast(dnl.DenoisedNonLocal, net.context)  # require_attention has checked this
    q, k, _, p = block.inputs(f, p)
    _, _, h, w = f.shape
    return q, k, p, (h, w)


@torch.inference_mode()
def attention_maps(
    net: dnl.Network, image: Tensor, pixel: Pixel, factor: float | None = None
) -> dict[str, Tensor]:
    """Title -> a pixel's row (h, w), at F's size, of A, A', A'' (Fig. 4) and P_class.

    image: (3, H, W), 0..255, computed whole, its sides times the factor. The rows are float32 on
    the CPU. Rows of parts that the network lacks are left out.
    """
    q, k, p, size = attention_inputs(net, image, factor)
    kernel = cast(dnl.DenoisedNonLocal, net.context).kernel  # as in attention_inputs
    x, y = pixel
    h, w = size
    _, H, W = image.shape
    row = round(y * (h - 1) / max(1, H - 1))  # the corners of F are the corners of the image
    column = round(x * (w - 1) / max(1, W - 1))
    query = torch.tensor([row * w + column], device=image.device)
    a, rectified, retained = dnl.denoised_maps(q, k, p, size, kernel, query)
    maps = {"A": a}
    if p is not None:
        maps["A' (after GR)"] = rectified
    if kernel:
        maps["A'' (after LR)"] = retained
    if p is not None:
        maps["P_class"] = dnl.class_affinity(p, query)
    return {title: rows.reshape(size).cpu() for title, rows in maps.items()}


def overlay_map(image: Picture, values: Tensor) -> Picture:
    """A map (h, w), divided by its maximum, in colours over the grey image, at the image's size."""
    largest = max(float(values.max()), 1e-30)
    size = (image.height, image.width)
    values = dnl.resize(values[None, None], size)
    colors = heat(values[0, 0].numpy() / largest).astype(np.float32)
    grey = np.asarray(image.convert("L"), np.float32) / 255
    mixed = 0.7 * colors + 0.3 * 255 * grey[..., None]
    mixed = mixed.round().astype(np.uint8)
    return Image.fromarray(mixed)


def attention_row(
    net: dnl.Network,
    image: Tensor,
    pixel: Pixel,
    caption: str,
    width: int,
    factor: float | None = None,
) -> dict[str, Picture]:
    """Title -> picture: the image with its caption, then each map over it, the pixel marked.

    image: (3, H, W) uint8 on the network's device; squeezed if it is higher than 4 times its width.
    width: of the whole row, in pixels. factor: as in `attention_inputs`.
    """
    maps = attention_maps(net, image, pixel, factor)
    _, H, W = image.shape
    across = (width - GAP) // (len(maps) + 1) - GAP
    across = max(1, across)
    tall = round(H * across / W)
    tall = max(1, min(4 * across, tall))
    array = image.permute(1, 2, 0).cpu().numpy()
    photo = Image.fromarray(array)
    photo = photo.resize((across, tall), Resampling.BILINEAR)
    x, y = pixel
    at = ((x + 0.5) * across / W, (y + 0.5) * tall / H)
    letters = text_size(width)
    first = mark_pixel(photo, at, caption, letters)
    row = {"pixel, predicted class": first}
    for title, values in maps.items():
        caption = f"max {values.max():.3g}"
        picture = overlay_map(photo, values)
        row[title] = mark_pixel(picture, at, caption, letters)
    return row


def attention_sheet(rows: Sequence[dict[str, Picture]]) -> Picture:
    """Rows of `attention_row` under their titles, and the scale of the colours (Figs. 1, 11)."""
    pictures = [list(row.values()) for row in rows]
    titles = list(rows[0])
    width = pictures[0][0].width
    return sheet(pictures, titles, SCALE, HEAT, width)


def pixel_of(text: str) -> Pixel:
    """X,Y of the command line as a pixel."""
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected X,Y in whole pixels, for example 120,200"
        ) from None
    return x, y


def require_pixel(pixel: Pixel, W: int, H: int, source: Path | str) -> None:
    """InputError unless the pixel lies in an image of W x H. source: the image's file."""
    x, y = pixel
    if not (0 <= x < W and 0 <= y < H):
        raise InputError(
            f"{quote(source)}: pixel {x},{y} is outside of the image of {W}x{H} (width x height); "
            f"expected X 0..{W - 1}, Y 0..{H - 1}"
        )
