"""train.py: schedule, losses, flags and settings, one step on one rank and several, what goes
beyond the paper.
"""

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, ROOT, TINY, batches, free_port, gap, ranks, run_python, same_run, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import check
import data
import dnl
import evaluate
import recipe
import train
from data import IGNORE
from ranks import sum_over_ranks
from run import Run, start_run, wrap_network
from runtime import InputError


def test_poly_schedule():
    assert [recipe.rate(s, 4, 1.0) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert recipe.rate(30, 100) == pytest.approx(0.7**0.9)
    assert [recipe.rate(s, 10**9, 0.9, 3) for s in range(5)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1]
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_plain_cross_entropy(weighted):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, dtype=torch.double, requires_grad=True)
    label = torch.randint(0, 4, (3, 17, 23)).byte()
    label[0, :9] = label[2] = 255
    weight = torch.rand(4, dtype=torch.double) + 0.5 if weighted else None
    labelled = (
        float(weight[label[label < 255].long()].sum()) if weighted else float((label < 255).sum())
    )
    ours = recipe.losses([logits], label, labelled, weight)[0]
    whole = torch.nn.functional.interpolate(logits, (17, 23), mode="bilinear", align_corners=True)
    plain = torch.nn.functional.cross_entropy(whole, label.long(), weight, ignore_index=255)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    g, h = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, plain))
    assert (g - h).abs().max() < 1e-14
    assert (
        recipe.losses([logits], torch.full_like(label, 255), 0.0)[0] == 0
    )  # nothing labelled: no NaN


def test_loss_keeps_one_image_of_logits():
    """A batch of 8 must not hold 8 full-size copies: nothing saved for the backward has their
    size.
    """
    logits, label = (
        torch.randn(8, 5, 4, 4, requires_grad=True),
        torch.randint(0, 5, (8, 64, 64)).byte(),
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        recipe.pixel_losses(logits, label).sum().backward()
    assert sum(saved) < 2 * 5 * 64 * 64


def test_hardest_pixels():
    rng = np.random.default_rng(0)
    p = rng.random((2, 20, 30))  # of the true class
    for at_least in (10, 300, 900, 10**6):
        hard = recipe.ohem_mask(torch.from_numpy(-np.log(p)), 0.7, at_least).numpy()
        enough = (p < 0.7).sum() >= at_least
        expected = p < 0.7 if enough else p <= np.sort(p.ravel())[min(at_least, p.size) - 1]
        assert (hard == expected).all()
    ignored = torch.zeros(1, 4, 4)
    assert not recipe.ohem_mask(ignored, 0.7, 3).any()


def gradients(rank, world, port, dtype, accumulate, out):
    """The gradient of one step over `world` gloo ranks, BatchNorm in eval mode, ignored pixels
    spread unevenly.
    """
    if world > 1:
        torch.set_num_threads(1)  # a process of its own
        torch.distributed.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    torch.manual_seed(0)
    net = dnl.build(replace(dnl.PAPER, num_classes=3, backbone="resnet18", channels=8)).to(dtype)
    torch.nn.init.constant_(net.context.gamma, 0.5)
    set_train = recipe.set_mode(net, False)
    for m in set_train.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    net.register_forward_pre_hook(lambda m, a: (a[0].to(dtype), *a[1:]))
    kept = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            kept.update({k: p.grad.clone() for k, p in net.named_parameters()})

    args = argparse.Namespace(
        **vars(
            recipe.parse_training(
                ["--batch", "4", "--accumulate", str(accumulate), "--amp", "off"], 1
            )
        )
    )
    optimizer = Keep([{"params": list(net.parameters()), "factor": 1.0}], 0.1)
    dataset = data.open_dataset("synthetic", None, "train")
    run = Run(
        args=args,
        data=dataset,
        val=dataset,
        net=net,
        model=net,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        loss_weights=torch.ones(3),
        sums=torch.zeros(3, dtype=torch.float64),
    )
    wrap_network(run)
    g = torch.Generator().manual_seed(1)
    images, labels = (
        torch.randint(0, 256, (4, 3, 40, 40), generator=g).byte(),
        torch.randint(0, 3, (4, 40, 40), generator=g).byte(),
    )
    labels[0], labels[1, 5:], labels[3, :, 3:] = 255, 255, 255
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    batch = [images[own], labels[own], torch.tensor([[1.1, 0.9, 1.2, 0.02]]).repeat(4, 1)[own]]
    labelled = sum_over_ranks([train.pixel_weights(run, batch[1]).sum()])[0]
    share = train.train_step(run, batch, labelled)
    if rank == 0:
        torch.save([kept, share], out)
    if world > 1:
        time.sleep(0.1)  # as in distributed
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.double, 1e-10)])
def test_ranks_and_parts_have_the_gradient_of_one(tmp_path, dtype, bound):
    one = tmp_path / "one"
    gradients(0, 1, 0, dtype, 1, one)
    reference, _ = torch.load(one)
    for world, accumulate in ((2, 1),) if dtype is torch.float32 else ((1, 2), (2, 2)):
        other = tmp_path / f"{world}-{accumulate}"
        if world == 1:
            gradients(0, 1, 0, dtype, accumulate, other)
        else:
            torch.multiprocessing.start_processes(
                gradients,
                (world, free_port(), dtype, accumulate, other),
                world,
                start_method="fork",
            )
        got, _ = torch.load(other)
        norm = torch.cat([g.flatten() for g in reference.values()]).norm()
        assert (
            torch.cat([(got[k] - g).flatten() for k, g in reference.items()]).norm() / norm < bound
        )
        assert norm > 0.1


