"""The files of a data set: which images and labels a split has, and why some make no pair."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

from runtime import InputError, quote

Files = dict[str, Path]  # by name
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
ADE_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}
# Found only in the full ADE20K.
FULL_ADE = ("index_ade*", "ADE20K_*", "images/ADE", "images/*/**/*_seg.png")
NO_DATA = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found")


def is_data(name: str) -> bool:
    """Whether a file or folder of this name may be data: it is not hidden, nor a system's own."""
    return not name.startswith(".") and name not in NO_DATA


def list_names(names: Sequence[Path | str]) -> str:
    """The first 20 names, for a message."""
    text = ", ".join(map(quote, names[:20])) or "none"
    return f"{text} and {len(names) - 20} more" if len(names) > 20 else text


@dataclass(frozen=True)
class Item:
    """The files of an image and its label (None: no ground truth); of a synthetic scene, names."""

    image: Path
    label: Path | None
    stamps: tuple[tuple[int, int] | None, ...] = ()  # of the files, when the set was opened

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.image,) if self.label is None else (self.image, self.label)


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns, or None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def split_files(name: str, root: Path, split: str) -> tuple[Path, tuple[str, ...], Path, str]:
    """Folder and endings, in lower case, of a split's images; folder and ending of its labels.

    Raises InputError for the full ADE20K.
    """
    if name == "cityscapes":
        labels = root / "gtFine" / split
        return root / "leftImg8bit" / split, ("_leftimg8bit.png",), labels, "_gtFine_labelIds.png"
    if name == "ade20k":
        if any(any(root.glob(pattern)) for pattern in FULL_ADE):
            raise InputError(
                f"{quote(root)}: this is the full ADE20K; expected the benchmark of 150 classes: "
                "download ADEChallengeData2016.zip and name its folder by --root"
            )
        folder = ADE_FOLDERS[split]
        return root / "images" / folder, (".jpg",), root / "annotations" / folder, ".png"
    return root / "images" / split, IMAGE_ENDINGS, root / "labels" / split, ".png"


def find_pairs(
    name: str, root: Path, split: str, problems: list[str], left_out: list[Path]
) -> list[Item]:
    """The pairs of one split, sorted by name.

    Adds a line to problems for each image or label alone, and other files to left_out. Raises
    InputError for a folder that is missing or cannot be read, for the full ADE20K, or if there is
    no pair.
    """
    image_dir, endings, label_dir, label_ending = split_files(name, root, split)
    try:
        labelled = split != "test" or (name != "cityscapes" and label_dir.is_dir())
        images, no_images = _find(root, image_dir, endings)
        labels: Files = {}
        no_labels: Files = {}
        if labelled:
            labels, no_labels = _find(root, label_dir, (label_ending.lower(),))
    except OSError as e:
        what = quote(e.filename or root)
        raise InputError(f"{what}: cannot be read ({e.strerror}): check --root") from e
    left_out += no_images.values()
    if name != "cityscapes":  # its folders of labels hold files for other tasks
        left_out += no_labels.values()
    if not images:
        raise InputError(
            f"{quote(image_dir)}: the split {split} is empty; expected images "
            f"*{', *'.join(endings)}; found {list_names(sorted(no_images))}"
        )
    if not labelled:
        return [Item(path, None, (stamp_of(path),)) for _, path in sorted(images.items())]
    if not images.keys() & labels.keys():
        text = _mismatch([*images], [*labels], sorted(no_labels), label_ending)
        raise InputError(f"{quote(label_dir)}: {text}")
    ending = f"{endings[0]} or the like"
    problems += _alone("image without label", images, labels, label_dir, label_ending, no_labels)
    problems += _alone("label without image", labels, images, image_dir, ending, no_images)
    items = []
    for key in sorted(images.keys() & labels.keys()):
        pair = images[key], labels[key]
        items.append(Item(*pair, (stamp_of(pair[0]), stamp_of(pair[1]))))
    return items


