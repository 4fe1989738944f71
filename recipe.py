"""The paper's recipe as values and functions.

Settings of each data set, flags, schedule, losses, and what makes two runs equal.
"""

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
from classes import IGNORE
from data import DataSet
from runtime import AMP, InputError, Parser, import_factory, quote, regular_file

# ---- settings


@dataclass(frozen=True)
class Settings:
    """Training settings of a data set.

    batch: images a step, over all ranks. channels: C of the paper, of the reduced feature F.
    """

    lr: float
    weight_decay: float
    crop: int
    batch: int
    epochs: int
    backbone: str
    channels: int = 512
    scale: tuple[float, float] = (0.5, 2.0)


SETTINGS = {  # cityscapes and ade20k: Section IV-A of the paper
    "synthetic": Settings(3e-2, 5e-4, 112, 8, 4, "resnet18", 128, (0.8, 1.25)),
    "cityscapes": Settings(1e-2, 5e-4, 768, 8, 240, "resnet101"),
    "ade20k": Settings(2e-2, 1e-4, 608, 16, 240, "resnet101"),
    "folder": Settings(1e-2, 5e-4, 512, 8, 100, "resnet50"),
}

# ---- flags

# A run may go on with other values of these.
OPERATIONAL = (
    "root out resume workers log_every save_every recompute compile cache tensorboard device"
)
POSITIVE = "crop batch accumulate epochs channels log_every eval_every"
NOT_NEGATIVE = (
    "lr weight_decay power momentum aux_weight coarse_weight seed clip warmup backbone_lr "
    "workers save_every"
)
MOST = {"crop": 8192, "channels": 8192, "seed": 2**63 - 1}  # 10**9 for the others


def training_parser() -> Parser:
    """The flags of train.py."""
    p = Parser(
        description="Train Denoised Non-Local. Defaults are in brackets. Flags marked * default "
        "to the settings for --data: the paper's for cityscapes and ade20k."
    )
    p.add_argument("--data", choices=list(SETTINGS), default="synthetic", help="(%(default)s)")
    p.add_argument("--root", help="folder of the data set")
    p.add_argument("--cache", metavar="DIR", help="keep a decoded copy there, for speed")
    p.add_argument("--split", choices=["train", "trainval"], default="train", help="(%(default)s)")
    p.add_argument("--out", help="folder of the run (runs/DATA)")
    p.add_argument("--init", metavar="FILE", help="checkpoint whose network to start from")
    p.add_argument(
        "--resume",
        default="auto",
        metavar="FILE",
        help="checkpoint to go on from (last.pt of --out)",
    )
    network_flags(p)
    optimisation_flags(p)
    extra_flags(p)
    g = p.add_argument_group("machine")
    g.add_argument("--workers", type=int, default=2, help="readers of a rank (%(default)s)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda[:N], mps (%(default)s)")
    g.add_argument("--compile", action="store_true", help="torch.compile the network")
    g.add_argument(
        "--recompute", action="store_true", help="compute activations twice: less memory, slower"
    )
    g.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files")
    g.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="(%(default)s)")
    g.add_argument(
        "--eval-every", type=int, default=1, metavar="EPOCHS", help="validate (%(default)s)"
    )
    g.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="between epochs")
    return p


def network_flags(p: Parser) -> None:
    """What is trained."""
    g = p.add_argument_group("network")
    g.add_argument("--preset", choices=list(dnl.PRESETS), default="paper", help="(%(default)s)")
    g.add_argument("--backbone", choices=list(dnl.LAYOUTS), help="*")
    g.add_argument("--channels", type=int, help="* of F")
    g.add_argument("--context", default="dnl", help="dnl, nl, none, MODULE:NAME (%(default)s)")
    g.add_argument("--no-gr", action="store_true", help="without Global Rectifying")
    g.add_argument("--no-lr", action="store_true", help="without Local Retention")
    g.add_argument(
        "--p-from",
        choices=dnl.P_FROM,
        help="P of GR: a convolution of F, or the res3 head's softmax or logits (the preset's)",
    )
    g.add_argument(
        "--weights",
        default="none",
        help="of the backbone: imagenet (downloaded), none, a file of torchvision or train.py "
        "(%(default)s)",
    )


