"""The paper's recipe as values and functions: settings of each data set, flags, schedule, losses, and what makes two runs
equal."""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import dnl
from data import IGNORE, DataSet
from runtime import AMP, InputError, Parser, import_factory, quote


@dataclass(frozen=True)
class Settings:
    """Training settings of a data set. batch: total over all ranks. relative: the scale is that of the short side to
    the crop (ADE20K) and not that of the image. channels: C of the paper, of the reduced feature."""

    lr: float
    weight_decay: float
    crop: int
    batch: int
    epochs: int
    backbone: str
    channels: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    relative: bool = False


SETTINGS = {  # cityscapes and ade20k: the paper's, section IV
    "synthetic": Settings(3e-2, 5e-4, 112, 8, 4, "resnet18", 128, (0.8, 1.25)),
    "cityscapes": Settings(1e-2, 5e-4, 768, 8, 240, "resnet101"),
    "ade20k": Settings(2e-2, 1e-4, 608, 16, 240, "resnet101", relative=True),
    "folder": Settings(1e-2, 5e-4, 512, 8, 100, "resnet50"),
}


def rate(step: int, total: int, power: float = 0.9, warmup: int = 0) -> float:
    """The factor of the learning rate at a step: (1 - step / total) ** power (Section IV-A), rising linearly over the first
    `warmup` steps."""
    return (1 - step / total) ** power * min(1.0, (step + 1) / (warmup + 1))


def pixel_losses(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of each pixel, (B, H, W) fp32, 0 where the label (B, H, W) is 255. logits (B, n, h, w), resized here.

    Image by image, each made again in the backward: full-size logits of one image are all that is ever in memory.
    weight: (n,) of the classes.
    """

    def one(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            dnl.resize(dnl.at_least_fp32(x), y.shape[1:]),
            y.long(),
            weight,
            ignore_index=IGNORE,
            reduction="none",
        )

    return torch.cat(
        [
            recomputed(one, x, y, use_reentrant=False, preserve_rng_state=False)
            for x, y in zip(logits.split(1), label.split(1))
        ]
    )


def ohem_mask(pixels: Tensor, threshold: float = 0.7, at_least: int = 100_000) -> Tensor:
    """OHEM: a mask of the pixels whose true class has a probability below the threshold, the ohem_mask `at_least` in any case."""
    known = pixels.flatten()[pixels.flatten() > 0]
    if known.numel() <= at_least:
        return pixels > 0
    return pixels >= known.topk(at_least).values[-1].clamp(max=-math.log(threshold))


def losses(
    outputs: Sequence[Tensor], label: Tensor, labelled: float, weight: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each output, (len(outputs),): this rank's sum divided by `labelled`, the labelled pixels of the
    whole step over all ranks (weighted, if weights are given). So the sum over ranks is the mean over the batch."""
    return torch.stack([pixel_losses(o, label, weight).sum() for o in outputs]) / max(
        labelled, 1e-9
    )


OPERATIONAL = (
    "root",
    "out",
    "resume",
    "workers",
    "log_every",
    "save_every",
    "recompute",
    "compile",
    "cache",
    "tensorboard",
    "skip_nonfinite",
)  # these leave the result alone


def training_parser() -> Parser:
    """The flags. Those marked * default to the paper's settings for the data set."""
    p = Parser(
        description="Train Denoised Non-Local. Defaults are in brackets; flags marked * have the paper's, or fitting "
        "ones, for --data."
    )
    p.add_argument("--data", choices=list(SETTINGS), default="synthetic", help="(%(default)s)")
    p.add_argument("--root", help="folder of the data set")
    p.add_argument(
        "--cache", metavar="DIR", help="keep a decoded copy of the data set there, for speed"
    )
    p.add_argument(
        "--split", choices=["train", "trainval"], default="train", help="to train on (%(default)s)"
    )
    p.add_argument("--out", help="folder of the run (runs/DATA)")
    p.add_argument(
        "--resume",
        default="auto",
        metavar="FILE",
        help="checkpoint to go on from (auto: last.pt of --out, if any)",
    )
    g = p.add_argument_group("network")
    g.add_argument("--preset", choices=list(dnl.PRESETS), default="paper", help="(%(default)s)")
    g.add_argument("--backbone", choices=list(dnl.LAYOUTS), help="*")
    g.add_argument("--channels", type=int, help="* of F")
    g.add_argument(
        "--context",
        default="dnl",
        help="dnl, nl, none, or MODULE:FACTORY of your own (%(default)s)",
    )
    g.add_argument("--no-gr", action="store_true", help="without Global Rectifying")
    g.add_argument("--no-lr", action="store_true", help="without Local Retention")
    g.add_argument(
        "--weights",
        default="none",
        help="of the backbone: imagenet (downloaded), none, or a file of torchvision or train.py "
        "(%(default)s)",
    )
    optimisation_flags(p)
    g = p.add_argument_group("machine")
    g.add_argument(
        "--workers", type=int, default=2, help="processes that read images, per rank (%(default)s)"
    )
    g.add_argument(
        "--compile", action="store_true", help="torch.compile the network; SyncBN is not compiled"
    )
    g.add_argument(
        "--recompute",
        action="store_true",
        help="make activations again in the backward: less memory, slower",
    )
    g.add_argument(
        "--skip-nonfinite",
        type=int,
        default=0,
        metavar="N",
        help="steps to leave out before giving up (%(default)s)",
    )
    g.add_argument("--tensorboard", action="store_true")
    g.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="(%(default)s)")
    g.add_argument(
        "--eval-every",
        type=int,
        default=1,
        metavar="EPOCHS",
        help="validate; the last epoch always (%(default)s)",
    )
    g.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="also between epochs")
    return p


