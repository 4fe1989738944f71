"""What the scripts share: errors, messages, files, flags, exit status; ranks, device, signals."""

import argparse
import glob
import io
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

import torch
from torch import nn

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class InputError(ValueError):
    """Unusable input, as one line: the file, what was got, what was expected and how to mend it."""


# ---- printing


def print_line(text: str, error: bool = False, end: str = "\n") -> None:
    """Print to standard output, or standard error. A closed pipe or a full disk stops nothing.

    On a terminal the line replaces an open line of progress.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed; print would use standard output
        return
    try:
        if on_terminal(stream):
            text = f"\r\033[K{text}"
        print(text, file=stream, end=end, flush=True)
    except OSError:
        discard_output(stream)


def print_progress(line: str, last: bool = False, log: bool = False) -> None:
    """Show progress: on a terminal a line that is rewritten in place, elsewhere only the last line.

    log: on standard output, and elsewhere every line; otherwise on standard error.
    """
    if on_terminal(sys.stdout if log else sys.stderr):
        columns = shutil.get_terminal_size().columns - 1  # a wrapped line could not be rewritten
        print_line(line[:columns], error=not log, end="\n" if last else "")
    elif last or log:
        print_line(line, error=not log)


def on_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees the stream, which may be closed."""
    return stream is not None and stream.isatty()


def discard_output(stream: TextIO) -> None:
    """Send the stream to /dev/null. Otherwise every later flush, and the exit, would fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    stream.flush()


def quote(path: Path | str) -> str:
    """A file's name for a message: escaped if it would break the line or cannot be printed."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def counted(n: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# ---- files


def regular_file(path: Path | str) -> Path:
    """The path, if a regular file is there; else OSError. Opening a pipe would wait for ever."""
    if not os.path.exists(path):
        raise FileNotFoundError(0, "no such file")
    if not os.path.isfile(path):
        raise OSError(0, "not a file")
    return Path(path)


def open_lock(path: Path) -> TextIO:
    """A file to lock. A pipe of that name does not block, and a link is not followed."""
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NONBLOCK", "O_NOFOLLOW"):  # not on Windows
        flags |= getattr(os, name, 0)
    return os.fdopen(os.open(path, flags), "w")


def lock_file(file: TextIO, wait: bool = False) -> bool:
    """Lock a file until it is closed. False if another process has it, unless it is waited for.

    Without fcntl (Windows), or on a file system without locks, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        # Children do not inherit this kind of lock; loader processes can outlive a killed training.
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def check_open_files(needed: int) -> None:
    """InputError if the system allows this process fewer open files."""
    try:
        import resource
    except ImportError:  # Windows
        return
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= allowed < needed:
        raise InputError(
            f"the system allows {allowed} open files, and --workers needs {needed}: raise the "
            f"limit (ulimit -n {needed}), or give --workers 0"
        )


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Call save(file) on a new file beside `path`, flush it to the disk, then replace `path`.

    So `path` is always whole: the old file or the new one. OSError (a full disk) leaves the old one
    and nothing else.
    """
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(beside, "xb") as f:  # x: a link that somebody put there is not followed
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException as e:
        beside.unlink(missing_ok=True)
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):
            raise e.__context__ from None  # torch.save hides the system's error behind its own
        raise


def remove_parts(folder: Path, name: str = "") -> None:
    """Remove what a killed `write` left of files whose names begin so. Call it under a lock."""
    for path in folder.glob(f"{glob.escape(name)}*.part"):
        if re.fullmatch(r".*\.[0-9a-f]{8}\.part", path.name) and path.is_file():
            path.unlink()


def write_result(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """`write`, in a folder that is made if needed. InputError if it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, save)
    except OSError as e:
        raise InputError(
            f"{quote(path)}: cannot be written ({e.strerror}): make room or write elsewhere"
        ) from e


# ---- the command line


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


FLAGS: dict[str, dict[str, Any]] = {  # the same in every script that takes a checkpoint
    "data": {"help": "data set (default: the checkpoint's)"},
    "root": {"help": "its folder (default: the checkpoint's)"},
    "split": {"default": "val", "help": "of the data set (default: val)"},
    "scales": {"type": float, "nargs": "+", "default": [1.0], "help": "averaged (default: 1.0)"},
    "base": {
        "type": int,
        "help": "short side of images at a scale of 1.0; 0: as they are (default: the crop of the "
        "training for ade20k, 0 for others)",
    },
    "flip": {"action": "store_true", "help": "average with the mirrored image"},
    "crop": {"type": int, "help": "sliding windows of this size (default: the whole image)"},
    "amp": {"choices": ["auto", *AMP], "help": "precision (default: the checkpoint's)"},
    "context": {"help": "MODULE:FACTORY, again, if training was given one"},
    "workers": {"type": int, "default": 2, "help": "reading processes a rank (default: 2)"},
    "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:N or mps (default: auto)"},
    "json": {"action": "store_true", "help": "print one JSON object as the last line"},
}


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add some of FLAGS to a parser."""
    for name in names:
        parser.add_argument(f"--{name}", **FLAGS[name])


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *names: str
) -> argparse.Namespace:
    """The arguments of a parser and of some of FLAGS. InputError for values out of range."""
    add_flags(parser, *names)
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: expected 0 or more")
    if "crop" in names and args.crop is not None and args.crop < 1:
        raise InputError(f"--crop {args.crop}: expected 1 or more")
    if "base" in names and args.base is not None and not 0 <= args.base <= 8192:
        raise InputError(f"--base {args.base}: expected 0 to 8192")
    for scale in args.scales if "scales" in names else ():
        if not 0.01 <= scale <= 10:
            raise InputError(f"--scales {scale}: expected 0.01 to 10")
    return args


