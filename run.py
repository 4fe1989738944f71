"""A training run: what it carries from step to step, how it starts, is saved and goes on."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dnl
from checkpoint import VERSION, base_of, finish_save, weight_names, write_checkpoint, write_last
from data import DataSet, open_dataset, require_classes, step_items
from ranks import NARROW, choose_amp, fail_on_all_ranks, sum_over_ranks, to_device
from recipe import check_network, configuration, rate, read_class_weights, settings_of
from runtime import (
    Caught,
    InputError,
    import_factory,
    lock_file,
    open_lock,
    print_line,
    quote,
    remove_parts,
    write,
)


@dataclass
class Run:
    """What training carries from step to step. `state_of` and `restore` save and read it."""

    args: argparse.Namespace
    data: DataSet
    val: DataSet
    net: dnl.Network
    model: nn.Module  # called in a step: the network, perhaps compiled and under DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rank: int
    world: int
    device: torch.device
    loss_weights: Tensor  # of eq. 5, on the device
    sums: Tensor  # of the losses in this epoch, this rank's share, on the CPU
    class_weights: Tensor | None = None  # on the CPU, where labelled pixels are counted
    ema: dnl.Network | None = None
    step: int = 0
    unadded: list[tuple[int, Tensor]] = field(default_factory=list)  # steps, losses not in sums
    history: list[dict[str, Any]] = field(default_factory=list)  # a line per epoch
    settings_log: list[dict[str, Any]] = field(default_factory=list)  # each with its first step
    best: float | None = None  # the mIoU of best.pt
    unsaved: bool = False  # the last checkpoint could not be written
    caught: Caught = field(default_factory=Caught)  # signals to stop

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.data) // self.args.batch

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.args.epochs * self.per_epoch

    @property
    def lr(self) -> float:
        """The learning rate of the last step, without --backbone-lr's factor."""
        last = max(0, self.step - 1)
        return self.args.lr * rate(last, self.total, self.args.power, self.args.warmup)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What must be equal for a run to go on: flags, images, classes."""
        return settings_of(self.args, self.data, self.class_weights)

    @property
    def base(self) -> int:
        """The short side of validation images, as evaluate.py has it for the checkpoint."""
        return base_of({"settings": self.settings})


# ---- the start


def start_run(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> Run:
    """This rank's data, network and optimizer. InputError for what the user can mend."""
    data = open_dataset(args.data, args.root, args.split, args.cache)
    val = open_dataset(args.data, args.root, "val", args.cache)
    step_items(0, seed=args.seed, n=len(data), batch=args.batch)  # raises if there is no step
    require_classes(data)
    if device.type == "cpu" and args.crop < NARROW:
        if args.amp == "bf16":
            raise InputError(
                f"--crop {args.crop} with --amp bf16: torch's convolutions of such a size are "
                "wrong on a CPU: give --amp off"
            )
        args.amp = "off"
    args.amp = choose_amp(args.amp, device)
    net = make_network(args, len(data.classes), rank, world, device)
    weights = [1.0, args.aux_weight, args.aux_weight]  # head, res2, res3
    if net.config.p_supervised:
        weights.append(args.coarse_weight)
    return Run(
        args=args,
        data=data,
        val=val,
        net=net,
        model=net,
        optimizer=make_optimizer(net, args),
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        rank=rank,
        world=world,
        device=device,
        loss_weights=torch.tensor(weights, device=device),
        sums=torch.zeros(len(weights), dtype=torch.float64),
        class_weights=read_class_weights(args.class_weights, data.classes),
    )