def optimisation_flags(p: Parser) -> None:
    """The paper's recipe, and what goes beyond it."""
    g = p.add_argument_group("optimisation")
    for name, kind, text in (
        ("crop", int, "pixels"),
        ("batch", int, "images a step, over all ranks"),
        ("epochs", int, ""),
        ("lr", float, ""),
        ("weight-decay", float, ""),
    ):
        g.add_argument(f"--{name}", type=kind, help=f"* {text}")
    g.add_argument(
        "--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="* range of the random scale"
    )
    g.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="parts a rank's batch is computed in, to save memory (%(default)s)",
    )
    g.add_argument("--power", type=float, default=0.9, help="of the poly schedule (%(default)s)")
    g.add_argument("--momentum", type=float, default=0.9, help="(%(default)s)")
    g.add_argument(
        "--aux-weight", type=float, default=1.0, help="lambda_1 = lambda_2 of eq. 5 (%(default)s)"
    )
    g.add_argument(
        "--coarse-weight",
        type=float,
        default=0.0,
        help="of a loss on GR's P, not in eq. 5 (%(default)s)",
    )
    g.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    g.add_argument("--amp", choices=["auto", *AMP], default="auto", help="precision (%(default)s)")
    g.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits twice, also on a GPU; slower there",
    )
    g = p.add_argument_group("beyond the paper, off by default")
    g.add_argument(
        "--ohem",
        action="store_true",
        help="the head's loss on hard pixels only (p < 0.7, at least 100,000 a part)",
    )
    g.add_argument("--class-weights", metavar="FILE", help="what `check.py --json` printed")
    g.add_argument(
        "--ema",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="average the weights into ema.pt, e.g. 0.999",
    )
    g.add_argument("--clip", type=float, default=0.0, metavar="NORM", help="of the gradient")
    g.add_argument("--warmup", type=int, default=0, metavar="STEPS")
    g.add_argument(
        "--backbone-lr",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="of the backbone's rate (%(default)s)",
    )
    g.add_argument(
        "--freeze-bn", action="store_true", help="keep the backbone's BatchNorm statistics"
    )


def parse_training(argv: Sequence[str] | None, world: int) -> argparse.Namespace:
    """The arguments, those that depend on --data filled in. InputError for what cannot be trained with."""
    args = training_parser().parse_args(argv)
    long = args.epochs is None and args.data == "cityscapes" and args.split == "trainval"
    for name, value in asdict(SETTINGS[args.data]).items():
        if getattr(args, name, value) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    args.epochs *= 2 if long else 1  # 480 epochs for the test set (Section IV-A)
    args.out = Path(args.out or f"runs/{args.data}")
    least = dict.fromkeys(
        ("crop", "batch", "accumulate", "epochs", "channels", "log_every", "eval_every"), 1
    )
    most = {"crop": 8192, "channels": 8192, "seed": 2**63 - 1}
    for name in (
        *least,
        "lr",
        "weight_decay",
        "power",
        "momentum",
        "aux_weight",
        "coarse_weight",
        "seed",
        "clip",
        "warmup",
        "backbone_lr",
        "workers",
        "skip_nonfinite",
        "save_every",
    ):
        low, high = least.get(name, 0), most.get(name, 10**9)
        if not low <= getattr(args, name) <= high:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: expected {low} or more, up to {high}"
            )
    if not 0 <= args.ema < 1:
        raise InputError(f"--ema {args.ema}: expected 0 (off) or a decay below 1, such as 0.999")
    if args.context not in ("dnl", "nl", "none") and ":" not in args.context:
        raise InputError(f"--context {args.context}: expected dnl, nl, none, or MODULE:FACTORY")
    if args.context != "dnl" and (args.no_gr or args.no_lr):
        raise InputError(
            f"--no-gr and --no-lr are parts of --context dnl, which --context {args.context} has not: leave them out"
        )
    if args.compile and args.recompute:
        raise InputError(
            "--compile and --recompute: torch.compile cannot follow the second forward: leave one out"
        )
    if not 0 < args.scale[0] <= args.scale[1] <= 100:
        raise InputError(f"--scale {args.scale[0]} {args.scale[1]}: expected 0 < MIN <= MAX <= 100")
    if args.tensorboard:
        try:
            import_module("torch.utils.tensorboard")
        except ImportError:
            raise InputError(
                "--tensorboard: the package tensorboard is not installed: pip install tensorboard, or do without"
            ) from None
    if args.batch % (world * args.accumulate):
        raise InputError(
            f"--batch {args.batch} is the total over all ranks, and {world} ranks in {args.accumulate} parts do not "
            f"divide it: take a multiple of {world * args.accumulate}"
        )
    return args