def import_factory(context: str) -> Callable[[int, int], nn.Module] | None:
    """The factory that MODULE:FACTORY names, imported; None for a built-in context."""
    if ":" not in context:
        return None
    module, name = context.split(":", 1)
    sys.path.insert(0, os.getcwd())  # the user's module lies in the current folder
    try:
        factory = getattr(import_module(module), name)
        if not callable(factory):
            raise TypeError(f"{name} cannot be called")
        return factory
    except Exception as e:  # the user's module can fail in any way
        raise InputError(
            f"--context {quote(context)}: {quote(str(e))}; expected MODULE:FACTORY "
            "with FACTORY(channels, num_classes) -> module"
        ) from None
    finally:
        sys.path.pop(0)


# ---- how a script ends

KILLED = "a process that reads images was killed, probably out of memory: lower --workers"
FAILURES = {  # a part of an error's text: what to print
    "DataLoader worker": f"{KILLED}, or enlarge /dev/shm",
    "process pool": KILLED,
    "by peer": "another rank is gone: its own line says why, or it was killed",  # gloo
}


def failure_line(error: BaseException) -> str | None:
    """The line for an error that the machine caused; None for an error of the program."""
    text = str(error)
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    # The CPU's allocator and CUDA's own calls raise a plain RuntimeError.
    if no_memory or "allocate memory" in text or "out of memory" in text:
        return "out of memory: try --recompute or --accumulate 2 (train.py), or --crop 768 (others)"
    for part, line in FAILURES.items():
        if part in text:
            return line
    return text if isinstance(error, OSError) else None


def run_script(main: Callable[[], int | None], needs_output: bool = True) -> None:
    """Run a script's main and exit with its status.

    Wrong input is one line on standard error and status 2; a failure of the machine, or a lost
    output if the script needs it, is status 1; Ctrl-C is 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that cannot be printed
    status: int | None = 1
    line = None
    try:
        status = main()
        if needs_output and sys.stdout is not None:
            sys.stdout.flush()
    except InputError as e:
        status, line = 2, str(e)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (OSError, MemoryError, RuntimeError) as e:
        status, line = 1, failure_line(e)
        if line is None:
            raise
    if line is not None:
        print_line(f"{Path(sys.argv[0]).name}: {quote(line)}", error=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            discard_output(stream)
    kill_children()
    sys.exit(status)


def kill_children() -> None:
    """Kill children that are left, such as stopped readers: otherwise the exit waits for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for each
    for process in multiprocessing.active_children():
        process.kill()


# ---- signals


def existing_signals(*names: str) -> list[signal.Signals]:
    """The signals of these names that the system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


# A terminal or Slurm sends these to every process of a group, loader processes included.
GROUP_SIGNALS = existing_signals("SIGINT", "SIGUSR1", "SIGHUP")


@contextmanager
def time_limit(seconds: int, message: str) -> Iterator[None]:
    """Raise TimeoutError with the message if the block takes longer; 0 is no limit."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(message)

    main = threading.current_thread() is threading.main_thread()  # others have no signals
    if not seconds or not main or not hasattr(signal, "SIGALRM"):
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


class Interrupted(BaseException):
    """A signal came during a wait. Not an Exception: those mean a wrong file when one is read."""


class Caught(list[int]):
    """The numbers of the signals that came. While `waiting`, a signal also raises Interrupted."""

    waiting = False

    def __call__(self, number: int, frame: object) -> None:
        self.append(number)
        if self.waiting:
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block, such as the wait for a batch, that a signal ends. It may have come before."""
        self.waiting = True
        try:
            if self:
                raise Interrupted
            yield
        finally:
            self.waiting = False


@contextmanager
def stop_signals() -> Iterator[Caught]:
    """Catch SIGTERM, SIGINT, SIGUSR1 (Slurm's warning) and SIGHUP while the block runs.

    A signal that is ignored, as SIGHUP is under nohup, stays so.
    """
    caught = Caught()
    old = {}
    for number in (signal.SIGTERM, *GROUP_SIGNALS):
        if signal.getsignal(number) != signal.SIG_IGN:
            old[number] = signal.signal(number, caught)
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
