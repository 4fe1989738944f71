"""Checkpoints: what reads them, and what is refused."""

import codecs
import json
import os
import shutil
import signal
import textwrap
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    TINY,
    Stub,
    make_street,
    predicted,
    run_python,
    same_state,
    script,
    trained,
)
from PIL import Image

import checkpoint
import dnl
import evaluate
import hubconf
import recipe
import train
from data import IGNORE
from dnl import PAPER, RELEASED, build
from resume import restore
from run import fill_backbone, start_run
from runtime import InputError

SMALL = {"backbone": "resnet18", "channels": 16, "num_classes": 5}


def test_the_backbone_of_a_checkpoint_loads(run_folder, street, tmp_path):
    """Fine-tuning: the network of another training, whatever its classes, lends its backbone."""
    args = recipe.parse_training(
        [*TINY, "--root", str(street), "--weights", str(run_folder / "last.pt")], 1
    )
    net, state = (
        build(replace(PAPER, **SMALL)),
        torch.load(run_folder / "last.pt", weights_only=True)["model"],
    )
    fill_backbone(net, args)
    assert all(torch.equal(t, state[f"backbone.{k}"]) for k, t in net.backbone.state_dict().items())
    args.backbone = "resnet34"
    with pytest.raises(
        InputError,
        match=r"last\.pt: this is a resnet18, expected a resnet34",
    ):
        fill_backbone(build(replace(PAPER, **SMALL | {"backbone": "resnet34"})), args)


def test_torch_hub_lists_explains_and_loads(run_folder, tmp_path):
    """From a folder, and from hub's copy of a repository, which is put there first so that nothing
    is downloaded.
    """
    (tmp_path / "someone_dnl_main").symlink_to(ROOT)
    done = run_python(
        textwrap.dedent(f"""
        import torch
        torch.hub.set_dir({str(tmp_path)!r})
        folder, copy = {str(ROOT)!r}, "someone/dnl:main"
        trust = dict(trust_repo=True, skip_validation=True)
        small = dict(source="local", num_classes=5, preset="released", backbone="resnet18")
        print(torch.hub.list(copy, verbose=False, **trust))
        print("A whole network" in torch.hub.help(copy, "network", **trust))
        print(torch.hub.load(folder, "network", **small).config)
        block = torch.hub.load(folder, "DenoisedNonLocal", 16, 5, source="local")
        print(block(torch.ones(1, 16, 3, 4)).shape)
        path = {str(run_folder / "best.pt")!r}
        net = torch.hub.load(copy, "trained", path, verbose=False, **trust)
        torch.save([net.training, net.state_dict()], "trained.pt")
    """),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['DenoisedNonLocal', 'network', 'trained']",
        "True",
        str(replace(RELEASED, num_classes=5, backbone="resnet18")),
        "torch.Size([1, 16, 3, 4])",
    ]
    training, state = torch.load(tmp_path / "trained.pt")
    saved = torch.load(run_folder / "best.pt")["model"]
    assert (
        not training
        and state.keys() == saved.keys()
        and all(torch.equal(t, saved[k]) for k, t in state.items())
    )
    with pytest.raises(ValueError, match="preset 'mine': expected paper or released"):
        hubconf.network(preset="mine")


def test_own_context_is_named_again(street, tmp_path):
    flags = ("--context", "paper.peers:nl", "--epochs", 1)
    assert trained(tmp_path / "r", street, *flags) == 0
    checkpoint = str(tmp_path / "r" / "last.pt")
    with pytest.raises(InputError, match="give the flag again"):
        evaluate.main([checkpoint])
    assert evaluate.main([checkpoint, "--context", "paper.peers:nl"]) == 0


def test_malicious_pickle_does_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"version": 1, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt"):
        checkpoint.read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


def test_an_ordered_dict_whose_attributes_hide_methods_is_a_plain_one(run_folder, tmp_path):
    state = OrderedDict(torch.load(run_folder / "best.pt", weights_only=True))
    state.get = state.keys = 1
    torch.save(state, tmp_path / "x.pt")
    _, read = checkpoint.load_network(tmp_path / "x.pt", "cpu")
    assert type(read) is dict and same_state(tmp_path / "x.pt", run_folder / "best.pt")


def test_a_pickle_that_names_a_codec_is_refused_at_once(tmp_path):
    """torch.load allows _codecs.encode, and punycode takes minutes for 30,000 letters."""

    class Slow:
        def __reduce__(self):
            return codecs.encode, (
                "\u4e00" * 10 + "".join(map(chr, range(20_000, 50_000))),
                "punycode",
            )

    torch.save({"version": 1, "model": Slow()}, tmp_path / "slow.pt")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"slow\.pt: not a readable checkpoint"):
        checkpoint.read_checkpoint(tmp_path / "slow.pt")
    assert time.monotonic() - start < 5