def recipe_warnings(args: argparse.Namespace) -> list[str]:
    """What of the paper's recipe these arguments leave, where it is known to move the score."""
    paper = SETTINGS[args.data]
    if args.data not in ("cityscapes", "ade20k"):
        return []
    return [
        text
        for text, told in (
            (
                f"the paper's total batch is {paper.batch}, this one {args.batch}",
                args.batch != paper.batch,
            ),
            ("the paper starts from ImageNet weights: --weights imagenet", args.weights == "none"),
        )
        if told
    ]


def configuration(args: argparse.Namespace, num_classes: int) -> dnl.Config:
    """The network that the arguments ask for."""
    return replace(
        dnl.PRESETS[args.preset],
        num_classes=num_classes,
        backbone=args.backbone,
        context=args.context,
        gr=not args.no_gr,
        lr=not args.no_lr,
        channels=args.channels,
        p_supervised=args.coarse_weight > 0,
    )


def check_batch(config: dnl.Config, args: argparse.Namespace, together: int) -> None:
    """InputError before training where a BatchNorm would see one value a channel: a forward of sizes alone, on the meta device.

    together: images that one BatchNorm sees at a time.
    """
    with torch.device("meta"):
        net = set_mode(dnl.build(config, import_factory(config.context)), args.freeze_bn)
        try:
            net(torch.empty(together, 3, args.crop, args.crop), full_size=False)
        except ValueError as e:
            raise InputError(
                f"--batch {args.batch} --accumulate {args.accumulate} leaves {together} image(s) of {args.crop}x"
                f"{args.crop} to a BatchNorm ({e}): raise --batch or --crop, or lower --accumulate"
            ) from None


def read_weights(path: str, classes: Sequence[str]) -> Tensor:
    """The weights of the classes (n,) that `check.py --json` printed into a file."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("no such file")
        report = json.loads(Path(path).read_text())
        splits, names = report["splits"], report["classes"]
        weights = torch.tensor(
            splits.get("train", next(iter(splits.values())))["weights"], dtype=torch.float32
        )
    except Exception as e:  # what is no such file can fail anywhere
        raise InputError(
            f"{quote(path)}: no class weights ({type(e).__name__} {e}): expected what `check.py --json` prints"
        ) from None
    if (
        names != [*classes]
        or weights.shape != (len(classes),)
        or not ((weights > 0) & weights.isfinite()).all()
    ):
        raise InputError(
            f"{quote(path)}: class weights {tuple(weights.shape)} of other classes, or not above 0 and finite: run "
            "check.py on this data set"
        )
    return weights


def settings_of(
    args: argparse.Namespace, data: DataSet, class_weights: Tensor | None
) -> dict[str, Any]:
    """The arguments that shape the result, and what stands for the files: the number and names of images, the classes, the weights."""
    own = {k: v for k, v in vars(args).items() if k not in OPERATIONAL}
    top = os.path.join(Path(args.root or ""), "")  # as the names have it, however --root is spelt
    names = "\n".join(str(item.image).removeprefix(top) for item in data.items)
    crc = zlib.crc32(names.encode("utf-8", "surrogateescape"))
    weights = (
        None if class_weights is None else class_weights.tolist()
    )  # not the name of their file
    return own | {
        "images": len(data),
        "names": f"{crc:08x}",
        "classes": list(data.classes),
        "class_weights": weights,
    }


def set_mode(net: dnl.Network, freeze_bn: bool) -> dnl.Network:
    """Training mode; with freeze_bn the backbone's BatchNorms keep to their running statistics."""
    net.train()
    for m in net.backbone.modules():
        if freeze_bn and isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    return net


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's generator in a step: dropout is a function of these, so no random state needs to be kept."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
