"""The checkpoint: its fields, how it is written, read and checked, and the network rebuilt from it.

A checkpoint is one dict of tensors and plain values, which torch.load reads with weights_only. A
run's folder holds last.pt, the one before it (last.prev.pt), best.pt, and with --ema the averaged
weights, ema.pt.
"""

import os
import pickletools
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dnl
from classes import IGNORE
from data import NAMES, RELATIVE, DataSet, open_dataset
from ranks import find_device, to_device
from runtime import AMP, InputError, import_factory, print_line, quote, regular_file, write

VERSION = 1
FIELDS = {  # what every script reads, beside the version
    "model": {str: Tensor},
    "config": {str: (str, int, float)},
    "data": str,
    "root": (str, type(None)),
    "classes": [str],
    "colors": [[int]],
    "amp": str,
}
RUN_FIELDS = FIELDS | {  # what a training needs to go on
    "optimizer": {str: dict},
    "scaler": dict,
    "settings": {str: object},
    "step": int,
    "sums": Tensor,
    "history": [dict],
}
GLOBALS = {  # what the pickle of such a checkpoint names
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch DoubleStorage",
    "torch FloatStorage",
    "torch LongStorage",
}
REMEDY = "give a .pt file that train.py wrote"

# ---- writing


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all. OSError if the disk is full."""
    write(path, lambda f: torch.save(state, f))


def write_last(out: Path, state: dict[str, Any]) -> None:
    """Write last.pt, keep the one before, and write averaged weights as ema.pt."""
    if state["ema"] is not None:
        # `restore` refuses these settings: no training can go on from averaged weights.
        settings = state["settings"] | {"averaged": True}
        write_checkpoint(out / "ema.pt", state | {"model": state["ema"], "settings": settings})
    write_checkpoint(out / "new.pt", state)
    finish_save(out)


def finish_save(out: Path) -> None:
    """Rename last.pt to last.prev.pt and new.pt to last.pt. Also completes a save killed here."""
    if (out / "new.pt").exists():
        if (out / "last.pt").exists():
            os.replace(out / "last.pt", out / "last.prev.pt")
        os.replace(out / "new.pt", out / "last.pt")


# ---- reading


def read_last(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """A run's newest whole checkpoint; None if there is none. InputError if none is whole."""
    found = [p for p in (out / "last.pt", out / "last.prev.pt") if p.exists()]
    for path in found:
        try:
            return path, read_checkpoint(path, RUN_FIELDS)
        except InputError as e:
            if path == found[-1]:
                raise
            print_line(f"warning: {e}; going on from {found[-1].name}", error=True)
    return None


def read_if_readable(path: Path) -> dict[str, Any]:
    """The checkpoint, or {} if it cannot be read."""
    try:
        return read_checkpoint(path)
    except InputError:
        return {}


def read_checkpoint(path: str | Path, fields: dict[str, Any] = FIELDS) -> dict[str, Any]:
    """A checkpoint's dict, on the CPU. InputError if it is missing, damaged, or lacks a field."""
    checkpoint = read_pickle(path)
    version = checkpoint.get("version") if isinstance(checkpoint, dict) else None
    if type(version) is not int or version != VERSION:
        raise InputError(f"{quote(path)}: not a checkpoint of version {VERSION}: {REMEDY}")
    wrong = []
    for name, kind in fields.items():
        if name not in checkpoint or not has_type(checkpoint[name], kind):
            wrong.append(name)
    wrong = wrong or invalid_fields(checkpoint)
    if wrong:
        raise InputError(f"{quote(path)}: fields missing or wrong: {', '.join(wrong)}: {REMEDY}")
    return checkpoint


def read_pickle(path: str | Path) -> Any:
    """What torch.save wrote. The zip's checksums are verified, which torch.load does not do."""
    best = Path(path, "best.pt")
    if best.is_file():
        raise InputError(f"{quote(path)} is a folder: did you mean {quote(best)}?")
    try:
        regular_file(path)
        with zipfile.ZipFile(path) as z, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles; our line is enough
            if sum(entry.file_size for entry in z.infolist()) > os.path.getsize(path):
                raise ValueError("compressed")  # torch.save does not, and it could be endless
            bad = z.testzip()
            if bad:
                raise InputError(
                    f"{quote(path)}: damaged at {quote(bad)}: use the previous one or train again"
                )
            for name in z.namelist():
                if name.endswith("data.pkl"):
                    check_globals(z.read(name))
        return plain(torch.load(path, map_location="cpu", weights_only=True))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{quote(path)}: no such checkpoint: {REMEDY}") from None
    except Exception as e:  # a damaged file can fail in any layer
        what = type(e).__name__
        raise InputError(f"{quote(path)}: not a readable checkpoint ({what}): {REMEDY}") from None


