"""Whole trainings: stopped, killed, resumed, on full disks, on ranks that die, two in a folder."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    TINY,
    forked,
    free_port,
    ranks,
    run_whole_and_in_parts,
    same_run,
    same_state,
    stop_at,
    trained,
)
from PIL import Image

import checkpoint
import data
import evaluate
import recipe
import run as a_run
import runtime
import train
from resume import restore
from run import start_run
from runtime import InputError


def test_a_run_leaves_its_four_files(run_folder):
    assert {p.name for p in run_folder.iterdir()} == {
        "last.pt",
        "last.prev.pt",
        "best.pt",
        "log.jsonl",
        "val.png",
        ".lock",
    }
    settings, *epochs = map(json.loads, (run_folder / "log.jsonl").read_text().splitlines())
    assert (
        settings["settings"]["batch"] == 4
        and [e["epoch"] for e in epochs] == [1, 2]
        and epochs[1]["step"] == 6
    )
    assert set(epochs[0]) == {
        "epoch",
        "step",
        "lr",
        "loss",
        "loss_res2",
        "loss_res3",
        "miou",
        "accuracy",
        "iou",
    }
    checkpoint = torch.load(run_folder / "last.pt", weights_only=True)
    assert checkpoint["classes"] == ["red", "green", "blue"] and checkpoint["best"] == max(
        e["miou"] for e in epochs
    )
    with Image.open(run_folder / "val.png") as sheet:
        assert sheet.width > 900 and sheet.height > 600


def test_the_line_fits_its_terminal(run_folder, street, tmp_path, monkeypatch, capsys, stub):
    """What is longer than a row could not be taken back by the next line."""
    monkeypatch.setattr(runtime, "on_terminal", lambda stream: True)
    monkeypatch.setattr(runtime.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    assert trained(tmp_path / "r", street) == 0
    lines = [line for line in capsys.readouterr().out.split("\r\033[K") if "loss" in line]
    assert len(lines) == 6 and all(len(line) == 79 for line in lines)
    assert lines[2].startswith("epoch 1/2  step 3/6  loss")


@pytest.mark.slow
def test_training_learns(street, tmp_path):
    """Colour alone separates these classes: a network that cannot learn them in 30 steps is
    broken.
    """
    assert trained(tmp_path / "r", street, "--epochs", 10, "--lr", 0.05, "--eval-every", 10) == 0
    lines = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()[1:]]
    assert (
        lines[-1]["loss"] < 0.75 * lines[0]["loss"]
        and lines[-1]["miou"] > 0.4
        and lines[0]["miou"] is None
    )


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(
            ["--preset", "released", "--workers", "2", "--ema", "0.9"], marks=pytest.mark.slow
        ),
    ],
)
def test_stopped_and_resumed_is_the_uninterrupted_run(street, tmp_path, monkeypatch, flags, capsys):
    """Stopped by a signal within an epoch (twice), resumed by the same command; the released preset
    has dropout.
    """
    run_whole_and_in_parts(tmp_path, street, monkeypatch, *flags)
    told = capsys.readouterr().err
    for step in (2, 4):  # the step is finished, no other begun
        assert f"SIGTERM at step {step}, saved" in told


def test_two_ranks_go_on_where_one_was(street, tmp_path, capsys, monkeypatch, stub):
    """Dead after step 5 on one rank, ended on two; the mIoU that two ranks logged is what one rank
    evaluates.
    """
    step = train.train_step

    def dying(run, *rest):
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run, *rest)

    monkeypatch.setattr(train, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "r", street, "--save-every", 1)
    monkeypatch.setattr(train, "train_step", step)
    status, texts = ranks(
        2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", said=tmp_path / "said"
    )
    assert status == [0, 0] and "at step 5 of 6" in texts[0], texts
    last = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert last["step"] == 6 and evaluate.main([str(tmp_path / "r" / "last.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["miou"] == last["miou"]


def test_three_ranks_stopped_and_resumed_are_the_uninterrupted_three(
    street, tmp_path, monkeypatch, stub
):
    """Of three on the order of a sum of gradients matters, and DDP changes its own after a
    process's first step.
    """
    flags, step = [*TINY, "--root", street, "--batch", 6], train.train_step

    def stopped(run, *args):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *args)

    assert (
        ranks(3, train.main, *flags, "--out", tmp_path / "whole", said=tmp_path / "said")[0]
        == [0] * 3
    )
    monkeypatch.setattr(train, "train_step", stopped)
    assert (
        ranks(3, train.main, *flags, "--out", tmp_path / "r", said=tmp_path / "said")[0]
        == [143] * 3
    )
    monkeypatch.setattr(train, "train_step", step)
    status, text = ranks(3, train.main, *flags, "--out", tmp_path / "r", said=tmp_path / "said")
    assert (
        status == [0] * 3
        and "last.pt at step 2 of 4" in text[0]
        and same_run(tmp_path / "whole", tmp_path / "r")
    )


def test_a_finished_run_stays_as_it_is(run_folder, street):
    before = (run_folder / "log.jsonl").read_text()
    assert trained(run_folder, street) == 0
    assert (run_folder / "log.jsonl").read_text() == before


class Full:
    """A file on a full disk."""

    def write(self, data):
        raise OSError(28, "No space left on device")


write = runtime.write


def writes_are(monkeypatch, function):
    """What a training writes, it writes by this function."""
    for module in (checkpoint, a_run, train):
        monkeypatch.setattr(module, "write", function)


def test_full_disk_at_each_write(street, tmp_path, monkeypatch, capsys, stub):
    """Whichever write fails, a loadable checkpoint is there afterwards, and the run goes on and
    ends the same.
    """
    assert trained(tmp_path / "whole", street, "--epochs", 1) == 0
    for nth, name in enumerate(
        ("new.pt", "log.jsonl", "best.pt", "new.pt", "log.jsonl", "val.png")
    ):
        out, writes = tmp_path / f"r{nth}", []
        writes_are(monkeypatch, partial(full_at, nth, writes))
        status = trained(out, street, "--epochs", 1)
        assert writes[nth] == name and "No space left" in capsys.readouterr().err
        assert not list(out.glob("*.part"))
        assert status == (name == "val.png") and same_run(tmp_path / "whole", out)


def full_at(nth, writes, path, save):
    """Write, but the nth of the writes fails half-way; their names are kept in the list."""
    writes.append(path.name)
    if len(writes) == nth + 1:
        return write(path, lambda f: f.write(b"part") and save(Full()))
    return write(path, save)


@pytest.mark.slow
@pytest.mark.parametrize("name, split", [("cityscapes", "trainval"), ("ade20k", "train")])
def test_trees_named_as_the_real_ones_train_and_score(name, split, request, tmp_path, capsys):
    root = request.getfixturevalue(name)
    flags = [
        "--data",
        name,
        "--root",
        str(root),
        "--split",
        split,
        "--backbone",
        "resnet18",
        "--channels",
        "8",
        "--crop",
        "64",
        "--batch",
        "1",
        "--epochs",
        "1",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "r"),
    ]
    assert train.main(flags) == 0
    checkpoint = str(tmp_path / "r" / "last.pt")
    assert evaluate.main([checkpoint, "--split", "train", "--workers", "0"]) == 0
    if name == "cityscapes":
        with pytest.raises(InputError, match="no ground truth"):
            evaluate.main([checkpoint, "--split", "test"])


def whole(process):
    process.join(200)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.slow
def test_killed_twenty_times_is_the_uninterrupted_run(street, tmp_path):
    """SIGKILL at random moments, the same command again each time: the weights, optimizer and log
    of the run left alone.
    """
    import torch._dynamo  # noqa: F401  else each start would, and most moments would fall into that

    flags = [*TINY, "--root", street, "--epochs", 6, "--save-every", 1, "--out"]
    whole(forked(train.main, *flags, tmp_path / "whole"))
    said, rng, patience = tmp_path / "said", random.Random(0), 1.0
    kills = training = ends = 0
    while kills < 20:
        said.write_text("")
        process = forked(train.main, *flags, tmp_path / "killed", said=said)
        process.join(rng.uniform(0, 2 * patience))
        ended = process.exitcode
        process.kill()
        process.join()
        seen = "  step " in said.read_text()
        if ended is None:
            kills += 1
            training += seen
        else:
            assert ended == 0, said.read_text()
            ends += 1
            shutil.move(tmp_path / "killed", tmp_path / f"ended{ends}")
        # Half of the kills come after the first step, however fast the machine is.
        patience *= 0.7 if seen else 1.4
    assert training > 3, "most moments were before the training"
    whole(forked(train.main, *flags, tmp_path / "killed"))
    said.unlink()
    assert all(same_run(tmp_path / "whole", ended) for ended in tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_stopped_and_killed_are_the_uninterrupted_two(street, tmp_path):
    """SIGTERM to torchrun: both ranks save the same step. Then --max-restarts 3 and each time one
    rank killed.
    """
    flags = [*TINY, "--root", street, "--epochs", 4, "--save-every", 1]
    assert ranks(2, train.main, *flags, "--out", tmp_path / "whole", said=tmp_path / "said")[0] == [
        0,
        0,
    ]

    def start():
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "3",
            ROOT / "train.py",
            *flags,
            "--out",
            tmp_path / "r",
        ]
        return subprocess.Popen(
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    process = start()
    for line in process.stdout:
        if "step 3/12" in line:
            process.terminate()
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and {
        f"rank {r}: stopped by SIGTERM at step" in rest for r in (0, 1)
    } == {True}, rest
    process, kills, steps, lines = start(), 0, 0, []
    for line in process.stdout:
        lines.append(line)
        steps = 0 if line.startswith("resumed") else steps + ("images/s" in line)
        if kills < 2 and steps == 3:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(workers[kills % 2]), signal.SIGKILL)
            kills, steps = kills + 1, 0
    assert (
        process.wait(60) == 0
        and kills == 2
        and sum(line.startswith("resumed") for line in lines) == 3
    ), "".join(lines)
    assert same_run(tmp_path / "whole", tmp_path / "r")


def test_killed_while_validating_repeats_only_that(street, tmp_path, monkeypatch, stub):
    assert trained(tmp_path / "whole", street) == 0
    evaluation, calls = evaluate.evaluate, []

    def dying(*args, **kwargs):
        calls.append(args[0].training)
        if len(calls) in (1, 2, 4):
            raise KeyboardInterrupt
        return evaluation(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", dying)
    for step in (3, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "r", street)
        assert (tmp_path / "r" / "last.prev.pt").exists() == (
            step == 6
        )  # a repetition leaves the checkpoint before where it is
        saved = checkpoint.read_checkpoint(tmp_path / "r" / "last.pt")
        assert saved["step"] == step and len(saved["history"]) == step // 3 - 1
    assert trained(tmp_path / "r", street) == 0 and len(calls) == 5
    assert same_run(tmp_path / "whole", tmp_path / "r")


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_while_validating_stops_every_rank_at_the_image(
    street, tmp_path, monkeypatch, stub, world
):
    """Told as saved, which it was before validating; the same command repeats validation alone, to
    the same bits.
    """
    assert (
        ranks(
            world,
            train.main,
            *TINY,
            "--root",
            street,
            "--out",
            tmp_path / "whole",
            said=tmp_path / "said",
        )[0]
        == [0] * world
    )
    first, prediction, seen = tmp_path / "first", evaluate.predict, []

    def signalled(*args, **kwargs):
        seen.append(0)
        if os.environ["RANK"] == "0" and not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        elif first.exists() and world == 1 and len(seen) == 2:
            raise RuntimeError("the next image was computed too")
        return prediction(*args, **kwargs)

    monkeypatch.setattr(evaluate, "predict", signalled)
    flags = [*TINY, "--root", street, "--out", tmp_path / "r"]
    status, text = ranks(world, train.main, *flags, said=tmp_path / "said")
    told = zip(status, text, (signal.SIGUSR1, signal.SIGTERM))
    assert all(
        code == 128 + s and f"rank {r}: stopped by {s.name} at step 3, saved" in line
        for r, (code, line, s) in enumerate(told)
    ), text
    saved = checkpoint.read_checkpoint(tmp_path / "r" / "last.pt")
    assert saved["step"] == 3 and not saved["history"]
    monkeypatch.setattr(evaluate, "predict", prediction)
    assert ranks(world, train.main, *flags, said=tmp_path / "said")[0] == [0] * world and same_run(
        tmp_path / "whole", tmp_path / "r"
    )


@pytest.mark.parametrize("moved", [False, True])
def test_killed_between_the_two_renames(street, tmp_path, capsys, moved, stub):
    """new.pt is whole and last.pt the one before, still there or already last.prev.pt: the run goes
    on from new.pt.
    """
    assert trained(tmp_path / "whole", street) == 0
    out = tmp_path / "r"
    shutil.copytree(tmp_path / "whole", out)
    os.replace(out / "last.pt", out / "new.pt")
    if not moved:
        os.replace(out / "last.prev.pt", out / "last.pt")
    capsys.readouterr()
    assert trained(out, street) == 0 and "last.pt at step 6 of 6" in capsys.readouterr().out
    assert same_run(tmp_path / "whole", out) and not (out / "new.pt").exists()


def test_a_file_size_limit_of_the_system(street, tmp_path, capsys, stub):
    """Writes that fail half-way by RLIMIT_FSIZE: the run trains to its end, says so, and the same
    command then writes all.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert trained(tmp_path / "whole", street) == 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
        assert trained(tmp_path / "r", street) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step 6 not saved" in capsys.readouterr().err and not list(
        (tmp_path / "r").glob("*.p*t")
    )
    assert trained(tmp_path / "r", street) == 0 and same_run(tmp_path / "whole", tmp_path / "r")


