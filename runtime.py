"""What every script starts, says and ends with: wrong input as one line, printing, whole-file writes, the argument parser and
the exit status; ranks, device, precision and signals."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
import torch.distributed as dist
from torch import nn

GROUP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class InputError(ValueError):
    """Unusable input, as one line: the file, what was got, what was expected and how to mend it."""


def print_line(text: str, error: bool = False, end: str = "\n") -> None:
    """Print to standard output, or error, where anybody listens: a closed pipe or a full disk behind it stops nothing."""
    stream = sys.stderr if error else sys.stdout
    try:
        if stream is not None:  # which print would take for standard output
            print(text, file=stream, end=end, flush=True)
    except OSError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Drop what a stream could not write: else each flush would fail on it, that of a starting process of the loader too, and that
    of the exit, which makes the status 120."""
    fd, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(fd)
    os.dup2(null, fd)
    stream.flush()
    os.dup2(kept, fd)
    os.close(kept)
    os.close(null)


def print_progress(line: str, *, last: bool = False) -> None:
    """Show progress on standard error: on a terminal rewritten in place, elsewhere the last line alone."""
    if on_terminal(sys.stderr):
        columns = shutil.get_terminal_size().columns - 1  # a longer line could not be taken back
        print_line(f"\r\033[K{line[:columns]}", error=True, end="\n" if last else "")
    elif last:
        print_line(line, error=True)


def on_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees the stream, which may be closed."""
    return stream is not None and stream.isatty()


def quote(path: Path | str) -> str:
    """A file's name for a message; quoted and escaped where it would break the line or cannot be printed."""
    return str(path) if str(path).isprintable() else repr(str(path))


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Call save(file) on a file beside `path`, flush it to the disk, then replace: `path` is whole whatever happens, the
    old one or the new one. OSError (a full disk) leaves the old one and nothing beside it."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException as e:
        beside.unlink(missing_ok=True)
        if isinstance(e, RuntimeError) and isinstance(
            e.__context__, OSError
        ):  # torch.save's writer has words of its own for it
            raise e.__context__ from None
        raise


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as those of wrong files."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


FLAGS = {  # spelt and meant alike in the scripts that take a checkpoint
    "data": {"help": "data set (default: the checkpoint's)"},
    "root": {"help": "its folder (default: the checkpoint's)"},
    "split": {"default": "val", "help": "of the data set (default: val)"},
    "scales": {
        "type": float,
        "nargs": "+",
        "default": [1.0],
        "help": "of the image, averaged over (default: 1.0)",
    },
    "flip": {"action": "store_true", "help": "average with the mirrored image"},
    "crop": {"type": int, "help": "sliding windows of this size (default: the whole image)"},
    "amp": {"choices": ["auto", *AMP], "help": "precision (default: the checkpoint's)"},
    "context": {"help": "MODULE:FACTORY, again, where training was given one"},
    "workers": {
        "type": int,
        "default": 2,
        "help": "processes that read images, per rank (default: 2)",
    },
    "json": {"action": "store_true", "help": "one JSON object as the last line"},
}


def add_flags(p: argparse.ArgumentParser, *names: str) -> None:
    """Add flags of FLAGS to a parser."""
    for name in names:
        p.add_argument(f"--{name}", **FLAGS[name])


def parse_flags(
    p: argparse.ArgumentParser, argv: Sequence[str] | None, *names: str
) -> argparse.Namespace:
    """The arguments of a parser and of these FLAGS. InputError for values out of range."""
    add_flags(p, *names)
    args = p.parse_args(argv)
    crop = getattr(args, "crop", None)
    if (
        not all(0 < s <= 10 for s in getattr(args, "scales", [1]))
        or (crop is not None and crop < 1)
        or args.workers < 0
    ):
        raise InputError(
            "--scales must be above 0 and at most 10, --crop above 0, --workers 0 or more"
        )
    return args


def import_factory(context: str) -> Callable[[int, int], nn.Module] | None:
    """The factory that `MODULE:FACTORY` names, imported; None for the built-in contexts. InputError when there is none."""
    if ":" not in context:
        return None
    module, name = context.split(":", 1)
    sys.path.insert(0, os.getcwd())  # the user's module lies where the user stands
    try:
        factory = getattr(import_module(module), name)
        if not callable(factory):
            raise TypeError(f"{name} cannot be called")
        return factory
    except Exception as e:  # the user's module can fail in any way
        raise InputError(
            f"--context {quote(context)}: {quote(str(e))}; expected MODULE:FACTORY with FACTORY(channels, num_classes) -> "
            "module"
        ) from None
    finally:
        sys.path.pop(0)