BAD = {  # flags: what the one line must hold
    "--batch 3 --accumulate 2": "multiple of 2",
    "--batch 1 --context paper.peers:ppm": "BatchNorm",
    "--batch 4 --accumulate 4 --crop 16": "BatchNorm",
    "--batch 64": "got 12 images for a batch of 64",
    "--backbone resnet19": "invalid choice",
    "--epochs 0": "expected 1 or more",
    "--scale 2 1": "MIN <= MAX",
    "--context nowhere:thing": "MODULE:FACTORY",
    "--context else": "expected dnl, nl, none, or MODULE:FACTORY",
    "--no-gr --coarse-weight 1": "needs GR",
    "--p-from res3 --coarse-weight 1": "needs GR with P from the feature",
    "--p-from res3 --no-gr": "for --context dnl with GR",
    "--p-from res3 --context nl": "for --context dnl with GR",
    "--p-from res2": "invalid choice: 'res2'",
    "--weights /nowhere.pth": "--weights /nowhere.pth: no such file",
    "--class-weights /nowhere.json": "/nowhere.json",
    "--resume /nowhere.pt": "/nowhere.pt",
    "--weights imagenet --preset released": "plain stem",
    "--weights README.md": "--weights README.md: not a file of weights (",
    "--seed -1": "0 or more",
    "--ema 1": "below 1",
    "--compile --recompute": "leave one out",
    "--context nl --no-gr": "leave them out",
    "--lr 1e39": "expected 0 or more, up to 1000000000",
    "--crop 100000": "up to 8192",
    "--scale 1 1e300": "MAX <= 100",
    "--context math:pi": "cannot be called",
    "--context math:gcd": "its factory returned int",
    "--context .a:b": "MODULE:FACTORY",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_cannot_be_trained_is_one_line(street, tmp_path, flags):
    with pytest.raises(InputError) as e:
        trained(tmp_path / "r", street, *flags.split())
    assert BAD[flags] in str(e.value) and "\n" not in str(e.value)


def test_notes_where_the_papers_recipe_is_left():
    told = recipe.recipe_warnings(
        recipe.parse_training(["--data", "cityscapes", "--batch", "4"], 1)
    )
    assert len(told) == 2 and "8" in told[0] and "imagenet" in told[1]
    assert not recipe.recipe_warnings(
        recipe.parse_training(["--data", "ade20k", "--weights", "imagenet"], 1)
    )


def test_other_settings_are_refused_by_name(run_folder, street):
    with pytest.raises(InputError, match=r"momentum 0.9 -> 0.5.*--out"):
        trained(run_folder, street, "--momentum", 0.5)


def test_loss_that_is_not_finite(street, tmp_path, monkeypatch, stub):
    """Step 4's images are made infinite: the run stops and names them, and the checkpoint of step 3
    stays.
    """
    normal = train.part_losses

    def broken(run, x, y, labelled):
        return normal(run, x * float("inf") if run.step == 3 else x, y, labelled)

    monkeypatch.setattr(train, "part_losses", broken)
    line = r"step 4, rank 0: the loss is not finite; images .*train/\d+\.png"
    with pytest.raises(InputError, match=line):
        trained(tmp_path / "r", street)
    saved = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    assert saved["step"] == 3 and all(t.isfinite().all() for t in saved["model"].values())


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--clip", "0.05", "--backbone-lr", "0.5", "--warmup", "3", "--freeze-bn"],
        ["--class-weights", "w.json"],
    ],
    ids=["paper", "beyond", "weighted"],
)
def test_two_steps_are_eq_5_by_plain_sgd(street, tmp_path, monkeypatch, stub, flags):
    """Against the formulas: cross-entropy + 0.3 * (res2, res3), momentum, weight decay, poly rate;
    jitter as its own test has it.
    """
    monkeypatch.chdir(tmp_path)
    Path("w.json").write_text(
        json.dumps(
            {"classes": ["red", "green", "blue"], "splits": {"train": {"weights": [0.5, 1.0, 2.0]}}}
        )
    )
    args = recipe.parse_training(
        [*TINY, "--root", str(street), "--aux-weight", "0.3", "--weight-decay", "0.1", *flags], 1
    )
    run = start_run(args, 0, 1, torch.device("cpu"))
    recipe.set_mode(run.net, args.freeze_bn)
    net, momenta = deepcopy(run.net), {}
    weight = torch.tensor([0.5, 1.0, 2.0]) if "--class-weights" in flags else None
    for step, batch in enumerate(batches(run.data, batch=4, stop=2, crop=48)):
        x, y, factors = batch
        parts = [
            F.cross_entropy(o, y.long(), weight, ignore_index=IGNORE)
            for o in net(data.normalize(data.color_jitter(x, factors)))
        ]
        net.zero_grad()
        (parts[0] + 0.3 * (parts[1] + parts[2])).backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert norm > 0.05  # else nothing is clipped
        rate = 0.01 * (1 - step / 6) ** 0.9 * ((step + 1) / 4 if "--warmup" in flags else 1)
        with torch.no_grad():
            for name, p in net.named_parameters():
                g = p.grad * (0.05 / norm if "--clip" in flags else 1) + 0.1 * p
                momenta[name] = 0.9 * momenta.get(name, 0) + g
                p -= (
                    rate
                    * (0.5 if "--backbone-lr" in flags and name.startswith("backbone.") else 1)
                    * momenta[name]
                )
        share = train.train_step(run, batch, train.pixel_weights(run, y).sum().item())
        run.step += 1
        assert torch.equal(run.net.backbone.bn.running_mean, torch.zeros(8)) == args.freeze_bn
        assert gap([share], [torch.stack(parts).detach()]) < 1e-6
        assert gap(run.net.state_dict().values(), net.state_dict().values()) < 1e-6


