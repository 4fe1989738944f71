"""Train a segmentation network, by default Denoised Non-Local as the paper trains it.

    python train.py                                    # synthetic scenes, minutes on a laptop
    python train.py --data folder --root DIR           # your own images
    torchrun --nproc-per-node 8 train.py --data cityscapes --root DIR --weights imagenet
    torchrun --nproc-per-node 8 train.py --data ade20k --root DIR --weights imagenet

A run's folder (runs/DATA, or --out) holds last.pt, best.pt, log.jsonl and, at the end, val.png.
The same command goes on where the run stopped, on any number of ranks. That is exact, because a
sample is a function of (seed, epoch, index), and a step one of the weights and its number.
"""

import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import recipe
from data import IGNORE, RELATIVE, color_jitter, normalize, train_batches
from evaluate import evaluate
from metrics import iou_table, scores
from resume import restore
from run import (
    Run,
    check_finite,
    check_ranks_agree,
    connect,
    locked_folder,
    save,
    start_run,
)
from runtime import (
    AMP,
    InputError,
    Interrupted,
    choose_kernels,
    distributed,
    fail_on_all_ranks,
    print_line,
    print_progress,
    quote,
    run_script,
    stop_signals,
    sum_over_ranks,
    write,
)
from watch import Board, epoch_line, epoch_values, start_line, step_line, val_sheet

Batch = tuple[Tensor, Tensor, Tensor]  # images, labels, colour factors