def check_globals(pickled: bytes) -> None:
    """ValueError if a pickle names more than tensors need. torch allows codecs that take hours."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and argument not in GLOBALS:
            raise ValueError(f"the pickle names {argument}")


def plain(value: Any) -> Any:
    """The value, each OrderedDict a dict: a file can give one attributes that hide methods."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in dict.items(value)}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value has a type; [t] and {k: t} stand for all that a list or a dict holds."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(has_type(v, kind[0]) for v in value)
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return False
        ((key, inner),) = kind.items()
        return all(has_type(k, key) and has_type(v, inner) for k, v in value.items())
    return isinstance(value, kind)


def invalid_fields(checkpoint: dict[str, Any]) -> list[str]:
    """The names of fields that have the right types but impossible values."""
    config, default = checkpoint["config"], asdict(dnl.PAPER)
    names, colors = checkpoint["classes"], checkpoint["colors"]
    count = len(names)
    base = base_of(checkpoint)
    named = 0 < count <= IGNORE and len(set(names)) == count and all(map(str.isprintable, names))
    valid = {
        "config": {k: type(v) for k, v in config.items()}
        == {k: type(v) for k, v in default.items()},
        "classes": named and count == config.get("num_classes"),
        "colors": len(colors) == count and all(is_color(c) for c in colors),
        "data": checkpoint["data"] in NAMES,
        "amp": checkpoint["amp"] in AMP,
        "settings": type(base) is int and 0 <= base <= 8192,  # as --base
    }
    return [name for name, good in valid.items() if not good]


def is_color(c: list[int]) -> bool:
    """Whether c is R, G, B, each 0..255."""
    return len(c) == 3 and min(c) >= 0 and max(c) <= 255


# ---- the network


def load_network(
    path: str | Path, device: torch.device | str = "auto", context: str | None = None
) -> tuple[dnl.Network, dict[str, Any]]:
    """The network of a checkpoint, filled, in eval mode and channels_last on the device; and the
    checkpoint.

    device: as --device. context: MODULE:FACTORY again, if the checkpoint was trained with one. A
    file alone cannot make us import something.
    """
    checkpoint = read_checkpoint(path)
    config, model = dnl.Config(**checkpoint["config"]), checkpoint["model"]
    if ":" in config.context and context != config.context:
        raise InputError(
            f"{quote(path)}: trained with --context {quote(config.context)}: give the flag again, "
            "to have it imported"
        )
    factory = import_factory(config.context)
    try:
        with torch.device("meta"):  # shapes alone: those in a broken file can be huge
            blank = dnl.build(config, factory)
        check_model(model, blank, os.path.getsize(path))
        net = dnl.build(config, factory)
        dnl.load_strict(net, model, "the model")
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"{quote(path)}: {quote(str(e))}") from None
    if isinstance(device, str):
        device = find_device(device)
    to_device(net, device)
    return net.eval(), checkpoint


def check_model(model: Mapping[str, Tensor], blank: nn.Module, size: int) -> None:
    """ValueError if the weights do not fit, are not finite, or exceed the file's size in bytes."""
    dnl.check_fit(blank, model, "the model")
    own = blank.state_dict()
    for name, t in model.items():
        if (t.dtype, t.layout, t.device.type) != (own[name].dtype, torch.strided, "cpu"):
            raise ValueError(f"the model does not fit: {name} is of another type")
    if sum(t.nbytes for t in model.values()) > size:
        raise ValueError("the model is larger than its file")
    if not all(model[name].isfinite().all() for name in weight_names(blank)):
        raise ValueError("the model's weights are not all finite")


def weight_names(net: nn.Module) -> list[str]:
    """Names of what must be finite: parameters and BatchNorm's statistics. A mask may hold -inf."""
    buffers = [name for name, _ in net.named_buffers()]
    statistics = [name for name in buffers if name.endswith(("running_mean", "running_var"))]
    return [name for name, _ in net.named_parameters()] + statistics


def base_of(checkpoint: dict[str, Any], asked: int | None = None) -> int:
    """The short side of images at a scale of 1, in pixels; 0: images stay as they are.

    asked: --base. Otherwise the crop of a training that scaled images by their short side.
    """
    if asked is not None:
        return asked
    settings = checkpoint.get("settings")
    if isinstance(settings, dict) and settings.get("data") in RELATIVE:
        return settings.get("crop", -1)
    return 0


def open_like(
    checkpoint: dict[str, Any], data: str | None, root: str | None, split: str, source: str
) -> DataSet:
    """The data set of a checkpoint, or the named one. InputError if the classes differ."""
    if data is None:
        data, root = checkpoint["data"], root or checkpoint["root"]
    dataset = open_dataset(data, root, split)
    was, now = checkpoint["classes"], list(dataset.classes)
    if was != now:
        text = f"trained on {name_classes(was)}, the data set has {name_classes(now)}"
        for number, (a, b) in enumerate(zip(was, now)):
            if a != b:
                text += f"; class {number} is {a} there and {b} here"
                break
        raise InputError(f"{quote(source)}: {text}: give its data set, or train on this one")
    return dataset


def name_classes(names: Sequence[str]) -> str:
    """3 classes (other, road, car), the first three by name."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} classes ({', '.join(names[:3])}{more})"
