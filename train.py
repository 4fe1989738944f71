"""Train a segmentation network, by default Denoised Non-Local as the paper trains it.

    python train.py                                    # synthetic scenes, minutes on a laptop
    python train.py --data folder --root DIR           # your own images
    torchrun --nproc-per-node 8 train.py --data cityscapes --root DIR --weights imagenet
    torchrun --nproc-per-node 8 train.py --data ade20k --root DIR --weights imagenet

A run's folder (runs/DATA, or --out) holds last.pt, best.pt, log.jsonl and, at the end, val.png.
The same command goes on from last.pt, on any number of ranks. With the same number, on a CPU, the
result is the same bit for bit: a sample depends on (seed, epoch, index) alone, dropout on (seed,
step, rank), so no random state is carried.
"""

import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import recipe
from classes import IGNORE
from data import RELATIVE, color_jitter, normalize, train_batches
from evaluate import evaluate
from metrics import iou_table, scores
from ranks import (
    autocast,
    choose_kernels,
    distributed,
    fail_on_all_ranks,
    read_ranks,
    sum_over_ranks,
)
from resume import restore
from run import Run, add_losses, check_ranks_agree, locked_folder, save, start_run, wrap_network
from runtime import (
    AMP,
    InputError,
    Interrupted,
    print_line,
    print_progress,
    quote,
    run_script,
    stop_signals,
    write,
)
from watch import Board, Clock, epoch_line, epoch_values, start_line, step_line, val_sheet

Batch = tuple[Tensor, Tensor, Tensor]  # images, labels, colour factors


class Stopped(Exception):
    """A signal, its only argument, came to this rank or another. Saving the run was tried."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, from the start or from the last checkpoint. Returns the exit status."""
    args = recipe.parse_training(argv, read_ranks()[1])
    with distributed(args.device) as (rank, world, device), ExitStack() as stack:
        choose_kernels(args.deterministic)
        with fail_on_all_ranks():
            run = start_run(args, rank, world, device)
            if rank == 0:
                stack.enter_context(locked_folder(args.out))
                for text in recipe.recipe_warnings(args):
                    print_line(f"note: {text}", error=True)
        check_ranks_agree(run)
        wrap_network(run)
        with fail_on_all_ranks():
            restore(run)
        steps = sum_over_ranks([run.step])
        with fail_on_all_ranks():
            if steps != [run.step * world]:
                raise InputError(
                    f"--out {quote(args.out)}: the ranks found different checkpoints: name a "
                    "folder that all nodes see"
                )
        if rank == 0:
            print_line(start_line(run))
        try:
            train(run)
        except Stopped as e:
            return stopped(run, e.args[0])
        return finish(run)


def train(run: Run) -> None:
    """All steps from run.step on: step, log, validate, save. Raises Stopped after a signal."""
    args = run.args
    recipe.set_mode(run.net, args.freeze_bn)
    board = Board(args.out, run.step, asked=args.tensorboard and run.rank == 0)
    with stop_signals() as run.caught, closing(board), closing(open_batches(run)) as batches:
        if run.step == (len(run.history) + 1) * run.per_epoch:  # it was stopped while validating
            end_epoch(run, board, saved=True)
        clock = Clock(run.step)
        while run.step < run.total:
            batch, labelled = next_batch(run, batches)
            share = train_step(run, batch, labelled)
            run.step += 1
            if run.step % args.log_every == 0 or run.step == clock.first + 1:
                log_step(run, board, share, clock)
            with clock.paused():
                if run.step % run.per_epoch == 0:
                    end_epoch(run, board)
                elif save_is_due(run):
                    save(run)
    if run.unsaved:  # the last try
        save(run)


def save_is_due(run: Run) -> bool:
    """Between epochs: every --save-every steps, and at a log if the last save failed."""
    every = run.args.log_every if run.unsaved else run.args.save_every
    return every > 0 and run.step % every == 0


# ---- a step


def open_batches(run: Run) -> Generator[Batch, None, None]:
    """This rank's share of every step that is left: images, labels, colour factors."""
    return train_batches(
        run.data,
        seed=run.args.seed,
        batch=run.args.batch,
        start=run.step,
        stop=run.total,
        rank=run.rank,
        world=run.world,
        crop=run.args.crop,
        scale=tuple(run.args.scale),
        relative=run.args.data in RELATIVE,
        workers=run.args.workers,
        pin=run.device.type == "cuda",
    )