def test_stopped_with_a_full_disk_is_not_told_as_saved(street, tmp_path, monkeypatch, capsys, stub):
    writes_are(monkeypatch, lambda path, save: save(Full()))

    def stopping(run, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(3)

    monkeypatch.setattr(train, "train_step", stopping)
    assert trained(tmp_path / "r", street) == 143
    assert "SIGTERM at step 1, not saved" in capsys.readouterr().err


def no_room_at_first(monkeypatch, name):
    """The first write of a file of this name meets a full disk."""
    tried = []

    def full(path, save):
        if path.name == name and not tried:
            tried.append(path)
            raise OSError(28, "No space left on device")
        return write(path, save)

    writes_are(monkeypatch, full)


def test_the_best_that_a_full_disk_lost_is_not_told_as_best(
    street, tmp_path, monkeypatch, capsys, stub
):
    rising = iter((0.5, 0.4, 0.3))
    monkeypatch.setattr(
        train,
        "validate",
        lambda run, net: {
            "miou": next(rising),
            "accuracy": 1.0,
            "iou": dict.fromkeys(("red", "green", "blue"), 0.5),
        },
    )
    no_room_at_first(monkeypatch, "best.pt")
    assert trained(tmp_path / "r", street, "--epochs", 3) == 0
    assert "best mIoU 40.00 %" in capsys.readouterr().out
    best, last = (
        checkpoint.read_checkpoint(tmp_path / "r" / name) for name in ("best.pt", "last.pt")
    )
    assert best["step"] == 6 and best["best"] == last["best"] == 0.4


def test_the_best_of_the_last_epoch_is_tried_again(street, tmp_path, monkeypatch, stub):
    """The retry at the end has the very weights."""
    no_room_at_first(monkeypatch, "best.pt")
    assert trained(tmp_path / "r", street, "--epochs", 1) == 0
    assert same_state(tmp_path / "r" / "best.pt", tmp_path / "r" / "last.pt")


def test_nobody_listens(street, tmp_path, monkeypatch, stub):
    """Nothing that is printed is worth a training: output to a full disk."""
    assert trained(tmp_path / "whole", street) == 0
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        assert trained(tmp_path / "r", street) == 0
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert same_run(tmp_path / "whole", tmp_path / "r")


def test_training_on_a_full_disk_behind_its_output_keeps_its_status(street, tmp_path, monkeypatch):
    """A process of its own, its output buffered: neither a loader's start, which flushes, nor the
    interpreter's end is the worse for it.
    """
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    command = [
        sys.executable,
        ROOT / "train.py",
        *TINY,
        "--root",
        street,
        "--out",
        tmp_path / "r",
        "--workers",
        1,
    ]
    with open("/dev/full", "w") as full:
        assert (
            subprocess.run([*map(str, command)], stdout=full, stderr=full, timeout=100).returncode
            == 0
        )
    assert trained(tmp_path / "heard", street) == 0 and same_run(tmp_path / "r", tmp_path / "heard")


def test_two_trainings_in_one_folder(street, tmp_path, stub):
    first = forked(train.main, *TINY, "--root", street, "--out", tmp_path / "r", "--epochs", 2000)
    try:
        while not (tmp_path / "r" / "last.pt").exists():
            assert first.is_alive()
            time.sleep(0.05)
        with pytest.raises(InputError, match="another training is writing"):
            trained(tmp_path / "r", street, "--epochs", 2000)
    finally:
        first.kill()
        first.join()


def test_resume_into_the_folder_of_another_run(run_folder, street, tmp_path, stub):
    assert trained(tmp_path / "r", street, "--seed", 5, "--epochs", 1) == 0
    with pytest.raises(InputError, match="holds a run of other settings"):
        trained(tmp_path / "r", street, "--resume", run_folder / "last.pt")
    (tmp_path / "r" / "last.pt").unlink()
    assert trained(tmp_path / "s", street, "--epochs", 2, "--eval-every", 2) == 0
    os.replace(tmp_path / "r" / "best.pt", tmp_path / "s" / "best.pt")
    assert trained(tmp_path / "s", street, "--epochs", 2, "--eval-every", 2) == 0
    args = recipe.parse_training(
        [*TINY, "--root", str(street), "--out", str(tmp_path / "s"), "--eval-every", "2"], 1
    )
    run = start_run(args, 0, 1, CPU)
    restore(run)
    assert run.step == 6 and run.best is None  # that best.pt is another run's


def test_a_file_that_breaks_stops_every_rank_with_one_line(street, tmp_path, stub):
    """Two ranks; images of later steps are not images: exit status 2, the name, no traceback of
    ours, and what was saved stays.
    """
    root = tmp_path / "street"
    shutil.copytree(street, root)
    first = {i for step in range(2) for _, i in data.step_items(step, seed=0, n=12, batch=4)}
    for i, item in enumerate(data.open_dataset("folder", root, "train").items):
        if i not in first:
            item.image.write_bytes(b"not an image")
    status, texts = ranks(
        2,
        train.main,
        *TINY,
        "--root",
        root,
        "--out",
        tmp_path / "r",
        "--save-every",
        1,
        said=tmp_path / "said",
    )
    told = [text.splitlines()[-1] for text in texts]
    assert (
        status == [2, 2]
        and any("images/train/" in line for line in told)
        and "Traceback" not in "".join(texts)
    ), texts
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("where", ["next_batch", "train_step", "mean_in_rank_order", "validate"])
def test_a_rank_that_is_killed_is_a_line_on_the_other(where, street, tmp_path, monkeypatch, stub):
    """By the kernel, for want of memory: no traceback, no waiting."""
    module = a_run if where == "mean_in_rank_order" else train
    function = getattr(module, where)

    @wraps(function)  # DDP looks at its hook's signature
    def killed(*args, **kwargs):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, where, killed)
    status, text = ranks(
        2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", said=tmp_path / "said"
    )
    assert status == [1, -signal.SIGKILL] and text[0].splitlines()[-1].endswith(
        "another rank is gone: its own line says why, or it was killed"
    )
    assert "Traceback" not in text[0]


