"""Data sets: finding and reading files, augmentation and loading.

A training sample depends on (seed, epoch, index) alone, whatever the workers, ranks or restarts.

What lies in --root:
    cityscapes  leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png
                gtFine/{train,val}/CITY/*_gtFine_labelIds.png
    ade20k      images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
    folder      images/{train,val,test}/** (any image), labels/{train,val,test}/**.png, classes.txt
    synthetic   nothing: scenes are made in memory
"""

import hashlib
import math
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import synthetic
from cache import Copy, open_copy
from classes import IGNORE, Color, classes_of
from decode import decode_image, decode_label, header
from files import Item, find_pairs, stamp_of
from runtime import GROUP_SIGNALS, InputError, check_open_files, counted, quote, time_limit

NAMES = ("synthetic", "cityscapes", "ade20k", "folder")
SPLITS = ("train", "val", "trainval", "test")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, 0..255
BATCH_TIMEOUT = 300  # s; other ranks wait 10 minutes, so the line of this one comes first
PAD = (124, 116, 104)  # MEAN, rounded: close to 0 once normalized
RELATIVE = ("ade20k",)  # a scale of 1 brings the short side to the crop, not to the image's own
LONGEST = 4  # times --base: of the long side
Sample = tuple[Tensor, Tensor, Tensor]  # image, label, colour factors


# ---- a split


@dataclass(frozen=True)
class DataSet:
    """One split of a data set."""

    name: str
    split: str
    classes: tuple[str, ...]
    colors: tuple[Color, ...]
    items: tuple[Item, ...]
    numbers: dict[Color, int] = field(default_factory=dict)  # see classes.Classes
    left_out: tuple[Path, ...] = ()  # files that are no image or label
    copy: Copy | None = None  # the decoded copy, if one is kept

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labelled(self) -> bool:
        return self.items[0].label is not None


def open_dataset(
    name: str, root: Path | str | None, split: str, cache: Path | str | None = None
) -> DataSet:
    """The split train, val, trainval or test of the data set.

    Looks at names, sizes and times of files only. With `cache`, a folder, also makes and keeps a
    decoded copy there. Raises InputError for a missing folder, an empty split, an image or label
    alone, the full ADE20K, a wrong classes.txt, or a cache of synthetic scenes.
    """
    if cache is not None and name == "synthetic":
        raise InputError("synthetic scenes are made in memory: leave --cache out")
    dataset, problems = open_split(name, root, split)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    return dataset if cache is None else _with_copy(dataset, Path(cache))


def _with_copy(dataset: DataSet, folder: Path) -> DataSet:
    """The data set, read from its decoded copy in the folder.

    The copy's name holds the sizes and times of the files, so a changed file makes a new copy.
    """
    stamps = []
    for item in dataset.items:
        for path, stamp in zip(item.files, item.stamps):
            stamps.append((os.path.realpath(path), *(stamp or ())))
    # The number changes when files are read in another way than before.
    key = repr((2, dataset.classes, dataset.numbers, stamps)).encode("utf-8", "surrogateescape")
    name = f"{dataset.name}-{dataset.split}-{hashlib.sha256(key).hexdigest()[:16]}"
    images = partial(eval_images, dataset, 0, 1, os.cpu_count() or 1)
    copy = open_copy(folder, name, len(dataset), dataset.labelled, images)
    return replace(dataset, copy=copy)


def open_split(name: str, root: Path | str | None, split: str) -> tuple[DataSet, list[str]]:
    """As open_dataset, but leaves out files without a partner and lists them as problems."""
    _check_names(name, root, split)
    top = Path(root or "")
    items: list[Item] = []
    problems: list[str] = []
    left_out: list[Path] = []
    for part in ("train", "val") if split == "trainval" else (split,):
        if name == "synthetic":
            for number in range(synthetic.SIZES[part]):
                scene = Path(name, part, str(number))
                items.append(Item(scene, scene))
        else:
            items += find_pairs(name, top, part, problems, left_out)
    names, colors, numbers = classes_of(name, top)
    dataset = DataSet(name, split, names, colors, tuple(items), numbers, tuple(left_out))
    return dataset, problems


def _check_names(name: str, root: Path | str | None, split: str) -> None:
    """InputError for another data set or split, or for a root too few or too many."""
    if name not in NAMES or split not in SPLITS:
        raise InputError(
            f"got data set {name!r}, split {split!r}; expected one of {', '.join(NAMES)} and one "
            f"of {', '.join(SPLITS)}"
        )
    if root is None and name != "synthetic":
        raise InputError(f"{name} is read from files: name its folder by --root DIR")
    if root is not None and name == "synthetic":
        raise InputError(
            f"--root {quote(root)}: synthetic scenes are made in memory: name what lies there by "
            "--data, or leave --root out"
        )