def make_network(
    args: argparse.Namespace, num_classes: int, rank: int, world: int, device: torch.device
) -> dnl.Network:
    """The network at its start. InputError if the flags make none, or too small a batch."""
    sync = world > 1 and device.type == "cuda"
    images = args.batch // args.accumulate  # that a BatchNorm sees at a time
    if not sync:
        images //= world
    config = configuration(args, num_classes)
    try:
        check_network(config, args, images)
        torch.manual_seed(args.seed)
        net = dnl.build(config, import_factory(config.context))
    except InputError:
        raise
    except (TypeError, ValueError) as e:  # TypeError: from a factory
        raise InputError(str(e)) from None
    if args.weights != "none" and rank == 0:  # `connect` hands rank 0's weights to the others
        fill_backbone(net, args)
    if sync:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.backbone.recompute = args.recompute
    to_device(net, device)
    return net


def fill_backbone(net: dnl.Network, args: argparse.Namespace) -> None:
    """Fill the backbone from --weights. InputError if they cannot be had or do not fit."""
    try:
        dnl.load_backbone(net.backbone, args.backbone, args.weights)
    except ValueError as e:
        raise InputError(f"--weights {quote(args.weights)}: {e}") from None
    except Exception as e:  # a download can fail in any layer
        what = f"cannot be loaded ({str(e).splitlines()[0]}): give another file"
        if args.weights == "imagenet":
            what = f"cannot be downloaded ({e}): give --weights FILE".replace("\n", " ")
        raise InputError(f"--weights {quote(args.weights)}: {what}") from None