def test_deterministic_gives_the_same_bits_twice(street, tmp_path):
    try:
        for name in "ab":
            assert trained(tmp_path / name, street, "--deterministic") == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("flags", [["--seed", 1], ["--save-every", 1], ["--out", "other"]], ids=str)
def test_ranks_of_different_flags_end_with_a_line_each(street, tmp_path, monkeypatch, stub, flags):
    monkeypatch.chdir(tmp_path)
    port, own = free_port(), [[], flags]
    processes = [
        forked(
            train.main,
            *TINY,
            "--root",
            street,
            "--out",
            "r",
            *own[r],
            said=f"said{r}",
            rank=r,
            world=2,
            port=port,
        )
        for r in range(2)
    ]
    for p in processes:
        p.join(60)
        p.kill()
    texts = [Path(f"said{r}").read_text() for r in range(2)]
    assert [p.exitcode for p in processes] == [2, 2], texts
    assert all(len(text.splitlines()) == 1 for text in texts), texts
    name = flags[0][2:].replace("-", "_")
    assert "rank 1: differs from rank 0: " + name in texts[1] and "rank 0: stopped" in texts[0]
    assert not list(tmp_path.glob("*/last.pt"))


MASKED = """import torch
class Masked(torch.nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.register_buffer("mask", torch.full((1,), -torch.inf))
        SPARE
    def forward(self, x):
        return torch.maximum(x, self.mask)
"""