def optimisation_flags(p: Parser) -> None:
    """The paper's recipe."""
    g = p.add_argument_group("optimisation")
    g.add_argument("--crop", type=int, help="* pixels")
    g.add_argument("--batch", type=int, help="* images a step, over all ranks")
    g.add_argument("--epochs", type=int, help="*")
    g.add_argument("--lr", type=float, help="*")
    g.add_argument("--weight-decay", type=float, help="*")
    g.add_argument("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="* its range")
    g.add_argument("--accumulate", type=int, default=1, help="parts of a batch (%(default)s)")
    g.add_argument("--power", type=float, default=0.9, help="of the schedule (%(default)s)")
    g.add_argument("--momentum", type=float, default=0.9, help="(%(default)s)")
    g.add_argument(
        "--aux-weight", type=float, default=1.0, help="lambda_1, lambda_2 of eq. 5 (%(default)s)"
    )
    g.add_argument(
        "--coarse-weight",
        type=float,
        default=0.0,
        help="of a loss on P, not in eq. 5 (%(default)s)",
    )
    g.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    g.add_argument("--amp", choices=["auto", *AMP], default="auto", help="(%(default)s)")
    g.add_argument("--deterministic", action="store_true", help="the same bits twice; slower")


def extra_flags(p: Parser) -> None:
    """What goes beyond the paper."""
    g = p.add_argument_group("beyond the paper, off by default")
    g.add_argument("--ohem", action="store_true", help="the head learns from hard pixels only")
    g.add_argument("--class-weights", metavar="FILE", help="what `check.py --json` printed")
    g.add_argument(
        "--ema", type=float, default=0.0, metavar="DECAY", help="averaged weights, ema.pt"
    )
    g.add_argument("--clip", type=float, default=0.0, metavar="NORM", help="of the gradient")
    g.add_argument("--warmup", type=int, default=0, metavar="STEPS", help="of the rate")
    g.add_argument("--backbone-lr", type=float, default=1.0, metavar="FACTOR", help="(1.0)")
    g.add_argument("--freeze-bn", action="store_true", help="keep the backbone's statistics")


def parse_training(argv: Sequence[str] | None, world: int) -> argparse.Namespace:
    """The arguments of train.py, with the defaults of --data. InputError if they do not fit."""
    args = training_parser().parse_args(argv)
    settings = asdict(SETTINGS[args.data])
    if args.data == "cityscapes" and args.split == "trainval":
        settings["epochs"] *= 2  # 480 for the test set (Section IV-A)
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.scale = list(args.scale)  # as argparse gives it: settings are compared
    args.out = Path(args.out or f"runs/{args.data}")
    if args.p_from == dnl.PRESETS[args.preset].p_from:
        args.p_from = None  # the same run as without the flag
    check_ranges(args)
    check_context(args)
    check_combinations(args, world)
    return args


def check_ranges(args: argparse.Namespace) -> None:
    """InputError for a number out of range."""
    for name in f"{POSITIVE} {NOT_NEGATIVE}".split():
        least = 1 if name in POSITIVE.split() else 0
        most = MOST.get(name, 10**9)
        value = getattr(args, name)
        if not least <= value <= most:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value}: expected {least} or more, up to {most}")
    if not 0 <= args.ema < 1:
        raise InputError(f"--ema {args.ema}: expected 0 (off) or a decay below 1, such as 0.999")
    low, high = args.scale
    if not 0 < low <= high <= 100:
        raise InputError(f"--scale {low} {high}: expected 0 < MIN <= MAX <= 100")


def check_context(args: argparse.Namespace) -> None:
    """InputError for an unknown context, and for flags about parts that it does not have."""
    if args.context not in ("dnl", "nl", "none") and ":" not in args.context:
        raise InputError(f"--context {args.context}: expected dnl, nl, none, or MODULE:FACTORY")
    if args.context != "dnl" and (args.no_gr or args.no_lr):
        raise InputError(
            f"--no-gr and --no-lr switch parts of --context dnl off, and this is --context "
            f"{args.context}: leave them out"
        )
    if args.p_from and (args.context != "dnl" or args.no_gr):
        raise InputError("--p-from is for --context dnl with GR: leave it out")


def check_combinations(args: argparse.Namespace, world: int) -> None:
    """InputError for flags that do not go together, or not with this number of ranks."""
    if args.init is not None and args.weights != "none":
        raise InputError("--init and --weights both fill the backbone: leave one out")
    if args.compile and args.recompute:
        raise InputError("--compile and --recompute do not work together: leave one out")
    if args.tensorboard:
        try:
            import_module("torch.utils.tensorboard")
        except ImportError:
            raise InputError(
                "--tensorboard: the package is not installed: pip install tensorboard, or leave "
                "it out"
            ) from None
    parts = world * args.accumulate
    if args.batch % parts:
        raise InputError(
            f"--batch {args.batch} is the total over all ranks, and {world} ranks in "
            f"{args.accumulate} parts do not divide it: take a multiple of {parts}"
        )


def recipe_warnings(args: argparse.Namespace) -> list[str]:
    """How the arguments leave the paper's recipe in ways that are known to move the score."""
    warnings = []
    if args.data in ("cityscapes", "ade20k"):
        batch = SETTINGS[args.data].batch
        if args.batch != batch:
            warnings.append(f"the paper's total batch is {batch}, this one {args.batch}")
        if args.weights == "none":
            warnings.append("the paper starts from ImageNet weights: --weights imagenet")
    return warnings


# ---- the network and the settings


def configuration(args: argparse.Namespace, num_classes: int) -> dnl.Config:
    """The network that the arguments ask for."""
    preset = dnl.PRESETS[args.preset]
    return replace(
        preset,
        num_classes=num_classes,
        backbone=args.backbone,
        context=args.context,
        gr=not args.no_gr,
        lr=not args.no_lr,
        channels=args.channels,
        p_from=args.p_from or preset.p_from,
        p_supervised=args.coarse_weight > 0,
    )