def make_optimizer(net: dnl.Network, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with two groups: the backbone, whose rate has a factor, and the rest."""
    others = [p for name, p in net.named_parameters() if not name.startswith("backbone.")]
    groups = [
        {"params": list(net.backbone.parameters()), "factor": args.backbone_lr},
        {"params": others, "factor": 1.0},
    ]
    # In fp16 the scaler may skip the first step. A fused one would then leave the momentum unset.
    fused = others[0].is_cuda and args.amp != "fp16"
    return torch.optim.SGD(
        groups,
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,
        fused=fused or None,  # False would also forbid torch's fast loop over parameters
    )


def check_ranks_agree(run: Run) -> None:
    """InputError on every rank if one has other flags or data than rank 0: they could hang."""
    own = vars(run.args) | run.settings
    for name in ("root", "cache", "workers"):  # a node may have its own
        del own[name]
    of_rank_0 = [own]
    if run.world > 1:
        dist.broadcast_object_list(of_rank_0, 0, device=torch.device("cpu"))
    differ = []
    for name, value in of_rank_0[0].items():
        if value != own[name]:
            differ.append(f"{name} {value} -> {own[name]}")
    with fail_on_all_ranks():
        if differ:
            raise InputError(
                f"rank {run.rank}: differs from rank 0: {'; '.join(differ)}: start every rank with "
                "the same flags and data"
            )


def wrap_network(run: Run) -> None:
    """Compile the network if asked, put it under DDP with rank 0's weights, copy it for --ema."""
    if run.args.compile:
        run.model = cast(nn.Module, torch.compile(run.net))  # the stub says: a function
    if run.world > 1:
        gpu = run.device.type == "cuda"
        model = nn.parallel.DistributedDataParallel(
            run.model, device_ids=[run.device] if gpu else None, gradient_as_bucket_view=True
        )
        if not gpu:
            model.register_comm_hook(None, mean_in_rank_order)
        run.model = model
    if run.args.ema:
        run.ema = deepcopy(run.net)


def mean_in_rank_order(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of DDP's gradients over the ranks, added up from rank 0 on.

    Gloo's own order depends on the place in the bucket, and DDP rearranges its buckets after the
    first step of a process. So three ranks that resume would round differently.
    """
    parts = [torch.empty_like(bucket.buffer()) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, bucket.buffer())
    for part in parts[1:]:
        parts[0] += part
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(parts[0].div_(len(parts)))
    return done


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make the run's folder, lock it, tidy up after a killed save. InputError if it is locked.

    If the block refuses to start (InputError), a new folder does not stay behind.
    """
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open_lock(path / ".lock")
    except OSError as e:
        raise InputError(f"--out {quote(path)}: {e.strerror}: choose another") from None
    with lock:
        if not lock_file(lock):
            raise InputError(
                f"--out {quote(path)}: another training is writing to it: wait for it, end it, or "
                "choose another"
            )
        remove_parts(path)
        finish_save(path)
        try:
            yield
        except InputError:
            if new and os.listdir(path) == [".lock"]:
                (path / ".lock").unlink()
                path.rmdir()
            raise


# ---- saving


def state_of(run: Run) -> dict[str, Any]:
    """The checkpoint. Call it on all ranks: it sums over them."""
    sums = torch.tensor(sum_over_ranks(run.sums.tolist()), dtype=torch.float64)
    return {
        "version": VERSION,
        "model": run.net.state_dict(),
        "optimizer": {"state": run.optimizer.state_dict()["state"]},
        "scaler": run.scaler.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else None,
        "config": asdict(run.net.config),
        "settings": run.settings,
        "settings_log": run.settings_log,
        "data": run.data.name,
        "root": str(Path(run.args.root).resolve()) if run.args.root else None,
        "classes": list(run.data.classes),
        "colors": [list(c) for c in run.data.colors],
        "amp": run.args.amp,
        "step": run.step,
        "best": run.best,
        "sums": sums,
        "history": run.history,
    }


def save(run: Run) -> None:
    """Write the checkpoint and log.jsonl. A full disk is a warning, and saving is tried again.

    Then run.unsaved is set on every rank. InputError if losses or weights are not finite: they
    would replace good ones.
    """
    add_losses(run)
    failure = None
    weights = run.net.state_dict()
    if not all(weights[name].isfinite().all() for name in weight_names(run.net)):
        failure = not_finite(run, max(0, run.step - 1), "weights are")
    sum_over_ranks([], failure)
    state = state_of(run)
    run.unsaved = False
    if run.rank == 0:
        try:
            write_all(run, state)
        except OSError as e:
            run.unsaved = True
            print_line(f"warning: step {run.step} not saved ({e}); it is tried again", error=True)
    run.unsaved = sum_over_ranks([run.unsaved]) != [0]


def write_all(run: Run, state: dict[str, Any]) -> None:
    """best.pt if this mIoU is the highest so far, last.pt, log.jsonl. OSError: the disk is full."""
    miou = None
    if run.history and run.history[-1]["step"] == run.step:
        miou = run.history[-1]["miou"]
    if miou is not None and (run.best is None or miou > run.best):
        state["best"] = miou
        write_checkpoint(run.args.out / "best.pt", state)
        run.best = miou
    write_last(run.args.out, state)
    write_log(run)


def write_log(run: Run) -> None:
    """log.jsonl: a line of the settings, one per epoch, and one where the settings change."""
    lines = sorted(
        [*run.settings_log, *run.history], key=lambda x: (x["step"], "settings" in x)
    )  # a change follows the epoch
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write(run.args.out / "log.jsonl", lambda f: f.write(text.encode()))


def add_losses(run: Run) -> None:
    """Add to run.sums the losses of the steps since the last call. The GPU is waited for here.

    InputError on all ranks if one is not finite.
    """
    failure = None
    for step, share in run.unadded:
        run.sums += share.cpu()
        if failure is None and not share.isfinite().all():
            failure = not_finite(run, step, "loss is")
    run.unadded = []
    sum_over_ranks([], failure)


def not_finite(run: Run, step: int, what: str) -> InputError:
    """The error of a step after which something is not finite, with the files of its batch."""
    args = run.args
    items = step_items(
        step, seed=args.seed, n=len(run.data), batch=args.batch, rank=run.rank, world=run.world
    )
    images = ", ".join(quote(run.data.items[i].image) for _, i in items)
    last = args.out / "last.pt"
    kept = f"{quote(last)} is an earlier checkpoint: " if last.exists() else ""
    return InputError(
        f"step {step + 1}, rank {run.rank}: the {what} not finite; images {images}; {kept}"
        "lower --lr, or try --clip 1 or --amp off"
    )