REASONS = {  # in the text of an error that is not of the program: what to do
    "DataLoader worker": "a process that reads images was killed, probably out of memory: lower --workers, or enlarge /dev/shm",
    "process pool": "a process that reads images was killed, probably out of memory: lower --workers",
    "by peer": "another rank is gone: its own line says why, or it was killed",  # gloo: closed, or reset
    "out of memory": "out of memory: lower --batch (train.py), or give --crop (the others)",  # a GPU's
    "allocate memory": "out of memory: lower --batch (train.py), or give --crop (the others)",
}  # a CPU's


def run_script(main: Callable[[], int | None], needs_output: bool = True) -> None:
    """Run a script's main. Wrong input becomes one line on standard error and exit status 2; what the machine lacks, 1, and so
    does an output that is lost, if the script is for its output; Ctrl-C 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a name that cannot be printed ends nothing
    status, line = 1, ""
    try:
        status = main()
        if needs_output and sys.stdout is not None:
            sys.stdout.flush()
    except InputError as e:
        status, line = 2, str(e)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (OSError, MemoryError, RuntimeError) as e:
        text = "out of memory" if isinstance(e, MemoryError) else str(e)
        line = next(
            (reason for part, reason in REASONS.items() if part in text),
            text * isinstance(e, OSError),
        )
        if not line:
            raise
        status = 1
    if line:
        print_line(f"{Path(sys.argv[0]).name}: {quote(line)}", error=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            discard(stream)
    sys.exit(status)


def from_environment(name: str, default: int) -> int:
    """A whole number among the environment variables."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{name}={text!r} in the environment: expected a number, as torchrun sets it"
        ) from None


@contextmanager
def fail_on_all_ranks(rank: int) -> Iterator[None]:
    """A block that ends in an InputError on every rank where it does on one: the others would wait for that rank."""
    failure = None
    try:
        yield
    except InputError as e:
        failure = e
    failed = torch.tensor(int(failure is not None))
    if dist.is_initialized():
        dist.all_reduce(failed)
    if failed:
        raise failure or InputError(f"rank {rank}: stopped, since another rank cannot go on")


@contextmanager
def distributed(
    timeout: timedelta = timedelta(minutes=10),
) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world, device) from torchrun's environment, or (0, 1, device) without it. The process group (nccl for GPU
    tensors, gloo for CPU ones) lives exactly as long as the block; a rank that waits so long for another gives up."""
    rank, world, local = (
        from_environment(k, d) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if (
        not (0 <= rank < world and 0 <= local)
        or world > 1
        and ("MASTER_ADDR" not in os.environ or not 0 < from_environment("MASTER_PORT", 0) < 65536)
    ):
        raise InputError(
            f"RANK {rank}, LOCAL_RANK {local}, WORLD_SIZE {world}, MASTER_ADDR or MASTER_PORT in the environment are not "
            "torchrun's: unset them, or start by torchrun"
        )
    gpu = torch.cuda.is_available()
    if gpu and local >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local} has no GPU, the machine has {torch.cuda.device_count()}: lower --nproc-per-node"
        )
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world > 1:
        store = next(dist.rendezvous("env://"))[0]
        if (
            os.environ.get("GROUP_WORLD_SIZE") == "1"
        ):  # one node, where the ranks' counts of restarts agree: after one, torchrun's
            store = dist.PrefixStore(
                f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )  # store still has dead addresses
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    try:
        yield rank, world, device
    finally:
        if dist.is_initialized():
            time.sleep(
                0.1
            )  # gloo's threads want Python's lock to drop their last tensors; its destructor waits for them, holding it
            dist.destroy_process_group()


def choose_amp(amp: str, device: torch.device) -> str:
    """'auto' to 'bf16' where the machine computes it well (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), else to 'fp16' on a
    GPU and 'off' on a CPU."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    fast = [
        getattr(torch.cpu, name, bool)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return "bf16" if any(fast) else "off"


def choose_kernels(args: argparse.Namespace) -> None:
    """For this process: the fastest convolutions of the GPU, or the repeatable ones with --deterministic."""
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGTERM, SIGUSR1 (Slurm's warning), SIGINT and, but under nohup, SIGHUP: the step is finished and the
    run saved."""
    caught: list[int] = []
    old = {
        s: signal.signal(s, lambda number, frame: caught.append(number))
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
        if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN
    }
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