def weights_file(folder):
    """What --class-weights takes, of the three classes of `street`."""
    weights = {"train": {"weights": [0.5, 1.0, 2.0]}}
    text = json.dumps({"classes": ["red", "green", "blue"], "splits": weights})
    (folder / "w.json").write_text(text)
    return folder / "w.json"


class NoDouble(TorchDispatchMode):
    """Fails on any operation with a float64 tensor: Apple's GPUs have none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            assert getattr(value, "dtype", None) != torch.float64, func
        return out


def test_the_device_computes_nothing_in_float64(street, tmp_path, stub):
    flags = [*TINY, "--root", street, "--ohem", "--ema", "0.9", "--clip", "1", "--accumulate", 2]
    flags += ["--coarse-weight", 1, "--class-weights", weights_file(tmp_path)]
    run = start_run(recipe.parse_training([*map(str, flags)], 1), 0, 1, CPU)
    batch = next(iter(batches(run.data, batch=4, stop=1, crop=48, seed=1)))
    with NoDouble():
        train.train_step(run, batch, 4 * 48 * 48.0)
        evaluate.evaluate(run.net, run.val, device=CPU, scales=(1.0, 0.5), flip=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_ohem_is_the_mean_over_the_hard_pixels_of_all_ranks(
    street, tmp_path, monkeypatch, stub, weighted
):
    """Two ranks print the loss of one, which is the mean of the pixels of a loss above 1, weighted
    where weights are given.
    """
    monkeypatch.setattr(recipe, "ohem_mask", lambda pixels: pixels > 1)
    flags = [*TINY, "--root", street, "--ohem", "--seed", 1]
    if weighted:
        flags += ["--class-weights", weights_file(tmp_path)]
    run = start_run(recipe.parse_training([*map(str, flags)], 1), 0, 1, torch.device("cpu"))
    x, y, factors = next(iter(batches(run.data, batch=4, stop=1, crop=48, seed=1)))
    with torch.no_grad():
        logits = deepcopy(run.net).eval()(data.normalize(data.color_jitter(x, factors)))
        monkeypatch.setattr(run, "model", lambda x, full_size: [logits] * 3)
        ours = train.part_losses(run, x, y, train.pixel_weights(run, y).sum().item())[0]
    plain = F.cross_entropy(logits, y.long(), ignore_index=IGNORE, reduction="none")
    weight = (
        torch.tensor([0.5, 1.0, 2.0])[y.long().clamp(max=2)] if weighted else torch.ones(y.shape)
    )
    assert 0.05 < (plain > 1).float().mean() < 0.95
    assert ours.item() == pytest.approx(
        ((plain * weight)[plain > 1].sum() / weight[plain > 1].sum()).item(), rel=1e-5
    )
    texts = [
        ranks(world, train.main, *flags, "--out", tmp_path / f"r{world}", said=tmp_path / "said")[
            1
        ][0]
        for world in (1, 2)
    ]
    first = [float(re.search("step 1/6  loss ([0-9.]+)", text)[1]) for text in texts]
    assert first[0] == pytest.approx(first[1], rel=0.05)  # BatchNorm sees other halves


def test_every_rank_scores_with_the_statistics_of_rank_0(street, tmp_path, monkeypatch, stub):
    evaluation = evaluate.evaluate
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda net, *a, **k: (
            print("bn", net.backbone.bn.running_mean.tolist()) or evaluation(net, *a, **k)
        ),
    )
    status, texts = ranks(
        2, train.main, *TINY, "--root", street, "--out", tmp_path / "r", said=tmp_path / "said"
    )
    lines = [re.findall("bn .*", text) for text in texts]
    assert status == [0, 0] and len(lines[0]) == 2 and lines[0] == lines[1], texts


def test_beyond_the_paper(street, tmp_path):
    """Every extra at once trains, and is recorded; a weights file is what check prints."""
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps(check.check("folder", street)))
    flags = (
        "--ohem",
        "--class-weights",
        weights,
        "--ema",
        0.5,
        "--clip",
        1,
        "--warmup",
        2,
        "--backbone-lr",
        0.1,
        "--freeze-bn",
        "--recompute",
        "--coarse-weight",
        0.4,
        "--accumulate",
        2,
        "--deterministic",
    )
    try:
        assert trained(tmp_path / "r", street, *flags) == 0
        weights.write_text(re.sub('"weights": .[0-9.]+', '"weights": [1.5', weights.read_text()))
        with pytest.raises(InputError, match="class_weights"):  # of the same name
            trained(tmp_path / "r", street, *flags)
    finally:
        torch.use_deterministic_algorithms(False)
    settings, *epochs = map(json.loads, (tmp_path / "r" / "log.jsonl").read_text().splitlines())
    assert (
        settings["settings"]["ohem"]
        and settings["settings"]["clip"] == 1
        and "ema_miou" in epochs[-1]
        and "loss_p" in epochs[-1]
    )
    ema = torch.load(tmp_path / "r" / "ema.pt", weights_only=True)
    assert not torch.equal(
        ema["model"]["head.4.weight"],
        torch.load(tmp_path / "r" / "last.pt", weights_only=True)["model"]["head.4.weight"],
    )
    assert evaluate.main([str(tmp_path / "r" / "ema.pt")]) == 0
    with pytest.raises(
        InputError, match="averaged True -> None"
    ):  # its momenta are of other weights
        trained(tmp_path / "s", street, "--resume", tmp_path / "r" / "ema.pt")


def test_ema_is_the_average():
    torch.manual_seed(0)
    net, mean = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    expected = mean.weight.detach().clone()
    for _ in range(3):
        torch.nn.init.normal_(net.weight)
        train.update_ema(mean, net, 0.75)
        expected = 0.75 * expected + 0.25 * net.weight.detach()
    assert torch.allclose(mean.weight, expected)


def test_a_context_may_have_a_vector_named_gamma(street, tmp_path, monkeypatch):
    (tmp_path / "layer_scale.py").write_text("""import torch
