"""Train a segmentation network, by default Denoised Non-Local as the paper trains it.

    python train.py                                                           # synthetic scenes, on any machine
    torchrun --nproc-per-node 8 train.py --data cityscapes --root DIR --weights imagenet
    torchrun --nproc-per-node 8 train.py --data ade20k --root DIR --weights imagenet
    python train.py --data folder --root DIR                                  # your own images

A run's folder (runs/DATA, or --out) holds last.pt, best.pt, log.jsonl and, at the end, val.png. The same command again
goes on where the run was, on any number of ranks: a sample is a function of (seed, epoch, index), a step of the
weights and its number, so nothing is replayed and nothing else is random.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import dnl
from checkpoint import VERSION, finish_save, read_checkpoint
from data import (
    IGNORE,
    DataSet,
    color_jitter,
    normalize,
    open_dataset,
    read,
    step_items,
    train_batches,
)
from evaluate import evaluate, iou_table, predict, scores
from pictures import colorize, sheet
from recipe import (
    SETTINGS,
    check_batch,
    configuration,
    losses,
    ohem_mask,
    parse_training,
    pixel_losses,
    rate,
    read_weights,
    recipe_warnings,
    set_mode,
    settings_of,
    step_seed,
)
from runtime import (
    AMP,
    InputError,
    choose_amp,
    choose_kernels,
    distributed,
    fail_on_all_ranks,
    import_factory,
    on_terminal,
    print_line,
    quote,
    run_script,
    stop_signals,
    write,
)

# ------------------------------------------------------------------------------------------------ schedule and loss


# ------------------------------------------------------------------------------------------------------- arguments


# ------------------------------------------------------------------------------------------------------------ a run


class Stopped(Exception):
    """A signal came, to this rank or another, and the run was saved. Its number is the only argument."""


@dataclass
class Run:
    """What training carries from step to step. What of it a checkpoint holds, `state_of` says."""

    args: argparse.Namespace
    data: DataSet
    val: DataSet
    net: dnl.Network  # the bare network
    model: nn.Module  # what is called: the network, compiled, under DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rank: int
    world: int
    device: torch.device
    weights: Tensor  # of the losses (eq. 5), on the device
    class_weights: Tensor | None = None  # on the CPU, where labelled pixels are counted
    ema: dnl.Network | None = None
    step: int = 0
    skipped: int = 0
    sums: Tensor | None = None  # of this epoch's losses, this rank's share
    recent: list[tuple[int, Tensor]] = field(
        default_factory=list
    )  # steps and losses not yet looked at
    history: list[dict[str, Any]] = field(default_factory=list)  # a line per epoch
    best: float | None = None  # the mIoU of best.pt
    unsaved: bool = False  # the last checkpoint could not be written
    caught: list[int] = field(default_factory=list)  # signals to stop

    @property
    def per_epoch(self) -> int:
        return len(self.data) // self.args.batch

    @property
    def total(self) -> int:
        return self.args.epochs * self.per_epoch

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.args.lr * rate(
            max(0, self.step - 1), self.total, self.args.power, self.args.warmup
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What makes the result what it is: runs with equal settings end with equal weights."""
        return settings_of(self.args, self.data, self.class_weights)