def read(dataset: DataSet, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (H, W, 3) uint8 and label (H, W) uint8 of train ids and IGNORE, checked.

    The label is None without ground truth. Raises InputError that names the file.
    """
    item = dataset.items[index]
    if dataset.name == "synthetic":
        _, split, number = item.image.parts
        return synthetic.scene(split, int(number))
    if dataset.copy is not None:
        image, label = dataset.copy.read(index)
        if label is not None and ((label >= len(dataset.classes)) & (label != IGNORE)).any():
            raise InputError(
                f"{quote(dataset.copy.path)}: holds labels out of range: remove it, and it is made "
                "again"
            )
        return image, label
    image = decode_image(item.image)
    label = None
    if item.label is not None:
        label = decode_label(item.label, dataset.name, len(dataset.classes), dataset.numbers)
    # Checked after reading, so that a change during the read is noticed.
    for path, stamp in zip(item.files, item.stamps):
        if stamp != stamp_of(path):
            raise InputError(
                f"{quote(path)}: changed since the data set was opened: size and time "
                f"{stamp_of(path)}, expected {stamp}: stop what writes there, and start again"
            )
    if label is not None and label.shape != image.shape[:2]:
        sizes = [f"{a.shape[0]}x{a.shape[1]}" for a in (label, image)]
        turned = label.shape == image.shape[1::-1] or header(item.image)[1]
        rotation = " as its EXIF rotation shows it" if turned else ""
        raise InputError(
            f"{quote(item.files[1])}: label of {sizes[0]} (height x width), image of {sizes[1]}; "
            f"expected one size: make the label again for {quote(item.image)}{rotation}"
        )
    return image, label


def require_classes(dataset: DataSet) -> None:
    """InputError unless the labels hold two classes. Reads files up to the second class."""
    seen: set[int] = set()
    for index in range(len(dataset)):
        _, label = read(dataset, index)
        if label is not None:
            seen.update(np.unique(label).tolist())
        seen.discard(IGNORE)
        if len(seen) > 1:
            return
    only = f"the class {dataset.classes[seen.pop()]!r} and " if seen else ""
    raise InputError(
        f"{quote(dataset.items[0].files[-1])}: this label and all others of {dataset.split} hold "
        f"only {only}255 (ignored), nothing to tell apart; expected numbers of two or more "
        "classes: make the labels again; write 0/255 masks as 0/1"
    )


# ---- augmentation


def sample(
    dataset: DataSet,
    seed: int,
    epoch: int,
    index: int,
    crop: int,
    scale: tuple[float, float] = (0.5, 2.0),
    relative: bool = False,
) -> Sample:
    """Training sample: image (3, crop, crop) and label (crop, crop), uint8, and colour factors.

    The factors, (4,) float32, are for color_jitter. The sample depends on the arguments alone.
    Raises InputError that names the file, or for a split without ground truth.
    """
    image, label = read(dataset, index)
    if label is None:
        raise InputError(f"{dataset.name} {dataset.split} has no ground truth to train on")
    rng = np.random.default_rng((seed, epoch, index))
    image, label = augment(image, label, crop, scale, relative, rng)
    planes = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return planes, torch.from_numpy(label), draw_jitter(rng)


def augment(
    image: np.ndarray,
    label: np.ndarray,
    crop: int,
    scale: tuple[float, float],
    relative: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Random scale, crop and flip: image (H, W, 3) and label (H, W) to (crop, crop, ...), uint8.

    scale: its range, times crop / short side if relative. Right of the image and below it the
    result is PAD and IGNORE. The crop is drawn in the scaled image but taken from the source:
    only its box is resized.
    """
    factor = rng.uniform(*scale)
    if relative:
        factor *= crop / min(label.shape)
    y, x = (_draw_crop(n, max(1, round(n * factor)), crop, rng) for n in label.shape)
    out = np.full((crop, crop, 3), PAD, np.uint8)
    ids = np.full((crop, crop), IGNORE, np.uint8)
    out[: y.size, : x.size] = _resize(image, y, x)
    ids[: y.size, : x.size] = label[np.ix_(y.nearest(), x.nearest())]
    if rng.random() < 0.5:
        out = out[:, ::-1].copy()
        ids = ids[:, ::-1].copy()
    return out, ids


@dataclass(frozen=True)
class _Crop:
    """A crop along one axis, in source pixels."""

    start: float
    pixel: float  # width of a pixel of the result
    size: int  # pixels of the result
    end: float
    low: int  # low..high are the source pixels that the result depends on
    high: int

    def nearest(self) -> np.ndarray:
        """The source pixel of each pixel of the result."""
        middles = np.arange(self.size) + 0.5
        return (self.start + self.pixel * middles).astype(int)


def _draw_crop(n: int, scaled: int, crop: int, rng: np.random.Generator) -> _Crop:
    """A random crop of at most `crop` pixels of an axis of n pixels, scaled to `scaled`."""
    pixel, size = n / scaled, min(scaled, crop)
    start = int(rng.integers(0, scaled - size + 1)) * pixel
    reach = max(1, pixel) + 1  # of the filter, beyond the crop
    end = start + size * pixel
    low = max(0, int(start - reach))
    high = min(n, math.ceil(end + reach))
    return _Crop(start, pixel, size, min(end, high), low, high)  # min: rounding at the border


def _resize(image: np.ndarray, y: _Crop, x: _Crop) -> np.ndarray:
    """The crop, bilinear (anti-aliased when shrinking), as from resizing the whole image."""
    pixels = image[y.low : y.high, x.low : x.high]
    part = Image.fromarray(np.ascontiguousarray(pixels))
    box = (x.start - x.low, y.start - y.low, x.end - x.low, y.end - y.low)
    crop = part.resize((x.size, y.size), Image.Resampling.BILINEAR, box)
    return np.asarray(crop)


def draw_jitter(rng: np.random.Generator) -> Tensor:
    """Colour factors (4,) float32: brightness, contrast, saturation 0.7..1.3, hue +-0.05 turns."""
    low = (0.7, 0.7, 0.7, -0.05)
    high = (1.3, 1.3, 1.3, 0.05)
    return torch.from_numpy(rng.uniform(low, high)).float()


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Images (B, 3, H, W), 0..255, changed by the factors (B, 4) of draw_jitter: float32, 0..255.

    In this order: times brightness; contrast about the image's mean grey; saturation about the
    pixel's grey; hue turned about the grey axis (in YIQ). All are affine in RGB: one 3x3 matrix
    and one offset for each image, made on the CPU, so that no GPU is waited for. Rows and columns
    that are all PAD are padding: they do not count in the mean, and become MEAN.
    """
    padding = _channels(PAD, images).to(images)
    drawn = (images != padding).any(1, keepdim=True)
    inside = drawn.any(2, keepdim=True) & drawn.any(3, keepdim=True)  # (B, 1, H, W)
    images, device = images.float(), images.device
    factors = factors.float().cpu().view(-1, 4, 1, 1)
    brightness, contrast, saturation, hue = factors.unbind(1)
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
    )
    angle = 2 * math.pi * hue  # (B, 1, 1), as are the others
    cos, sin = saturation * angle.cos(), saturation * angle.sin()
    one, zero = torch.ones_like(hue), torch.zeros_like(hue)
    rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]  # Y stays
    turn = torch.cat(rows, 1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)  # (B, 3, 3)
    offset = (1 - contrast) * brightness * to_yiq[0]  # (B, 1, 3), of the mean colour
    matrix = matrix.to(device, non_blocking=True)
    offset = offset.to(device, non_blocking=True)
    # Of two tensors, for torch divides by a number inexactly: it is 1 without padding.
    every = torch.ones_like(inside).sum((2, 3))
    ratio = every / inside.sum((2, 3)).clamp(min=1)
    mean = (images * inside).mean((2, 3)) * ratio
    grey = (mean[:, None] * offset).sum(2, keepdim=True)  # saturation and hue leave it as it is
    result = (matrix @ images.flatten(2) + grey).clamp(0, 255).view_as(images)
    return torch.where(inside, result, _channels(MEAN, images))


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    pixel = torch.tensor(values).view(3, 1, 1)
    return pixel.to(like.device, non_blocking=True)


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), 0..255, to float32 with ImageNet's mean and deviation."""
    return (images.float() - _channels(MEAN, images)) / _channels(STD, images)


def base_factor(size: Sequence[int], base: int) -> float | None:
    """What scales an image (H, W) to a short side of `base` pixels. None for base 0: nothing does.

    The long side stays within 4 * base, as in the peers (mmsegmentation's 2048x512 for ADE20K): the
    memory does not grow with a panorama, and 150 classes of 608x2432 fit one tile.
    """
    if base == 0:
        return None
    return min(base / min(size), LONGEST * base / max(size))


def scaled(size: Sequence[int], factor: float) -> tuple[int, int]:
    """(H, W) times a factor, in whole pixels."""
    height, width = size
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_smooth(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear, anti-aliased when shrinking: as `_resize` trains."""
    if max(x.shape[2] / size[0], x.shape[3] / size[1]) > 60:  # too much for a GPU's kernel
        return F.interpolate(x, tuple(size), mode="area")
    return F.interpolate(x, tuple(size), mode="bilinear", antialias=True)


# ---- loading


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of 0..n-1 in which an epoch goes through the images."""
    rng = np.random.default_rng((seed, epoch, 0, 1))  # the 1 keeps it off the streams of samples
    return rng.permutation(n)


def step_items(
    step: int, *, seed: int, n: int, batch: int, rank: int = 0, world: int = 1
) -> list[tuple[int, int]]:
    """(epoch, index) of each image in a rank's share of a step.

    An epoch has n // batch steps. Raises InputError if it has none.
    """
    if n < batch:
        got = counted(n, "image")
        raise InputError(f"got {got} for a batch of {batch}: lower --batch, or add images")
    epoch, k = divmod(step, n // batch)
    share = batch // world
    first = k * batch + rank * share
    chosen = order(seed, epoch, n)[first : first + share]
    return [(epoch, int(i)) for i in chosen]


def train_batches(
    dataset: DataSet,
    *,
    seed: int,
    batch: int,
    start: int,
    stop: int,
    rank: int,
    world: int,
    crop: int,
    scale: tuple[float, float] = (0.5, 2.0),
    relative: bool = False,
    workers: int = 0,
    pin: bool = False,
) -> Generator[Sample, None, None]:
    """This rank's share of the steps start..stop-1, b = batch // world samples each.

    Images (b, 3, crop, crop) and labels (b, crop, crop), uint8, and factors (b, 4) float32.
    Raises InputError at once, or at the step of a wrong file.
    """
    if not dataset.labelled:
        raise InputError(
            f"{dataset.name} {dataset.split} has no ground truth to train on: choose --split train"
        )
    items = partial(step_items, seed=seed, n=len(dataset), batch=batch, rank=rank, world=world)
    items(0)  # raises if there is not one batch
    load = partial(sample, dataset, seed, crop=crop, scale=scale, relative=relative)
    steps = map(items, range(start, stop))
    return load_batches(load, workers, collate_fn=_collate, pin_memory=pin, batch_sampler=steps)


def eval_items(n: int, rank: int, world: int) -> range:
    """The indices that a rank evaluates: each of n once over all ranks."""
    return range(rank, n, world)


def eval_images(
    dataset: DataSet, rank: int, world: int, workers: int
) -> Generator[tuple[int, Tensor, Tensor | None], None, None]:
    """Index, image (3, H, W) uint8 and label (H, W) uint8 or None of each of this rank's images.

    Raises InputError that names the file.
    """
    keys = [(index,) for index in eval_items(len(dataset), rank, world)]
    return load_batches(partial(_eval_item, dataset), workers, sampler=keys, batch_size=None)


def _eval_item(dataset: DataSet, index: int) -> tuple[int, Tensor, Tensor | None]:
    image, label = read(dataset, index)
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return index, planes, None if label is None else torch.from_numpy(label.copy())


@dataclass(frozen=True)
class _Loader(Dataset):
    """Maps a key to load(*key), and returns an InputError as a value.

    If a worker of DataLoader raises an error, only its text reaches the main process.
    """

    load: Callable[..., Any]

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        try:
            return self.load(*key)
        except InputError as e:
            return e


def _collate(rows: list[Any]) -> list[Tensor] | InputError:
    for row in rows:
        if isinstance(row, InputError):
            return row
    return [torch.stack(column) for column in zip(*rows)]


def load_batches(
    load: Callable[..., Any], workers: int, **options: Any
) -> Generator[Any, None, None]:
    """What DataLoader makes of load(*key). Raises an InputError of a worker.

    RuntimeError if a worker is gone, TimeoutError if no batch comes for BATCH_TIMEOUT.
    """
    if workers:
        check_open_files(64 + 32 * workers)
    loader = DataLoader(
        _Loader(load),
        num_workers=workers,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # otherwise it draws from torch's global one
        **options,
    )
    for batch in _bounded(_started(loader), BATCH_TIMEOUT if workers else 0):
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _bounded(batches: Iterator[Any], seconds: int) -> Iterator[Any]:
    """The batches. DataLoader's own timeout does not cover a worker that stops while it sends."""
    lost = (
        f"no batch came for {seconds} s: a process that reads images is stopped or stuck, or "
        "/dev/shm is full: enlarge it (docker: --shm-size), or give --workers 0"
    )
    while True:
        with time_limit(seconds, lost):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _started(loader: DataLoader) -> Iterator[Any]:
    """iter(loader), with signals blocked. The workers inherit that until they set handlers."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return iter(loader)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {*GROUP_SIGNALS, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _prepare_worker(worker: int) -> None:
    """Leave signals to the whole process group, such as Ctrl-C, to the main process.

    It finishes its step, and needs its workers for that. It also ends leftover workers with
    SIGTERM, so that signal is delayed by 30 s (longer than a step). A batch that cannot be sent
    (/dev/shm is full) ends the worker: it would be dropped, and waited for.
    """
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*GROUP_SIGNALS, signal.SIGTERM})
    hook = staticmethod(lambda error, batch: os._exit(1))
    Queue._on_queue_feeder_error = hook  # type: ignore[attr-defined]  # not in typeshed