class Scale(torch.nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(channels, 1, 1))
    def forward(self, x):
        return x * self.gamma
""")
    monkeypatch.chdir(tmp_path)
    assert trained(tmp_path / "r", street, "--context", "layer_scale:Scale") == 0


def test_the_rank_whose_loss_is_not_finite_is_told(street, tmp_path, monkeypatch, stub):
    """Two ranks; rank 1's images of each step are infinite: the files named are its own."""
    normal = train.part_losses
    monkeypatch.setattr(
        train,
        "part_losses",
        lambda run, x, *rest: normal(run, x * (float("inf") if run.rank else 1), *rest),
    )
    status, texts = ranks(
        2,
        train.main,
        *TINY,
        "--root",
        street,
        "--out",
        tmp_path / "r",
        said=tmp_path / "said",
    )
    assert status == [2, 2] and "step 1, rank 1: the loss is not finite; images" in texts[1], texts
    assert (
        "rank 0: stopped, because another rank cannot go on" in texts[0]
        and "images/train" not in texts[0]
    ), texts


def test_other_images_of_the_same_number_are_other_settings(run_folder, street, tmp_path):
    root = tmp_path / "street"
    shutil.copytree(street, root)
    for kind in ("images", "labels"):
        os.replace(root / kind / "train" / "3.png", root / kind / "train" / "new.png")
    shutil.copytree(run_folder, tmp_path / "r")
    with pytest.raises(InputError, match=r"names [0-9a-f]{8} -> [0-9a-f]{8}"):
        trained(tmp_path / "r", root)


