"""The checkpoint in one place: its fields, how it is written, read and checked, and the network rebuilt from it."""

from __future__ import annotations

import os
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dnl
from data import IGNORE, NAMES, DataSet, open_dataset
from runtime import AMP, InputError, import_factory, quote

VERSION = 1  # of the checkpoint's layout
FIELDS = {
    "model": {str: Tensor},
    "config": {str: (str, int, float)},
    "data": str,
    "root": (str, type(None)),
    "classes": [str],
    "colors": [[int]],
    "amp": str,
}  # what every script reads of a checkpoint, beside its version


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value read from a file is of a kind: types, or [kind] or {kind: kind} of all that is in it."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(has_type(v, kind[0]) for v in value)
    if isinstance(kind, dict):
        ((key, inner),) = kind.items()
        return isinstance(value, dict) and all(
            has_type(k, key) and has_type(v, inner) for k, v in value.items()
        )
    return isinstance(value, kind)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's dict, on the CPU. InputError when it is missing, damaged (the zip's own checksums), of another kind, or
    its fields are not as train.py writes them."""
    ours = "give a .pt file that train.py wrote"
    if not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{quote(path)}: no such checkpoint: {ours}")
    try:
        with zipfile.ZipFile(path) as z, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: one line is enough
            if sum(entry.file_size for entry in z.infolist()) > os.path.getsize(path):
                raise ValueError(
                    "compressed, which torch.save does not"
                )  # and could be without end
            bad = z.testzip()
            if bad:
                raise InputError(
                    f"{quote(path)}: damaged at {quote(bad)}: use the previous one or train again"
                )
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as e:  # a damaged file can fail in any of the layers that parse it
        raise InputError(
            f"{quote(path)}: not a readable checkpoint ({type(e).__name__}): {ours}"
        ) from None
    if (
        not isinstance(checkpoint, dict)
        or not has_type(checkpoint.get("version"), int)
        or checkpoint["version"] != VERSION
    ):
        raise InputError(f"{quote(path)}: not a checkpoint of this version ({VERSION}): {ours}")
    wrong = [
        name
        for name, kind in FIELDS.items()
        if name not in checkpoint or not has_type(checkpoint[name], kind)
    ]
    wrong = wrong or invalid_fields(checkpoint)
    if wrong:
        raise InputError(
            f"{quote(path)}: the fields {', '.join(wrong)} are missing or not as they should be: {ours}"
        )
    return checkpoint


def invalid_fields(checkpoint: dict[str, Any]) -> list[str]:
    """The fields of a checkpoint, all of the right kind, whose values cannot be."""
    c, names, colors = checkpoint["config"], checkpoint["classes"], checkpoint["colors"]
    default = asdict(dnl.PAPER)
    right = {
        "config": c.keys() == default.keys() and all(type(c[k]) is type(default[k]) for k in c),
        "classes": 0 < len(set(names)) == len(names) == c.get("num_classes") <= IGNORE
        and all(map(str.isprintable, names)),
        "colors": len(colors) == len(names)
        and all(len(x) == 3 and 0 <= min(x) <= max(x) <= 255 for x in colors),
        "data": checkpoint["data"] in NAMES,
        "amp": checkpoint["amp"] in AMP,
    }
    return [name for name in right if not right[name]]


def check_weights(model: dict[str, Tensor], blank: nn.Module, size: int) -> None:
    """ValueError where a file of so many bytes cannot have held these weights of the network, or not all are finite."""
    dnl.check_fit(blank, model, "the model")
    own = blank.state_dict()
    wrong = [
        k
        for k, t in model.items()
        if (t.dtype, t.layout, t.device.type) != (own[k].dtype, torch.strided, "cpu")
    ]
    if wrong:
        raise ValueError(f"the model does not fit: of another type: {', '.join(wrong)}")
    if sum(t.nbytes for t in model.values()) > size:
        raise ValueError("the model is larger than its file")
    if not all(t.isfinite().all() for t in model.values()):
        raise ValueError("the model's weights are not all finite")


def finish_save(out: Path) -> None:
    """Make new.pt, where there is one, the last.pt: the end of `save`, and of one that was killed here."""
    if (out / "new.pt").exists():
        if (out / "last.pt").exists():
            os.replace(out / "last.pt", out / "last.prev.pt")
        os.replace(out / "new.pt", out / "last.pt")


def load_network(
    path: str | Path, device: torch.device | str, context: str | None = None
) -> tuple[dnl.Network, dict[str, Any]]:
    """The network of a checkpoint, rebuilt, filled, in eval mode and channels_last on the device; and the checkpoint.

    context: MODULE:FACTORY again, where the checkpoint was trained with one: no field of a file is imported.
    """
    checkpoint = read_checkpoint(path)
    try:
        config, model = dnl.Config(**checkpoint["config"]), checkpoint["model"]
        if ":" in config.context and context != config.context:
            raise InputError(
                f"{quote(path)}: trained with --context {quote(config.context)}; name it again to let it be imported"
            )
        factory = import_factory(config.context)
        with torch.device("meta"):  # sizes alone: those of a broken file could be anything
            blank = dnl.build(config, factory)
        check_weights(model, blank, os.path.getsize(path))
        net = dnl.build(config, factory)
        dnl.load_strict(net, model, "the model")
    except (TypeError, ValueError, RuntimeError) as e:
        raise (
            e if isinstance(e, InputError) else InputError(f"{quote(path)}: {quote(str(e))}")
        ) from None
    return net.to(device, memory_format=torch.channels_last).eval(), checkpoint


def open_like(
    checkpoint: dict[str, Any], data: str | None, root: str | None, split: str, source: str
) -> DataSet:
    """The data set that a checkpoint was trained on, or the named one; InputError when their classes differ."""
    dataset = open_dataset(
        data or checkpoint["data"], root or (None if data else checkpoint["root"]), split
    )
    if list(dataset.classes) != list(checkpoint["classes"]):
        was, now = (
            f"{len(names)} classes ({', '.join(names[:3])}, ...)"
            for names in (checkpoint["classes"], dataset.classes)
        )
        raise InputError(f"{quote(source)}: trained on {was}, the data set has {now}")
    return dataset
