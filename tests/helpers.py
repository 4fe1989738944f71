"""What the tests of several rooms share: files and pictures, runs of a script in this process, in
its copies and in others.
"""

import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import check
import checkpoint
import data
import dnl
import predict
import runtime
import train
from classes import palette

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng
IMAGE, LABEL = "images/train/a 1.png", "labels/train/a 1.png"
TINY = [
    "--data",
    "folder",
    "--backbone",
    "resnet18",
    "--channels",
    "16",
    "--crop",
    "48",
    "--batch",
    "4",
    "--epochs",
    "2",
    "--workers",
    "0",
    "--log-every",
    "1",
    "--amp",
    "off",
]
CPU = torch.device("cpu")


def gap(a, b):
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def run_python(code, folder):
    """A fresh interpreter in `folder`, with nothing of this project on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )


def status_of(main, *args):
    """The exit status of a script whose main this is."""
    with pytest.raises(SystemExit) as e:
        runtime.run_script(lambda: main([*map(str, args)]))
    return e.value.code


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)


def noise(h, w, seed=0, channels=3):
    return RNG(seed).integers(0, 256, (h, w, channels), np.uint8)


def png_of_bits(values, depth, kind):
    """A PNG of samples (H, W, channels) of `depth` bit; kind 0 is grey, 2 is RGB.

    Pillow does not write 2 and 4 bit, nor 3 x 16.
    """
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=3)[
        ..., 16 - depth :
    ]
    rows = np.packbits(bits.reshape(len(values), -1), axis=1)
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, 0)
    chunks = (
        b"IHDR" + size,
        b"IDAT" + zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes()),
        b"IEND",
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def report_of(capsys, *args):
    status = check.main([*map(str, args), "--workers", "0", "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def batches(dataset, **options):
    """The training batches of a data set, with small options by default."""
    return list(
        data.train_batches(
            dataset,
            **{
                "seed": 3,
                "batch": 6,
                "start": 0,
                "stop": 4,
                "rank": 0,
                "world": 1,
                "crop": 32,
                "workers": 0,
                **options,
            },
        )
    )


def make_street(root):
    """A folder data set of 3 classes: 12 training images of 40x56, 5 validation images of odd
    sizes, with ignored pixels.
    """
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 5)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(n):
            size = (40, 56) if split == "train" else (33 + i, 47 - i)
            label = (np.add.outer(np.arange(size[0]) // 9, np.arange(size[1]) // 11) + i) % 3
            image = np.array([[200, 60, 40], [60, 180, 80], [50, 70, 220]])[label] + rng.integers(
                -30, 30, (*size, 3)
            )
            label[rng.random(size) < 0.1 * i / n] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
                root / "images" / split / f"{i}.png"
            )
            Image.fromarray(label.astype(np.uint8)).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("red 200 60 40\ngreen 60 180 80\nblue 50 70 220\n")
    return root


class Stub(nn.Module):
    """A backbone of 240 weights in the place of a ResNet's 11 million: a checkpoint of 100 kB."""

    def __init__(self, name, **options):
        super().__init__()
        self.conv, self.bn, self.channels, self.recompute = (
            nn.Conv2d(3, 8, 3, 8, 1),
            nn.BatchNorm2d(8),
            (8, 8, 8),
            False,
        )
        if name not in dnl.LAYOUTS:
            raise ValueError(f"backbone {name!r}")

    def forward(self, image):
        return (F.relu(self.bn(self.conv(image))),) * 3


def trained(out, street, *flags):
    """Train the tiny network in this process; the exit status."""
    return train.main([*TINY, "--root", str(street), "--out", str(out), *map(str, flags)])


def forked(main, *argv, said=os.devnull, rank=0, world=1, port=0):
    """main(argv) in a process of its own, started at once: a copy of this one, on one thread, with
    torchrun's environment. What it prints goes to the file `said`.
    """

    def work():
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        with open(said, "w", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            runtime.run_script(lambda: main([*map(str, argv)]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(world, main, *argv, said):
    """main(argv) on that many ranks: the exit status and the printed text of each."""
    port = free_port()
    processes = [
        forked(main, *argv, said=f"{said}{r}", rank=r, world=world, port=port) for r in range(world)
    ]
    for p in processes:
        p.join(100)
        p.kill()  # what hangs
    return [p.exitcode for p in processes], [Path(f"{said}{r}").read_text() for r in range(world)]


def script(name, *args):
    """Run a script as a user does: (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout, done.stderr


def same_state(a, b):
    """Whether two checkpoints hold the same weights, optimizer state and log, bit for bit."""
    a, b = (torch.load(p, weights_only=True) for p in (a, b))
    tensors = [(x[k], y[k]) for x, y in ((a["model"], b["model"]),) for k in x]
    tensors += [(x, b["ema"][k]) for k, x in (a["ema"] or {}).items()]
    tensors += [
        (x["momentum_buffer"], b["optimizer"]["state"][k]["momentum_buffer"])
        for k, x in a["optimizer"]["state"].items()
    ]
    return (
        all(torch.equal(x, y) for x, y in tensors)
        and a["history"] == b["history"]
        and a["step"] == b["step"]
    )


def same_run(a, b):
    """Whether two runs ended with the same bits and the same log."""
    return (
        same_state(a / "last.pt", b / "last.pt")
        and (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    )


def stop_at(stops, monkeypatch):
    """Send SIGTERM as a step of the list `stops` begins, once for each."""
    step = train.train_step

    def stopping(run, *rest):
        if run.step in stops:
            stops.remove(run.step)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *rest)

    monkeypatch.setattr(train, "train_step", stopping)


def run_whole_and_in_parts(folder, street, monkeypatch, *flags):
    """Train without a stop, and stopped by a signal within an epoch, twice; the runs are equal."""
    assert trained(folder / "whole", street, *flags) == 0
    stop_at([1, 3], monkeypatch)
    assert [trained(folder / "parts", street, *flags) for _ in range(3)] == [143, 143, 0]
    assert same_run(folder / "whole", folder / "parts")


def make_checkpoint(path, classes, data="folder", root=None, context="dnl"):
    """Write the checkpoint of a small network with random weights."""
    torch.manual_seed(0)
    config = replace(
        dnl.PAPER, num_classes=len(classes), backbone="resnet18", channels=32, context=context
    )
    net = dnl.build(config)
    if context == "dnl":
        nn.init.constant_(net.context.gamma, 0.5)
    nn.init.normal_(net.head[-1].weight, std=3.0)  # several classes in an image
    torch.save(
        {
            "version": checkpoint.VERSION,
            "model": net.state_dict(),
            "config": asdict(config),
            "data": data,
            "root": root,
            "classes": list(classes),
            "amp": "off",
            "colors": [list(c) for c in palette(len(classes))],
        },
        path,
    )
    return str(path)


def blocks(h, w, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (h // 8 + 2, w // 8 + 2, 3), np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:h, :w].copy()


def predicted(*args):
    return predict.main([*map(str, args), "--workers", "0"])


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
