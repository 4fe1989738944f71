"""Training loss and validation mIoU of runs over their epochs, drawn from log.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.Image import Resampling

from classes import Color, palette
from pictures import load_font, shorten
from runtime import InputError, quote, regular_file

GREY = (225, 225, 225)
Points = Sequence[tuple[float, float]]  # (epoch, value)


def read_log(run: str) -> list[dict[str, Any]]:
    """The epochs in the log.jsonl of a run: its folder, or the file. InputError: no such file."""
    path = Path(run)
    if path.is_dir():
        path = path / "log.jsonl"
    try:
        lines = regular_file(path).read_text(encoding="utf-8").splitlines()
        epochs = [e for e in map(json.loads, lines) if "settings" not in e]
        if not epochs or not all(map(is_epoch, epochs)):
            raise ValueError("no epoch in it, or other values than train.py writes")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(
            f"{quote(path)}: not the log of a run ({reason}): name the folder that train.py wrote, "
            "after its first epoch"
        ) from None
    return epochs


def is_epoch(line: dict[str, Any]) -> bool:
    """Whether a line of a log can be drawn: a number from 1, loss and mIoU finite or None."""
    number = line["epoch"]
    if type(number) is not int or number < 1:
        return False
    for value in (line["loss"], line["miou"]):
        if value is not None and not abs(value) < 1e30:
            return False
    return True


def ticks(low: float, high: float, about: int = 8) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart.

    There are at most `about` + 1 of them.
    """
    least = max(high - low, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(least))
    step = power
    for factor in (2, 5, 10):
        if step < least * (1 - 1e-9):
            step = factor * power
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    numbers = range(first, last + 1)
    return [round(i * step, 12) for i in numbers]


def panel(
    title: str,
    lines: Sequence[Points],
    colors: Sequence[Color],
    x_end: int,
    size: tuple[int, int],
) -> Image.Image:
    """A diagram, size (width, height), of lines of points over the epochs 0..x_end."""
    out = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(out)
    font = load_font(24)
    left, top = 90, 50
    right, bottom = size[0] - 30, size[1] - 60
    values = [y for _, y in chain(*lines)] or [0, 1]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low or 1)
    low -= margin
    high += margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (right - left) * x / x_end
        up = (bottom - top) * (y - low) / (high - low)
        return left + across, bottom - up

    draw.text((left, 8), title, "black", font)
    for tick in ticks(low, high):
        _, y = place(0, tick)
        ends = (left, y, right, y)
        draw.line(ends, GREY, 2)
        draw.text((left - 10, y), f"{tick:g}", "black", font, anchor="rm")
    for tick in ticks(0, x_end, min(8, x_end)):  # whole epochs
        x, _ = place(tick, low)
        draw.text((x, bottom + 8), f"{tick:g}", "black", font, anchor="mt")
    draw.text((right, bottom + 34), "epoch", "black", font, anchor="rt")
    axes = (left, top, left, bottom, right, bottom)
    draw.line(axes, "black", 2)
    for line, color in zip(lines, colors):
        points = [place(x, y) for x, y in line]
        draw.line(points, color, 4, "curve")
        if len(points) < 80:
            for point in points:
                draw.circle(point, 5, color)
    return out


def curves(runs: list[str], titles: list[str], width: int) -> Image.Image:
    """The diagrams of loss and mIoU side by side, and the runs' titles with their best mIoU.

    InputError: a run without a log.
    """
    logs = [read_log(run) for run in runs]
    colors = palette(len(runs))
    last = max(log[-1]["epoch"] for log in logs)
    size = (2 * width, 760 + 40 * len(runs))  # twice as large as asked for, for smooth lines
    out = Image.new("RGB", size, "white")
    for left, key, factor, title in (
        (0, "loss", 1, "training loss"),
        (width, "miou", 100, "validation mIoU, %"),
    ):
        lines = []
        for log in logs:
            drawn = [e for e in log if e[key] is not None]
            line = [(e["epoch"], factor * e[key]) for e in drawn]
            lines.append(line)
        diagram = panel(title, lines, colors, last, (width, 760))
        out.paste(diagram, (left, 0))
    draw = ImageDraw.Draw(out)
    font = load_font(28)
    y = 770
    for text, color, line in zip(titles, colors, lines):
        if line:
            best = max(miou for _, miou in line)
            text += f"   best mIoU {best:.2f} %"
        draw.rectangle((90, y, 130, y + 20), color)
        text = shorten(text, font, 2 * width - 160)
        draw.text((145, y + 10), text, "black", font, anchor="lm")
        y += 40
    size = (width, out.height // 2)
    return out.resize(size, Resampling.LANCZOS)