def settings_of(
    args: argparse.Namespace, data: DataSet, class_weights: Tensor | None
) -> dict[str, Any]:
    """What must be equal for a run to go on: flags, number and names of images, classes."""
    settings = {k: v for k, v in vars(args).items() if k not in OPERATIONAL.split()}
    top = os.path.join(Path(args.root or ""), "")  # as in the names, however --root is spelt
    names = "\n".join(str(item.image).removeprefix(top) for item in data.items)
    crc = zlib.crc32(names.encode("utf-8", "surrogateescape"))
    settings |= {"images": len(data), "names": f"{crc:08x}", "classes": list(data.classes)}
    settings["class_weights"] = None  # the weights, not the name of their file
    if class_weights is not None:
        settings["class_weights"] = class_weights.tolist()
    return settings


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed for dropout of a step on a rank. So no random state is saved."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def set_mode(net: dnl.Network, freeze_bn: bool) -> dnl.Network:
    """Training mode. freeze_bn: the backbone's BatchNorms keep their running statistics."""
    net.train()
    for m in net.backbone.modules():
        if freeze_bn and isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    return net


def check_network(config: dnl.Config, args: argparse.Namespace, images: int) -> None:
    """InputError if a BatchNorm would see one value a channel, or a parameter has no gradient.

    images: how many a BatchNorm sees at a time. A step on the meta device: shapes, no arithmetic.
    """
    with torch.device("meta"):
        net = set_mode(dnl.build(config, import_factory(config.context)), args.freeze_bn)
        try:
            outputs = net(torch.empty(images, 3, args.crop, args.crop), full_size=False)
        except ValueError as e:
            raise InputError(
                f"--batch {args.batch} --accumulate {args.accumulate} --crop {args.crop} leaves "
                f"too little to a BatchNorm ({e}): raise --batch or --crop, or lower --accumulate"
            ) from None
        torch.stack([o.sum() for o in outputs]).sum().backward()
    spare = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    if spare:
        raise InputError(
            f"--context {args.context}: no output depends on {', '.join(spare)}: use these "
            "parameters in forward, or remove them"
        )


# ---- schedule and losses


def rate(step: int, total: int, power: float = 0.9, warmup: int = 0) -> float:
    """The poly schedule: the learning rate's factor (1 - step / total) ** power (Section IV-A).

    It rises linearly over the first `warmup` steps.
    """
    return (1 - step / total) ** power * min(1.0, (step + 1) / (warmup + 1))


def pixel_losses(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of each pixel, (B, H, W) fp32; 0 for label 255.

    logits (B, n, h, w) are resized to the label (B, H, W). weight: (n,), of the classes. Images go
    one at a time and are computed again in the backward, so the full-size logits of only one image
    are in memory.
    """

    def one(x: Tensor, y: Tensor) -> Tensor:
        x = dnl.resize(dnl.at_least_fp32(x), (y.shape[1], y.shape[2]))
        return F.cross_entropy(x, y.long(), weight, ignore_index=IGNORE, reduction="none")

    rows = []
    for x, y in zip(logits.split(1), label.split(1)):
        rows.append(recomputed(one, x, y, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(rows)


def ohem_mask(pixels: Tensor, threshold: float = 0.7, at_least: int = 100_000) -> Tensor:
    """The hard pixels of `pixel_losses`: the true class has a probability below the threshold.

    At least the `at_least` hardest pixels, or all labelled ones if they are fewer.
    """
    known = pixels[pixels > 0]
    if known.numel() <= at_least:
        return pixels > 0
    return pixels >= known.topk(at_least).values[-1].clamp(max=-math.log(threshold))


def losses(
    outputs: Sequence[Tensor], label: Tensor, labelled: float, weight: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each output, (len(outputs),): this rank's sum, divided by `labelled`.

    labelled: the labelled pixels of the whole step over all ranks, weighted if weights are given.
    So the sum over ranks is the mean over the batch.
    """
    sums = torch.stack([pixel_losses(o, label, weight).sum() for o in outputs])
    return sums / max(labelled, 1e-9)


def read_class_weights(path: str | None, classes: Sequence[str]) -> Tensor | None:
    """The weights of the classes (n,) in a file that `check.py --json` printed; None for no file.

    InputError if they do not fit.
    """
    if path is None:
        return None
    try:
        report = json.loads(regular_file(path).read_text())
        splits, names = report["splits"], report["classes"]
        part = splits.get("train", next(iter(splits.values())))
        weights = torch.tensor(part["weights"], dtype=torch.float32)
    except Exception as e:  # a wrong file can fail anywhere
        raise InputError(
            f"{quote(path)}: no class weights ({type(e).__name__} {e}): expected the output of "
            "`check.py --json`"
        ) from None
    fits = names == [*classes] and weights.shape == (len(classes),)
    if not fits or not ((weights > 0) & weights.isfinite()).all():
        raise InputError(
            f"{quote(path)}: the class weights are of other classes, or not above 0 and finite: "
            "run check.py on this data set"
        )
    return weights