def test_a_context_may_have_an_infinite_mask_but_no_spare_parameter(street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masked.py").write_text(MASKED.replace("SPARE", ""))
    spare = MASKED.replace("SPARE", "self.scale = torch.nn.Parameter(torch.ones(1))")
    (tmp_path / "spare.py").write_text(spare)
    flags = ("--epochs", 1, "--context")
    assert trained(tmp_path / "r", street, *flags, "masked:Masked") == 0
    assert evaluate.main([str(tmp_path / "r/last.pt"), "--context", "masked:Masked"]) == 0
    line = "no output depends on context.scale: use"
    with pytest.raises(InputError, match=line):
        trained(tmp_path / "s", street, *flags, "spare:Masked")
    assert not (tmp_path / "s").exists()


def train_with_stopped_reader(street, out, said):
    """A training whose process that reads images was stopped by SIGSTOP after the first step."""
    flags = (*TINY, "--root", street, "--out", out, "--epochs", 200, "--workers", 1)
    process = forked(train.main, *flags, said=said)
    while "step 1/" not in (said.read_text() if said.exists() else ""):
        assert process.is_alive()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGSTOP)
    return process


def test_a_signal_ends_the_wait_for_a_lost_batch(street, tmp_path, stub):
    process = train_with_stopped_reader(street, tmp_path / "r", tmp_path / "said")
    time.sleep(2)  # the batches that were ready are used
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 143, (tmp_path / "said").read_text()
    assert "stopped by SIGTERM" in (tmp_path / "said").read_text()
    assert (tmp_path / "r" / "last.pt").exists()