def test_damaged_checkpoint_falls_back_to_the_previous(run_folder, street, tmp_path, capsys):
    out = tmp_path / "r"
    shutil.copytree(run_folder, out)
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert trained(out, street) == 0
    assert "going on from last.prev.pt" in capsys.readouterr().err
    assert same_state(out / "last.pt", run_folder / "last.pt")
    for at in np.random.default_rng(0).integers(
        0, len(whole), 10
    ):  # a flipped bit is noticed, or changes nothing
        flipped = bytearray(whole)
        flipped[at] ^= 4
        (tmp_path / "x.pt").write_bytes(flipped)
        try:
            checkpoint.read_checkpoint(tmp_path / "x.pt")
        except InputError:
            continue
        assert same_state(tmp_path / "x.pt", run_folder / "last.pt")


def test_broken_checkpoint_is_one_line(run_folder, tmp_path):
    whole = (run_folder / "best.pt").read_bytes()
    broken, other = tmp_path / "a\nname.pt", torch.load(run_folder / "best.pt", weights_only=True)
    for spoil in (
        lambda: broken.write_bytes(whole[:-100]),
        lambda: torch.save(other | {"classes": ["red"]}, broken),
        lambda: (broken.unlink(), os.mkfifo(broken)),
    ):
        spoil()
        status, out, err = script("evaluate.py", broken)
        assert status == 2 and not out and err.count("\n") == 1 and repr(str(broken)) in err, err


def broken_fields(state):
    """A checkpoint with one field changed into what no run writes."""
    yield from (
        {"step": 7},
        {"step": -1},
        {"step": 2.5},
        {"step": "6"},
        {"history": None},
        {"history": [1]},
        {"sums": torch.zeros(2, dtype=torch.float64)},
        {"sums": 0},
        {"optimizer": {}},
        {"optimizer": {"state": [1]}},
        {"model": {}},
        {"model": None},
        {"model": [1]},
        {"settings": None},
        {"scaler": 3},
        {"settings": []},
    )


def test_a_checkpoint_that_no_run_wrote_is_refused(run_folder, street, tmp_path):
    """By restore, in one line with the file's name; each case without its change goes on."""
    args = recipe.parse_training([*TINY, "--root", str(street), "--out", str(tmp_path / "r")], 1)
    run, whole = (
        start_run(args, 0, 1, CPU),
        torch.load(run_folder / "last.pt", weights_only=True),
    )
    args.out.mkdir()
    for change in broken_fields(whole):
        torch.save(whole | change, args.out / "last.pt")
        with pytest.raises(InputError, match=r"last\.pt") as e:
            restore(run)
        assert "\n" not in str(e.value), change
    torch.save(whole, args.out / "last.pt")
    restore(run)
    assert run.step == 6 and run.history == whole["history"]


VERSION_1, FLAGS_1 = (
    Path(__file__).parent / "version1.pt",
    ("--channels", 4, "--epochs", 12, "--lr", 0.3, "--eval-every", 4),
)


def write_version_1(folder):
    """How version1.pt was made, by torch 2.13 on a CPU: the stub trained on the street in a new
    `folder`, stopped after step 32 of 36. `PYTHONPATH=.:tests python -c "import pathlib,
    test_checkpoint as t; t.write_version_1(pathlib.Path('/tmp/version1'))"`
    """
    step = train.train_step

    def stopping(run, *rest):
        if run.step == 31:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dnl, "ResNet", Stub)
        patch.setattr(train, "train_step", stopping)
        assert (
            trained(folder / "run", make_street(folder / "street"), *FLAGS_1)
            == 128 + signal.SIGTERM
        )
    shutil.copy(folder / "run" / "last.pt", VERSION_1)


def test_a_checkpoint_of_version_1_still_loads(street, tmp_path, capsys, stub):
    """Written once, and read by all that comes after: scored, predicted with, trained on to its
    end, its backbone lent.
    """
    saved = torch.load(VERSION_1, weights_only=True)
    assert saved["version"] == 1 and saved["step"] == 32
    assert evaluate.main([str(VERSION_1), "--root", str(street), "--workers", "0", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (scores["miou"], scores["accuracy"]) == pytest.approx(
        (0.51165, 0.67694), abs=2e-3
    )  # of 7559 pixels a few are near a draw
    assert predicted(VERSION_1, street / "images" / "val", "--out", tmp_path / "masks") == 0
    truth, mask = (
        np.concatenate([np.asarray(Image.open(folder / f"{i}.png")).ravel() for i in range(5)])
        for folder in (street / "labels" / "val", tmp_path / "masks")
    )
    assert (truth == mask)[truth != IGNORE].mean() == pytest.approx(scores["accuracy"], abs=2e-3)
    capsys.readouterr()
    assert trained(tmp_path / "r", street, *FLAGS_1, "--resume", VERSION_1) == 0
    assert "version1.pt at step 32 of 36" in capsys.readouterr().out
    ended = checkpoint.read_checkpoint(tmp_path / "r" / "last.pt")
    assert (
        ended["step"] == 36
        and len(ended["history"]) == 12
        and ended["history"][:10] == saved["history"]
    )
    backbone = Stub("resnet18")
    dnl.load_backbone(backbone, "resnet18", str(VERSION_1))
    assert all(
        torch.equal(t, saved["model"][f"backbone.{k}"]) for k, t in backbone.state_dict().items()
    )
