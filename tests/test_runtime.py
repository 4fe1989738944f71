"""What the scripts share: exit status, error lines, torchrun's environment, ranks, whole-file
writes.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from datetime import timedelta

import pytest
import torch
from helpers import ROOT, TINY, forked, free_port, ranks, run_python, script, status_of

import runtime
import train
from ranks import distributed, find_device
from run import locked_folder
from runtime import InputError


def test_exit_status_and_one_line(street, tmp_path):
    for args in (
        ("train.py", "--data", "folder", "--root", tmp_path / "none"),
        ("train.py", "--crop", "x"),
        ("evaluate.py", tmp_path / "none.pt"),
    ):
        status, _, err = script(*args)
        assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "a"}, "RANK='a'"),
        ({"WORLD_SIZE": "2"}, "start with torchrun"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "start with torchrun"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"},
            "MASTER_PORT='abc'",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "RANK='2'"),
    ],
    ids=str,
)
def test_an_environment_that_is_not_torchruns(monkeypatch, environment, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words), distributed():
        pass


@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_cannot_be_written_is_no_traceback(run_folder, monkeypatch, buffered):
    """A full disk behind standard output: status 1 and a line; a closed standard error: nobody
    hears, the result is the same.
    """
    command = [sys.executable, str(ROOT / "evaluate.py"), str(run_folder / "best.pt")]
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)  # empty: as if unset, the usual case
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1] == "evaluate.py: [Errno 28] No space left on device"
    ), done.stderr
    done = subprocess.run(
        f"{shlex.join(command)} --json 2>&-",
        shell=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and "miou" in json.loads(done.stdout.splitlines()[-1])


def test_names_that_the_output_cannot_print_end_nothing(street, tmp_path):
    shutil.copytree(street, tmp_path / "d")
    (tmp_path / "d" / "classes.txt").write_text("stra\u00dfe\ngreen\nblue\n", encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "check.py"),
            "--data",
            "folder",
            "--root",
            str(tmp_path / "d"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=100,
    )
    assert (
        done.returncode == 0 and "stra\\xdfe" in done.stdout and not done.stderr.count("Traceback")
    ), done.stderr


def test_what_only_rank_0_meets_is_one_line_on_every_rank(street, tmp_path):
    (tmp_path / "file").write_text("")
    for flags in (["--weights", "/nowhere.pth"], ["--out", tmp_path / "file"]):
        status, text = ranks(
            2,
            train.main,
            *TINY,
            "--root",
            street,
            "--out",
            tmp_path / "r",
            *flags,
            said=tmp_path / "said",
        )
        assert (
            status == [2, 2]
            and all(len(t.splitlines()) == 1 for t in text)
            and "rank 1: stopped" in text[1]
        ), text


def test_ctrl_c_is_no_traceback(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert status_of(interrupted) == 130 and not capsys.readouterr().err


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    seen = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: seen.append(
            [p.read_bytes() for p in (*tmp_path.glob("x.*.part"), tmp_path / "x")]
        ),
    )
    runtime.write(tmp_path / "x", lambda f: f.write(b"new"))
    assert seen == [[b"new", b"old"]] and (tmp_path / "x").read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError):
        runtime.write(tmp_path / "x", lambda f: f.write(b"half") / 0)
    assert (tmp_path / "x").read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_a_planted_link_beside_a_file_is_not_followed(tmp_path, monkeypatch):
    """Neither by a write nor by the lock of a run; a pipe in its place blocks nothing."""
    (tmp_path / "mine").write_text("precious")
    monkeypatch.setattr(runtime.secrets, "token_hex", lambda n: "0" * 8)
    (tmp_path / "x.00000000.part").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        runtime.write(tmp_path / "x", lambda f: f.write(b"new"))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="--out"), locked_folder(tmp_path / "r"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"
    (tmp_path / "r" / ".lock").unlink()
    os.mkfifo(tmp_path / "r" / ".lock")
    with locked_folder(tmp_path / "r"):
        pass


def test_a_system_without_fcntl_resource_and_some_signals(street, tmp_path):
    """As Windows is: everything imports, and an epoch is trained, scored and predicted."""
    code = f"""
        import signal, sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        for name in ("fcntl", "resource"):
            sys.modules[name] = None
        for name in ("SIGUSR1", "SIGHUP"):
            delattr(signal, name)
        import dnl, evaluate, predict, train
        flags = {[*TINY, "--root", str(street), "--out", "r", "--epochs", "1"]!r}
        assert train.main(flags) == 0
        assert evaluate.main(["r/last.pt", "--workers", "0"]) == 0
        images = {str(street / "images" / "val")!r}
        assert predict.main(["r/last.pt", images, "--workers", "0", "--out", "masks"]) == 0
    """
    done = run_python(textwrap.dedent(code), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "masks" / "0.png").exists()


@pytest.mark.parametrize(
    "asked, words",
    [
        ("cuda", "not on this machine"),
        ("cuda:7", "not on this machine"),
        ("mps", "not on this machine"),
        ("tpu", "expected auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_a_device_that_is_not_there_is_a_line(asked, words):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(InputError, match=f"--device {asked}: {words}"):
        find_device(asked)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


def test_a_rank_gives_up_one_that_hangs(tmp_path):
    """Within the timeout, here 2 s in place of 10 minutes; torchrun then ends the others."""

    def main(argv):
        with distributed(timeout=timedelta(seconds=2)) as (rank, _, _):
            time.sleep(200 * rank)
            torch.distributed.all_reduce(torch.ones(1))

    port = free_port()
    waiting, hanging = (
        forked(main, said=tmp_path / f"said{r}", rank=r, world=2, port=port) for r in (0, 1)
    )
    waiting.join(100)
    ended = waiting.exitcode, hanging.exitcode
    for process in (waiting, hanging):
        process.kill()
        process.join()
    assert ended[0] not in (0, None) and ended[1] is None