def _alone(
    what: str, found: Files, partners: Files, folder: Path, ending: str, others: Files
) -> list[str]:
    """A line for each file without a partner. others: what lies in the partners' folder."""
    lines = []
    for key in sorted(found.keys() - partners.keys()):
        mend = f"add it or remove the {what[:5]}"
        for name, path in others.items():
            if name.rpartition(".")[0] == key:
                mend = f"convert {quote(path)}"
        expected = f"{quote(folder / key)}{ending}"
        lines.append(f"{quote(found[key])}: {what}; expected {expected}: {mend}")
    return lines


def _mismatch(images: list[str], labels: list[str], others: list[str], ending: str) -> str:
    """Why no label has the name of an image, and what to do. others: names beside the labels."""
    if not labels:
        return (
            f"no label; expected *{ending}, one for each image; found {list_names(others)}: make "
            "PNGs from the annotation"
        )
    of_image, of_label = _cores(images), _cores(labels)
    image, label = min(images), min(labels)
    shared = of_image.keys() & of_label.keys()
    if shared:
        core = min(shared)
        image, label = of_image[core], of_label[core]
    stem, name = Path(image).name, Path(label).name
    text = "no label has the name of an image"
    if name.startswith(stem):
        text = f"labels carry the suffix {quote(name.removeprefix(stem))}"
    elif name.endswith(stem):
        text = f"labels carry the prefix {quote(name.removesuffix(stem))}"
    got = f"got the label {quote(label)}{ending} and the image {quote(image)}"
    return f"{text}: {got}; expected {quote(image)}{ending}: rename all labels so"


def _cores(keys: list[str]) -> dict[str, str]:
    """The keys by what is left without the prefix and suffix, not of digits, that all share."""
    names = [key.rpartition("/")[2] for key in keys]
    head = commonprefix(names).rstrip("0123456789")  # noqa: RUF071 (of letters is meant)
    backwards = [name[len(head) :][::-1] for name in names]
    tail = commonprefix(backwards)[::-1].lstrip("0123456789")  # noqa: RUF071
    cores = {}
    for key, name in zip(keys, names):
        core = name[len(head) : len(name) - len(tail)]
        cores[key.removesuffix(name) + core] = key
    return cores


def _missing(root: Path, folder: Path) -> InputError:
    """The error of a missing folder. Looks one level up and down for the root that was meant."""
    top = folder.parent
    mend = "name the data set's folder by --root"
    if top.is_dir():
        mend = "name another split, or add this one"
    below = [found.parent for found in root.glob(f"*/{top.name}")]
    for near in (root.parent, root.parent.parent, *below):
        if near != root and Path(near, top.name, folder.name).is_dir():
            mend = f"give --root {quote(near)}"
            break
    return InputError(
        f"{quote(folder)}: no such folder; expected a root that contains "
        f"{top.name}/{folder.name}: {mend}"
    )


def _find(root: Path, top: Path, endings: tuple[str, ...]) -> tuple[Files, Files]:
    """The files below top: those with one of the endings, by relative name without it, and others.

    Names are in Unicode's form NFC. Leaves out what is no data (see is_data), and links to a folder
    that they lie in. InputError if top is missing.
    """
    if not top.is_dir():
        raise _missing(root, top)
    found: Files = {}
    others: Files = {}
    for here, folders, files in os.walk(top, onerror=_raise, followlinks=True):
        above = [os.path.realpath(top / p) for p in Path(here).relative_to(top).parents]
        if os.path.realpath(here) in above:
            folders.clear()
            continue
        folders[:] = filter(is_data, folders)
        for name in filter(is_data, files):
            path = Path(here, name)
            relative = unicodedata.normalize("NFC", path.relative_to(top).as_posix())
            ending = next((e for e in endings if name.lower().endswith(e)), None)
            if ending is None:
                others[relative] = path
                continue
            key = relative[: -len(ending)]
            if key in found:
                raise InputError(
                    f"{quote(path)}: {quote(found[key])} has this name too; expected one file for "
                    "each name, whatever the ending: rename or remove one"
                )
            found[key] = path
    return found, others


def _raise(error: OSError) -> None:
    raise error  # os.walk would skip a folder that it cannot read
