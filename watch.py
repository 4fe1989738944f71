"""What people watch of a training: the line of a step, TensorBoard, the sheet of validation
images.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import base_factor, read
from evaluate import predict, top_class
from pictures import colorize, sheet, with_ignored
from ranks import peak_memory
from run import Run
from runtime import AMP, counted, print_line, quote


class Board:
    """TensorBoard's files of a run, if asked for. A full disk ends them with one line."""

    def __init__(self, folder: Path, step: int, asked: bool) -> None:
        self.writer: Any = None
        if asked:
            from torch.utils.tensorboard import SummaryWriter  # late: the package is optional

            try:
                self.writer = SummaryWriter(
                    folder, purge_step=step + 1
                )  # points after the checkpoint
            except OSError as e:
                self.stop(e)

    def draw(self, values: dict[str, Any], step: int, picture: Image.Image | None = None) -> None:
        """Add the floats among the values, and the picture."""
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, step)
            if picture is not None:
                self.writer.add_image("val", np.asarray(picture), step, dataformats="HWC")
        except OSError as e:
            self.stop(e)

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            try:
                self.writer.close()
            except OSError as e:
                self.stop(e)

    def stop(self, error: OSError) -> None:
        """Draw nothing any more."""
        print_line(
            f"warning: TensorBoard's file not written ({error}); no more is drawn", error=True
        )
        self.writer = None


def start_line(run: Run) -> str:
    """Where and on what the run trains, told when it starts."""
    args, n = run.args, len(run.data)
    rest = n - run.per_epoch * args.batch
    left_out = f" ({rest} left out of each)" if rest else ""
    weights = f"weights {args.weights}"
    if args.init is not None:
        weights = f"network of {quote(args.init)}"
    if run.step:
        weights = f"going on at step {run.step}"
    line = (
        f"{run.device}, amp {args.amp}; train {counted(n, 'image')}, "
        f"{counted(run.per_epoch, 'step')} an epoch{left_out}; "
        f"val {counted(len(run.val), 'image')}; {weights}; in {quote(args.out)}"
    )
    if args.split == "trainval":
        line += "; the validation images are trained on: their mIoU is no test"
    return line


class Clock:
    """How fast the steps are, and when the last will be done."""

    def __init__(self, step: int) -> None:
        self.first, self.start, self.pause = step, time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that is not part of the steps, such as a validation."""
        began = time.monotonic()
        yield
        self.pause += time.monotonic() - began

    def steps_per_second(self, step: int) -> float:
        """Of the steps so far, without the pauses."""
        return (step - self.first) / (time.monotonic() - self.start - self.pause)

    def seconds_left(self, step: int, total: int) -> float:
        """For the other steps, with pauses as so far."""
        return (total - step) * (time.monotonic() - self.start) / (step - self.first)


def step_line(run: Run, loss: float, speed: float, seconds: float) -> str:
    """The line of a step. speed: images/s over all ranks. seconds: that are left."""
    end = datetime.now() + timedelta(seconds=seconds)
    left = int(seconds)
    return (
        f"epoch {(run.step - 1) // run.per_epoch + 1}/{run.args.epochs}  "
        f"step {run.step}/{run.total}  loss {loss:.4f}  lr {run.lr:.6f}  "
        f"{speed:.1f} images/s  {peak_memory(run.device):.1f} GiB  "
        f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}, until {end:%H:%M}"
    )


def epoch_line(line: dict[str, Any], epochs: int) -> str:
    """The scores of an epoch, given its line of log.jsonl."""
    text = f"epoch {line['epoch']}/{epochs}  "
    if line["miou"] is None:
        return f"{text}no pixel of the validation split is labelled"
    text += f"val mIoU {100 * line['miou']:.2f} %  accuracy {100 * line['accuracy']:.2f} %"
    if "ema_miou" in line:
        text += f"  averaged weights mIoU {100 * line['ema_miou']:.2f} %"
    return text


def epoch_values(run: Run, line: dict[str, Any]) -> dict[str, Any]:
    """An epoch's values for TensorBoard: its line of log.jsonl, the IoU of each class, gamma."""
    values = dict(line)
    for name, iou in line.get("iou", {}).items():
        values[f"iou/{name}"] = iou
    gamma = getattr(run.net.context, "gamma", None)
    if isinstance(gamma, Tensor) and gamma.numel() == 1:  # a context of one's own may have another
        values["gamma"] = gamma.item()
    return values


def val_sheet(run: Run) -> Image.Image:
    """Image, truth and prediction of up to four validation images, with a legend.

    Leaves the network in eval mode.
    """
    run.net.eval()
    rows, truths = [], []
    for i in np.linspace(0, len(run.val) - 1, min(4, len(run.val))).round().astype(int):
        image, label = read(run.val, int(i))
        x = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(run.device)
        factor = base_factor(image.shape[:2], run.base)
        p = predict(run.net, x, factor=factor, amp=AMP[run.args.amp])
        guess = top_class(p, x.shape[1:])[0].cpu().numpy()
        truth = cast(np.ndarray, label)  # this split is validated on, so it has labels
        truths.append(truth)
        masks = [colorize(ids, run.val.colors) for ids in (truth, guess)]
        rows.append([Image.fromarray(image), *masks])
    legend = with_ignored(run.val.classes, run.val.colors, truths)
    return sheet(rows, ("image", "truth", "prediction"), *legend)