@pytest.mark.slow
def test_a_lost_batch_is_a_line(street, tmp_path, monkeypatch, stub):
    monkeypatch.setattr(data, "BATCH_TIMEOUT", 2)
    process = train_with_stopped_reader(street, tmp_path / "r", tmp_path / "said")
    process.join(60)
    ended = process.exitcode
    process.kill()
    text = (tmp_path / "said").read_text()
    assert ended == 1 and "no batch came for 2 s" in text.splitlines()[-1], text
    assert "Traceback" not in text


def test_a_full_shared_memory_is_a_line(street, tmp_path):
    """/dev/shm of 1 MiB, as a container may have it, and batches of 0.8 MB."""
    script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} "$@"'
    inside = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*inside, "-c", ""], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    flags = (*TINY, "--root", street, "--out", tmp_path / "r", "--workers", 2, "--crop", 256)
    command = [*inside, ROOT / "train.py", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "enlarge /dev/shm" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


def test_too_few_open_files_is_a_line(street, tmp_path, stub):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
        with pytest.raises(InputError, match="allows 100 open files, and --workers needs 128"):
            trained(tmp_path / "r", street, "--workers", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- longer, and from another network


def test_a_run_trains_longer_by_the_schedule_of_the_new_command(
    street, tmp_path, monkeypatch, capsys, stub
):
    """2 epochs, then 4: the weights of one training whose rate is of 6 steps, then of 12. Stopped
    and started again after the change: the same bits."""
    step, rate = train.train_step, recipe.rate
    for name in ("longer", "stopped"):
        assert trained(tmp_path / name, street) == 0
    capsys.readouterr()
    assert trained(tmp_path / "longer", street, "--epochs", 4, "--lr", 0.02) == 0
    line = "epochs 2 -> 4; lr 0.01 -> 0.02: the schedule from step 6 on is that of 4 epochs"
    assert line in capsys.readouterr().out

    def stopping(run, *rest):
        if run.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *rest)

    monkeypatch.setattr(train, "train_step", stopping)
    assert trained(tmp_path / "stopped", street, "--epochs", 4, "--lr", 0.02) == 143
    monkeypatch.setattr(train, "train_step", step)
    assert trained(tmp_path / "stopped", street, "--epochs", 4, "--lr", 0.02) == 0
    assert same_run(tmp_path / "longer", tmp_path / "stopped")

    def by_hand(step, total, *rest):
        return rate(step, 6, *rest) / 2 if step < 6 else rate(step, 12, *rest)

    monkeypatch.setattr(recipe, "rate", by_hand)
    assert trained(tmp_path / "hand", street, "--epochs", 4, "--lr", 0.02) == 0
    ours, hand = (
        checkpoint.read_checkpoint(tmp_path / name / "last.pt") for name in ("longer", "hand")
    )
    assert all(torch.equal(t, hand["model"][k]) for k, t in ours["model"].items())
    lines = [*map(json.loads, (tmp_path / "longer" / "log.jsonl").read_text().splitlines())]
    settings = [(i, x["step"], x["settings"]["lr"]) for i, x in enumerate(lines) if "settings" in x]
    assert settings == [(0, 0, 0.01), (3, 6, 0.02)]
    with pytest.raises(InputError, match="has trained 4 epochs, and --epochs is 1: give more"):
        trained(tmp_path / "longer", street, "--epochs", 1)
    with pytest.raises(InputError, match=r"seed 0 -> 1.*--init .*last\.pt and another --out"):
        trained(tmp_path / "longer", street, "--seed", 1)


def test_init_keeps_what_fits_and_names_the_rest(street, tmp_path, capsys, stub):
    """From 3 classes to 4, of which 2 have the same names: their rows, and all else, are equal."""
    assert trained(tmp_path / "r", street) == 0
    root = tmp_path / "four"
    shutil.copytree(street, root)
    (root / "classes.txt").write_text("blue\nsky\nred\nbus\n")
    capsys.readouterr()
    flags = [*TINY, "--root", str(root), "--out", str(tmp_path / "s"), "--seed", "5"]
    args = recipe.parse_training([*flags, "--init", str(tmp_path / "r" / "best.pt")], 1)
    run, fresh = (start_run(a, 0, 1, CPU) for a in (args, recipe.parse_training(flags, 1)))
    restore(run)
    old = checkpoint.read_checkpoint(tmp_path / "r" / "best.pt")["model"]
    own, drawn = run.net.state_dict(), fresh.net.state_dict()
    classifiers = {"head.4.weight", "head.4.bias", "aux2.weight", "aux2.bias", "aux3.weight"}
    classifiers |= {"aux3.bias", "context.coarse.weight", "context.coarse.bias"}
    for name, tensor in own.items():
        if name in classifiers:  # red green blue -> blue sky red bus
            assert torch.equal(tensor[[2, 0]], old[name][[0, 2]]), name
            assert torch.equal(tensor[[1, 3]], drawn[name][[1, 3]]), name
        else:
            assert torch.equal(tensor, old[name]), name
    told = capsys.readouterr().out
    assert "new classes, so drawn anew: sky, bus" in told, told
    assert train.main([*flags, "--init", str(tmp_path / "r" / "best.pt")]) == 0


def test_a_requeued_resume_into_another_folder_goes_on_there(street, tmp_path, monkeypatch, stub):
    """`--resume FILE --out NEW`, stopped three times: FILE is taken once."""
    assert trained(tmp_path / "whole", street, "--epochs", 4) == 0
    stops = [4]
    stop_at(stops, monkeypatch)
    assert trained(tmp_path / "first", street, "--epochs", 4) == 143
    stops += [6, 8, 10]
    flags = ("--epochs", 4, "--resume", tmp_path / "first" / "last.pt")
    status = [trained(tmp_path / "r", street, *flags) for _ in range(4)]
    assert status == [143, 143, 143, 0] and same_run(tmp_path / "whole", tmp_path / "r")


def test_of_the_runs_own_files_last_pt_alone_can_be_resumed(
    street, tmp_path, monkeypatch, capsys, stub
):
    """As if --resume were not given. An older file would replace what was trained since."""
    stop_at([4], monkeypatch)
    assert trained(tmp_path / "r", street) == 143
    with pytest.raises(InputError, match=r"is in --out, whose last\.pt it would replace"):
        trained(tmp_path / "r", street, "--resume", tmp_path / "r" / "last.prev.pt")
    assert trained(tmp_path / "r", street, "--resume", tmp_path / "r" / "last.pt") == 0
    assert "last.pt at step 5 of 6" in capsys.readouterr().out
    with pytest.raises(InputError, match="no such checkpoint"):
        trained(tmp_path / "s", street, "--resume", tmp_path / "s" / "last.pt")


def test_a_refused_start_leaves_no_folder_behind(street, run_folder, tmp_path, stub):
    with pytest.raises(InputError, match="its settings differ"):
        trained(tmp_path / "r", street, "--seed", 3, "--resume", run_folder / "last.pt")
    assert not (tmp_path / "r").exists()


def test_the_start_tells_what_is_trained_where(street, tmp_path, capsys, stub):
    assert trained(tmp_path / "r", street, "--batch", 5, "--epochs", 1) == 0
    first = capsys.readouterr().out.splitlines()[0]
    line = "cpu, amp off; train 12 images, 2 steps an epoch (2 left out of each); val 5 images; "
    assert first == line + f"weights none; in {tmp_path / 'r'}"