class Stopped(Exception):
    """A signal, its only argument, came to this rank or another, and the run was saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, from the start or from the last checkpoint. Returns the exit status."""
    with distributed() as (rank, world, device), ExitStack() as stack:
        args = recipe.parse_training(argv, world)
        choose_kernels(args.deterministic)
        with fail_on_all_ranks():
            run = start_run(args, rank, world, device)
            if rank == 0:
                stack.enter_context(locked_folder(args.out))
                for text in recipe.recipe_warnings(args):
                    print_line(f"note: {text}", error=True)
        check_ranks_agree(run)
        connect(run)
        with fail_on_all_ranks():
            restore(run)
        if sum_over_ranks([run.step]) != [run.step * world]:
            raise InputError(
                f"{args.out}: the ranks found different checkpoints: name an --out that all nodes "
                "see"
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
    args, first, start = run.args, run.step, time.monotonic()
    recipe.set_mode(run.net, args.freeze_bn)
    board = Board(args.out, run.step, asked=args.tensorboard and run.rank == 0)
    with stop_signals() as run.caught, closing(board), closing(open_batches(run)) as batches:
        if run.step == (len(run.history) + 1) * run.per_epoch:  # it was stopped while validating
            end_epoch(run, board, saved=True)
        while run.step < run.total:
            batch, labelled, retry = next_batch(run, batches)
            share = train_step(run, batch, labelled)
            run.step += 1
            if run.step % args.log_every == 0 or run.step == first + 1:
                speed = (run.step - first) * args.batch / (time.monotonic() - start)
                log_step(run, board, share, speed)
            paused = time.monotonic()
            if run.step % run.per_epoch == 0:
                end_epoch(run, board)
            elif retry or (args.save_every and run.step % args.save_every == 0):
                save(run)
            start += time.monotonic() - paused  # images/s are of training alone
    if sum_over_ranks([run.unsaved])[0]:
        save(run)


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


def next_batch(run: Run, batches: Iterator[Batch]) -> tuple[Batch, float, bool]:
    """The next batch, its labelled pixels over all ranks, and whether a failed save is to be tried
    again.

    All ranks do the same: InputError if one of them cannot read its images, Stopped if one of them
    got a signal.
    """
    failure, labelled = None, 0.0
    try:
        with run.caught.interruptible():
            batch = next(batches)
        labelled = count_labelled(run, batch[1]).item()
    except Interrupted:  # every rank stops below
        pass
    except InputError as e:
        failure = e
    labelled, signals, unsaved = sum_over_ranks([labelled, len(run.caught), run.unsaved], failure)
    if signals:
        save(run)
    stop_if(run, signals)
    return batch, labelled, bool(unsaved) and run.step % run.args.log_every == 0


def stop_if(run: Run, signals: float) -> None:
    """Raise Stopped if a rank has caught a signal. signals: their number over all ranks."""
    if signals:
        raise Stopped(run.caught[0] if run.caught else signal.SIGTERM)


def train_step(run: Run, batch: Batch, labelled: float) -> Tensor:
    """One step of SGD on this rank's images, labels and colour factors.

    With N ranks the gradient is the one that a single rank has for the whole batch (with --ohem,
    for the hard pixels of each part). Returns this rank's share of the losses, on the device; the
    GPU is not waited for.
    """
    args = run.args
    torch.manual_seed(recipe.step_seed(args.seed, run.step, run.rank))
    factor = recipe.rate(run.step, run.total, args.power, args.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = args.lr * group["factor"] * factor
    share = torch.zeros_like(run.sums)
    images, labels, factors = batch
    parts = zip(
        images.to(run.device, non_blocking=True).chunk(args.accumulate),
        labels.to(run.device, non_blocking=True).chunk(args.accumulate),
        factors.chunk(args.accumulate),
    )
    for i, (x, y, f) in enumerate(parts, 1):
        with no_sync(run) if i < args.accumulate else nullcontext():
            part = part_losses(run, normalize(color_jitter(x, f)), y, labelled)
            loss = (part * run.weights).sum() * run.world  # DDP averages over the ranks
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
    run.recent.append((run.step, share))
    run.sums += share
    return share


def no_sync(run: Run) -> AbstractContextManager:
    """A block whose backward leaves the gradients of this rank alone."""
    if isinstance(run.model, nn.parallel.DistributedDataParallel):
        return run.model.no_sync()
    return nullcontext()


def part_losses(run: Run, x: Tensor, y: Tensor, labelled: float) -> Tensor:
    """The losses of a part of a rank's batch. With --ohem the head's are of hard pixels."""
    amp = AMP[run.args.amp]
    with torch.autocast(run.device.type, amp or torch.bfloat16, enabled=amp is not None):
        outputs = run.model(x.contiguous(memory_format=torch.channels_last), full_size=False)
    weight = run.class_weights
    if weight is not None:
        weight = weight.to(run.device, non_blocking=True)
    if not run.args.ohem:
        return recipe.losses(outputs, y, labelled, weight)
    with torch.no_grad():  # hard by probability, whatever the class weighs
        hard = recipe.ohem_mask(recipe.pixel_losses(outputs[0], y))
    pixels = recipe.pixel_losses(outputs[0], y, weight)
    kept = count_labelled(run, y, hard).float()
    if run.world > 1:
        dist.all_reduce(kept)
    head = (pixels * hard).sum() / kept.clamp(min=1) / run.args.accumulate
    return torch.cat([head[None], recipe.losses(outputs[1:], y, labelled, weight)])


def count_labelled(run: Run, labels: Tensor, among: Tensor | bool = True) -> Tensor:
    """Labelled pixels of this rank's batch, weighted by class. among: a mask."""
    weight = labels != IGNORE
    if run.class_weights is not None:
        weights = F.pad(run.class_weights, (0, 256 - len(run.class_weights)))
        weight = weights.to(labels.device, non_blocking=True)[labels.long()]
    return (weight * among).sum(dtype=torch.float64)


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * net, for parameters and buffers; counters are copied."""
    for mean, now in zip(ema.state_dict().values(), net.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)


def log_step(run: Run, board: Board, share: Tensor, speed: float) -> None:
    """Check that the losses since the last log are finite, then print this step's line."""
    check_finite(run)
    loss = sum_over_ranks(share.tolist())[0]
    if run.rank == 0:
        print_progress(step_line(run, loss, speed), log=True)
    values = {"step/loss": loss, "step/lr": run.lr, "step/images_per_second": speed}
    board.draw(values, run.step)


# ---- an epoch


def end_epoch(run: Run, board: Board, saved: bool = False) -> None:
    """Validate (every --eval-every epochs, and the last), add the epoch's line to the history,
    save.

    Validating may take long, so the run is saved before as well: after a kill only validation is
    repeated. saved: that has been done.
    """
    epoch = run.step // run.per_epoch
    means = [total / run.per_epoch for total in sum_over_ranks(run.sums.tolist())]
    names = ("loss", "loss_res2", "loss_res3", "loss_p")
    line: dict[str, Any] = {"epoch": epoch, "step": run.step, "lr": run.lr, "miou": None}
    line |= zip(names, means)
    validated = epoch % run.args.eval_every == 0 or epoch == run.args.epochs
    if validated:
        if not saved:  # a second save would replace last.prev.pt, perhaps the last good one
            save(run)
        line |= validate(run, run.net)
        if run.ema is not None:
            line["ema_miou"] = validate(run, run.ema)["miou"]
        recipe.set_mode(run.net, run.args.freeze_bn)
    run.history.append(line)
    run.sums.zero_()
    save(run)
    if run.rank == 0 and validated:
        print_line(epoch_line(line, run.args.epochs))
    if board.writer is not None:
        picture = val_sheet(run) if line["miou"] is not None else None
        board.draw(epoch_values(run, line), run.step, picture)


def validate(run: Run, net: nn.Module) -> dict[str, Any]:
    """The scores on the validation split by evaluate.py's function. Every rank uses rank 0's
    BatchNorm statistics.

    A signal to any rank stops every rank at the next image.
    """
    if run.world > 1:
        for b in net.buffers():
            dist.broadcast(b, 0)

    def stop_at_signal(index: int, matrix: Tensor) -> None:
        if run.caught:
            raise InputError("stopped by a signal")

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
    there = [name for name in ("last.pt", "best.pt", "log.jsonl") if (out / name).exists()]
    best = f"; best mIoU {100 * run.best:.2f} %" if run.best is not None else ""
    print_line(f"in {quote(out)}: {', '.join([*there, 'val.png'])}{best}")
    return int(run.unsaved)


def stopped(run: Run, number: int) -> int:
    """Say that a signal stopped the run. Returns the exit status, 128 + its number."""
    saved = "not saved" if sum_over_ranks([run.unsaved])[0] else "saved"
    name = signal.Signals(number).name
    print_line(
        f"rank {run.rank}: stopped by {name} at step {run.step}, {saved}: the same command goes on",
        error=True,
    )
    return 128 + number


if __name__ == "__main__":
    run_script(main, needs_output=False)