def next_batch(run: Run, batches: Iterator[Batch]) -> tuple[Batch, float]:
    """The next batch, and its labelled pixels over all ranks.

    All ranks save and raise InputError if one cannot read its images, Stopped if one got a signal.
    """
    failure, labelled = None, 0.0
    try:
        with run.caught.interruptible():
            batch = next(batches)
        labelled = pixel_weights(run, batch[1]).sum(dtype=torch.float64).item()
    except Interrupted:  # every rank stops below
        pass
    except InputError as e:
        failure = e
    try:
        labelled, signals = sum_over_ranks([labelled, len(run.caught)], failure)
    except InputError:
        if run.step > 0:
            save(run)
        raise
    if signals:
        save(run)
    stop_if(run, signals)
    return batch, labelled


def stop_if(run: Run, signals: float) -> None:
    """Raise Stopped if a rank has caught a signal. signals: their number over all ranks."""
    if signals:
        raise Stopped(run.caught[0] if run.caught else signal.SIGTERM)  # another rank got it


def train_step(run: Run, batch: Batch, labelled: float) -> Tensor:
    """One step of SGD on this rank's images, labels and colour factors.

    The loss is the mean over the labelled pixels of the whole batch, however many ranks and parts
    share it (with --ohem, over the hard pixels of each part). A BatchNorm sees one part at a time,
    without SyncBN of one rank. Returns this rank's share of the losses, on the device. Only fp16
    and --ohem wait for a GPU.
    """
    args = run.args
    torch.manual_seed(recipe.step_seed(args.seed, run.step, run.rank))
    factor = recipe.rate(run.step, run.total, args.power, args.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = args.lr * group["factor"] * factor
    share = torch.zeros_like(run.loss_weights)
    images, labels, colours = batch
    parts = zip(
        images.to(run.device, non_blocking=True).chunk(args.accumulate),
        labels.to(run.device, non_blocking=True).chunk(args.accumulate),
        colours.chunk(args.accumulate),
    )
    for i, (x, y, c) in enumerate(parts, 1):
        with no_sync(run) if i < args.accumulate else nullcontext():
            part = part_losses(run, normalize(color_jitter(x, c)), y, labelled)
            loss = (part * run.loss_weights).sum() * run.world  # DDP averages over the ranks
            run.scaler.scale(loss).backward()
        share += part.detach()
    if args.clip:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.net.parameters(), args.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema is not None:
        update_ema(run.ema, run.net, args.ema)
    run.unadded.append((run.step, share))
    return share


def no_sync(run: Run) -> AbstractContextManager:
    """A block whose backward leaves the gradients of this rank alone."""
    if isinstance(run.model, nn.parallel.DistributedDataParallel):
        return run.model.no_sync()
    return nullcontext()


def part_losses(run: Run, x: Tensor, y: Tensor, labelled: float) -> Tensor:
    """The losses of a part of a rank's batch. With --ohem the head's are of hard pixels."""
    with autocast(run.device, AMP[run.args.amp]):
        outputs = run.model(x.contiguous(memory_format=torch.channels_last), full_size=False)
    weight = run.class_weights
    if weight is not None:
        weight = weight.to(run.device, non_blocking=True)
    if not run.args.ohem:
        return recipe.losses(outputs, y, labelled, weight)
    pixels = recipe.pixel_losses(outputs[0], y, weight)
    plain = pixels.detach()
    if weight is not None:
        with torch.no_grad():  # hard by probability, whatever the class weighs
            plain = recipe.pixel_losses(outputs[0], y)
    hard = recipe.ohem_mask(plain)
    kept = (pixel_weights(run, y) * hard).sum().float()
    if run.world > 1:
        dist.all_reduce(kept)
    # The hard pixels of later parts are not known yet, so each part has an equal share.
    head = (pixels * hard).sum() / kept.clamp(min=1) / run.args.accumulate
    return torch.cat([head[None], recipe.losses(outputs[1:], y, labelled, weight)])


def pixel_weights(run: Run, labels: Tensor) -> Tensor:
    """The weight of each pixel, in the shape of labels: its class's, or 1 (bool); unlabelled 0."""
    if run.class_weights is None:
        return labels != IGNORE
    table = F.pad(run.class_weights, (0, 256 - len(run.class_weights)))  # IGNORE weighs 0
    return table.to(labels.device, non_blocking=True)[labels.long()]


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * net, for parameters and buffers; counters are copied."""
    for mean, now in zip(ema.state_dict().values(), net.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)


def log_step(run: Run, board: Board, share: Tensor, clock: Clock) -> None:
    """Add the losses to the epoch's sums, print the step's line, draw its values."""
    add_losses(run)
    loss = sum_over_ranks(share.tolist())[0]
    speed = clock.steps_per_second(run.step) * run.args.batch
    if run.rank == 0:
        left = clock.seconds_left(run.step, run.total)
        print_progress(step_line(run, loss, speed, left), log=True)
    values = {"step/loss": loss, "step/lr": run.lr, "step/images_per_second": speed}
    board.draw(values, run.step)


# ---- an epoch


def end_epoch(run: Run, board: Board, saved: bool = False) -> None:
    """Validate (every --eval-every epochs, and the last), add to the history, save.

    Validating may take long, so the run is saved before as well: after a kill only validation is
    repeated. saved: the checkpoint that the run goes on from is that save.
    """
    add_losses(run)
    epoch = run.step // run.per_epoch
    means = [total / run.per_epoch for total in sum_over_ranks(run.sums.tolist())]
    names = ("loss", "loss_res2", "loss_res3", "loss_p")
    line: dict[str, Any] = {"epoch": epoch, "step": run.step, "lr": run.lr, "miou": None}
    line.update(zip(names, means))  # the head's loss first; loss_p only with --coarse-weight
    validated = epoch % run.args.eval_every == 0 or epoch == run.args.epochs
    if validated:
        if not saved:  # else last.pt is this step, and last.prev.pt may be the last good one
            save(run)
        line |= validate(run, run.net)
        if run.ema is not None:
            line["ema_miou"] = validate(run, run.ema)["miou"]
    run.history.append(line)
    run.sums.zero_()
    save(run)
    if run.rank == 0 and validated:
        print_line(epoch_line(line, run.args.epochs))
    if board.writer is not None:
        picture = val_sheet(run) if line["miou"] is not None else None
        board.draw(epoch_values(run, line), run.step, picture)
    recipe.set_mode(run.net, run.args.freeze_bn)


def validate(run: Run, net: nn.Module) -> dict[str, Any]:
    """The scores on the validation split, by evaluate.py's function, with rank 0's statistics.

    A rank that got a signal stops at its next image, the others at the end of theirs. Then all
    raise Stopped.
    """
    if run.world > 1:
        for b in net.buffers():
            dist.broadcast(b, 0)

    def stop_at_signal(index: int, matrix: Tensor) -> None:
        if run.caught:
            raise InputError("stopped by a signal")  # only an InputError reaches the other ranks

    try:
        matrix = evaluate(
            net,
            run.val,
            device=run.device,
            rank=run.rank,
            world=run.world,
            workers=run.args.workers,
            base=run.base,
            amp=AMP[run.args.amp],
            each=stop_at_signal,
        )
    except InputError:  # on all ranks, or none
        stop_if(run, sum_over_ranks([len(run.caught)])[0])
        raise
    result = scores(matrix)
    return result | {"iou": dict(zip(run.val.classes, result["iou"]))}


def finish(run: Run) -> int:
    """Print the table of classes and write val.png. Returns the exit status."""
    if run.rank > 0:
        return 0
    last, out = run.history[-1], run.args.out
    print_line(iou_table(last | {"iou": list(last["iou"].values())}, run.data.classes))
    picture = val_sheet(run)
    try:
        write(out / "val.png", lambda f: picture.save(f, "PNG"))
    except OSError as e:
        print_line(f"warning: val.png not written ({e})", error=True)
        return 1
    there = [
        name for name in ("last.pt", "best.pt", "ema.pt", "log.jsonl") if (out / name).exists()
    ]
    best = f"; best mIoU {100 * run.best:.2f} %" if run.best is not None else ""
    print_line(f"in {quote(out)}: {', '.join([*there, 'val.png'])}{best}")
    return int(run.unsaved)


def stopped(run: Run, number: int) -> int:
    """Say that a signal stopped the run. Returns the exit status, 128 + its number."""
    saved = "saved: the same command goes on"
    if run.unsaved:
        saved = "not saved: the same command goes on from the last checkpoint"
    name = signal.Signals(number).name
    print_line(f"rank {run.rank}: stopped by {name} at step {run.step}, {saved}", error=True)
    return 128 + number


if __name__ == "__main__":
    run_script(main, needs_output=False)