def setup(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> Run:
    """This rank's data, network and optimizer, before it meets the others. Raises InputError for what the user can mend."""
    data, val = (open_dataset(args.data, args.root, s, args.cache) for s in (args.split, "val"))
    step_items(0, seed=args.seed, n=len(data), batch=args.batch)
    args.amp = choose_amp(args.amp, device)
    sync = world > 1 and device.type == "cuda"
    try:
        config = configuration(args, len(data.classes))
        check_batch(config, args, args.batch // args.accumulate // (1 if sync else world))
        torch.manual_seed(args.seed)
        net = dnl.build(config, import_factory(config.context))
    except (TypeError, ValueError) as e:  # TypeError: of a factory
        raise e if isinstance(e, InputError) else InputError(str(e)) from None
    if args.weights != "none" and rank == 0:  # `connect` hands rank 0's to the others
        read_backbone(net, args)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if sync else net
    net.backbone.recompute = args.recompute
    net.to(device, memory_format=torch.channels_last)
    backbone = list(net.backbone.parameters())
    others = [p for name, p in net.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.SGD(
        [{"params": backbone, "factor": args.backbone_lr}, {"params": others, "factor": 1.0}],
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,  # not fused in fp16, where a first step
        fused=device.type == "cuda" and args.amp != "fp16",
    )  # that is skipped leaves momentum unset
    weights = [1.0, args.aux_weight, args.aux_weight] + [args.coarse_weight] * config.p_supervised
    return Run(
        args,
        data,
        val,
        net,
        torch.compile(net) if args.compile else net,
        optimizer,
        torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        rank,
        world,
        device,
        torch.tensor(weights, device=device),
        sums=torch.zeros(len(weights), dtype=torch.float64, device=device),
        class_weights=read_weights(args.class_weights, data.classes)
        if args.class_weights
        else None,
    )


def connect(run: Run) -> None:
    """The network under DDP where there are several ranks, all with rank 0's weights; then, for --ema, a copy of them."""
    if run.world > 1:
        gpu = run.device.type == "cuda"
        run.model = nn.parallel.DistributedDataParallel(
            run.model, device_ids=[run.device] if gpu else None, gradient_as_bucket_view=True
        )
        if not gpu:
            run.model.register_comm_hook(None, mean_in_rank_order)
    run.ema = deepcopy(run.net) if run.args.ema else None


def mean_in_rank_order(
    state, bucket
):  # DDP refuses annotations that are text, as all of this file are
    """The mean of DDP's gradients, added up from rank 0 on. Gloo's own order depends on the place in the bucket, and DDP lays out
    its buckets anew after the first step of a process: a resumed run of three ranks would round otherwise than an uninterrupted one."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, bucket.buffer())
    for part in parts[1:]:
        parts[0] += part
    done = torch.futures.Future()
    done.set_result(parts[0].div_(len(parts)))
    return done


def read_backbone(net: dnl.Network, args: argparse.Namespace) -> None:
    """Fill the backbone from --weights. InputError where the file is missing, broken or of another network."""
    try:
        dnl.load_backbone(net.backbone, args.backbone, args.weights)
    except ValueError as e:
        raise InputError(f"--weights {args.weights}: {e}") from None
    except Exception as e:  # a broken file or download fails in any of the layers that read it
        mend = (
            "where nothing can be downloaded, give --weights FILE"
            if args.weights == "imagenet"
            else ("expected a file of torchvision's for this backbone, or a checkpoint of train.py")
        )
        what = (
            "not a file of weights"
            if isinstance(e, pickle.UnpicklingError)
            else str(e).splitlines()[0]
        )
        raise InputError(f"--weights {args.weights}: {what}: {mend}") from None


def sum_over_ranks(run: Run, facts: Sequence[float]) -> list[float]:
    """The sums over all ranks of plain numbers on the CPU, by gloo: a GPU is not waited for."""
    t = torch.tensor(facts, dtype=torch.float64)
    if run.world > 1:
        dist.all_reduce(t)
    return t.tolist()


def count_labelled(run: Run, labels: Tensor, among: Tensor | bool = True) -> Tensor:
    """Labelled pixels of a batch of this rank, of those `among` them, each counted by the weight of its class."""
    weight = labels != IGNORE
    if run.class_weights is not None:
        weight = F.pad(run.class_weights, (0, 256 - len(run.class_weights))).to(
            labels.device, non_blocking=True
        )[labels.long()]
    return (weight * among).sum(dtype=torch.float64)


def part_losses(run: Run, x: Tensor, y: Tensor, labelled: float) -> Tensor:
    """The losses of a part of a rank's batch: forward, then `losses`, the head's on hard pixels only with --ohem."""
    amp = AMP[run.args.amp]
    with torch.autocast(run.device.type, amp or torch.bfloat16, enabled=amp is not None):
        outputs = run.model(x.contiguous(memory_format=torch.channels_last), full_size=False)
    weight = (
        None if run.class_weights is None else run.class_weights.to(run.device, non_blocking=True)
    )
    if not run.args.ohem:
        return losses(outputs, y, labelled, weight)
    with torch.no_grad():
        hard = ohem_mask(pixel_losses(outputs[0], y))  # by probability, whatever the class weighs
    pixels = pixel_losses(outputs[0], y, weight)
    kept = count_labelled(run, y, hard).float()
    if run.world > 1:
        dist.all_reduce(kept)
    head = (pixels * hard).sum() / kept.clamp(min=1) / run.args.accumulate
    return torch.cat([head[None], losses(outputs[1:], y, labelled, weight)])


def train_step(run: Run, batch: Sequence[Tensor], labelled: float) -> Tensor | None:
    """One step of SGD on this rank's images, labels and colour factors. With N ranks the gradient is that of one rank with the
    whole batch (with --ohem, of the hard pixels of each part). Returns this rank's share of the losses, on the device and not waited
    for; None for a step left out."""
    args = run.args
    torch.manual_seed(step_seed(args.seed, run.step, run.rank))
    for group in run.optimizer.param_groups:
        group["lr"] = args.lr * group["factor"] * rate(run.step, run.total, args.power, args.warmup)
    before = [b.clone() for b in run.net.buffers()] if args.skip_nonfinite else []
    share = torch.zeros_like(run.sums)
    images, labels, factors = batch
    parts = zip(
        *(
            t.chunk(args.accumulate)
            for t in (
                images.to(run.device, non_blocking=True),
                labels.to(run.device, non_blocking=True),
                factors,
            )
        )
    )
    for i, (x, y, factors) in enumerate(parts, 1):
        with nullcontext() if i == args.accumulate or run.world == 1 else run.model.no_sync():
            part = part_losses(run, normalize(color_jitter(x, factors)), y, labelled)
            run.scaler.scale(
                (part * run.weights).sum() * run.world
            ).backward()  # DDP averages over ranks
        share += part.detach()
    if args.skip_nonfinite and sum_over_ranks(run, [not finite(run, share)])[0]:
        run.skipped += 1
        if run.skipped > args.skip_nonfinite:
            run.recent.append((run.step, share))
            check_finite(run)  # raises, and tells the rank whose loss it is
            raise nonfinite(run, run.step, "gradient is")
        run.optimizer.zero_grad()
        for b, old in zip(run.net.buffers(), before):  # BatchNorm has counted the bad batch
            b.copy_(old)
        return None
    if args.clip:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.net.parameters(), args.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema is not None:
        follow(run.ema, run.net, args.ema)
    return share


def finite(run: Run, share: Tensor) -> bool:
    """Whether the losses and the gradient are finite. (Of fp16's gradients the scaler takes care.)"""
    gradients = (
        []
        if run.scaler.is_enabled()
        else [p.grad for p in run.net.parameters() if p.grad is not None]
    )
    return bool(share.isfinite().all() and nn.utils.get_total_norm(gradients).isfinite())


@torch.no_grad()
def follow(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * net, for parameters and buffers; counts are copied."""
    for mean, now in zip(ema.state_dict().values(), net.state_dict().values()):
        mean.lerp_(now, 1 - decay) if mean.is_floating_point() else mean.copy_(now)


def nonfinite(run: Run, step: int, what: str = "loss is") -> InputError:
    """The error of a step after which something is not finite, with the files of its batch."""
    items = step_items(
        step,
        seed=run.args.seed,
        n=len(run.data),
        batch=run.args.batch,
        rank=run.rank,
        world=run.world,
    )
    images = ", ".join(quote(run.data.items[i].image) for _, i in items)
    last = run.args.out / "last.pt"
    return InputError(
        f"step {step + 1}, rank {run.rank}: the {what} not finite; images {images}; "
        + f"{quote(last)} is from before: " * last.exists()
        + "lower --lr, try --clip 1 or --amp off, or --skip-nonfinite N"
    )


def check_finite(run: Run) -> None:
    """Look at the losses since the last look (this waits for the device). InputError where one is not finite."""
    steps, run.recent = run.recent, []
    bad = (
        (~torch.stack([share for _, share in steps]).isfinite().all(1)).nonzero().flatten().tolist()
        if steps
        else []
    )
    elsewhere = sum_over_ranks(run, [bool(bad)])[0]
    if bad:
        raise nonfinite(run, steps[bad[0]][0])
    if elsewhere:
        raise InputError(f"rank {run.rank}: stopped, since the loss of another rank is not finite")


def validate(run: Run, net: nn.Module) -> dict[str, Any]:
    """The scores on the validation split by evaluate.py's function, every rank with rank 0's BatchNorm statistics. Stopped, on
    every rank, after a signal."""
    if run.world > 1:
        for b in net.buffers():
            dist.broadcast(b, 0)

    def look(done: int, n: int) -> None:
        if run.caught:
            raise InputError(f"rank {run.rank}: a signal")

    try:
        matrix = evaluate(
            net,
            run.val,
            device=run.device,
            rank=run.rank,
            world=run.world,
            workers=run.args.workers,
            amp=AMP[run.args.amp],
            progress=look,
        )
    except InputError:  # of all ranks, or of none
        stop_if(run, sum_over_ranks(run, [len(run.caught)])[0])
        raise
    return scores(matrix)


def stop_if(run: Run, signals: float) -> None:
    """Stopped, where any rank has caught a signal: signals is their number over all ranks."""
    if signals:
        raise Stopped(run.caught[0] if run.caught else signal.SIGTERM)


# ------------------------------------------------------------------------------------------------------ checkpoints


def state_of(run: Run) -> dict[str, Any]:
    """The checkpoint: one dict of tensors and plain values, readable with weights_only. Call on all ranks: it sums over them."""
    sums = torch.tensor(sum_over_ranks(run, run.sums.tolist()), dtype=torch.float64)
    return {
        "version": VERSION,
        "model": run.net.state_dict(),
        "optimizer": {"state": run.optimizer.state_dict()["state"]},
        "scaler": run.scaler.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else None,
        "config": asdict(run.net.config),
        "settings": run.settings,
        "data": run.data.name,
        "root": str(Path(run.args.root).resolve()) if run.args.root else None,
        "classes": list(run.data.classes),
        "colors": [list(c) for c in run.data.colors],
        "amp": run.args.amp,
        "step": run.step,
        "epoch": run.step // run.per_epoch,
        "best": run.best,
        "sums": sums,
        "skipped": run.skipped,
        "history": run.history,
    }


def save(run: Run) -> None:
    """Write (best.pt, ema.pt and) last.pt, keeping the one before as last.prev.pt, and log.jsonl. A full disk is a warning, and
    tried again. InputError where the weights are not finite: they would replace good ones."""
    check_finite(run)
    if not all(t.isfinite().all() for t in run.net.state_dict().values()):
        raise nonfinite(run, run.step - 1, "weights are")
    state, out = state_of(run), run.args.out
    if run.rank:
        return
    miou = (
        run.history[-1]["miou"] if run.history and run.history[-1]["step"] == run.step else None
    )  # of these weights
    try:
        if miou is not None and (run.best is None or miou > run.best):
            state["best"] = miou
            write(out / "best.pt", lambda f: torch.save(state, f))
            run.best = miou
        if run.ema is not None:
            averaged = state | {
                "model": state["ema"],
                "settings": state["settings"] | {"averaged": True},
            }  # nothing to train on from
            write(out / "ema.pt", lambda f: torch.save(averaged, f))
        write(out / "new.pt", lambda f: torch.save(state, f))
        finish_save(out)
        write_log(run)
        run.unsaved = False
    except OSError as e:
        run.unsaved = True
        print_line(
            f"warning: step {run.step} not saved ({e}); tried again within {run.args.log_every} steps",
            error=True,
        )


def write_log(run: Run) -> None:
    """log.jsonl: a line of the settings, then one per epoch, those of the checkpoint and no other."""
    lines = [{"settings": run.settings}, *run.history]
    write(
        run.args.out / "log.jsonl",
        lambda f: f.write("".join(json.dumps(line) + "\n" for line in lines).encode()),
    )


def find_checkpoint(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """--resume's file; for auto the newest whole one of the run's folder, None where there is none at all."""
    if run.args.resume != "auto":
        if read_if_readable(run, "last.pt").get("settings", run.settings) != run.settings:
            raise InputError(
                f"--out {run.args.out}: holds a run of other settings, which this one would replace: choose another"
            )
        return Path(run.args.resume), read_checkpoint(run.args.resume)
    found = [p for p in (run.args.out / "last.pt", run.args.out / "last.prev.pt") if p.exists()]
    for path in found:
        try:
            return path, read_checkpoint(path)
        except InputError as e:
            if path == found[-1]:
                raise
            if run.rank == 0:
                print_line(f"warning: {e}; going on from {found[-1].name}", error=True)
    return None


def check_state(run: Run, state: dict[str, Any]) -> None:
    """ValueError that names the fields of a checkpoint which no `state_of` of this run makes."""
    (epochs, rest), history = divmod(state["step"], run.per_epoch), state["history"]
    momentum, parameters = (
        state["optimizer"]["state"],
        [p for g in run.optimizer.param_groups for p in g["params"]],
    )
    sound = {
        "step": type(state["step"]) is int and 0 <= state["step"] <= run.total,
        "history": [line["epoch"] for line in history] == [*range(1, len(history) + 1)]
        and len(history)
        in ((epochs,) if rest else (epochs - 1, epochs)),  # the epoch's line comes after validation
        "skipped": type(state["skipped"]) is int and 0 <= state["skipped"] <= state["step"],
        "sums": state["sums"].shape == run.sums.shape
        and state["sums"].dtype == run.sums.dtype
        and state["sums"].isfinite().all(),
        "scaler": state["scaler"].keys() == run.scaler.state_dict().keys(),
        "optimizer": momentum.keys() <= {*range(len(parameters))}
        and all(
            one["momentum_buffer"] is None or one["momentum_buffer"].shape == parameters[i].shape
            for i, one in momentum.items()
        ),
    }
    wrong = [name for name, good in sound.items() if not good]
    if wrong:
        raise ValueError(
            f"damaged: {', '.join(wrong)} of no run of these settings: give another, or train again"
        )


def read_if_readable(run: Run, name: str) -> dict[str, Any]:
    """The checkpoint of that name in the run's folder; empty where there is none that can be read."""
    try:
        return read_checkpoint(run.args.out / name)
    except InputError:
        return {}


def restore(run: Run) -> None:
    """Go on from a checkpoint, if there is one. InputError, naming the difference, where it is of other settings."""
    found = find_checkpoint(run)
    if found is None:
        return
    path, state = found
    try:
        was, now = state["settings"], run.settings
        differ = [
            f"{k} {was.get(k)} -> {now.get(k)}"
            for k in sorted({*was, *now})
            if was.get(k) != now.get(k)
        ]
        if differ:
            raise InputError(
                f"of other settings ({'; '.join(differ)}): repeat its flags to go on, or choose another --out"
            )
        check_state(run, state)
        dnl.load_strict(run.net, state["model"], "model")
        if run.ema is not None:
            dnl.load_strict(run.ema, state["ema"], "ema")
        run.optimizer.load_state_dict(
            run.optimizer.state_dict() | {"state": state["optimizer"]["state"]}
        )
        run.scaler.load_state_dict(state["scaler"])
        run.step, run.history, run.skipped = state["step"], state["history"], state["skipped"]
        best = read_if_readable(run, "best.pt") if run.rank == 0 else {}
        run.best = float(best["best"]) if best.get("settings") == run.settings else None
        run.sums += state["sums"].to(run.device) if run.rank == 0 else 0
    except Exception as e:  # a field of another kind can fail in any of these
        raise InputError(
            f"{path}: {e if isinstance(e, ValueError) else f'{type(e).__name__} {e}'}".replace(
                "\n", " "
            )
        ) from None
    if run.rank == 0:
        try:
            write_log(run)
        except OSError as e:
            print_line(f"warning: log.jsonl not written ({e})", error=True)
        print_line(f"resumed {path} at step {run.step} of {run.total}")


# ------------------------------------------------------------------------------------------------------ the training


def log_step(run: Run, draw: Callable[..., None], share: Tensor | None, speed: float) -> None:
    """Look at the losses so far, and tell this step's. share: what `train_step` returned. speed: images/s over all ranks."""
    check_finite(run)
    loss = math.nan if share is None else sum_over_ranks(run, share.tolist())[0]
    if run.rank == 0:
        print_step(run, "left out" if share is None else f"{loss:.4f}", speed)
    draw({"step/loss": loss, "step/lr": run.lr, "step/images_per_second": speed})


def print_step(run: Run, loss: str, speed: float) -> None:
    """The fixed line for people; on a terminal rewritten in place, with a bar."""
    memory = (
        torch.cuda.max_memory_allocated() / 2**30
        if run.device.type == "cuda"
        else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    )
    left = int((run.total - run.step) * run.args.batch / speed)
    line = (
        f"epoch {(run.step - 1) // run.per_epoch + 1}/{run.args.epochs}  step {run.step}/{run.total}  loss {loss}  "
        f"lr {run.lr:.6f}  {speed:.1f} images/s  {memory:.1f} GiB  "
        f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    )
    if on_terminal(sys.stdout):
        done = 20 * run.step // run.total
        line = f"[{'#' * done}{'.' * (20 - done)}] {line}"[
            : shutil.get_terminal_size().columns - 1
        ]  # a row: more could not be taken back
        print_line(f"\r\033[K{line}", end="")
    else:
        print_line(line)


def end_epoch(run: Run, draw: Callable[..., None], saved: bool = False) -> None:
    """Validate (every --eval-every epochs, and the last), append the epoch's line to the history, save. Saved before validating
    too, which may take long: after a kill or a signal meanwhile, validation alone is repeated. saved: that this has been done."""
    epoch, names = run.step // run.per_epoch, ("loss", "loss_res2", "loss_res3", "loss_p")
    steps = run.per_epoch - run.skipped + (run.history[-1]["skipped"] if run.history else 0)
    means = [total / steps if steps else None for total in sum_over_ranks(run, run.sums.tolist())]
    line = {
        "epoch": epoch,
        "step": run.step,
        "lr": run.lr,
        "skipped": run.skipped,
        **dict(zip(names, means)),
        "miou": None,
    }
    if epoch % run.args.eval_every == 0 or epoch == run.args.epochs:
        if not saved:  # once more would put it in the place of the checkpoint before, which may be the last good one
            save(run)
        result = validate(run, run.net)
        line |= result | {"iou": dict(zip(run.data.classes, result["iou"]))}
        if run.ema is not None:
            line["ema_miou"] = validate(run, run.ema)["miou"]
        set_mode(run.net, run.args.freeze_bn)
    run.history.append(line)
    run.sums.zero_()
    save(run)
    if run.rank == 0 and "iou" in line:
        print_line(
            "\n" * on_terminal(sys.stdout)
            + f"epoch {epoch}/{run.args.epochs}  val mIoU {line['miou']}  accuracy {line['accuracy']}"
            + (f"  of the averaged weights mIoU {line['ema_miou']}" if run.ema is not None else "")
            + "; no pixel of the validation split is labelled" * (line["miou"] is None)
        )
    gamma = getattr(run.net.context, "gamma", None)  # a context of one's own may have another
    values = (
        line
        | {f"iou/{name}": iou for name, iou in line.get("iou", {}).items()}
        | {"gamma": gamma.item() if isinstance(gamma, Tensor) and gamma.numel() == 1 else None}
    )
    draw(values, None if line["miou"] is None else partial(val_sheet, run))


@contextmanager
def open_board(run: Run) -> Iterator[Callable[..., None]]:
    """draw(values, picture) into TensorBoard, on rank 0 where it is asked for; it leaves out what is no float, and calls picture for
    an image. A full disk is a warning."""
    if not run.args.tensorboard or run.rank:
        yield lambda values, picture=None: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writers, failed = [], []

    def attempt(action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as e:
            if not failed:
                print_line(f"warning: TensorBoard's file not written ({e})", error=True)
            failed.append(e)

    def draw(values: dict[str, Any], picture: Callable[[], Image.Image] | None = None) -> None:
        for writer in writers:
            for name, value in values.items():
                if isinstance(value, float):
                    attempt(partial(writer.add_scalar, name, value, run.step))
            if picture is not None:
                attempt(
                    partial(
                        writer.add_image, "val", np.asarray(picture()), run.step, dataformats="HWC"
                    )
                )

    attempt(lambda: writers.append(SummaryWriter(run.args.out, purge_step=run.step)))
    try:
        yield draw
    finally:
        for writer in writers:
            attempt(writer.close)


def results(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, and the InputError that ends them as the last."""
    try:
        yield from batches
    except InputError as e:
        yield e


def agree_on_step(run: Run, batch: Any, *facts: float) -> list[float]:
    """Before a step: this step's labelled pixels and the facts, each summed over all ranks, so that all do the same. InputError
    on every rank where one could not read its images."""
    failed = isinstance(batch, InputError)
    *sums, failures = sum_over_ranks(
        run, [0.0 if failed else count_labelled(run, batch[1]).item(), *facts, failed]
    )
    if failed:
        raise batch
    if failures:
        raise InputError(f"rank {run.rank}: stopped, since another rank cannot go on")
    return sums


def train(run: Run) -> None:
    """From run.step to the end. Stopped, after a signal."""
    args = run.args
    batches = train_batches(
        run.data,
        seed=args.seed,
        batch=args.batch,
        start=run.step,
        stop=run.total,
        rank=run.rank,
        world=run.world,
        crop=args.crop,
        scale=tuple(args.scale),
        relative=SETTINGS[args.data].relative,
        workers=args.workers,
        pin=run.device.type == "cuda",
    )
    set_mode(run.net, args.freeze_bn)
    with stop_signals() as run.caught, closing(batches), open_board(run) as draw:
        if run.step == (len(run.history) + 1) * run.per_epoch:  # stopped while validating
            end_epoch(run, draw, saved=True)
        start, first = time.monotonic(), run.step
        for batch in results(batches):
            labelled, signals, again = agree_on_step(
                run, batch, len(run.caught), run.unsaved and run.step % args.log_every == 0
            )
            if signals:
                save(run)
            stop_if(run, signals)
            share = train_step(run, batch, labelled)
            if share is not None:
                run.recent.append((run.step, share))
                run.sums += share
            run.step += 1
            if run.step % args.log_every == 0 or run.step == first + 1:
                log_step(
                    run, draw, share, (run.step - first) * args.batch / (time.monotonic() - start)
                )
            pause = time.monotonic()
            if run.step % run.per_epoch == 0:
                end_epoch(run, draw)
            elif again or args.save_every and run.step % args.save_every == 0:
                save(run)
            start += time.monotonic() - pause  # images/s are those of training
    if sum_over_ranks(run, [run.unsaved])[0]:
        save(run)


def val_sheet(run: Run) -> Image.Image:
    """Image, truth and prediction of up to four validation images, in the classes' colours, with a legend."""
    run.net.eval()
    rows = []
    for i in np.linspace(0, len(run.val) - 1, min(4, len(run.val))).round().astype(int):
        image, label = read(run.val, int(i))
        x = torch.from_numpy(image.transpose(2, 0, 1).copy()).to(run.device)
        guess = predict(run.net, x, amp=AMP[run.args.amp]).argmax(0).byte().cpu().numpy()
        rows.append(
            [
                Image.fromarray(image),
                colorize(label, run.val.colors),
                colorize(guess, run.val.colors),
            ]
        )
    set_mode(run.net, run.args.freeze_bn)
    return sheet(rows, ("image", "truth", "prediction"), run.val.classes, run.val.colors)


def finish(run: Run) -> int:
    """The table of classes of the last epoch and val.png, by rank 0. Returns the exit status: 1 where the disk was full to the end."""
    if run.rank == 0:
        last, out = run.history[-1], run.args.out
        print_line(iou_table({**last, "iou": list(last["iou"].values())}, run.data.classes))
        pictures = val_sheet(run)
        try:
            write(out / "val.png", lambda f: pictures.save(f, "PNG"))
        except OSError as e:
            print_line(f"warning: val.png not written ({e})", error=True)
            return 1
        best = "" if run.best is None else f"best.pt (mIoU {run.best:.4f}), "
        print_line(f"in {out}: last.pt, {best}log.jsonl, val.png")
    return int(run.unsaved)


def make_folder(path: Path) -> Any:
    """The run's folder, ready to be looked at, or InputError. Returns a file in it that is locked as long as it is open."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(
            os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK), "w"
        )  # a pipe of that name would be waited for
        try:
            fcntl.lockf(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # not inherited by the loader's processes, which outlive a killed one
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"--out {quote(path)}: another training is writing to it: wait for it, end it, or choose another"
            ) from None
        except OSError:
            pass  # a file system without locks
        finish_save(path)
        return lock
    except OSError as e:
        raise InputError(f"--out {quote(path)}: {e.strerror}: choose another") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Train, from the start or from where the run was. Returns the exit status, 128 + the signal that stopped it."""
    with distributed() as (rank, world, device):
        args = parse_training(argv, world)
        choose_kernels(args)
        with fail_on_all_ranks(rank):
            run = setup(args, rank, world, device)
            lock = (
                make_folder(args.out) if rank == 0 else nullcontext()
            )  # no rank looks for a checkpoint before
        with lock:
            for text in recipe_warnings(args) if rank == 0 else ():
                print_line(f"note: {text}", error=True)
            connect(run)
            with fail_on_all_ranks(rank):
                restore(run)
            if sum_over_ranks(run, [run.step])[0] != run.step * world:
                raise InputError(
                    f"{args.out}: the ranks found different checkpoints: name an --out that all nodes see"
                )
            try:
                train(run)
            except Stopped as e:
                number, saved = (
                    e.args[0],
                    "not saved" if sum_over_ranks(run, [run.unsaved])[0] else "saved",
                )
                print_line(
                    f"rank {rank}: stopped by {signal.Signals(number).name} at step {run.step}, {saved}: the same command goes on",
                    error=True,
                )
                return 128 + number
            return finish(run)


if __name__ == "__main__":
    run_script(main, needs_output=False)