def test_tensorboard_is_imported_only_when_asked(street, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert trained(tmp_path / "r", street, "--epochs", 1) == 0
    with pytest.raises(InputError, match="pip install tensorboard"):
        trained(tmp_path / "s", street, "--tensorboard")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "full", [(), ("add_scalar",), ("__init__",), ("close",), ("add_scalar", "close")], ids=str
)
def test_tensorboard_gets_the_log_and_its_full_disk_stops_nothing(
    street, tmp_path, monkeypatch, capsys, stub, full
):
    values, pictures = {}, []

    class Writer:  # in the place of TensorBoard's
        def __init__(self, folder, purge_step):
            assert purge_step == 1  # what was drawn at the checkpoint's step, 0 here, stays
            if "__init__" in full:
                raise OSError(28, "No space left on device")

        def add_scalar(self, name, value, step):
            if "add_scalar" in full:
                raise OSError(28, "No space left on device")
            values[name, step] = value

        def add_image(self, name, picture, step, dataformats):
            pictures.append((name, picture.shape[2], step))

        def close(self):
            if "close" in full:
                raise OSError(28, "No space left on device")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", argparse.Namespace(SummaryWriter=Writer)
    )
    assert trained(tmp_path / "r", street, "--tensorboard", "--ema", 0.5) == 0
    assert capsys.readouterr().err.count("warning: TensorBoard's file not written") == bool(full)
    assert trained(tmp_path / "s", street, "--ema", 0.5) == 0 and same_run(
        tmp_path / "r", tmp_path / "s"
    )
    if not full:
        line = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
        names = ("loss", "loss_res2", "loss_res3", "lr", "miou", "accuracy", "ema_miou")
        assert {n: values[n, 6] for n in names} == {n: line[n] for n in names}
        assert {n: values[f"iou/{n}", 6] for n in line["iou"]} == line["iou"] and (
            "gamma",
            6,
        ) in values
        assert len([n for n, step in values if n == "step/loss"]) == 6 and pictures == [
            ("val", 3, 3),
            ("val", 3, 6),
        ]


@pytest.mark.slow
def test_resnet101_at_the_papers_sizes_within_20_gib():
    """A forward of 1024 x 2048 and 1025 x 511, and a training step of 2 x 768 x 768, in a process
    of their own.
    """
    done = run_python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})"
        + textwrap.dedent("""
        import resource, torch, torch.nn.functional as F
        from dnl import PAPER, build
        last = dict(memory_format=torch.channels_last)  # as in training: half the time
        net = build(PAPER).to(**last)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
        with torch.autocast("cpu", torch.bfloat16):
            label = torch.randint(0, 19, (2, 768, 768))
            outputs = net(torch.randn(2, 3, 768, 768).to(**last))
            loss = sum(F.cross_entropy(o.float(), label) for o in outputs)
            loss.backward()
            optimizer.step()
            net.eval()
            with torch.inference_mode():
                sizes = ((1024, 2048), (1025, 511))
                shapes = [tuple(net(torch.randn(1, 3, *s).to(**last)).shape) for s in sizes]
        ok = loss.isfinite().item() and shapes == [(1, 19, 1024, 2048), (1, 19, 1025, 511)]
        print(ok, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    """),
        ROOT,
    )
    assert done.returncode == 0, done.stderr
    ok, peak = done.stdout.split()
    assert ok == "True" and float(peak) < 20  # GiB


def test_p_from_at_its_default_is_the_run_without_it():
    for preset, own, other in (("paper", "feature", "res3"), ("released", "res3", "feature")):
        parsed = [
            recipe.parse_training(["--preset", preset, "--p-from", name], 1)
            for name in (own, other)
        ]
        assert [args.p_from for args in parsed] == [None, other]
        assert [recipe.configuration(a, 5).p_from for a in parsed] == [own, other]
